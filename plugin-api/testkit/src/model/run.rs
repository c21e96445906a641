//! Runs a model with random weights and compares it with itself.

use torus_abi::{
    DType, TensorType,
    attention::Target,
    model::{ModelDescription, WeightRole, WeightSpec},
    step::StepShape,
};

use super::{
    Opened, Program,
    assemble::{Assembler, INPUTS},
};
use crate::{
    Device, Report, Tensor,
    attention::Backend,
    numbers::{decode, floats, integers, noise, zeros},
    step::{Schedule, inputs},
};

/// Larger models are not run: random weights of a small config show the same.
const WEIGHT_BYTES_MAX: u64 = 256 << 20;
const PAGE_SIZE: usize = 16;
const PROMPT_TOKENS: usize = 37;
const OTHER_TOKENS: usize = 20;
/// Tokens of the step programs.
const BUCKETS: [u64; 4] = [1, 16, 64, 128];
/// Largest difference between logits, as a part of the largest logit.
const TOLERANCE: f32 = 1e-3;

/// One way to compute the prompt, which is the last sequence of the schedule.
struct Way {
    name: &'static str,
    schedule: Schedule,
    /// The bucket of each step.
    buckets: Vec<usize>,
}

/// Runs the model on a device with another plugin's attention.
pub fn run(model: &dyn Opened, backend: &dyn Backend, device: &impl Device, target: &Target) -> Report {
    let mut report = Report::default();
    let runner = model.describe().and_then(|description| Runner::new(model, &description, backend, device, target));
    let runner = match runner {
        Ok(runner) => runner,
        Err(error) => {
            report.failed("a program of the model", error);
            return report;
        }
    };
    let length = (runner.context_length as usize).clamp(2, PROMPT_TOKENS);
    let whole = Way { name: "prefill", schedule: Schedule::new(PAGE_SIZE, &[&[length]]), buckets: vec![2] };
    let reference = match runner.logits(&whole) {
        Ok(logits) => logits,
        Err(error) => {
            report.failed(whole.name, error);
            return report;
        }
    };
    report.result(whole.name, finite(&reference));
    for way in ways(length) {
        let difference = runner.logits(&way).and_then(|logits| compare(&logits, &reference, runner.vocab));
        report.result(way.name, difference);
    }
    report
}

fn ways(length: usize) -> Vec<Way> {
    let chunks: Vec<usize> = match length {
        PROMPT_TOKENS => vec![16, 5, 16],
        _ => (0..length).step_by(5).map(|start| (length - start).min(5)).collect(),
    };
    let others = OTHER_TOKENS.min(length);
    vec![
        Way {
            name: "in chunks = at once",
            buckets: vec![1; chunks.len()],
            schedule: Schedule::new(PAGE_SIZE, &[&chunks]),
        },
        Way {
            name: "token by token = at once",
            schedule: Schedule::new(PAGE_SIZE, &[&vec![1; length]]),
            buckets: vec![0; length],
        },
        Way {
            name: "with more padding = with less",
            schedule: Schedule::new(PAGE_SIZE, &[&[length]]),
            buckets: vec![3],
        },
        Way {
            name: "among others = alone",
            schedule: Schedule::new(PAGE_SIZE, &[&[others], &[length]]),
            buckets: vec![2],
        },
        Way {
            name: "decoding among others = at once",
            schedule: Schedule::new(PAGE_SIZE, &[&[others - 1, 1], &[0, 4], &[length - 1, 1]]),
            buckets: vec![2, 1],
        },
    ]
}

struct Runner<'a, D: Device> {
    device: &'a D,
    /// One for each bucket.
    programs: Vec<(StepShape, D::Program)>,
    weights: Vec<Tensor>,
    pools: Vec<Tensor>,
    vocab: usize,
    context_length: u64,
}

impl<'a, D: Device> Runner<'a, D> {
    fn new(
        model: &dyn Opened,
        description: &ModelDescription,
        backend: &dyn Backend,
        device: &'a D,
        target: &Target,
    ) -> Result<Self, String> {
        let assembler = Assembler { model, description, backend, target, dtype: DType::F32 };
        let mut programs = Vec::new();
        let mut types = None;
        for tokens in BUCKETS {
            let shape =
                StepShape { tokens, seqs: tokens.min(4), page_size: PAGE_SIZE as u64, pages: 16, page_table: 16 };
            let Program { text, weights, pools } = assembler.program(shape, true)?;
            check_size(&weights)?;
            let compiled = device.compile(&text).map_err(|error| format!("it does not compile: {error}"))?;
            programs.push((shape, compiled));
            types = Some(pools);
        }
        let pools = types.unwrap_or_default().iter().map(zeros).collect::<Result<_, _>>()?;
        let weights = draw_weights(description);
        let (vocab, context_length) = (description.vocab as usize, description.context_length);
        Ok(Self { device, programs, weights, pools, vocab, context_length })
    }

