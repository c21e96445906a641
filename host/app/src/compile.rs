//! `torus compile`: everything that a server runs, compiled for a TPU that need not be there.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::ensure;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use torus_engine::{AheadCompiler, Blueprint, CompiledAhead, Rows, StepKind};
use torus_pjrt::{Collective, Traffic};

use crate::{
    ahead::{AbsentTpu, ModelFile},
    args::{CompileArgs, LogLevel},
    limits::Limits,
    logging,
};

pub fn run(args: &CompileArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, LogLevel::Warn)?;
    let model = ModelFile::open(&args.engine)?;
    let (tpu, topology) = AbsentTpu::by_compiler(&args.engine, &args.topology)?;
    let config = tpu.config(&args.engine, &model)?;
    let blueprint = model.blueprint(&config, &tpu.device)?;
    model.check_kv_scales(&blueprint)?;
    let mut compiler = AheadCompiler::new(&config, &blueprint, &topology)?;
    compiler.again = args.again;
    let mut programs = compiler.programs()?;
    if !args.steps.is_empty() {
        let known = blueprint.steps();
        let unknown = args.steps.iter().find(|tokens| known.iter().all(|step| step.tokens != **tokens));
        ensure!(unknown.is_none(), "--steps {}: {}", unknown.unwrap_or(&0), sizes(&known));
        programs.retain(|program| program.step.is_some_and(|step| args.steps.contains(&step.tokens)));
    }
    let bar = progress_bar(programs.len());
    let threads = args.jobs.unwrap_or_else(|| limits.cpus());
    let compiled = compiler.compile_all(&programs, threads, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let report = Report { args, model: &model, tpu: &tpu, blueprint: &blueprint, compiled };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.json()?)?);
    } else {
        report.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn sizes(steps: &[StepKind]) -> String {
    let sizes: Vec<_> = steps.iter().map(|step| step.tokens.to_string()).collect();
    format!("there is no such step; there are steps of {} tokens", sizes.join(", "))
}

pub fn progress_bar(total: usize) -> ProgressBar {
    let bar = ProgressBar::new(total as u64);
    // The template is a constant; a default style would do as well.
    match ProgressStyle::with_template("compiling {bar:40} {pos}/{len} programs, {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// What is printed.
struct Report<'a> {
    args: &'a CompileArgs,
    model: &'a ModelFile,
    tpu: &'a AbsentTpu,
    blueprint: &'a Blueprint,
    /// The largest steps first.
    compiled: Vec<CompiledAhead>,
}

impl Report<'_> {
    fn print(&self) -> anyhow::Result<()> {
        let blueprint = self.blueprint;
        let [model, attention] = blueprint.plugins();
        println!(
            "{} for {} ({}), plugins '{model}' and '{attention}'",
            self.model.name, self.args.topology, self.tpu.device.device_kind
        );
        println!(
            "each device: {:.2} GB of weights and {:.2} GB of KV ({} tokens) of {:.2} GB",
            gb(blueprint.weight_bytes()),
            gb(blueprint.pool_bytes()),
            blueprint.kv_tokens(),
            gb(self.tpu.memory_bytes)
        );
        println!(
            "{:<28} {:>9} {:>10} {:>12} {:>12} {:>10} {:>11}",
            "program", "seconds", "code MB", "arguments MB", "in place MB", "temp MB", "stored MB"
        );
        for program in self.compiled.iter().rev() {
            print!("{:<28} ", label(program));
            match &program.compiled {
                None => print!("{:>9} {:>10} {:>12} {:>12} {:>10}", "kept", "-", "-", "-", "-"),
                Some(compiled) => print!(
                    "{:>9.1} {:>10.2} {:>12.1} {:>12.1} {:>10.2}",
                    compiled.seconds,
                    mb(compiled.memory.code_bytes),
                    mb(compiled.memory.argument_bytes),
                    mb(compiled.memory.alias_bytes),
                    mb(compiled.memory.temp_bytes)
                ),
            }
            println!(" {:>11.2}", program.stored_bytes as f64 / 1e6);
        }
        println!("{}", self.advice());
        Ok(())
    }

    /// How a server comes to use what was compiled.
    fn advice(&self) -> String {
        format!(
            "A server finds these programs if it has the same cache folder, options, environment (XLA_FLAGS, LIBTPU_INIT_ARGS), \
             version and libtpu, and as many KV tokens. How many it plans follows from the memory that its devices have free, \
             which is not known here: give it --max-total-tokens {}. That a TPU loads them was never tried; what it refuses, it \
             compiles again.",
            self.blueprint.kv_tokens()
        )
    }

    fn json(&self) -> anyhow::Result<Value> {
        let blueprint = self.blueprint;
        let [model_plugin, attention_plugin] = blueprint.plugins();
        let programs: Vec<_> = self.compiled.iter().rev().map(program_json).collect();
        Ok(json!({
            "model": self.model.name,
            "topology": self.args.topology.to_string(),
            "device_kind": self.tpu.device.device_kind,
            "device_memory_bytes": self.tpu.memory_bytes,
            "model_plugin": model_plugin,
            "attention_plugin": attention_plugin,
            "weight_bytes": blueprint.weight_bytes(),
            "pool_bytes": blueprint.pool_bytes(),
            "donated_bytes": blueprint.donated_bytes()?,
            "kv_tokens": blueprint.kv_tokens(),
            "programs": programs,
        }))
    }
}

fn label(program: &CompiledAhead) -> String {
    match program.program.step {
        Some(StepKind { tokens, rows: Rows::Sampled }) => format!("step of {tokens}"),
        Some(StepKind { tokens, rows: Rows::All }) => format!("step of {tokens}, all logprobs"),
        None => program.program.name.clone(),
    }
}

fn program_json(program: &CompiledAhead) -> Value {
    let compiled = program.compiled.as_ref();
    let memory = compiled.map(|compiled| compiled.memory);
    let traffic = compiled.and_then(|compiled| compiled.traffic.as_ref());
    json!({
        "program": label(program),
        "tokens": program.program.step.map(|step| step.tokens),
        "logits": program.program.step.map(|step| if step.rows == Rows::All { "all" } else { "sampled" }),
        "kept": compiled.is_none(),
        "compile_s": compiled.map(|compiled| compiled.seconds),
        "code_bytes": memory.map(|memory| memory.code_bytes),
        "argument_bytes": memory.map(|memory| memory.argument_bytes),
        "output_bytes": memory.map(|memory| memory.output_bytes),
        "alias_bytes": memory.map(|memory| memory.alias_bytes),
        "temp_bytes": memory.map(|memory| memory.temp_bytes),
        "compiler_flops": compiled.and_then(|compiled| compiled.flops),
        "compiler_bytes_accessed": compiled.and_then(|compiled| compiled.bytes_accessed),
        "hbm_bytes_outside_kernels": traffic.map(|traffic| traffic.bytes),
        "loops_of_unknown_length": traffic.map(|traffic| traffic.loops_of_unknown_length),
        "custom_calls": traffic.map(|traffic| traffic.custom_calls.iter().cloned().collect::<BTreeMap<_, _>>()),
        "collectives": traffic.map(collectives),
        "stored_bytes": program.stored_bytes,
    })
}

/// By operation: how many run, the bytes of their results, and those of the largest.
fn collectives(traffic: &Traffic) -> Value {
    let mut sums = BTreeMap::<&str, (u64, u64, u64)>::new();
    for Collective { operation, bytes, times } in &traffic.collectives {
        let (count, total, largest) = sums.entry(operation).or_default();
        (*count, *total, *largest) = (*count + times, *total + bytes * times, (*largest).max(*bytes));
    }
    let sums = sums.into_iter().map(|(operation, (count, total, largest))| {
        (operation.to_owned(), json!({"count": count, "bytes": total, "largest_bytes": largest}))
    });
    sums.collect::<serde_json::Map<_, _>>().into()
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn mb(bytes: i64) -> f64 {
    bytes as f64 / 1e6
}
