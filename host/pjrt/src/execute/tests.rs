use std::sync::mpsc;

use super::*;
use crate::{
    AlignedBytes, ElementType, OverrideValue,
    testing::{
        MULTIPLY_ADD, UPDATE_IN_PLACE, cpu_client, cpu_plugin, cpu_plugins, f32_buffer, f32_buffer_on, f32_bytes,
        read_f32,
    },
};

/// As `MULTIPLY_ADD`, as a printer writes it that knows no pretty forms.
const GENERIC: &str = r#"
"builtin.module"() <{sym_name = "multiply_add"}> ({
  "func.func"() <{function_type = (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>, sym_name = "main",
                  sym_visibility = "public"}> ({
  ^bb0(%x: tensor<4xf32>, %y: tensor<4xf32>):
    %0 = "stablehlo.multiply"(%x, %y) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %1 = "stablehlo.add"(%0, %x) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    "func.return"(%1) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} : () -> ()
"#;

const X: [f32; 4] = [1.0, 2.0, 3.0, 4.0];
const Y: [f32; 4] = [10.0, 20.0, 30.0, 40.0];

#[test]
fn programs_compute_in_both_forms_of_text() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        for text in [MULTIPLY_ADD, GENERIC] {
            let executable = client.compile(text, &CompileOptions::default()).unwrap();
            let result = executable.execute(&[&f32_buffer(&client, &X), &f32_buffer(&client, &Y)]).unwrap();
            result.done.wait().unwrap();
            assert!(result.done.is_ready());
            assert_eq!(read_f32(&result.outputs[0]), [11.0, 42.0, 93.0, 164.0]);
        }
    }
}

#[test]
fn programs_can_be_asked_what_they_are() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let loaded = client.compile(UPDATE_IN_PLACE, &CompileOptions::default()).unwrap();
        let executable: &Executable = &loaded;
        assert!(executable.name().unwrap().contains("update"));
        assert_eq!((executable.num_replicas().unwrap(), executable.num_partitions().unwrap()), (1, 1));
        assert_eq!((loaded.num_outputs(), loaded.devices().len()), (2, 1));
        assert_eq!(executable.output_types().unwrap(), [ElementType::F32, ElementType::F32]);
        assert_eq!(executable.output_dims().unwrap(), [vec![4], vec![]]);
        let memory = executable.memory_stats().unwrap();
        assert_eq!((memory.argument_bytes, memory.alias_bytes), (32, 16), "{plugin:?} {memory:?}");
        match executable.cost_analysis() {
            Ok(costs) => assert!(!costs.is_empty()),
            Err(error) => assert!(error.is_unsupported(), "{error}"),
        }
        match executable.fingerprint() {
            Ok(fingerprint) => assert!(!fingerprint.is_empty()),
            Err(error) => assert!(error.is_unsupported(), "{error}"),
        }
        loaded.delete().unwrap();
    }
}

#[test]
fn donated_arguments_are_updated_in_place_and_deleted() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(UPDATE_IN_PLACE, &CompileOptions::default()).unwrap();
        let mut state = f32_buffer(&client, &X);
        let step = f32_buffer(&client, &Y);
        let address = state.address().unwrap();
        for round in 1..=3 {
            let mut result = executable.execute(&[&state, &step]).unwrap();
            assert!(state.is_deleted().unwrap());
            assert!(!step.is_deleted().unwrap());
            assert!(executable.execute(&[&state, &step]).is_err());
            state = result.outputs.remove(0);
            assert_eq!(state.address().unwrap(), address, "{plugin:?}");
            assert_eq!(read_f32(&state)[0], 1.0 + 10.0 * round as f32);
        }
    }
}

#[test]
fn donated_arguments_may_still_be_on_their_way() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(UPDATE_IN_PLACE, &CompileOptions::default()).unwrap();
        let mut state = f32_buffer(&client, &X);
        let step = f32_buffer(&client, &Y);
        for _ in 0..100 {
            state = executable.execute(&[&state, &step]).unwrap().outputs.remove(0);
        }
        assert_eq!(read_f32(&state), [1001.0, 2002.0, 3003.0, 4004.0]);
    }
}

