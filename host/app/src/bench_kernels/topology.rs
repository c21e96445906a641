//! `torus bench kernels --topology`: what the TPU's attention kernels cost as libtpu schedules them, without a TPU.
//!
//! Each kernel is compiled in a child process that leaves the compiler's schedule in a folder. Cycles are those of the
//! bundles on the executed path, with trip counts from the batch; what no schedule can show is added by a model that is
//! printed with the numbers.

mod cases;
mod model;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, anyhow, bail, ensure};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use torus_attention::{Route, Work, queue::Sequence};
use torus_mosaic::schedule::{DumpKind, Schedule, Unit, Usage, dump_of};
use torus_pjrt::CompileOptions;

use crate::{
    args::{Device, KernelBenchArgs},
    cache_dir::CacheDir,
};

use cases::{Batch, Case};
use model::{Chip, Modelled, Part};

pub fn run(args: &KernelBenchArgs, topology: &str) -> anyhow::Result<ExitCode> {
    let cache = CacheDir::new(args.cache_dir.as_deref())?;
    let libtpu = cache.pjrt_plugin(Device::Tpu, args.pjrt_plugin.as_deref())?;
    if let Some(program) = &args.compile_only {
        compile(&libtpu, topology, program)?;
        return Ok(ExitCode::SUCCESS);
    }
    let chip = Chip::of_topology(topology)?;
    let mut cases = cases::all(chip.generation)?;
    let known: Vec<_> = cases.iter().map(|case| case.name.clone()).collect();
    cases.retain(|case| args.is_chosen(&case.name));
    ensure!(!cases.is_empty(), "--case: no case is called so; there are: {}", known.join(", "));
    let bar = ProgressBar::new(cases.len() as u64)
        .with_style(indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} [{elapsed}]")?);
    let mut lines = Vec::new();
    for case in &cases {
        bar.set_message(case.name.clone());
        match case.measure(&libtpu, topology, &chip) {
            Ok(found) => lines.extend(found.into_iter().map(Ok)),
            Err(error) => lines.push(Err(format!("{}: {error:#}", case.name))),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let failed = lines.iter().filter(|line| line.is_err()).count();
    if args.json {
        let cases: Vec<_> =
            lines.iter().map(|line| line.as_ref().map_or_else(|e| json!({"error": e}), Line::json)).collect();
        println!("{}", json!({"topology": topology, "chip": chip.json(), "cases": cases}));
    } else {
        print(topology, &chip, &lines);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl KernelBenchArgs {
    fn is_chosen(&self, name: &str) -> bool {
        self.case.is_empty() || self.case.iter().any(|part| name.contains(part.as_str()))
    }
}

/// One batch of one kernel.
struct Line {
    name: String,
    work: Work,
    /// Cycles of the loops that do the work, all iterations, and of the whole path.
    loop_cycles: f64,
    path_cycles: f64,
    /// One iteration of decode's loop, or of a chunk's where it takes a whole block.
    inner: Usage,
    modelled: Modelled,
    bound: Bound,
    /// Why it takes longer than [`NEAR`] of its floor.
    reasons: Vec<String>,
}

/// What a kernel's time is made of beside its bytes, as multiples of its floor.
struct Bound {
    /// The unit with the most to do in the loops, and the cycles in which it could do it.
    unit: Unit,
    unit_of_floor: f64,
    /// Cycles outside of the loops, latencies of DMA, and the last iterations.
    outside_of_floor: f64,
}

impl Bound {
    fn new(main: &Usage, modelled: &Modelled) -> Self {
        let (unit, share) = main.busiest();
        let floor = modelled.floor();
        let outside = modelled.cycles - modelled.memory.max(main.cycles);
        Self { unit, unit_of_floor: share * main.cycles / floor, outside_of_floor: outside / floor }
    }

    fn reason(&self) -> String {
        format!(
            "{} alone needs {:.2} of the floor, latencies and what is outside of the loops {:.2}",
            self.unit.name(),
            self.unit_of_floor,
            self.outside_of_floor
        )
    }
}

/// Up to this multiple of its floor a kernel needs no excuse.
const NEAR: f64 = 1.3;

impl Case {
    /// Compiles the kernel, and costs its batches.
    fn measure(&self, libtpu: &Path, topology: &str, chip: &Chip) -> anyhow::Result<Vec<Line>> {
        let kernel = torus_attention::kernel(&self.spec, &self.shape, &self.tuning)?;
        let program = kernel.program(&torus_attention::call_options(&self.spec))?;
        let schedule = scheduled(libtpu, topology, kernel.name(), &program)?;
        self.batches.iter().map(|batch| self.line(&schedule, batch, chip)).collect()
    }

    fn line(&self, schedule: &Schedule, batch: &Batch, chip: &Chip) -> anyhow::Result<Line> {
        let (work, route) = self.way(schedule, &batch.sequences)?;
        let inner = if work.chunks > 0 { route.whole.clone() } else { route.decode.clone() };
        let parts = batch.parts(self.shape.draft).into_iter().map(|sequences| {
            let (work, route) = self.way(schedule, &sequences)?;
            let last = route.last_iterations(schedule, &work);
            Ok(Part { work, path: schedule.run(&route.path).cycles, last })
        });
        let modelled = chip.model(&work, &parts.collect::<anyhow::Result<Vec<_>>>()?);
        let main = route.main(schedule);
        let bound = Bound::new(&main, &modelled);
        let mut reasons = Vec::new();
        if modelled.ratio() > NEAR {
            reasons.push(bound.reason());
            reasons.extend(self.reasons(batch).into_iter().map(str::to_owned));
        }
        Ok(Line {
            name: format!("{} {}", self.name, batch.name),
            work,
            loop_cycles: main.cycles,
            path_cycles: schedule.run(&route.path).cycles,
            inner: schedule.usage(inner),
            reasons,
            bound,
            modelled,
        })
    }

    fn way(&self, schedule: &Schedule, sequences: &[Sequence]) -> anyhow::Result<(Work, Route)> {
        let work = Work::of(&self.spec, &self.shape, &self.tuning, sequences)?;
        let route =
            Route::new(schedule, &work).map_err(|reason| anyhow!("the schedule is not understood: {reason}"))?;
        Ok((work, route))
    }
}

impl Line {
    /// Slot use in the inner loop, the busiest unit first.
    fn shares(&self) -> Vec<(Unit, f64)> {
        let units = Unit::ALL.into_iter().filter(|unit| !unit.is_part());
        let mut shares: Vec<_> = units.map(|unit| (unit, self.inner.share(unit))).collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares
    }

    fn json(&self) -> Value {
        let shares = self.shares();
        let Work { bytes_in, bytes_out, bytes_within, kv_bytes, flops, .. } = self.work;
        json!({
            "case": self.name,
            "loop_cycles": self.loop_cycles,
            "path_cycles": self.path_cycles,
            "inner_loop": {
                "cycles": self.inner.cycles,
                "busiest": shares.first().map(|(unit, _)| unit.name()),
                "slot_use": shares.iter().map(|(unit, share)| (unit.name().to_owned(), json!(share))).collect::<Map<_, _>>(),
                "spills": self.inner.slots(Unit::Spill),
            },
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "bytes_within_hbm": bytes_within,
            "kv_bytes": kv_bytes,
            "flops": flops,
            "memory_floor_cycles": self.modelled.memory,
            "arithmetic_floor_cycles": self.modelled.arithmetic,
            "loop_of_floor": self.loop_cycles / self.modelled.floor(),
            "modelled_cycles": self.modelled.cycles,
            "modelled_of_floor": self.modelled.ratio(),
            "busiest": self.bound.unit.name(),
            "busiest_of_floor": self.bound.unit_of_floor,
            "outside_of_floor": self.bound.outside_of_floor,
            "reasons": self.reasons,
        })
    }

    fn print(&self) {
        let units = self.shares().into_iter().filter(|(_, share)| *share >= 0.1);
        let units: Vec<_> = units.map(|(unit, share)| format!("{} {:.0}%", unit.name(), share * 100.0)).collect();
        println!(
            "{:<34} {:>9.0} {:>9.0} {:>8.1} {:>9.0} {:>9.0} {:>6.3} {:>8.3} {:>6.0}  {}; {:.0} spills",
            self.name,
            self.loop_cycles,
            self.path_cycles,
            self.work.hbm_bytes() as f64 / 1e6,
            self.modelled.memory,
            self.modelled.arithmetic,
            self.loop_cycles / self.modelled.floor(),
            self.modelled.ratio(),
            self.inner.cycles,
            units.join(", "),
            self.inner.slots(Unit::Spill),
        );
    }
}

fn print(topology: &str, chip: &Chip, lines: &[Result<Line, String>]) {
    println!(
        "{topology}: cycles of libtpu's schedules at {:.2} GHz, stalls included; nothing was run on a TPU.",
        chip.hertz / 1e9
    );
    chip.assumptions().iter().for_each(|line| println!("{line}"));
    println!(
        "Columns: the loops that do the work, and the executed path; DMAs and products at the chip's rate; loop and model as \
         multiples of the longer of these; one iteration (of a chunk: one whole block) and the slots that it uses, the \
         busiest unit first.\n"
    );
    println!(
        "{:<34} {:>9} {:>9} {:>8} {:>9} {:>9} {:>6} {:>8} {:>6}  slots",
        "case", "loops", "path", "DMA MB", "DMA", "FLOP", "loops", "modelled", "inner"
    );
    for line in lines {
        match line {
            Ok(line) => line.print(),
            Err(error) => println!("{error}"),
        }
    }
    let far = |line: &&Line| line.modelled.ratio() > NEAR;
    for line in lines.iter().flatten().filter(far) {
        let reasons = if line.reasons.is_empty() { "no reason is known".to_owned() } else { line.reasons.join("; ") };
        println!("Above {NEAR}: {}: {reasons}", line.name);
    }
}

/// What the child does.
fn compile(libtpu: &Path, topology: &str, program: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(program).with_context(|| format!("--compile-only {}", program.display()))?;
    let plugin = torus_pjrt::Plugin::load(libtpu)?;
    plugin.topology(topology, &[])?.compile(&text, &CompileOptions::default())?;
    Ok(())
}

/// Compiles a program in a child process and reads the schedule of the kernel in it.
fn scheduled(libtpu: &Path, topology: &str, kernel: &str, program: &str) -> anyhow::Result<Schedule> {
    let folder = tempfile::tempdir()?;
    let (file, dumps) = (folder.path().join("program.mlir"), folder.path().join("dump"));
    fs::write(&file, program)?;
    fs::create_dir(&dumps)?;
    // What the operator set stays.
    let flags = env::var("LIBTPU_INIT_ARGS").unwrap_or_default();
    let flags = format!("{flags} --xla_jf_dump_to={} --xla_jf_dump_llo_text=true", dumps.display());
    let child = Command::new(env::current_exe().context("this program's own file is not known")?)
        .args(["bench", "kernels", "--topology", topology, "--compile-only"])
        .arg(&file)
        .arg("--pjrt-plugin")
        .arg(libtpu)
        .env("LIBTPU_INIT_ARGS", flags.trim())
        .env("TPU_SKIP_MDS_QUERY", "1")
        .env("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        .stdin(Stdio::null())
        .output()?;
    if !child.status.success() {
        let log = String::from_utf8_lossy(&child.stderr);
        let words = log.lines().rfind(|line| line.starts_with("error: ")).unwrap_or(log.trim_end());
        bail!("it does not compile: {}", words.trim_start_matches("error: "));
    }
    read(&dumps, kernel)
}

fn read(dumps: &Path, kernel: &str) -> anyhow::Result<Schedule> {
    let (mut bundles, mut utilization): (Option<PathBuf>, Option<PathBuf>) = (None, None);
    for entry in fs::read_dir(dumps)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some((found, kind)) = name.to_str().and_then(dump_of) else { continue };
        // The operation is named for the kernel, with a number behind a dot.
        if found.split('.').next() == Some(kernel) {
            match kind {
                DumpKind::Bundles => bundles = Some(entry.path()),
                DumpKind::Utilization => utilization = Some(entry.path()),
            }
        }
    }
    let (Some(bundles), Some(utilization)) = (bundles, utilization) else {
        bail!("libtpu wrote no schedule of '{kernel}'; is LIBTPU_INIT_ARGS heeded?")
    };
    Ok(Schedule::parse(&fs::read_to_string(bundles)?, &fs::read_to_string(utilization)?)?)
}
