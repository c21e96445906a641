use std::process::Command;

use super::*;
use crate::{
    ElementType, OverrideValue, prepare_libtpu_environment,
    testing::{LIBTPU, plugin_path},
};

/// One shard of a product whose partial sums are added up over `devices`.
fn matmul(devices: usize) -> String {
    let group: Vec<String> = (0..devices).map(|device| device.to_string()).collect();
    format!(
        r#"module @matmul attributes {{mhlo.num_partitions = {devices} : i32, mhlo.num_replicas = 1 : i32}} {{
  func.func public @main(%x: tensor<128x256xbf16>, %w: tensor<256x512xbf16>,
                         %acc: tensor<128x512xf32> {{tf.aliasing_output = 0 : i32}}) -> tensor<128x512xf32> {{
    %0 = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0]
      : (tensor<128x256xbf16>, tensor<256x512xbf16>) -> tensor<128x512xf32>
    %1 = "stablehlo.all_reduce"(%0) <{{
      channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>,
      replica_groups = dense<[[{}]]> : tensor<1x{devices}xi64>, use_global_device_ids
    }}> ({{
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %s = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %s : tensor<f32>
    }}) : (tensor<128x512xf32>) -> tensor<128x512xf32>
    %2 = stablehlo.add %1, %acc : tensor<128x512xf32>
    return %2 : tensor<128x512xf32>
  }}
}}"#,
        group.join(", ")
    )
}

/// In a process of its own: libtpu reads the environment, which must not change while other tests run.
#[test]
fn programs_compile_for_tpus_that_are_not_there() {
    let test = "topology::tests::libtpu_alone_in_its_process";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && log.contains("1 passed"), "{log}");
}

#[test]
#[ignore = "run by programs_compile_for_tpus_that_are_not_there"]
fn libtpu_alone_in_its_process() {
    // SAFETY: the only other thread of this process waits for this one.
    unsafe { prepare_libtpu_environment() };
    let plugin = Plugin::load(plugin_path(LIBTPU)).unwrap();

    for (name, count) in [("v6e:1x1", 1), ("v6e:2x2", 4)] {
        let topology = plugin.topology(name, &[]).unwrap();
        assert_eq!(topology.platform_name(), "tpu");
        assert_eq!(topology.devices().len(), count);
        let device = &topology.devices()[0];
        assert_eq!(device.kind, "TPU v6 lite");
        assert!(device.memory_limit().unwrap() > 30_000_000_000);

        let options = CompileOptions::partitioned(count as u32)
            .with("xla_tpu_enable_deduplicated_calls", OverrideValue::Bool(true));
        let executable = topology.compile(&matmul(count), &options).unwrap();
        assert_eq!(executable.num_partitions().unwrap(), count);
        assert_eq!(executable.output_types().unwrap(), [ElementType::F32]);
        assert_eq!(executable.output_dims().unwrap(), [[128, 512]]);
        let memory = executable.memory_stats().unwrap();
        let accumulator = 128 * 512 * 4;
        assert_eq!(memory.argument_bytes, 128 * 256 * 2 + 256 * 512 * 2 + accumulator);
        assert_eq!((memory.output_bytes, memory.alias_bytes), (accumulator, accumulator));
        assert!(memory.code_bytes > 0);
        let flops = executable.cost_analysis().unwrap()["flops"].as_float().unwrap();
        assert!(flops >= 2.0 * 128.0 * 256.0 * 512.0, "{flops}");
        assert!(!executable.serialize().unwrap().is_empty());
    }

    let topology = plugin.topology("v6e:1x1", &[]).unwrap();
    let error = topology.compile("module { nonsense }", &CompileOptions::default()).unwrap_err();
    assert!(error.to_string().contains("custom op 'nonsense' is unknown"), "{error}");
    assert!(plugin.topology("v6e:no", &[]).is_err());
}