#[test]
fn threads_share_clients_and_programs() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(MULTIPLY_ADD, &CompileOptions::default()).unwrap();
        let y = f32_buffer(&client, &Y);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (client, executable, y) = (&client, &executable, &y);
                scope.spawn(move || {
                    for round in 0..25 {
                        let x = (thread * 25 + round) as f32;
                        let result = executable.execute(&[&f32_buffer(client, &[x; 4]), y]).unwrap();
                        assert_eq!(read_f32(&result.outputs[0]), Y.map(|y| x * y + x));
                    }
                });
            }
        });
    }
}

#[test]
fn arguments_can_be_exempt_from_donation() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(UPDATE_IN_PLACE, &CompileOptions::default()).unwrap();
        let (x, y) = (f32_buffer(&client, &X), f32_buffer(&client, &Y));
        let options = ExecuteOptions { non_donatable: &[0], ..ExecuteOptions::default() };
        let result = executable.execute_with(&[&[&x, &y]], &options).unwrap().remove(0);
        assert_eq!(read_f32(&result.outputs[0]), [11.0, 22.0, 33.0, 44.0]);
        assert_eq!(read_f32(&x), X);
    }
}

#[test]
fn memory_of_the_host_is_never_written_by_programs() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(UPDATE_IN_PLACE, &CompileOptions::default()).unwrap();
        let bytes = Arc::new(AlignedBytes::copy_of(&f32_bytes(&X)).unwrap());
        struct Shared(Arc<AlignedBytes>);
        impl AsRef<[u8]> for Shared {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let owner = Shared(Arc::clone(&bytes));
        let x = client.buffer_from_owned(owner, ElementType::F32, &[4], &client.devices().unwrap()[0]).unwrap();
        let result = executable.execute(&[&x, &f32_buffer(&client, &Y)]).unwrap();
        assert_eq!(read_f32(&result.outputs[0]), [11.0, 22.0, 33.0, 44.0]);
        assert_eq!(&bytes[..], f32_bytes(&X), "{plugin:?}");
    }
}

/// Takes long enough that nobody sees it finished by accident: 200 products of 256 x 256 matrices, one after another.
const SLOW: &str = r#"
module @slow attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%x: tensor<256x256xf32>) -> tensor<256x256xf32> {
    %zero = stablehlo.constant dense<0> : tensor<i32>
    %one = stablehlo.constant dense<1> : tensor<i32>
    %end = stablehlo.constant dense<200> : tensor<i32>
    %r:2 = stablehlo.while(%i = %zero, %y = %x) : tensor<i32>, tensor<256x256xf32>
    cond {
      %c = stablehlo.compare LT, %i, %end : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    } do {
      %n = stablehlo.add %i, %one : tensor<i32>
      %z = stablehlo.dot %y, %x : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
      stablehlo.return %n, %z : tensor<i32>, tensor<256x256xf32>
    }
    return %r#1 : tensor<256x256xf32>
  }
}
"#;

#[test]
fn events_and_callbacks_tell_when_a_program_is_done() {
    let client = cpu_client(&cpu_plugin(), 1);
    let executable = client.compile(SLOW, &CompileOptions::default()).unwrap();
    let mut identity = vec![0.0; 256 * 256];
    identity.iter_mut().step_by(257).for_each(|x| *x = 1.0);
    let device = &client.devices().unwrap()[0];
    let x = client.buffer_from_host(&f32_bytes(&identity), ElementType::F32, &[256, 256], device).unwrap();

    let result = executable.execute(&[&x]).unwrap();
    let copy = result.outputs[0].to_host().unwrap();
    let (told, when) = mpsc::channel();
    result.done.on_ready(move |outcome| told.send(outcome.is_ok()).unwrap()).unwrap();
    assert_eq!(when.recv(), Ok(true));
    assert!(result.done.is_ready());
    result.outputs[0].ready_event().unwrap().wait().unwrap();
    assert_eq!(copy.wait().unwrap(), f32_bytes(&identity));

    let (told, when) = mpsc::channel();
    result.done.on_ready(move |_| told.send(()).unwrap()).unwrap();
    when.try_recv().expect("the callback of a ready event runs at once");

    // Neither outputs nor events nor arguments need to be kept until the end.
    drop(executable.execute(&[&x]).unwrap());
    drop((x, executable));
}

#[test]
fn a_synchronous_client_is_done_when_execute_returns() {
    let options = [("cpu_device_count".to_owned(), 1.into()), ("asynchronous".to_owned(), false.into())];
    let client = Client::new(&cpu_plugin(), &options).unwrap();
    let executable = client.compile(MULTIPLY_ADD, &CompileOptions::default()).unwrap();
    let result = executable.execute(&[&f32_buffer(&client, &X), &f32_buffer(&client, &Y)]).unwrap();
    assert!(result.done.is_ready());
}

