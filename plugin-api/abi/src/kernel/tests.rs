//! Calls as XLA makes them, from frames built here.

use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{frame::*, *};

struct Kernels;

impl KernelList for Kernels {
    const PLUGIN: &'static str = "mine";
    const ENTRIES: &'static [Entry] =
        &[Entry::new::<Self, Views>(), Entry::new::<Self, Attributes>(), Entry::new::<Self, Panics>()];
}

fn message<T>(result: Result<T, Fault>) -> String {
    result.err().map_or_else(|| "no fault".into(), |fault| fault.message)
}

/// Arguments: f32 `[2, 3]`, bool `[2]`, f32 `[2]`. Results: f32 `[2, 3]`, and one in the memory of argument 2.
struct Views;

impl Kernel for Views {
    const NAME: &'static str = "views";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        assert_eq!((call.arguments(), call.results()), (3, 2));
        let x = call.argument::<f32>(0)?;
        assert_eq!(x.dims::<2>()?, [2, 3]);
        assert_eq!(message(x.dims::<1>()), "a tensor of f32[2, 3] has not the rank 1");
        assert_eq!(&call.argument::<f32>(0)?[..2], &x[..2]);
        assert_eq!(message(call.argument::<i32>(0)), "argument 0 is of f32, taken as i32");
        assert_eq!(message(call.argument::<f32>(3)), "there is no argument 3 (of 3)");
        assert_eq!(message(call.result::<f32>(2)), "there is no result 2 (of 2)");
        assert_eq!(message(call.argument::<bool>(1)), "argument 1 holds no booleans");
        let mut y = call.result::<f32>(0)?;
        assert_eq!(message(call.result::<f32>(0)), "result 0 is taken twice");
        y.iter_mut().zip(x.iter()).for_each(|(y, x)| *y = 2.0 * x);
        let mut pool = call.result::<f32>(1)?;
        assert_eq!(&pool[..], [7.0, 8.0]);
        let refusal = message(call.argument::<f32>(2));
        assert!(refusal.starts_with("argument 2 shares its memory with result 1"), "{refusal}");
        pool[0] = 1.0;
        Ok(())
    }
}

struct Attributes;

impl Kernel for Attributes {
    const NAME: &'static str = "attributes";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        assert_eq!(call.attribute::<i64>("count")?, -3);
        assert_eq!(call.attribute::<f32>("scale")?, 0.5);
        assert_eq!(call.attribute::<String>("mode")?, "fast");
        assert_eq!(call.attribute::<Vec<i64>>("sizes")?, [4, 5]);
        assert_eq!(call.optional_attribute::<bool>("gone")?, None);
        assert_eq!(
            message(call.attribute::<usize>("count")),
            "attribute 'count' is the integer -3, expected an unsigned integer"
        );
        call.attribute::<bool>("gone").map(|_| ())
    }
}

struct Panics;

impl Kernel for Panics {
    const NAME: &'static str = "panics";

    fn call(_: &Call<'_>) -> Result<(), Fault> {
        parallel_for(3, |index| assert!(index < 2, "index {index} is too large"));
        Ok(())
    }
}

fn buffer<T>(element_type: i32, dims: &[i64], data: &mut [T]) -> RawBuffer {
    RawBuffer {
        struct_size: size_of::<RawBuffer>(),
        extensions: ptr::null(),
        element_type,
        data: data.as_mut_ptr().cast(),
        rank: dims.len() as i64,
        dims: dims.as_ptr(),
    }
}

/// Keeps the message where a pointer to it is the "error".
unsafe extern "C" fn create_error(arguments: *mut CreateError) -> *mut c_void {
    // SAFETY: the handler passes its arguments with a C string.
    let text = unsafe { CStr::from_ptr((*arguments).message) }.to_str().unwrap().to_owned();
    Box::into_raw(Box::new(text)).cast()
}

const VERSION: RawVersion =
    RawVersion { struct_size: size_of::<RawVersion>(), extensions: ptr::null(), major: 0, minor: 3 };

