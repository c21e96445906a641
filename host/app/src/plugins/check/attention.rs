//! Checks of an attention plugin: what it emits is linked, compiled for the CPU, run on a small batch, and compared
//! with attention written down plainly.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, ensure};
use half::bf16;
use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, Target},
    fragment::{Export, Function, Operand},
    model::AttentionSpec,
    step::StepInput,
};
use torus_hlo::{Builder, Callee, Shape, Value, module_text};
use torus_pjrt::{Buffer, Client, CompileOptions, Device, ElementType};
use torus_plugins::{
    AttentionInterface, LinkError, Plugin,
    link::{self, Unit},
};

use super::{
    Findings,
    batch::{self, SHAPE, STEPS},
    reference::{Reference, Tokens},
};
use crate::{args, cache_dir::CacheDir};

/// One kind of attention and the dtype it is asked in.
struct Case {
    name: &'static str,
    spec: AttentionSpec,
    dtype: DType,
}

fn cases() -> Vec<Case> {
    let plain = AttentionSpec { q_heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25, window: None, soft_cap: None };
    let case = |name, spec: &AttentionSpec, dtype| Case { name, spec: spec.clone(), dtype };
    vec![
        case("attention in f32", &plain, DType::F32),
        case("attention in bf16", &plain, DType::Bf16),
        case("attention with a window", &AttentionSpec { window: Some(7), ..plain.clone() }, DType::F32),
        case("attention with a soft cap", &AttentionSpec { soft_cap: Some(1.5), ..plain.clone() }, DType::F32),
    ]
}

pub fn check(
    plugin: &Plugin,
    backend: &AttentionInterface,
    cache: &CacheDir,
    pjrt_plugin: Option<&Path>,
    findings: &mut Findings,
) {
    let runner = match Runner::new(cache, pjrt_plugin, plugin) {
        Ok(runner) => Some(runner),
        Err(error) => {
            findings.failed("a CPU to run it on", format_args!("{error:#}"));
            None
        }
    };
    let mut served = 0;
    for case in cases() {
        match check_case(backend, &case, runner.as_ref()) {
            Ok(Outcome::Refused(reason)) => findings.passed(case.name, format_args!("not served: {reason}")),
            Ok(Outcome::Served(detail)) => {
                served += 1;
                findings.passed(case.name, detail);
            }
            Err(error) => {
                served += 1;
                findings.failed(case.name, format_args!("{error:#}"));
            }
        }
    }
    if served == 0 {
        findings.failed("attention", "it serves none of the kinds that were asked for");
    }
}

enum Outcome {
    Refused(String),
    Served(String),
}

fn check_case(backend: &AttentionInterface, case: &Case, runner: Option<&Runner>) -> anyhow::Result<Outcome> {
    let target = Target { platform: "cpu".to_owned(), device_kind: "cpu".to_owned() };
    let query =
        AttentionQuery { spec: case.spec.clone(), dtype: case.dtype, kv_dtype: case.dtype, shape: SHAPE, target };
    let answer = backend.query(&query)?;
    if answer.score == 0 {
        return Ok(Outcome::Refused(answer.reason));
    }
    let request = EmitAttention { kind: 0, query };
    let package = backend.emit(&request)?;
    ensure!(backend.emit(&request)? == package, "the same request gives different answers");
    let text = program(backend.unit(&package.fragment), case, &answer)?;
    let Some(runner) = runner else { return Ok(Outcome::Served("linked; not run".to_owned())) };
    let difference = runner.largest_difference(&text, case, &answer)?;
    let allowed = if case.dtype == DType::Bf16 { 0.03 } else { 1e-4 };
    ensure!(difference <= allowed, "results differ by {difference:e} from plain attention; {allowed:e} is allowed");
    Ok(Outcome::Served(format!("score {}, differs by {difference:.1e} from plain attention", answer.score)))
}

/// Types of the arguments of a program, in order: query, key, value, pool parts, step inputs.
fn argument_types(case: &Case, answer: &AttentionAnswer) -> Vec<TensorType> {
    let heads = |heads| TensorType::new(case.dtype, [SHAPE.tokens, heads, case.spec.head_dim]);
    let mut types = vec![heads(case.spec.q_heads), heads(case.spec.kv_heads), heads(case.spec.kv_heads)];
    types.extend(answer.pool.iter().cloned());
    types.extend(answer.inputs.iter().map(|input| input.tensor_type(&SHAPE)));
    types
}

/// A module whose `main` computes the context and the attention of one layer, and gives the attended tokens and the
/// new pool.
fn program(unit: Unit<'_>, case: &Case, answer: &AttentionAnswer) -> anyhow::Result<String> {
    let (context, context_function) = link::export(unit, "context")?;
    let (attention, attention_function) = link::export(unit, "attention")?;
    ensure!(context_function.results == answer.context, "the results of 'context' are not what the plugin answered");
    let roots = [context.symbol.as_str(), attention.symbol.as_str()];
    let mut functions = link::link(&[unit], &roots, &mut |import| {
        Err(LinkError::Malformed {
            plugin: unit.plugin.to_owned(),
            message: format!("it imports '{}', but attention is given nothing to import", import.symbol),
        })
    })?;
    functions.push(main_function(case, answer, (context, context_function), (attention, attention_function))?);
    Ok(module_text("check", 1, &functions))
}

