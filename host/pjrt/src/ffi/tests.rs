use std::slice;

use super::*;
use crate::{
    Client, CompileOptions,
    testing::{cpu_client, cpu_plugins, f32_buffer, read_f32},
};

/// Doubles a vector of `f32`.
unsafe extern "C" fn double(frame: *mut CallFrame) -> *mut HandlerError {
    // SAFETY: registered with programs that pass one vector of f32 and take one of the same length.
    unsafe {
        answer(frame, |call| {
            let (x, y) = (call.arg(0).ok_or("no argument")?, call.ret(0).ok_or("no result")?);
            assert_eq!((x.element_type, x.dims), (11, y.dims));
            let len = x.dims[0] as usize;
            let x = slice::from_raw_parts(x.data.cast::<f32>(), len);
            let y = slice::from_raw_parts_mut(y.data.cast::<f32>(), len);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = 2.0 * x);
            Ok(())
        })
    }
}

unsafe extern "C" fn panics(frame: *mut CallFrame) -> *mut HandlerError {
    // SAFETY: touches no buffers.
    unsafe { answer(frame, |_| panic!("row {} is not to my liking", 3)) }
}

unsafe extern "C" fn fails(frame: *mut CallFrame) -> *mut HandlerError {
    // SAFETY: touches no buffers.
    unsafe { answer(frame, |_| Err("the scale is zero".to_owned())) }
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
        let handlers: [(&str, Handler); 3] =
            [("torus.test.double", double), ("torus.test.panics", panics), ("torus.test.fails", fails)];
        for (target, handler) in handlers {
            // SAFETY: the handlers above go through `answer`.
            unsafe { plugin.register_ffi_handler(target, "Host", handler) }.unwrap();
        }
        let client = cpu_client(&plugin, 1);
        assert_eq!(call(&client, "torus.test.double").unwrap(), [2.0, 4.0, 6.0], "{plugin:?}");
        let error = call(&client, "torus.test.panics").unwrap_err();
        assert!(error.to_string().contains("the handler panicked: row 3 is not to my liking"), "{error}");
        let error = call(&client, "torus.test.fails").unwrap_err();
        assert!(error.to_string().contains("the scale is zero"), "{error}");
        let error = call(&client, "torus.test.absent").unwrap_err();
        assert!(error.to_string().contains("torus.test.absent"), "{error}");
        assert_eq!(call(&client, "torus.test.double").unwrap(), [2.0, 4.0, 6.0]);
    }
}

#[test]
fn failures_of_handlers_reach_the_outputs() {
    for plugin in cpu_plugins() {
        // SAFETY: the handler goes through `answer`.
        unsafe { plugin.register_ffi_handler("torus.test.fails_late", "Host", fails) }.unwrap();
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
        // SAFETY: the handlers go through `answer`.
        unsafe {
            plugin.register_ffi_handler("torus.test.taken", "Host", double).unwrap();
            plugin.register_ffi_handler("torus.test.taken", "Host", double).unwrap();
            let error = plugin.register_ffi_handler("torus.test.taken", "Host", panics).unwrap_err();
            assert!(matches!(error, PjrtError::DuplicateHandler { .. }));
            assert!(error.to_string().contains("`torus.test.taken`"), "{error}");
        }
    }
}
