//! The custom call through which XLA runs a kernel.

use std::fmt::Write;

use base64::{Engine, prelude::BASE64_STANDARD};
use torus_hlo::{Attribute, BackendConfig, CustomCall, Shape};

use crate::{Generation, Kernel, VersionError, types::Type};

/// What a kernel costs, for XLA's scheduler. Zeros are honest where the host counts kernels itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CostEstimate {
    pub flops: u64,
    pub transcendentals: u64,
    /// From and to HBM.
    pub bytes_accessed: u64,
}

/// How a kernel is called.
#[derive(Clone, Debug)]
pub struct CallOptions {
    pub generation: Generation,
    /// Of the textual format; `None` is the lowest one that has the kernel's operations.
    pub version: Option<u32>,
    /// VMEM that the kernel may use. XLA uses the rest to prefetch weights meanwhile, so take no more than you need.
    /// `None` is [`Generation::default_vmem_limit_bytes`].
    pub vmem_limit_bytes: Option<usize>,
    pub cost: Option<CostEstimate>,
    /// Leaves out the compiler's checks of DMA bounds, which cost about 23 cycles a DMA on a TPU v6e. The interpreter
    /// checks all bounds in any case.
    pub disable_bounds_checks: bool,
}

impl CallOptions {
    pub fn new(generation: Generation) -> Self {
        Self { generation, version: None, vmem_limit_bytes: None, cost: None, disable_bounds_checks: false }
    }
}

/// A kernel that cannot be called on a generation of TPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error(
        "kernel '{kernel}' holds {bytes} bytes in VMEM, and `vmem_limit_bytes` is {limit}: raise it, or use smaller blocks"
    )]
    Vmem { kernel: String, bytes: usize, limit: usize },
    #[error(
        "`vmem_limit_bytes` of kernel '{kernel}' is {limit}, and a kernel on {generation:?} can have {available} bytes of VMEM"
    )]
    VmemLimit { kernel: String, limit: usize, available: usize, generation: Generation },
    #[error(
        "kernel '{kernel}' holds {bytes} bytes in SMEM, and a kernel on {generation:?} can have {available}: pass smaller \
         tables, of rank 1, or keep them in HBM and copy what a step needs"
    )]
    Smem { kernel: String, bytes: usize, available: usize, generation: Generation },
    #[error(transparent)]
    Version(#[from] VersionError),
}

impl Kernel {
    /// The call as a StableHLO operation. `results` are the shapes of the results with named axes; their sizes must be
    /// those of [`Kernel::outputs`], which the compiler checks.
    pub fn custom_call(&self, options: &CallOptions, results: Vec<Shape>) -> Result<CustomCall, CallError> {
        let config = self.backend_config(options)?;
        let mut call = CustomCall::new(TARGET, results);
        call.config = BackendConfig::Text(config);
        call.row_major = true;
        call.attributes = vec![("kernel_name".to_owned(), Attribute::Text(self.name.clone()))];
        for (result, operand) in self.aliases() {
            call = call.alias(result, operand);
        }
        Ok(call)
    }

    /// A StableHLO module whose `@main` is one call of the kernel: what is compiled to check a kernel or to read its
    /// schedule. Operands that the kernel writes in place are donated.
    pub fn program(&self, options: &CallOptions) -> Result<String, CallError> {
        let config = self.backend_config(options)?.replace('"', "\\22");
        let operands: Vec<_> = self.operands.iter().map(|operand| Type::Vector(operand.tensor.clone())).collect();
        let results: Vec<_> = self.outputs.iter().map(|output| Type::Vector(output.tensor.clone())).collect();
        let (operand_types, result_types) = (tensors(&operands), tensors(&results));
        let mut text = format!(
            "module @{} attributes {{mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32}} {{\n",
            self.name
        );
        let names: Vec<_> = (0..operands.len()).map(|i| format!("%arg{i}")).collect();
        let parameters = names.iter().zip(&operand_types).enumerate().map(|(i, (name, ty))| {
            let donated = self.aliases().find(|(_, operand)| *operand == i);
            let donation = donated.map(|(result, _)| format!(" {{tf.aliasing_output = {result} : i32}}"));
            format!("{name}: {ty}{}", donation.unwrap_or_default())
        });
        let parameters: Vec<_> = parameters.collect();
        let result_list = result_types.join(", ");
        // Writing to a string cannot fail.
        let _ = write!(text, "  func.func public @main({}) -> ({result_list}) {{\n    ", parameters.join(", "));
        if !results.is_empty() {
            let _ = write!(text, "%0:{} = ", results.len());
        }
        let _ = writeln!(
            text,
            "\"stablehlo.custom_call\"({}) {{api_version = 1 : i32, backend_config = \"{config}\", \
             call_target_name = \"{TARGET}\", has_side_effect = false, kernel_name = \"{}\", operand_layouts = [{}], \
             output_operand_aliases = [{}], result_layouts = [{}]}} : ({}) -> ({result_list}) loc(\"{}\")",
            names.join(", "),
            self.name,
            layouts(&operands),
            self.alias_attributes(),
            layouts(&results),
            operand_types.join(", "),
            self.name,
        );
        let returned: Vec<_> = (0..results.len()).map(|i| format!("%0#{i}")).collect();
        let colon = if results.is_empty() { "" } else { " : " };
        let _ = write!(text, "    return {}{colon}{result_list}\n  }}\n}}\n", returned.join(", "));
        Ok(text)
    }