fn main_function(
    case: &Case,
    answer: &AttentionAnswer,
    (context, context_function): (&Export, &Function),
    (attention, attention_function): (&Export, &Function),
) -> anyhow::Result<Function> {
    let callee = |function: &Function| Callee::external(&function.symbol, &function.arguments, &function.results);
    let builder = Builder::new("check");
    let mut missing = None;
    builder.main(|main| {
        let types = argument_types(case, answer);
        let arguments: Vec<_> = types.iter().map(|ty| main.argument(Shape::opaque(ty))).collect();
        let mut known: BTreeMap<Operand, Value<'_>> = BTreeMap::new();
        let pools = (0..answer.pool.len()).map(|part| Operand::Pool { layer: 0, part });
        let inputs = answer.inputs.iter().copied().map(Operand::Step);
        let operands = [Operand::Query, Operand::Key, Operand::Value].into_iter().chain(pools).chain(inputs);
        known.extend(operands.zip(arguments));
        for (export, function) in [(context, context_function), (attention, attention_function)] {
            let given = export.arguments.iter().map(|operand| known.get(operand).copied().ok_or(operand));
            match given.collect::<Result<Vec<_>, _>>() {
                Ok(arguments) => {
                    let results = main.call(&callee(function), &arguments);
                    known.extend(export.results.iter().cloned().zip(results));
                }
                Err(operand) => missing = Some(operand.clone()),
            }
        }
        let results = [Operand::Attended].into_iter();
        let pools = (0..answer.pool.len()).map(|part| Operand::Pool { layer: 0, part });
        results.chain(pools).filter_map(|operand| known.get(&operand).copied()).collect()
    });
    if let Some(operand) = missing {
        anyhow::bail!("an export takes {operand:?}, which was not asked for with the answer to the query");
    }
    let fragment = builder.finish()?;
    fragment.functions.into_iter().next().context("no main function was made")
}

/// A CPU client.
struct Runner {
    client: Client,
    device: Device,
}

impl Runner {
    /// A client that knows the kernels of `plugin`.
    fn new(cache: &CacheDir, pjrt_plugin: Option<&Path>, plugin: &Plugin) -> anyhow::Result<Self> {
        let path = cache.pjrt_plugin(args::Device::Cpu, pjrt_plugin)?;
        let device_plugin = torus_pjrt::Plugin::load(&path)?;
        torus_engine::register_kernels(&device_plugin, plugin)?;
        let options = vec![("cpu_device_count".to_owned(), torus_pjrt::OptionValue::Int(1))];
        let client = Client::new(&device_plugin, &options)?;
        let device = client.devices()?.into_iter().next().context("the CPU client has no device")?;
        Ok(Self { client, device })
    }

    /// Runs all steps. Returns the largest difference between what the program and the reference give.
    fn largest_difference(&self, text: &str, case: &Case, answer: &AttentionAnswer) -> anyhow::Result<f32> {
        let executable = self.client.compile(text, &CompileOptions::default()).context("it does not compile")?;
        let mut pools = Vec::new();
        for ty in &answer.pool {
            let bytes = ty.bytes().context("the pool is too large")?;
            pools.push(self.buffer(&vec![0; bytes as usize], ty)?);
        }
        let mut reference = Reference::default();
        let mut largest = 0f32;
        for (number, chunks) in STEPS.iter().enumerate() {
            let tokens = NewTokens::draw(case, number as u64);
            let mut arguments = tokens.buffers(self, case)?;
            arguments.append(&mut pools);
            let inputs = batch::inputs(chunks);
            for input in &answer.inputs {
                arguments.push(self.step_input(*input, &inputs)?);
            }
            let execution = executable.execute(&arguments.iter().collect::<Vec<_>>()).context("it does not run")?;
            execution.done.wait().context("it does not run")?;
            let mut outputs = execution.outputs.into_iter();
            let attended = outputs.next().context("it gives no result")?.to_host_vec()?;
            pools.extend(outputs);
            let expected = reference.step(&case.spec, chunks, &tokens.as_tokens());
            let found = decode(&attended, case.dtype);
            ensure!(found.len() >= expected.len(), "the result has {} elements", found.len());
            let difference = found
                .into_iter()
                .zip(expected)
                .map(|(found, expected)| (found - expected).abs())
                // Unlike `max`, this keeps a NaN.
                .fold(0f32, |largest, next| if next <= largest { largest } else { next });
            ensure!(!difference.is_nan(), "a result is not a number");
            largest = largest.max(difference);
        }
        Ok(largest)
    }

