//! The reader of schedules: on excerpts in the dump's format, and on what libtpu writes of a kernel whose loops are known.

use std::{collections::BTreeMap, env, fs, path::PathBuf};

use crate::{
    CallOptions, Elem, Kernel, Space,
    schedule::{DELAY_SLOTS, DumpKind, Path, Schedule, ScheduleError, Unit, dump_of},
    tests::tpu::{Compiler, alone_with},
};

/// A loop of 7 bundles (2 to 8) in one of 13 (1 to 13), in which a branch skips the inner one's guard.
const BUNDLES: &str = "\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 /* copy for cssa */  ;;  %4 = vsyncpa [#allocation12], 0 } /* Start region 0 */
   0x1 LB: > { %s2 = sphi %s1, %s3 /* phi copy */ } /* Start region 7 */
   0x2 LB: >> { %v1 = vld [vmem:[#allocation3 + $0x78] sm:$0xff]  ;;  %41 = dma.hbm_to_vmem [thread:$0]  (%p1), /*hbm=*/%s9 }
   0x3   : >> {}
   0x4   : >> { %v2 = vadd.f32 %v1, %v1  ;;  %15 = sbr.rel (!%p12_p8) target bundleno = 2 (0x2), region = 195 }
   0x5   : >> { %v3 = vmul.f32 %v2,
   /* a long remark */ %v2  ;;  %16 = dma.done.wait [#allocation5], 32 }
   0x6   : >> {}
   0x7   : >> {}
   0x8   : >> {} /* End region 195 */
   0x9   : > { %3117 = sbr.rel (!%p3_p7) target bundleno = 1 (0x1), region = 7 }
   0xa   : > {}
   0xb   : > {}
   0xc   : > {}
   0xd   : > { %v4 = vmov 0.0 } /* End region 7 */
   0xe   :  { %77 = sbr.rel (%p4) target bundleno = 21 (0x15), region = 8 }
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  { %6042 = vst [vmem:[#allocation80_spill] sm:$0xff] /*vst_source=*/%v4 }
  0x14   :  {}
  0x15 PF:  {} /* Start/End empty region 8 */
";

/// The use of [`BUNDLES`]: loads in bundle 2, arithmetic in 4, 5 and 13, a spill in 19.
fn utilization() -> String {
    let head = "== CAPACTIY:\n\
                MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n    \
                2     2     2     4     2     1     3     3     2     2     2\n== UTILIZATION:\n";
    let row = |at: usize| match at {
        2 => "0 0 0 0 0 0 1 0 0 0 2\n",
        4 | 5 | 13 => "0 0 0 1 0 0 0 0 0 0 0\n",
        19 => "0 0 0 0 0 0 0 0 1 1 0\n",
        _ => "0 0 0 0 0 0 0 0 0 0 0\n",
    };
    head.to_owned() + &(0..22).map(row).collect::<String>()
}

#[test]
fn loops_and_segments_are_found() {
    let schedule = Schedule::parse(BUNDLES, &utilization()).unwrap();
    assert_eq!(schedule.cycles(), 22);
    let loops: Vec<_> = schedule.loops().iter().map(|found| (found.bundles.clone(), found.parent)).collect();
    assert_eq!(loops, [(1..14, None), (2..9, Some(0))]);
    assert_eq!(schedule.segments(), [0..1, 1..2, 2..9, 9..14, 14..19, 19..21, 21..22]);
    let forward: Vec<_> = schedule.branches().filter(|branch| !branch.is_backward()).collect();
    assert_eq!((forward.len(), forward[0].at, forward[0].target, forward[0].conditional), (1, 14, 21, true));
    assert_eq!(schedule.busiest_loop(Unit::VectorLoad), Some(1));
    assert_eq!(schedule.busiest_loop(Unit::Eup), None);
}

#[test]
fn use_is_counted() {
    let schedule = Schedule::parse(BUNDLES, &utilization()).unwrap();
    let inner = schedule.usage(2..9);
    assert_eq!((inner.cycles, inner.stalls, inner.dma_starts, inner.dma_waits), (7.0, 4.0, 1.0, 1.0));
    assert_eq!((inner.slots(Unit::Valu), inner.share(Unit::Valu)), (2.0, 2.0 / 28.0));
    assert_eq!(inner.busiest(), (Unit::Scalar, 2.0 / 14.0));
    assert_eq!(schedule.usage(0..22).slots(Unit::Spill), 1.0);
}

#[test]
fn a_path_counts_what_is_executed() {
    let schedule = Schedule::parse(BUNDLES, &utilization()).unwrap();
    assert_eq!(schedule.run(&Path::new()).cycles, 22.0);
    // 1 + 3 * (6 + 5 * 7) + 8
    let path = Path::new().trips(0, 3.0).trips(1, 5.0);
    let run = schedule.run(&path);
    assert_eq!((run.cycles, run.slots(Unit::VectorLoad), run.slots(Unit::Spill)), (132.0, 15.0, 1.0));
    // The delay slots of a branch are executed in any case; what it skips is not.
    let executed = schedule.executions(&path.clone().taken(14, 1.0));
    assert_eq!((executed[18], executed[19], executed[20], executed[21]), (1.0, 0.0, 0.0, 1.0));
    let run = schedule.run(&path.taken(14, 0.25));
    assert_eq!((run.cycles, run.slots(Unit::Spill)), (131.5, 0.75));
    assert_eq!(schedule.run(&Path::new().trips(0, 0.0)).cycles, 9.0);
    let path = Path::new().trips(0, 3.0).trips(1, 5.0);
    assert_eq!(schedule.run_within(&path, &[0..1, 2..9]).cycles, 106.0);
}

#[test]
fn what_is_not_understood_is_an_error() {
    let parse = |bundles: &str, utilization: &str| Schedule::parse(bundles, utilization).unwrap_err();
    let rows = utilization();
    assert_eq!(
        parse(BUNDLES, rows.trim_end().rsplit_once('\n').unwrap().0),
        ScheduleError::Length { bundles: 22, rows: 21 }
    );
    let line = |error: ScheduleError| match error {
        ScheduleError::Line { line, reason, .. } => (line, reason),
        other => panic!("{other}"),
    };
    assert_eq!(line(parse("", &rows)).1, "there is no bundle in it");
    assert_eq!(line(parse(&BUNDLES.replace("   0x3   :", "   0x4   :"), &rows)).0, 8);
    assert!(line(parse(&BUNDLES.replace("21 (0x15)", "somewhere"), &rows)).1.contains("target"));
    assert!(line(parse(&BUNDLES.replace("21 (0x15)", "99 (0x63)"), &rows)).1.contains("0x63"));
    assert!(line(parse(BUNDLES, &rows.replace("XLU, ", "")).clone()).1.contains("MATPUSH"));
    assert_eq!(line(parse(BUNDLES, &rows.replace("0 0 0 0 0 0 1 0 0 0 2", "0 0 0 -1 0 0 1 0 0 0 2"))).0, 7);
}

#[test]
fn files_are_known_by_their_names() {
    let name = "1795750997978236034-sum_pages.1-65-packed-bundles-post-ra.txt";
    assert_eq!(dump_of(name), Some(("sum_pages.1", DumpKind::Bundles)));
    let name = "17957-a-b.2-68-pre-delay_hlo-static-per-bundle-utilization.txt";
    assert_eq!(dump_of(name), Some(("a-b.2", DumpKind::Utilization)));
    assert_eq!(dump_of("1-dk.1-64-schedule-analysis_packed-bundles-post-ra.txt"), None);
    assert_eq!(dump_of("1-dk.1-70-final_hlo-static-per-bundle-utilization.txt"), None);
}

/// A loop of `rows` in one of `blocks`, with a product in the inner one, and two ways through the outer.
fn nested() -> Kernel {
    Kernel::build("nested", |k| {
        let counts = k.prefetch(Elem::I32.of([3]));
        let a = k.input(Space::Vmem, Elem::Bf16.of([64, 16, 128]));
        let b = k.input(Space::Vmem, Elem::Bf16.of([128, 128]));
        let out = k.output(Space::Vmem, Elem::F32.of([16, 128]));
        out.store(k.zeros(Elem::F32.of([16, 128])));
        k.for_range(0, counts.get((0,)), &[], |block, _| {
            k.for_range(0, counts.get((1,)), &[], |row, _| {
                let product = a.load_at((row,)).dot(b.load());
                out.store(out.load() + product);
                Vec::new()
            });
            k.if_else(
                block.lt(counts.get((2,))),
                || {
                    (0..8).for_each(|_| out.store((out.load() + 1.0).exp2()));
                    Vec::new()
                },
                || {
                    (0..4).for_each(|_| out.store(out.load().rsqrt()));
                    Vec::new()
                },
            );
            Vec::new()
        });
    })
    .unwrap()
}

#[test]
fn libtpu_writes_schedules_that_are_read() {
    let folder = env::temp_dir().join(format!("torus-schedule-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let options = format!("--xla_jf_dump_to={} --xla_jf_dump_llo_text=true", folder.display());
    alone_with(
        "tests::schedule::compile",
        &[("LIBTPU_INIT_ARGS", &options), ("TORUS_TEST_DUMP", &folder.display().to_string())],
    );
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
#[ignore = "run by libtpu_writes_schedules_that_are_read"]
fn compile() {
    let folder = PathBuf::from(env::var("TORUS_TEST_DUMP").unwrap());
    for compiler in Compiler::all() {
        let options = CallOptions { disable_bounds_checks: true, ..compiler.options() };
        compiler.compile(&nested(), &options).unwrap_or_else(|error| panic!("{error}"));
        let schedule = read(&folder, "nested");
        let loops: Vec<_> = schedule.loops().iter().map(|found| found.parent).collect();
        assert_eq!(loops, [None, Some(0)], "{:?}", schedule.loops());
        let inner = schedule.loops()[1].bundles.clone();
        assert_eq!(schedule.busiest_loop(Unit::Matmul), Some(1));
        let body = schedule.usage(inner.clone());
        assert!(body.slots(Unit::Matmul) > 0.0 && body.slots(Unit::Eup) == 0.0 && body.stalls > 0.0, "{body:?}");
        // The loop's body is closed by its branch and the delay slots.
        let last = schedule.branches().filter(|branch| branch.target == inner.start).last().unwrap();
        assert_eq!(last.at + 1 + DELAY_SLOTS, inner.end);

        // The branch over the exponentials, taken or not, inside of the outer loop.
        let exponentials = |path: &Path| schedule.run(path).slots(Unit::Eup);
        let path = Path::new().trips(0, 10.0).trips(1, 7.0);
        let run = schedule.run(&path);
        let once = schedule.run(&Path::new().trips(0, 10.0).trips(1, 6.0));
        assert_eq!(run.cycles - once.cycles, 10.0 * body.cycles);
        assert_eq!(run.slots(Unit::Matmul), 70.0 * body.slots(Unit::Matmul));
        let skips: Vec<_> = schedule.branches().filter(|branch| !branch.is_backward() && branch.conditional).collect();
        let ways: BTreeMap<_, _> =
            skips.iter().map(|skip| (skip.at, exponentials(&path.clone().taken(skip.at, 1.0)))).collect();
        assert!(ways.values().any(|way| *way < exponentials(&path)), "{ways:?} of {}", exponentials(&path));
        fs::read_dir(&folder).unwrap().for_each(|entry| fs::remove_file(entry.unwrap().path()).unwrap());
    }
}

fn read(folder: &std::path::Path, kernel: &str) -> Schedule {
    let mut texts = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if let Some((name, kind)) = dump_of(path.file_name().unwrap().to_str().unwrap())
            && name.starts_with(kernel)
        {
            texts.insert(kind == DumpKind::Bundles, fs::read_to_string(&path).unwrap());
        }
    }
    Schedule::parse(&texts[&true], &texts[&false]).unwrap()
}