    /// The logits of the last sequence, `[tokens, vocab]`.
    fn logits(&self, way: &Way) -> Result<Vec<f32>, String> {
        let last = way.schedule.sequences.len() - 1;
        let mut pools = self.pools.clone();
        let mut logits = Vec::new();
        for (chunks, bucket) in way.schedule.steps.iter().zip(&way.buckets) {
            let (shape, program) = &self.programs[*bucket];
            let tables = way.schedule.tables(shape, 1);
            let mut tokens = Vec::new();
            let mut rows = 0..0;
            for chunk in chunks {
                // The prompt is the same whatever comes before it.
                let seed = if chunk.sequence == last { 0 } else { 1 + chunk.sequence };
                let start = tokens.len();
                tokens.extend((chunk.start..chunk.start + chunk.len).map(|position| self.token(seed, position)));
                if chunk.sequence == last {
                    rows = start * self.vocab..tokens.len() * self.vocab;
                }
            }
            tokens.resize(shape.tokens as usize, 0);
            let tokens = integers(TensorType::new(DType::I32, [shape.tokens]), &tokens);
            let step = inputs(shape, &tables, chunks);
            let arguments = self.weights.iter().chain(&pools).chain([&tokens]);
            let arguments: Vec<_> = arguments.chain(INPUTS.iter().map(|input| &step[input])).collect();
            let mut results = self.device.run(program, &arguments).map_err(|e| format!("it does not run: {e}"))?;
            let found = results.pop().ok_or("it gives no result")?;
            let kept = self.pools.iter().zip(results).map(|(pool, bytes)| Tensor { ty: pool.ty.clone(), bytes });
            pools = kept.collect();
            let found = decode(&found, DType::F32);
            logits.extend_from_slice(found.get(rows).ok_or("it gives too few logits")?);
        }
        Ok(logits)
    }

    fn token(&self, seed: usize, position: usize) -> i32 {
        ((seed * 7 + position * 5 + position * position) % self.vocab) as i32
    }
}

fn check_size(weights: &[TensorType]) -> Result<(), String> {
    let bytes: u64 = weights.iter().filter_map(|ty| ty.bytes()).sum();
    if bytes > WEIGHT_BYTES_MAX {
        return Err(format!(
            "its weights take {bytes} bytes; give a config of fewer layers and smaller sizes (at most {WEIGHT_BYTES_MAX})"
        ));
    }
    Ok(())
}

/// Matrices that keep the size of what they multiply; vectors around 1, as scales of norms are.
fn draw_weights(description: &ModelDescription) -> Vec<Tensor> {
    let draw = |(index, spec): (usize, &WeightSpec)| {
        let ty = TensorType::new(DType::F32, spec.shape.clone());
        let len = ty.elements().unwrap_or(0) as usize;
        let inputs = spec.shape.last().copied().unwrap_or(1) as f32;
        let seed = 1_000 + index as u64;
        let values: Vec<f32> = match spec.role {
            WeightRole::Vector => noise(seed, len, 0.5, DType::F32).into_iter().map(|x| 1.0 + x).collect(),
            WeightRole::Embed => noise(seed, len, 1.0, DType::F32),
            WeightRole::Linear(_) | WeightRole::EmbedAndHead => noise(seed, len, (3.0 / inputs).sqrt(), DType::F32),
        };
        floats(ty, &values)
    };
    description.weights.iter().enumerate().map(draw).collect()
}

fn finite(logits: &[f32]) -> Result<String, String> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(place) => Err(format!("logit {place} is {}", logits[place])),
        None => Ok(format!("{} logits, all finite", logits.len())),
    }
}

fn compare(found: &[f32], expected: &[f32], vocab: usize) -> Result<String, String> {
    if found.len() != expected.len() {
        return Err(format!("{} logits instead of {}", found.len(), expected.len()));
    }
    let largest = expected.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
    let mut difference = 0f32;
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let here = (found - expected).abs() / largest;
        if here.is_nan() || here > TOLERANCE {
            let (position, token) = (i / vocab, i % vocab);
            return Err(format!("position {position}, logit of token {token}: {found} instead of {expected}"));
        }
        difference = difference.max(here);
    }
    Ok(format!("logits differ by {difference:.1e} of the largest"))
}
