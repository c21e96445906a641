//! `torus plan`: whether a model fits chips that need not be here, and what its steps cost there at least.

mod fit;
mod print;

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Context, ensure};
use serde::Serialize;
use torus_bench::plot::{self, Chart, Series};
use torus_engine::{
    AheadCompiler, Blueprint, Compiled, Rows,
    roofline::{Bound, Group, StepCost, StepTime, Topology, Work},
};

use self::fit::Fit;
use crate::{
    ahead::{AbsentTpu, ModelFile},
    args::{LogLevel, PlanArgs},
    logging,
};

pub fn run(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, LogLevel::Warn)?;
    let model = ModelFile::open(&args.engine)?;
    let (tpu, compiler) = match args.compile {
        true => AbsentTpu::by_compiler(&args.engine, &args.topology).map(|(tpu, topology)| (tpu, Some(topology)))?,
        false => (AbsentTpu::by_sheet(&args.engine, &args.topology)?, None),
    };
    let fits = fit::try_all(args, &model, &tpu)?;
    let fit = fits.chosen(args)?;
    let mut plan = Plan { args, model: &model, tpu: &tpu, fits: &fits, fit, cases: Vec::new() };
    if let Some(blueprint) = &fit.blueprint {
        plan.cases = cases(args, blueprint, group(&args.topology, fit.tp_size)?)?;
        if let Some(topology) = &compiler {
            let config = tpu.config(&args.engine, &model)?;
            compile(&mut plan.cases, &AheadCompiler::new(&config, blueprint, topology)?)?;
        }
        if let Some(path) = &args.plot {
            plot::write(path, &charts(args, blueprint, group(&args.topology, fit.tp_size)?, &model.name))?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan.json())?);
    } else {
        plan.print();
    }
    Ok(if fit.blueprint.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All that was found out.
struct Plan<'a> {
    args: &'a PlanArgs,
    model: &'a ModelFile,
    tpu: &'a AbsentTpu,
    fits: &'a fit::Fits,
    /// With the number of devices that was asked for.
    fit: &'a Fit,
    cases: Vec<Case>,
}

/// One step and its costs.
#[derive(Serialize)]
struct Case {
    kind: Kind,
    #[serde(flatten)]
    work: Work,
    /// Tokens that the program computes, padding included.
    step_tokens: u64,
    /// Whether the pool holds the tokens that its sequences have.
    kv_fits: bool,
    #[serde(flatten)]
    cost: StepCost,
    #[serde(flatten)]
    time: StepTime,
    step_s: f64,
    tokens_per_s: f64,
    compiler: Option<Estimate>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Decode,
    Prefill,
}

/// What the compiler says of a program.
#[derive(Clone, Copy, Serialize)]
struct Estimate {
    flops: Option<f64>,
    bytes_accessed: Option<f64>,
    /// Without kernels.
    hbm_bytes: Option<u64>,
    temp_bytes: i64,
    alias_bytes: i64,
    code_bytes: i64,
    compile_s: f64,
}

impl From<&Compiled> for Estimate {
    fn from(compiled: &Compiled) -> Self {
        Self {
            flops: compiled.flops,
            bytes_accessed: compiled.bytes_accessed,
            hbm_bytes: compiled.traffic.as_ref().map(|traffic| traffic.bytes),
            temp_bytes: compiled.memory.temp_bytes,
            alias_bytes: compiled.memory.alias_bytes,
            code_bytes: compiled.memory.code_bytes,
            compile_s: compiled.seconds,
        }
    }
}

impl Case {
    /// `None` if no program has room for so many tokens.
    fn new(topology: &Topology, blueprint: &Blueprint, group: &Group, kind: Kind, work: Work) -> Option<Self> {
        let padded = blueprint.padded((work.sequences * work.new_tokens) as usize)?;
        let cost = blueprint.shard().cost(work, padded);
        let time = cost.time(topology.chip, group);
        let step_s = time.seconds();
        let kept = work.sequences * (work.cached_tokens + work.new_tokens);
        Some(Self {
            kind,
            work,
            step_tokens: padded.tokens,
            kv_fits: kept <= blueprint.kv_tokens() as u64,
            cost,
            time,
            step_s,
            tokens_per_s: (work.sequences * work.new_tokens) as f64 / step_s,
            compiler: None,
        })
    }
}

fn group(topology: &Topology, devices: u64) -> anyhow::Result<Group> {
    topology.group(devices).with_context(|| format!("--tp-size {devices}: no such part of {topology}"))
}

/// A decoding step: the context counts the new token.
fn decode(sequences: u64, context: u64) -> Work {
    Work { sequences, new_tokens: 1, cached_tokens: context.saturating_sub(1) }
}

fn prefill(new_tokens: u64, cached_tokens: u64) -> Work {
    Work { sequences: 1, new_tokens, cached_tokens }
}