    fn buffer(&self, bytes: &[u8], ty: &TensorType) -> anyhow::Result<Buffer> {
        let dims: Vec<_> = ty.dims.iter().map(|size| *size as i64).collect();
        Ok(self.client.buffer_from_host(bytes, element(ty.dtype), &dims, &self.device)?)
    }

    fn step_input(&self, input: StepInput, inputs: &BTreeMap<StepInput, Vec<i32>>) -> anyhow::Result<Buffer> {
        let values = inputs.get(&input).with_context(|| format!("the step has no {input:?}"))?;
        let bytes: Vec<_> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.buffer(&bytes, &input.tensor_type(&SHAPE))
    }
}

/// Queries, keys and values of a step, for padding tokens too.
struct NewTokens {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl NewTokens {
    fn draw(case: &Case, seed: u64) -> Self {
        let mut state = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut draw = |heads: u64| -> Vec<f32> {
            let count = SHAPE.tokens * heads * case.spec.head_dim;
            (0..count).map(|_| round(uniform(&mut state), case.dtype)).collect()
        };
        let (q, kv) = (case.spec.q_heads, case.spec.kv_heads);
        Self { queries: draw(q), keys: draw(kv), values: draw(kv) }
    }

    fn as_tokens(&self) -> Tokens<'_> {
        Tokens { queries: &self.queries, keys: &self.keys, values: &self.values }
    }

    fn buffers(&self, runner: &Runner, case: &Case) -> anyhow::Result<Vec<Buffer>> {
        let sizes = [case.spec.q_heads, case.spec.kv_heads, case.spec.kv_heads];
        let lists = [&self.queries, &self.keys, &self.values].into_iter().zip(sizes);
        lists
            .map(|(list, heads)| {
                let ty = TensorType::new(case.dtype, [SHAPE.tokens, heads, case.spec.head_dim]);
                runner.buffer(&encode(list, case.dtype), &ty)
            })
            .collect()
    }
}

/// A number in -1..1, by the generator splitmix64.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^= bits >> 31;
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn round(value: f32, dtype: DType) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(value).to_f32() } else { value }
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}

fn element(dtype: DType) -> ElementType {
    match dtype {
        DType::Bool => ElementType::Pred,
        DType::I8 => ElementType::S8,
        DType::I16 => ElementType::S16,
        DType::I32 => ElementType::S32,
        DType::I64 => ElementType::S64,
        DType::U8 => ElementType::U8,
        DType::U16 => ElementType::U16,
        DType::U32 => ElementType::U32,
        DType::U64 => ElementType::U64,
        DType::F16 => ElementType::F16,
        DType::Bf16 => ElementType::BF16,
        DType::F32 => ElementType::F32,
        DType::F64 => ElementType::F64,
    }
}

#[cfg(test)]
mod tests {
    use torus_plugins::Registry;

    use super::*;

    fn runner(plugin: &Plugin) -> Runner {
        let runner = Runner::new(&CacheDir::new(None).unwrap(), None, plugin);
        runner.unwrap_or_else(|error| panic!("{error:#}; run .make/setup.sh test"))
    }

    fn native() -> std::sync::Arc<Plugin> {
        let registry = Registry::linked().unwrap();
        registry.plugins().iter().find(|plugin| plugin.name() == "native").unwrap().clone()
    }

    #[test]
    fn the_stock_backend_computes_plain_attention() {
        let plugin = native();
        let runner = runner(&plugin);
        for case in cases() {
            match check_case(plugin.attention().unwrap(), &case, Some(&runner)) {
                Ok(Outcome::Served(_)) => {}
                Ok(Outcome::Refused(reason)) => panic!("{}: refused: {reason}", case.name),
                Err(error) => panic!("{}: {error:#}", case.name),
            }
        }
    }

    #[test]
    fn a_backend_that_computes_something_else_is_found_out() {
        let plugin = native();
        let runner = runner(&plugin);
        let backend = plugin.attention().unwrap();
        let mut case = cases().remove(0);
        let target = Target { platform: "cpu".to_owned(), device_kind: "cpu".to_owned() };
        let query = |spec: &AttentionSpec| AttentionQuery {
            spec: spec.clone(),
            dtype: DType::F32,
            kv_dtype: DType::F32,
            shape: SHAPE,
            target: target.clone(),
        };
        let answer = backend.query(&query(&case.spec)).unwrap();
        let package = backend.emit(&EmitAttention { kind: 0, query: query(&case.spec) }).unwrap();
        let text = program(backend.unit(&package.fragment), &case, &answer).unwrap();
        // What was emitted knows of no window.
        case.spec.window = Some(3);
        assert!(runner.largest_difference(&text, &case, &answer).unwrap() > 0.01);
    }

    #[test]
    fn numbers_are_spread_over_the_range() {
        let mut state = 1;
        let numbers: Vec<_> = (0..1_000).map(|_| uniform(&mut state)).collect();
        assert!(numbers.iter().all(|number| (-1.0..1.0).contains(number)));
        assert!((numbers.iter().sum::<f32>() / 1_000.0).abs() < 0.1);
    }
}
