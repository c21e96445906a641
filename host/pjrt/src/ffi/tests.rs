use torus_abi::{
    fault::Fault,
    kernel::{Call, Entry, Kernel, KernelList},
};

use super::*;
use crate::{
    Client, CompileOptions,
    testing::{cpu_client, cpu_plugins, f32_buffer, read_f32},
};

struct Kernels;

impl KernelList for Kernels {
    const PLUGIN: &'static str = "mine";
    const ENTRIES: &'static [Entry] =
        &[Entry::new::<Self, Double>(), Entry::new::<Self, Panics>(), Entry::new::<Self, Fails>()];
}

/// Doubles a vector.
struct Double;

impl Kernel for Double {
    const NAME: &'static str = "double";

    fn call(call: &Call<'_>) -> std::result::Result<(), Fault> {
        let (x, mut y) = (call.argument::<f32>(0)?, call.result::<f32>(0)?);
        y.iter_mut().zip(x.iter()).for_each(|(y, x)| *y = 2.0 * x);
        Ok(())
    }
}

struct Panics;

impl Kernel for Panics {
    const NAME: &'static str = "panics";

    fn call(_: &Call<'_>) -> std::result::Result<(), Fault> {
        panic!("row {} is not to my liking", 3)
    }
}

struct Fails;

impl Kernel for Fails {
    const NAME: &'static str = "fails";

    fn call(_: &Call<'_>) -> std::result::Result<(), Fault> {
        Err(Fault::invalid("the scale is zero"))
    }
}

fn handler(name: &str) -> Handler {
    Kernels::ENTRIES.iter().find(|entry| entry.name == name).unwrap().handler
}

fn program(target: &str) -> String {
    format!(
        r#"module @call attributes {{mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32}} {{
  func.func public @main(%x: tensor<3xf32>) -> tensor<3xf32> {{
    %0 = stablehlo.custom_call @{target}(%x) {{api_version = 4 : i32}} : (tensor<3xf32>) -> tensor<3xf32>
    return %0 : tensor<3xf32>
  }}
}}"#
    )
}

/// The outcome of one run, wherever the error comes out.
fn call(client: &Client, target: &str) -> Result<Vec<f32>> {
    let executable = client.compile(&program(target), &CompileOptions::default())?;
    let result = executable.execute(&[&f32_buffer(client, &[1.0, 2.0, 3.0])])?;
    result.done.wait()?;
    Ok(read_f32(&result.outputs[0]))
}

#[test]
fn handlers_are_called_and_their_failures_become_errors() {
    for plugin in cpu_plugins() {
        for Entry { name, handler } in Kernels::ENTRIES {
            // SAFETY: they are the handlers of kernels.
            unsafe { plugin.register_ffi_handler(&format!("torus.test.{name}"), "Host", *handler) }.unwrap();
        }
        let client = cpu_client(&plugin, 1);
        assert_eq!(call(&client, "torus.test.double").unwrap(), [2.0, 4.0, 6.0], "{plugin:?}");
        let error = call(&client, "torus.test.panics").unwrap_err();
        assert!(
            error.to_string().contains("kernel 'panics' of plugin 'mine': it panicked: row 3 is not to my liking"),
            "{error}"
        );
        let error = call(&client, "torus.test.fails").unwrap_err();
        assert!(error.to_string().contains("kernel 'fails' of plugin 'mine': the scale is zero"), "{error}");
        let error = call(&client, "torus.test.absent").unwrap_err();
        assert!(error.to_string().contains("torus.test.absent"), "{error}");
        assert_eq!(call(&client, "torus.test.double").unwrap(), [2.0, 4.0, 6.0]);
    }
}

#[test]
fn failures_of_handlers_reach_the_outputs() {
    for plugin in cpu_plugins() {
        // SAFETY: it is the handler of a kernel.
        unsafe { plugin.register_ffi_handler("torus.test.fails_late", "Host", handler("fails")) }.unwrap();
        let client = cpu_client(&plugin, 1);
        let executable = client.compile(&program("torus.test.fails_late"), &CompileOptions::default()).unwrap();
        // Small programs may run within the call, so the error comes either at once or through the output.
        let outcome = executable
            .execute(&[&f32_buffer(&client, &[1.0, 2.0, 3.0])])
            .and_then(|result| result.outputs[0].to_host_vec());
        assert!(outcome.unwrap_err().to_string().contains("the scale is zero"));
    }
}

#[test]
fn a_name_belongs_to_its_first_handler() {
    for plugin in cpu_plugins() {
        // SAFETY: they are the handlers of kernels.
        unsafe {
            plugin.register_ffi_handler("torus.test.taken", "Host", handler("double")).unwrap();
            plugin.register_ffi_handler("torus.test.taken", "Host", handler("double")).unwrap();
            let error = plugin.register_ffi_handler("torus.test.taken", "Host", handler("panics")).unwrap_err();
            assert!(matches!(error, PjrtError::DuplicateHandler { .. }));
            assert!(error.to_string().contains("`torus.test.taken`"), "{error}");
        }
    }
}
