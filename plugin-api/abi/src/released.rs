//! What is out there: every released layout of what crosses the boundary, checked whenever this crate is built.
//!
//! Plugins and hosts that were built long ago read memory by these numbers, so lines are added here and never changed.
//! If the build fails in this file, put back what you changed in the table and append instead:
//!
//! - **A new slot** goes to the end of its table, and a line to the end of the table's list here: the name of the coming
//!   layout, the new size, the new slots. Who reads the slot asks [`crate::table::slot`], which answers `None` for a
//!   table of an older layout, and does without.
//! - **Another meaning or signature** of a slot is a new slot under a new name. The old one stays and works.
//! - **A new table** gets a name in [`crate::table::interface`], a list here, and is null in plugins that lack it.
//! - **A new number** (fault code, log level) follows the last; readers take numbers they do not know for the last
//!   that existed when they were built, or the most serious.
//!
//! At a release, `tests/data/abi/make.sh` builds a plugin of the new layout, which every later host must load.

use std::{ffi::c_void, mem::offset_of};

use abi_stable::{
    library::RootModule,
    std_types::{RSlice, RStr, RVec},
};

use crate::{
    fault::FaultCode,
    log::Level,
    root::{PluginRoot, PluginRootRef, ROOT_SYMBOL, ROOT_VERSION},
    table::{
        AttentionTable, HostTable, KernelTable, ModelTable, ProposeInput, ProposeOutput, Reply, RuntimeTable,
        SpeculativeTable, interface,
    },
};

/// What to do instead, for the messages below.
macro_rules! append {
    () => {
        ". Plugins in the field rely on it: put it back and append instead (new slots go to the end of a table and into \
         a new line of plugin-api/abi/src/released.rs, whose first lines say how)"
    };
}

/// The layouts of one struct, oldest first: name of the layout, size in bytes, and the fields it added with their
/// offsets and types.
macro_rules! released {
    ($table:ident { $($layout:literal: $size:literal bytes { $($field:ident @ $offset:literal: $type:ty,)+ })+ }) => {
        $($(
            const _: () = {
                assert!(
                    offset_of!($table, $field) == $offset,
                    concat!("'", stringify!($table), ".", stringify!($field), "' is not at offset ", $offset,
                        ", where layout ", $layout, " has it", append!())
                );
                field_type::<$table, _, $type>(|table| &table.$field);
            };
        )+)+
        const _: () = {
            let sizes = [$($size),+];
            assert!(
                size_of::<$table>() == sizes[sizes.len() - 1],
                concat!("the size of '", stringify!($table), "' is not that of its last layout (",
                    $($layout, ": ", $size, " bytes; "),+, "today is none of them)", append!())
            );
            let mut next = 1;
            while next < sizes.len() {
                assert!(sizes[next - 1] < sizes[next], concat!("a layout of '", stringify!($table), "' is no longer \
                    than the one before", append!()));
                next += 1;
            }
        };
    };
}

/// Compiles if the field that `_get` borrows has the type it was released with.
const fn field_type<Table, Today: Is<Released>, Released>(_get: fn(&Table) -> &Today) {}

#[diagnostic::on_unimplemented(
    message = "a released field changed its type from `{Released}` to `{Self}`",
    label = "released with this type",
    note = "plugins in the field rely on it: put it back and append instead (the first lines of this file say how)"
)]
trait Is<Released> {}

impl<T> Is<T> for T {}

macro_rules! fixed {
    ($($what:expr => $released:expr,)+) => {$(
        const _: () = assert!($what == $released, concat!("'", stringify!($what), "' was released as ",
            stringify!($released), append!()));
    )+};
}

/// `==` of strings is not for constants.
const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

macro_rules! fixed_text {
    ($($what:expr => $released:literal,)+) => {$(
        const _: () = assert!(same($what, $released), concat!("'", stringify!($what), "' was released as \"",
            $released, "\"", append!()));
    )+};
}

fixed_text! {
    interface::MODEL => "model",
    interface::ATTENTION => "attention",
    interface::SPECULATIVE => "speculative",
    interface::RUNTIME => "runtime",
    interface::KERNELS => "kernels",
    ROOT_SYMBOL => "_1as_0lib_1header_0root_bmodule_bloader",
    PluginRootRef::NAME => "torus_plugin",
    ROOT_VERSION => "1.0.0",
}