#[test]
fn serialized_programs_run_again() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let bytes = client.compile(MULTIPLY_ADD, &CompileOptions::default()).unwrap().serialize().unwrap();
        let again = cpu_client(&plugin, 1);
        let executable = again.deserialize(&bytes).unwrap();
        let result = executable.execute(&[&f32_buffer(&again, &X), &f32_buffer(&again, &Y)]).unwrap();
        assert_eq!(read_f32(&result.outputs[0]), [11.0, 42.0, 93.0, 164.0], "{plugin:?}");
        assert!(again.deserialize(b"no program").is_err());
    }
}

#[test]
fn compile_errors_carry_the_compilers_message() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let error = client.compile(&MULTIPLY_ADD.replace("%0, %x", "%0, %w"), &CompileOptions::default()).unwrap_err();
        assert!(error.to_string().contains("undeclared SSA value"), "{plugin:?}: {error}");
        let error = client.compile(MULTIPLY_ADD, &CompileOptions::default().with("no_such", OverrideValue::Bool(true)));
        assert!(error.unwrap_err().to_string().contains("no_such"));
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let client = cpu_client(&cpu_plugin(), 1);
    let executable = client.compile(MULTIPLY_ADD, &CompileOptions::default()).unwrap();
    let x = f32_buffer(&client, &X);
    assert!(executable.execute(&[&x]).is_err());
    assert!(executable.execute(&[&x, &f32_buffer(&client, &[1.0; 3])]).is_err());

    let other = cpu_client(&cpu_plugin(), 1);
    let error = executable.execute(&[&x, &f32_buffer(&other, &X)]).unwrap_err();
    assert!(error.to_string().contains("another client"), "{error}");
    let error = executable.execute_on_all(&[&[&x, &x], &[&x, &x]]).unwrap_err();
    assert!(error.to_string().contains("runs on 1 devices, but arguments are given for 2"), "{error}");
    let error = executable.execute_on_all(&[&[&x, &x], &[&x]]).unwrap_err();
    assert!(error.to_string().contains("same number of arguments"), "{error}");
}

/// One shard of four: the sum over all devices, and the device's own input.
const ALL_REDUCE: &str = r#"
module @shard attributes {mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%x: tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>) {
    %0 = "stablehlo.all_reduce"(%x) <{
      channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>,
      replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>,
      use_global_device_ids
    }> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %s = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %s : tensor<f32>
    }) : (tensor<4xf32>) -> tensor<4xf32>
    return %0, %x : tensor<4xf32>, tensor<4xf32>
  }
}
"#;

#[test]
fn partitions_sum_over_their_devices() {
    let client = cpu_client(&cpu_plugin(), 4);
    let executable = client.compile(ALL_REDUCE, &CompileOptions::partitioned(4)).unwrap();
    assert_eq!(executable.devices().len(), 4);
    let shards: Vec<_> =
        (0..4).map(|device| f32_buffer_on(&client, device, &X.map(|x| x * 10_f32.powi(device as i32)))).collect();
    let lists: Vec<_> = shards.iter().map(|shard| [shard]).collect();
    let lists: Vec<&[&Buffer]> = lists.iter().map(|list| list.as_slice()).collect();
    for _ in 0..3 {
        let results = executable.execute_on_all(&lists).unwrap();
        assert_eq!(results.len(), 4);
        for (device, result) in results.iter().enumerate() {
            result.done.wait().unwrap();
            assert_eq!(read_f32(&result.outputs[0]), [1111.0, 2222.0, 3333.0, 4444.0]);
            assert_eq!(read_f32(&result.outputs[1])[0], 10_f32.powi(device as i32));
        }
    }
}

#[test]
fn programs_run_on_the_devices_they_are_assigned() {
    let client = cpu_client(&cpu_plugin(), 3);
    let id = client.devices().unwrap()[2].id();
    let options = CompileOptions { device_ids: vec![i64::from(id)], ..CompileOptions::default() };
    let executable = client.compile(MULTIPLY_ADD, &options).unwrap();
    assert_eq!(executable.devices()[0].id(), id);
    let result = executable.execute(&[&f32_buffer_on(&client, 2, &X), &f32_buffer_on(&client, 2, &Y)]).unwrap();
    assert_eq!(read_f32(&result.outputs[0])[3], 164.0);
}