fn run(
    kernel: usize,
    arguments: &[RawBuffer],
    results: &[RawBuffer],
    attributes: &[(&str, i32, *const c_void)],
    extensions: *const RawExtension,
) -> Result<(), String> {
    let api = RawApi {
        struct_size: size_of::<RawApi>(),
        extensions: ptr::null(),
        version: VERSION,
        internal: ptr::null(),
        create_error,
    };
    let types = vec![BUFFER; arguments.len().max(results.len())];
    let pointers = |list: &[RawBuffer]| list.iter().map(ptr::from_ref).collect::<Vec<_>>();
    let (argument_list, result_list) = (pointers(arguments), pointers(results));
    let operands = |list: &Vec<*const RawBuffer>| RawOperands {
        struct_size: size_of::<RawOperands>(),
        extensions: ptr::null(),
        size: list.len() as i64,
        types: types.as_ptr(),
        pointers: list.as_ptr(),
    };
    let texts: Vec<_> = attributes.iter().map(|(name, ..)| RawText { bytes: name.as_ptr(), len: name.len() }).collect();
    let names: Vec<_> = texts.iter().map(ptr::from_ref).collect();
    let kinds: Vec<_> = attributes.iter().map(|(_, kind, _)| *kind).collect();
    let values: Vec<_> = attributes.iter().map(|(.., value)| *value).collect();
    let mut frame = RawFrame {
        struct_size: size_of::<RawFrame>(),
        extensions,
        api: &api,
        context: ptr::null_mut(),
        stage: STAGE_EXECUTE,
        arguments: operands(&argument_list),
        results: operands(&result_list),
        attributes: RawAttributes {
            struct_size: size_of::<RawAttributes>(),
            extensions: ptr::null(),
            size: attributes.len() as i64,
            types: kinds.as_ptr(),
            names: names.as_ptr(),
            values: values.as_ptr(),
        },
    };
    // SAFETY: the frame and all that it points to live during the call; errors come from `create_error`.
    unsafe {
        let error = (Kernels::ENTRIES[kernel].handler)((&raw mut frame).cast());
        if error.is_null() { Ok(()) } else { Err(*Box::from_raw(error.cast::<String>())) }
    }
}

#[test]
fn views_are_typed_and_never_overlap_a_mutable_one() {
    let (mut x, mut flags, mut pool, mut y) = ([1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1u8, 2], [7f32, 8.0], [0f32; 6]);
    let arguments = [buffer(11, &[2, 3], &mut x), buffer(1, &[2], &mut flags), buffer(11, &[2], &mut pool)];
    let results = [buffer(11, &[2, 3], &mut y), buffer(11, &[2], &mut pool)];
    run(0, &arguments, &results, &[], ptr::null()).unwrap();
    assert_eq!((y, pool), ([2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [1.0, 8.0]));
}

#[test]
fn attributes_are_typed_and_a_missing_one_is_named_with_the_kernel() {
    let (count, scale, sizes, mode) = (-3i64, 0.5f32, [4i64, 5], "fast");
    let count = RawScalar { element_type: 5, value: (&raw const count).cast() };
    let scale = RawScalar { element_type: 11, value: (&raw const scale).cast() };
    let sizes = RawArray { element_type: 5, len: 2, values: sizes.as_ptr().cast() };
    let mode = RawText { bytes: mode.as_ptr(), len: mode.len() };
    let attributes = [
        ("count", ATTRIBUTE_SCALAR, (&raw const count).cast::<c_void>()),
        ("scale", ATTRIBUTE_SCALAR, (&raw const scale).cast()),
        ("sizes", ATTRIBUTE_ARRAY, (&raw const sizes).cast()),
        ("mode", ATTRIBUTE_TEXT, (&raw const mode).cast()),
    ];
    let error = run(1, &[], &[], &attributes, ptr::null()).unwrap_err();
    assert_eq!(error, "kernel 'attributes' of plugin 'mine': attribute 'gone' is missing");
}

#[test]
fn a_panic_in_a_loop_becomes_an_error() {
    let error = run(2, &[], &[], &[], ptr::null()).unwrap_err();
    assert_eq!(error, "kernel 'panics' of plugin 'mine': it panicked: index 2 is too large");
}

#[test]
fn a_handler_answers_with_the_version_of_the_frame() {
    let mut metadata =
        RawMetadata { struct_size: size_of::<RawMetadata>(), version: RawVersion { minor: 0, ..VERSION }, traits: 9 };
    let extension = RawExtension {
        struct_size: size_of::<RawExtension>(),
        kind: METADATA,
        next: ptr::null(),
        metadata: &mut metadata,
    };
    run(2, &[], &[], &[], &extension).unwrap();
    assert_eq!((metadata.version.minor, metadata.traits), (3, 0));
}

#[test]
fn chunks_cover_all_elements_without_a_host_too() {
    let (mut data, calls) = ([0usize; 10], AtomicUsize::new(0));
    parallel_chunks(&mut data, 4, |index, chunk| {
        calls.fetch_add(1, Ordering::Relaxed);
        chunk.fill(index + 1);
    });
    assert_eq!((data, calls.into_inner()), ([1, 1, 1, 1, 2, 2, 2, 2, 3, 3], 3));
    assert_eq!(threads(), 1);
}

#[test]
fn bfloat16_rounds_to_the_nearest() {
    for (value, rounded) in [(1.0, 1.0), (1.0 + 1.0 / 256.0, 1.0), (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0)] {
        assert_eq!(f32::from(Bf16::from_f32(value)), rounded);
    }
    assert!(f32::from(Bf16::from_f32(f32::NAN)).is_nan());
    assert_eq!(Bf16::from_f32(f32::MAX), Bf16::from_f32(f32::INFINITY));
}