fixed! {
    FaultCode::Unsupported as u32 => 1,
    FaultCode::Invalid as u32 => 2,
    FaultCode::Internal as u32 => 3,
    Level::Error as u32 => 1,
    Level::Warn as u32 => 2,
    Level::Info as u32 => 3,
    Level::Debug as u32 => 4,
    Level::Trace as u32 => 5,
    size_of::<RSlice<'_, u8>>() => 16,
    size_of::<RStr<'_>>() => 16,
    size_of::<RVec<u8>>() => 32,
}

// The root is no table: it has one layout for ever (see `crate::root`).
released!(PluginRoot {
    "0.1-a": 16 bytes {
        describe @ 0: extern "C" fn() -> RVec<u8>,
        interface @ 8: extern "C" fn(RStr<'_>) -> *const c_void,
    }
});

// Given and taken by value: it cannot grow.
released!(Reply {
    "0.1-a": 40 bytes {
        status @ 0: u32,
        body @ 8: RVec<u8>,
    }
});

released!(ModelTable {
    "0.1-a": 48 bytes {
        struct_size @ 0: usize,
        from_gguf @ 8: extern "C" fn(RSlice<'_, u8>) -> Reply,
        open @ 16: unsafe extern "C" fn(RSlice<'_, u8>, *mut *mut c_void) -> Reply,
        describe @ 24: unsafe extern "C" fn(*const c_void) -> Reply,
        emit @ 32: unsafe extern "C" fn(*const c_void, RSlice<'_, u8>) -> Reply,
        close @ 40: unsafe extern "C" fn(*mut c_void),
    }
});

released!(AttentionTable {
    "0.1-a": 24 bytes {
        struct_size @ 0: usize,
        query @ 8: extern "C" fn(RSlice<'_, u8>) -> Reply,
        emit @ 16: extern "C" fn(RSlice<'_, u8>) -> Reply,
    }
});

released!(RuntimeTable {
    "0.1-a": 16 bytes {
        struct_size @ 0: usize,
        attach @ 8: unsafe extern "C" fn(*const HostTable),
    }
});

released!(HostTable {
    "0.1-a": 16 bytes {
        struct_size @ 0: usize,
        log @ 8: extern "C" fn(u32, RStr<'_>, RStr<'_>),
    }
    "0.1-c": 32 bytes {
        parallel_for @ 16: unsafe extern "C" fn(usize, unsafe extern "C" fn(*const c_void, usize), *const c_void),
        threads @ 24: extern "C" fn() -> usize,
    }
});

released!(KernelTable {
    "0.1-c": 32 bytes {
        struct_size @ 0: usize,
        count @ 8: extern "C" fn() -> usize,
        name @ 16: extern "C" fn(usize) -> RStr<'static>,
        handler @ 24: extern "C" fn(usize) -> Option<unsafe extern "C" fn(*mut c_void) -> *mut c_void>,
    }
});

released!(SpeculativeTable {
    "0.1-b": 48 bytes {
        struct_size @ 0: usize,
        open @ 8: unsafe extern "C" fn(RSlice<'_, u8>, *mut *mut c_void) -> Reply,
        describe @ 16: unsafe extern "C" fn(*const c_void) -> Reply,
        propose @ 24: unsafe extern "C" fn(*mut c_void, *const ProposeInput, *mut ProposeOutput) -> u32,
        forget @ 32: unsafe extern "C" fn(*mut c_void, u64),
        close @ 40: unsafe extern "C" fn(*mut c_void),
    }
});

released!(ProposeInput {
    "0.1-b": 48 bytes {
        struct_size @ 0: usize,
        rows @ 8: usize,
        ids @ 16: *const u64,
        tokens @ 24: *const *const u32,
        lengths @ 32: *const usize,
        limits @ 40: *const u32,
    }
});

released!(ProposeOutput {
    "0.1-b": 32 bytes {
        struct_size @ 0: usize,
        stride @ 8: usize,
        tokens @ 16: *mut u32,
        counts @ 24: *mut u32,
    }
});
