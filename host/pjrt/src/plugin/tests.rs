use std::fs;

use super::*;
use crate::testing::{cpu_plugins, plugin_path};

#[test]
fn a_file_is_loaded_once() {
    for plugin in cpu_plugins() {
        let again = Plugin::load(plugin.path()).unwrap();
        assert!(Arc::ptr_eq(&plugin, &again));
        let detour = plugin.path().parent().unwrap().join(".").join(plugin.path().file_name().unwrap());
        assert!(Arc::ptr_eq(&plugin, &Plugin::load(detour).unwrap()));
    }
}

#[test]
fn plugins_describe_themselves() {
    let plugins = cpu_plugins();
    let minors: Vec<_> = plugins.iter().map(|plugin| plugin.api_version().1).collect();
    assert_eq!(minors, [115, 106, 81]);
    for plugin in &plugins {
        let stablehlo = &plugin.attributes()["stablehlo_current_version"];
        assert!(matches!(stablehlo, OptionValue::Ints(version) if version.len() == 3), "{stablehlo:?}");
        assert!(plugin.extensions().contains(&pjrt_sys::PJRT_Extension_Type_PJRT_Extension_Type_FFI));
    }
}

#[test]
fn what_is_no_plugin_is_refused_with_its_reason() {
    let folder = std::env::temp_dir().join(format!("torus-pjrt-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();

    let missing = Plugin::load(folder.join("absent.so")).unwrap_err();
    assert!(matches!(&missing, PjrtError::PluginMissing { .. }), "{missing}");
    assert!(missing.to_string().contains("absent.so"), "{missing}");

    let text = folder.join("text.so");
    fs::write(&text, "not machine code\n").unwrap();
    let error = Plugin::load(&text).unwrap_err();
    assert!(matches!(&error, PjrtError::NotALibrary { .. }), "{error}");
    assert!(error.to_string().contains("too short") || error.to_string().contains("ELF"), "{error}");

    let folders = ["/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64", "/usr/lib", "/lib"];
    let libm = folders.iter().map(|folder| Path::new(folder).join("libm.so.6")).find(|path| path.exists());
    let error = Plugin::load(libm.expect("a C library lies in one of these folders")).unwrap_err();
    assert!(matches!(&error, PjrtError::NotAPlugin { .. }), "{error}");
    assert!(error.to_string().contains("GetPjrtApi"), "{error}");

    fs::remove_dir_all(&folder).unwrap();
}

fn table(major: i32, table_bytes: usize) -> &'static PJRT_Api {
    Box::leak(Box::new(PJRT_Api {
        struct_size: table_bytes,
        pjrt_api_version: pjrt_sys::PJRT_Api_Version { major_version: major, minor_version: 7, ..Default::default() },
        ..Default::default()
    }))
}

#[test]
fn tables_of_other_majors_or_too_short_are_refused() {
    let path = Path::new("some/plugin.so");
    for (major, bytes) in [(1, size_of::<PJRT_Api>()), (0, TABLE_BYTES - 1), (0, 8)] {
        // SAFETY: a leaked table that is as long as it says, or longer.
        let error = unsafe { check_table(path, table(major, bytes)) }.unwrap_err();
        assert!(matches!(&error, PjrtError::IncompatibleApi { .. }), "{error}");
        assert!(error.to_string().contains("use another version"), "{error}");
    }
    // SAFETY: null is allowed.
    assert!(matches!(unsafe { check_table(path, std::ptr::null()) }, Err(PjrtError::NotAPlugin { .. })));
    // SAFETY: as above.
    assert!(unsafe { check_table(path, table(0, TABLE_BYTES)) }.is_ok());
}

#[test]
fn functions_beyond_the_table_are_unsupported() {
    // SAFETY: as above.
    let api = unsafe { check_table(Path::new("p.so"), table(0, TABLE_BYTES)) }.unwrap();
    let mut beyond = args!(PJRT_Executable_Fingerprint_Args {});
    // SAFETY: nothing is called.
    let error = unsafe { api.call(&mut beyond) }.unwrap_err();
    assert!(error.is_unsupported());
    assert!(error.to_string().contains("PJRT_Executable_Fingerprint"), "{error}");
    let mut empty_slot = args!(PJRT_Compile_Args {});
    // SAFETY: nothing is called.
    assert!(unsafe { api.call(&mut empty_slot) }.unwrap_err().is_unsupported());
}

/// A plugin of which nothing works but its errors.
mod broken {
    use pjrt_sys::*;

    const MESSAGE: &str = "no device driver";

    pub(super) unsafe extern "C" fn initialize(_: *mut PJRT_Plugin_Initialize_Args) -> *mut PJRT_Error {
        Box::into_raw(Box::new(17_u64)).cast()
    }

    pub(super) unsafe extern "C" fn message(args: *mut PJRT_Error_Message_Args) {
        // SAFETY: the arguments are alive, and the message is for ever.
        unsafe {
            (*args).message = MESSAGE.as_ptr().cast();
            (*args).message_size = MESSAGE.len();
        }
    }

    pub(super) unsafe extern "C" fn code(args: *mut PJRT_Error_GetCode_Args) -> *mut PJRT_Error {
        // SAFETY: the arguments are alive.
        unsafe { (*args).code = 14 };
        std::ptr::null_mut()
    }

    pub(super) unsafe extern "C" fn destroy(args: *mut PJRT_Error_Destroy_Args) {
        // SAFETY: the error came from `initialize`, and is destroyed once.
        drop(unsafe { Box::from_raw((*args).error.cast::<u64>()) });
    }
}

#[test]
fn a_plugin_that_does_not_start_says_why() {
    let mut table = *table(0, TABLE_BYTES);
    table.PJRT_Plugin_Initialize = Some(broken::initialize);
    table.PJRT_Error_Message = Some(broken::message);
    table.PJRT_Error_GetCode = Some(broken::code);
    table.PJRT_Error_Destroy = Some(broken::destroy);
    // SAFETY: a leaked table that is longer than it says.
    let api = unsafe { check_table(Path::new("p.so"), Box::leak(Box::new(table))) }.unwrap();
    let error = Plugin::start(api, "broken.so".into()).unwrap_err();
    assert!(matches!(&error, PjrtError::InitializeFailed { .. }), "{error}");
    assert!(error.to_string().contains("broken.so"), "{error}");
    assert!(error.to_string().contains("no device driver (unavailable)"), "{error}");
    assert_eq!(error.code(), Some(crate::ErrorCode::Unavailable));
}

#[test]
fn test_files_are_looked_for_in_the_cache() {
    assert!(plugin_path(crate::testing::LIBTPU).ends_with("pjrt/libtpu-0.0.52/libtpu.so"));
}