    /// Pairs of a result and the operand whose buffer it takes.
    fn aliases(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.outputs.iter().enumerate().filter_map(|(result, output)| output.alias.map(|operand| (result, operand)))
    }

    fn alias_attributes(&self) -> String {
        let single = self.outputs.len() == 1;
        let one = |(result, operand): (usize, usize)| {
            // A single result is no tuple.
            let tuple = if single { String::new() } else { result.to_string() };
            format!(
                "#stablehlo.output_operand_alias<output_tuple_indices = [{tuple}], operand_index = {operand}, \
                 operand_tuple_indices = []>"
            )
        };
        self.aliases().map(one).collect::<Vec<_>>().join(", ")
    }

    /// The JSON that the compiler reads.
    fn backend_config(&self, options: &CallOptions) -> Result<String, CallError> {
        self.check_memory(options)?;
        let text = self.text(options.version.unwrap_or_else(|| self.minimum_version()))?;
        let mut call = serde_json::json!({
            "body": BASE64_STANDARD.encode(text),
            "serialization_format": 1,
            "needs_layout_passes": true,
        });
        if let Some(CostEstimate { flops, transcendentals, bytes_accessed }) = options.cost {
            call["cost_estimate"] = serde_json::json!({
                "flops": flops,
                "transcendentals": transcendentals,
                "bytes_accessed": bytes_accessed,
                "remote_bytes_transferred": 0,
            });
        }
        if options.disable_bounds_checks {
            call["disable_bounds_checks"] = true.into();
        }
        let mut config = serde_json::json!({ "custom_call_config": call });
        if let Some(limit) = options.vmem_limit_bytes {
            config["scoped_memory_configs"] = serde_json::json!([{ "memory_space": VMEM, "offset": 0, "size": limit }]);
        }
        Ok(config.to_string())
    }

    fn check_memory(&self, options: &CallOptions) -> Result<(), CallError> {
        let (footprint, generation) = (self.footprint(), options.generation);
        let kernel = || self.name.clone();
        let available = generation.usable_vmem_bytes();
        let limit = options.vmem_limit_bytes.unwrap_or(generation.default_vmem_limit_bytes());
        if limit > available {
            return Err(CallError::VmemLimit { kernel: kernel(), limit, available, generation });
        }
        if footprint.vmem > limit {
            return Err(CallError::Vmem { kernel: kernel(), bytes: footprint.vmem, limit });
        }
        let available = generation.usable_smem_bytes();
        if footprint.smem > available {
            return Err(CallError::Smem { kernel: kernel(), bytes: footprint.smem, available, generation });
        }
        Ok(())
    }
}

/// What XLA knows Mosaic kernels by.
const TARGET: &str = "tpu_custom_call";
/// XLA's number of VMEM among memory spaces.
const VMEM: u32 = 1;

/// `vector<…>` and `tensor<…>` spell dimensions and elements alike.
fn tensors(types: &[Type]) -> Vec<String> {
    types.iter().map(|ty| ty.to_string().replacen("vector", "tensor", 1)).collect()
}

/// Row-major order as XLA writes it: the axes from innermost to outermost.
fn layouts(types: &[Type]) -> String {
    let layout = |ty: &Type| {
        let order: Vec<_> = (0..ty.dims().len()).rev().collect();
        format!("dense<{order:?}> : tensor<{}xindex>", order.len())
    };
    types.iter().map(layout).collect::<Vec<_>>().join(", ")
}
