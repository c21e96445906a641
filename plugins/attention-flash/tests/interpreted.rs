//! What the plugin emits for a TPU, run: XLA's CPU runs the graph, and in the place of the kernel's call the interpreter runs
//! the kernel. It interprets no text, so it takes the kernel whose text the call is found to hold.

#![cfg(test)]

use std::{path::PathBuf, sync::Mutex};

use torus_abi::{
    DType,
    attention::Target,
    fault::Fault,
    kernel::{self, Bf16, Call, Entry, KernelList},
    model::AttentionSpec,
    step::StepShape,
};
use torus_attention::{Generation, KvFormat, Layout, Shape, Spec, Tuning};
use torus_attention_flash::Flash;
use torus_mosaic::{Array, Elem, Interpreter, Kernel, RunOptions};
use torus_pjrt::{
    Client, CompileOptions, Device as PjrtDevice, ElementType, LoadedExecutable, OptionValue, PjrtError, Plugin,
};
use torus_testkit::{
    Device, Tensor,
    attention::{Case, Checked, InProcess, examine, run_case},
    step::Schedule,
};

/// The kernel that calls mean.
static EMITTED: Mutex<Option<Kernel>> = Mutex::new(None);

const TARGET: &str = "torus.test.interpreted";

struct Kernels;

impl KernelList for Kernels {
    const PLUGIN: &'static str = "attention-flash";
    const ENTRIES: &'static [Entry] = &[Entry::new::<Self, Interpreted>()];
}

struct Interpreted;

impl kernel::Kernel for Interpreted {
    const NAME: &'static str = "interpreted";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        let kernel = EMITTED.lock().unwrap();
        let kernel = kernel.as_ref().ok_or_else(|| Fault::invalid("there is no kernel"))?;
        // Results hold what the operands do that they take the place of.
        let (mut rows, mut pool) = (call.result::<Bf16>(0)?, call.result::<i32>(1)?);
        let wide = |rows: &[Bf16]| rows.iter().map(|x| f32::from(*x)).collect::<Vec<_>>();
        let mut operands = Vec::new();
        for (i, operand) in kernel.operands().iter().enumerate() {
            let (tensor, in_place) = (operand.tensor.clone(), kernel.outputs().iter().any(|out| out.alias == Some(i)));
            operands.push(match (tensor.elem, in_place) {
                (Elem::Bf16, true) => Array::from_f32(tensor, &wide(&rows)),
                (Elem::Bf16, false) => Array::from_f32(tensor, &wide(&call.argument::<Bf16>(i)?)),
                (_, true) => Array::from_i32(tensor, &pool),
                (_, false) => Array::from_i32(tensor, &call.argument::<i32>(i)?),
            });
        }
        let outcome = Interpreter::new(kernel).run(&operands, &RunOptions::default());
        let outcome = outcome.map_err(|error| Fault::invalid(error.to_string()))?;
        rows.iter_mut().zip(outcome.outputs[0].to_f32()).for_each(|(out, x)| *out = Bf16::from_f32(x));
        pool.copy_from_slice(&outcome.outputs[1].to_i32());
        Ok(())
    }
}

/// A CPU on which kernels are interpreted.
struct Machine {
    client: Client,
    device: PjrtDevice,
    /// The backend configuration of the only kernel that programs may call.
    config: String,
}

impl Machine {
    fn new(spec: &Spec, shape: &Shape) -> Self {
        let plugin = Plugin::load(pjrt("lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so")).unwrap();
        // SAFETY: it is the handler of a kernel.
        unsafe { plugin.register_ffi_handler(TARGET, "Host", Kernels::ENTRIES[0].handler) }.unwrap();
        let client = Client::new(&plugin, &[("cpu_device_count".to_owned(), OptionValue::Int(1))]).unwrap();
        let device = client.devices().unwrap().remove(0);
        let tuning = Tuning::new(spec, &Layout::new(spec).unwrap());
        let emitted = torus_attention::kernel(spec, shape, &tuning).unwrap();
        let program = emitted.program(&torus_attention::call_options(spec)).unwrap();
        let config = quoted(&program, "backend_config = ").to_owned();
        *EMITTED.lock().unwrap() = Some(emitted);
        Self { client, device, config }
    }
}

