//! The `torus` binary: reads the command line, finds what the server needs on this machine, and wires the parts.
//!
//! Deliberately absent: everything that another crate can know. What is decided here is which files and limits a server
//! runs with.
//!
//! Invariants:
//! - An option is served or refused with a sentence that names it; none is ignored.
//! - Environment variables are set before the first thread starts, and only here.
//! - No code from a model's folder is ever run. Plugins are loaded from where the operator put them, and nowhere else.

mod ahead;
mod args;
mod bench_host;
mod bench_kernels;
mod bench_step;
mod cache_dir;
mod check_env;
mod compile;
mod compiler_flags;
mod ctl;
mod engine;
mod generate;
mod limits;
mod logging;
mod model;
mod operate;
mod plan;
mod plugins;
mod python;
mod serve;
mod tpu;
mod version;

use std::{io::Write, process::ExitCode};

use clap::Parser;

// Plugins that are linked in register themselves; naming their crates keeps the linker from leaving them out.
use torus_attention_flash as _;
use torus_attention_native as _;
use torus_model_gemma as _;
use torus_model_llama as _;
use torus_model_qwen as _;

use crate::{
    args::{BenchCommand, Cli, Command, Device, EngineArgs, PluginsCommand, refuse},
    limits::Limits,
};

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let mut cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => match refuse::explain(&error) {
            Some(refused) => return usage_error(&refused),
            None => error.exit(),
        },
    };
    cli.command.imply_device();
    let limits = Limits::of_process();
    if let Some(args) = cli.command.engine_args()
        && let Err(refused) = refuse::check(args)
    {
        return usage_error(&refused);
    }
    if cli.command.compiles_for_absent_tpu() {
        // SAFETY: this process has no other thread yet.
        unsafe { torus_pjrt::prepare_libtpu_environment() };
    }
    keep_freed_memory();
    if let Some(args) = cli.command.engine_args()
        && let Some((variable, flags)) = compiler_flags::to_set(&args.device, &|name| std::env::var(name).ok())
    {
        // SAFETY: this process has no other thread yet.
        unsafe { std::env::set_var(variable, flags) };
    }
    let threads = cli.command.engine_args().and_then(|args| args.device.threads);
    prepare_xla_environment(threads.unwrap_or_else(|| limits.cpus()));
    let runs_engine = cli.command.engine_args().is_some();
    let result = run(cli.command, &limits);
    if let Err(error) = &result {
        eprintln!("error: {error:#}");
    }
    if runs_engine {
        end_at_once(result.is_ok_and(|code| code == ExitCode::SUCCESS));
    }
    result.unwrap_or(ExitCode::FAILURE)
}

/// Ends the process without the exit handlers of the libraries in it. A compiler that was interrupted may still run on
/// threads of its own, and would crash when its statics are destroyed under it.
fn end_at_once(success: bool) -> ! {
    // Whoever read the output may be gone.
    let _ = std::io::stdout().flush();
    // SAFETY: it only ends the process; nothing of it is used afterwards.
    unsafe { libc::_exit(i32::from(!success)) }
}

fn run(command: Command, limits: &Limits) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(&args, limits),
        Command::Generate(args) => generate::run(&args, limits),
        Command::Compile(args) => compile::run(&args, limits),
        Command::Plan(args) => plan::run(&args),
        Command::Plugins(command) => plugins::run(&command),
        Command::Ctl(args) => ctl::run(&args),
        Command::CheckEnv(args) => check_env::run(&args, limits),
        Command::Bench(BenchCommand::OverHttp(bench)) => torus_bench::run(bench).map(|()| ExitCode::SUCCESS),
        Command::Bench(BenchCommand::Step(args)) => bench_step::run(&args, limits),
        Command::Bench(BenchCommand::Host(args)) => bench_host::run(&args),
        Command::Bench(BenchCommand::Kernels(args)) => bench_kernels::run(&args, limits),
        Command::ProbeDevice(args) => tpu::run_probe(args.device, &args.pjrt_plugin),
        Command::Version => {
            println!("{}", version::describe());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn usage_error(refused: &refuse::Refused) -> ExitCode {
    const USAGE: u8 = 2;
    eprintln!("error: {refused}");
    ExitCode::from(USAGE)
}

/// Gives back to the system what loading has freed: blocks all over the heap that no step uses again.
fn release_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only returns pages that the allocator holds free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the allocator keep large blocks that were freed. XLA allocates the temporaries of a step anew each time; given back
/// to the system, each of their pages costs a fault and a clearing in every step.
fn keep_freed_memory() {
    const KEPT_BYTES: libc::c_int = 1 << 30;
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: it only changes how the allocator of this process behaves.
        unsafe { libc::mallopt(parameter, KEPT_BYTES) };
    }
}

/// Settings that XLA reads from the environment: how many threads its pool has on a CPU (as many as the machine has cores
/// otherwise), and that it keeps notes about itself out of the log. An operator's own values stay.
fn prepare_xla_environment(threads: usize) {
    for (name, value) in [("PJRT_NPROC", threads.to_string()), ("TF_CPP_MIN_LOG_LEVEL", "1".to_owned())] {
        if std::env::var_os(name).is_none() {
            // SAFETY: this process has no other thread yet: `main` calls this before anything starts one.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

impl Command {
    fn engine_args(&self) -> Option<&EngineArgs> {
        match self {
            Command::Serve(args) => Some(&args.engine),
            Command::Generate(args) => Some(&args.engine),
            Command::Bench(BenchCommand::Step(args)) => Some(&args.engine),
            Command::Compile(args) => Some(&args.engine),
            Command::Plan(args) => Some(&args.engine),
            _ => None,
        }
    }

    /// Who asks about a topology asks about TPUs, whatever computes here.
    fn imply_device(&mut self) {
        match self {
            Command::Compile(args) => args.engine.device.device = Device::Tpu,
            Command::Plan(args) => args.engine.device.device = Device::Tpu,
            _ => {}
        }
    }

    fn compiles_for_absent_tpu(&self) -> bool {
        match self {
            Command::Compile(_) => true,
            Command::Plan(args) => args.compile,
            Command::Plugins(PluginsCommand::Check(args)) => args.target.topology().is_some(),
            _ => false,
        }
    }
}