fn cases(args: &PlanArgs, blueprint: &Blueprint, group: Group) -> anyhow::Result<Vec<Case>> {
    let running = blueprint.max_running();
    let too_many = args.batch_size.iter().find(|batch| **batch > running);
    ensure!(too_many.is_none(), "--batch-size {}: at most {running} requests run at once", too_many.unwrap_or(&0));
    let batches = if args.batch_size.is_empty() { decode_batches(blueprint) } else { args.batch_size.clone() };
    let chunks = if args.prefill.is_empty() { prefill_chunks(blueprint) } else { args.prefill.clone() };
    let case = |kind: Kind, work: Work| {
        let case = Case::new(&args.topology, blueprint, &group, kind, work);
        let largest = blueprint.steps().iter().map(|step| step.tokens).max().unwrap_or(0);
        case.with_context(|| format!("--prefill {}: a step computes at most {largest} tokens", work.new_tokens))
    };
    let within = |context: u64| context <= blueprint.context_length() as u64;
    let mut cases = Vec::new();
    for context in args.context.iter().copied().filter(|context| *context > 0 && within(*context)) {
        for batch in &batches {
            cases.push(case(Kind::Decode, decode(*batch as u64, context))?);
        }
    }
    let mut before = vec![0];
    before.extend(args.context.iter().copied().filter(|context| *context > 0));
    for context in before {
        for chunk in chunks.iter().map(|chunk| *chunk as u64).filter(|chunk| within(context + chunk)) {
            cases.push(case(Kind::Prefill, prefill(chunk, context))?);
        }
    }
    ensure!(!cases.is_empty(), "--context: a sequence has at most {} tokens", blueprint.context_length());
    Ok(cases)
}

/// The buckets, up to what runs at once.
fn decode_batches(blueprint: &Blueprint) -> Vec<usize> {
    let sizes = blueprint.steps().into_iter().filter(|step| step.rows == Rows::Sampled).map(|step| step.tokens);
    sizes.filter(|tokens| *tokens <= blueprint.max_running()).collect()
}

/// The largest buckets.
fn prefill_chunks(blueprint: &Blueprint) -> Vec<usize> {
    const CHUNKS: usize = 4;
    let sizes = blueprint.steps().into_iter().filter(|step| step.rows == Rows::Sampled).map(|step| step.tokens);
    let sizes: Vec<_> = sizes.collect();
    sizes[sizes.len().saturating_sub(CHUNKS)..].to_vec()
}

/// Compiles the step of each case once.
fn compile(cases: &mut [Case], compiler: &AheadCompiler<'_>) -> anyhow::Result<()> {
    let wanted = |tokens: usize| cases.iter().any(|case| case.step_tokens == tokens as u64);
    let mut programs = compiler.programs()?;
    programs.retain(|program| program.step.is_some_and(|step| step.rows == Rows::Sampled && wanted(step.tokens)));
    let bar = crate::compile::progress_bar(programs.len());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let compiled = compiler.compile_all(&programs, threads, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let estimates = compiled.iter().filter_map(|program| {
        let tokens = program.program.step?.tokens as u64;
        Some((tokens, Estimate::from(program.compiled.as_ref()?)))
    });
    let estimates: BTreeMap<u64, Estimate> = estimates.collect();
    for case in cases {
        case.compiler = estimates.get(&case.step_tokens).copied();
    }
    Ok(())
}

/// Step time and throughput of decoding over the batch size, and over the context.
fn charts(args: &PlanArgs, blueprint: &Blueprint, group: Group, model: &str) -> Vec<Chart> {
    let at = |batch: u64, context: u64| {
        let case = Case::new(&args.topology, blueprint, &group, Kind::Decode, decode(batch, context));
        case.filter(|case| case.kv_fits)
    };
    let line = |name: String, points: Vec<(u64, Option<Case>)>, value: fn(&Case) -> f64| {
        let mut series = Series::line(&name);
        for (x, case) in points {
            if let Some(case) = case {
                series.push(x as f64, value(&case), String::new());
            }
        }
        series
    };
    let batches: Vec<u64> = decode_batches(blueprint).into_iter().map(|batch| batch as u64).collect();
    let longest = blueprint.context_length() as u64;
    let contexts: Vec<u64> = (8..).map(|power| 1u64 << power).take_while(|context| *context <= longest).collect();
    let few: Vec<u64> = batches.iter().rev().step_by(2).take(4).copied().rev().collect();
    let over_batch = |value| {
        let points = |context: u64| batches.iter().map(move |batch| (*batch, at(*batch, context))).collect();
        args.context.iter().map(|context| line(format!("{context} tokens"), points(*context), value)).collect()
    };
    let over_context = |value| {
        let points = |batch: u64| contexts.iter().map(move |context| (*context, at(batch, *context))).collect();
        few.iter().map(|batch| line(format!("batch {batch}"), points(*batch), value)).collect()
    };
    let title = |what: &str| format!("{what}: {model}, {}, tp {}", args.topology, group.devices);
    let milliseconds: fn(&Case) -> f64 = |case| case.step_s * 1e3;
    let throughput: fn(&Case) -> f64 = |case| case.tokens_per_s;
    let (batch, context) = ("Sequences that decode together", "Tokens in the cache of each");
    let (time, rate) = ("Step at least (ms)", "Tokens a second at most");
    vec![
        plot::logarithmic(&title("Step time"), batch, time, over_batch(milliseconds)),
        plot::logarithmic(&title("Throughput"), batch, rate, over_batch(throughput)),
        plot::logarithmic(&title("Step time"), context, time, over_context(milliseconds)),
        plot::logarithmic(&title("Throughput"), context, rate, over_context(throughput)),
    ]
}

fn bound(bound: Bound) -> &'static str {
    match bound {
        Bound::Hbm => "HBM",
        Bound::Mxu => "MXU",
        Bound::Interconnect => "interconnect",
    }
}