/// A file that the setup script fetched.
fn pjrt(file: &str) -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt").join(file);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// The quoted text behind a word.
fn quoted<'a>(text: &'a str, word: &str) -> &'a str {
    let (_, text) = text.split_once(word).unwrap();
    text.trim_start_matches('"').split_once('"').unwrap().0
}

impl Device for Machine {
    type Program = LoadedExecutable;

    fn compile(&self, text: &str) -> Result<LoadedExecutable, String> {
        let calls: Vec<&str> = text.lines().filter(|line| line.contains("tpu_custom_call")).collect();
        let [call] = calls[..] else { return Err(format!("{} kernels are called", calls.len())) };
        let config = quoted(call, "backend_config = ");
        if config != self.config {
            return Err("it calls another kernel".to_owned());
        }
        let replaced = call
            .replace(&format!("backend_config = \"{config}\""), "backend_config = {}")
            .replace("api_version = 1 : i32", "api_version = 4 : i32")
            .replace("tpu_custom_call", TARGET);
        let text = text.replace(call, &replaced);
        self.client.compile(&text, &CompileOptions::default()).map_err(|error| format!("{error}: {replaced}"))
    }

    fn run(&self, program: &LoadedExecutable, arguments: &[&Tensor]) -> Result<Vec<Vec<u8>>, String> {
        let failed = |error: PjrtError| error.to_string();
        let upload = |tensor: &&Tensor| {
            let dims: Vec<_> = tensor.ty.dims.iter().map(|size| *size as i64).collect();
            let element = match tensor.ty.dtype {
                DType::I32 => ElementType::S32,
                DType::Bf16 => ElementType::BF16,
                dtype => panic!("{dtype}"),
            };
            self.client.buffer_from_host(&tensor.bytes, element, &dims, &self.device).map_err(failed)
        };
        let buffers = arguments.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let execution = program.execute(&buffers.iter().collect::<Vec<_>>()).map_err(failed)?;
        execution.done.wait().map_err(failed)?;
        execution.outputs.iter().map(|output| output.to_host_vec().map_err(failed)).collect()
    }
}

/// Sequences that are prefilled and decoded in the same steps, over the ends of pages.
#[test]
fn what_is_emitted_for_a_tpu_attends_as_plain_loops_do() {
    let target = Target { platform: "tpu".to_owned(), device_kind: "TPU v6 lite".to_owned() };
    let (q_heads, kv_heads, head_dim, scale) = (4, 2, 128, 128f32.sqrt().recip());
    let spec = AttentionSpec { q_heads, kv_heads, head_dim, scale, window: None, soft_cap: None };
    let schedule = Schedule::new(128, &[&[130, 1, 1], &[0, 3, 1]]);
    let case = Case::new("decode beside prefill", spec, DType::Bf16, schedule);
    let spec = Spec {
        q_heads: q_heads as usize,
        kv_heads: kv_heads as usize,
        head_dim: head_dim as usize,
        kv: KvFormat::Bf16,
        page_size: 128,
        scale,
        window: None,
        soft_cap: None,
        sinks: false,
        mask: false,
        generation: Generation::V6e,
    };
    let StepShape { tokens, seqs, pages, page_table, .. } = case.shape;
    let [tokens, seqs, pages, page_table] = [tokens, seqs, pages, page_table].map(|size| size as usize);
    let machine = Machine::new(&spec, &Shape { tokens, seqs, pages, page_table, draft: 1 });
    let checked = examine(&InProcess::<Flash>::default(), &case, &target).unwrap();
    let Checked::Emitted(answer, fragment) = checked else { panic!("it is not served") };
    run_case(&case, &answer, &fragment, &machine).unwrap();
    // Another scale is noticed.
    let spec = AttentionSpec { scale: 1.2 * scale, ..case.spec.clone() };
    let other = Case { spec, schedule: Schedule::new(128, &[&[1, 1, 1]]), ..case };
    let error = run_case(&other, &answer, &fragment, &machine).unwrap_err();
    assert!(error.contains("step 1, "), "{error}");
}
