//! Compiled programs, whether they can run here or not.

use std::{collections::BTreeMap, ffi::c_char, fmt, mem::size_of, ptr::NonNull};

use pjrt_sys::{PJRT_Executable, PJRT_Program};

use crate::{
    args::{Api, args, copy_text, lent_slice, returned},
    element::ElementType,
    error::Result,
    traffic::Traffic,
    value::{OptionValue, copy_values},
};

/// A compiled program: what can be known of it without running it.
///
/// Plugins need not answer every question; [`PjrtError::is_unsupported`](crate::PjrtError::is_unsupported) tells.
pub struct Executable {
    api: Api,
    raw: NonNull<PJRT_Executable>,
}

// SAFETY: PJRT executables may be used from any thread, even by several at once.
unsafe impl Send for Executable {}
// SAFETY: see above.
unsafe impl Sync for Executable {}

/// Bytes a program needs on each device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// All arguments, donated ones included.
    pub argument_bytes: i64,
    /// All outputs, those included that live in donated arguments.
    pub output_bytes: i64,
    /// Bytes of outputs that live in donated arguments.
    pub alias_bytes: i64,
    /// What the program allocates while it runs.
    pub temp_bytes: i64,
    /// The machine code.
    pub code_bytes: i64,
}

impl Executable {
    /// # Safety
    /// `raw` is null (reported as an error) or an executable of this plugin that the caller hands over.
    pub(crate) unsafe fn from_raw(raw: *mut PJRT_Executable, api: Api) -> Result<Self> {
        Ok(Self { api, raw: returned(raw, "executable")? })
    }

    /// The name of the module.
    pub fn name(&self) -> Result<String> {
        let mut args = args!(PJRT_Executable_Name_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and its name lives as long.
        unsafe {
            self.api.call(&mut args)?;
            Ok(copy_text(args.executable_name, args.executable_name_size))
        }
    }

    /// As in the compile options.
    pub fn num_replicas(&self) -> Result<usize> {
        let mut args = args!(PJRT_Executable_NumReplicas_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive.
        unsafe { self.api.call(&mut args) }?;
        Ok(args.num_replicas)
    }

    /// As in the compile options.
    pub fn num_partitions(&self) -> Result<usize> {
        let mut args = args!(PJRT_Executable_NumPartitions_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive.
        unsafe { self.api.call(&mut args) }?;
        Ok(args.num_partitions)
    }

    /// Outputs per device.
    pub fn num_outputs(&self) -> Result<usize> {
        let mut args = args!(PJRT_Executable_NumOutputs_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive.
        unsafe { self.api.call(&mut args) }?;
        Ok(args.num_outputs)
    }

    /// The element type of each output.
    pub fn output_types(&self) -> Result<Vec<ElementType>> {
        let mut args = args!(PJRT_Executable_OutputElementTypes_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and the list lives as long.
        let types = unsafe {
            self.api.call(&mut args)?;
            lent_slice(args.output_types, args.num_output_types)
        };
        types.iter().map(|&raw| ElementType::from_raw(raw)).collect()
    }

    /// The dimensions of each output on one device.
    pub fn output_dims(&self) -> Result<Vec<Vec<i64>>> {
        let mut args = args!(PJRT_Executable_OutputDimensions_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and so are the lists; `dims` holds as many values as the ranks add up to.
        unsafe {
            self.api.call(&mut args)?;
            let ranks = lent_slice(args.dim_sizes, args.num_outputs);
            let mut rest = lent_slice(args.dims, ranks.iter().sum());
            let take = |&rank: &usize| {
                let (dims, tail) = rest.split_at(rank);
                rest = tail;
                dims.to_vec()
            };
            Ok(ranks.iter().map(take).collect())
        }
    }

    /// Equal for equal programs, options and compilers.
    pub fn fingerprint(&self) -> Result<Vec<u8>> {
        let mut args = args!(PJRT_Executable_Fingerprint_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and its fingerprint lives as long.
        unsafe {
            self.api.call(&mut args)?;
            Ok(lent_slice(args.executable_fingerprint.cast::<u8>(), args.executable_fingerprint_size).to_vec())
        }
    }

    /// Bytes for [`Client::deserialize`](crate::Client::deserialize) of the same plugin, device kind and CPU features.
    pub fn serialize(&self) -> Result<Vec<u8>> {
        let mut args = args!(PJRT_Executable_Serialize_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive; the bytes live until the deleter has run, which is called once.
        unsafe {
            self.api.call(&mut args)?;
            let bytes = lent_slice(args.serialized_bytes.cast::<u8>(), args.serialized_bytes_size).to_vec();
            if let Some(delete) = args.serialized_executable_deleter {
                delete(args.serialized_executable);
            }
            Ok(bytes)
        }
    }

    /// What it needs on each device.
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        let mut args = args!(PJRT_Executable_GetCompiledMemoryStats_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive.
        unsafe { self.api.call(&mut args) }?;
        Ok(MemoryStats {
            argument_bytes: args.argument_size_in_bytes,
            output_bytes: args.output_size_in_bytes,
            alias_bytes: args.alias_size_in_bytes,
            temp_bytes: args.temp_size_in_bytes,
            code_bytes: args.generated_code_size_in_bytes,
        })
    }

    /// What it moves through the device's main memory, counted over the program as the compiler has optimized it.
    pub fn traffic(&self) -> Result<Traffic> {
        let mut program = PJRT_Program { struct_size: size_of::<PJRT_Program>(), ..PJRT_Program::default() };
        let mut args =
            args!(PJRT_Executable_OptimizedProgram_Args { executable: self.raw.as_ptr(), program: &mut program });
        // SAFETY: the executable is alive; without memory for the code, its size is told.
        unsafe { self.api.call(&mut args) }?;
        let mut code = vec![0u8; program.code_size];
        program.code = code.as_mut_ptr().cast();
        args.program = &mut program;
        // SAFETY: the executable is alive, and there are as many bytes for the code as it was just said to have.
        unsafe { self.api.call(&mut args) }?;
        // SAFETY: the format is a name that the plugin keeps.
        let format = unsafe { copy_text(program.format, program.format_size) };
        Traffic::of_program(&format, &code)
    }

    /// The compiler's own estimates, such as `flops` and `bytes accessed`.
    pub fn cost_analysis(&self) -> Result<BTreeMap<String, OptionValue>> {
        let mut args = args!(PJRT_Executable_GetCostAnalysis_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and its properties live as long.
        unsafe {
            self.api.call(&mut args)?;
            Ok(copy_values(args.properties, args.num_properties))
        }
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let mut args = args!(PJRT_Executable_Destroy_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is ours and this is its last use.
        unsafe { self.api.destroy(&mut args) };
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Executable").field(&self.name().unwrap_or_default()).finish()
    }
}

/// Borrows the text: the result is valid as long as it is.
pub(crate) fn mlir_program(text: &str) -> PJRT_Program {
    const FORMAT: &str = "mlir";
    PJRT_Program {
        struct_size: size_of::<PJRT_Program>(),
        extension_start: std::ptr::null_mut(),
        // The plugin only reads programs that it compiles; the field is mutable for those it returns.
        code: text.as_ptr().cast::<c_char>().cast_mut(),
        code_size: text.len(),
        format: FORMAT.as_ptr().cast(),
        format_size: FORMAT.len(),
    }
}
