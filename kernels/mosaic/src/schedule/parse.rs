//! The two texts.

use super::{Branch, Bundle, DELAY_SLOTS, Loop, Schedule, Slots, Unit};

/// A text that is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("line {line} of the {text}: {reason}")]
    Line { text: &'static str, line: usize, reason: String },
    #[error("{bundles} bundles, but the use of {rows}: the texts are of different kernels or compilations")]
    Length { bundles: usize, rows: usize },
}

/// A file of a kernel's dump that a schedule is read from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DumpKind {
    /// `…-packed-bundles-post-ra.txt`
    Bundles,
    /// `…-pre-delay_hlo-static-per-bundle-utilization.txt`: of the same bundles, which the compiler then compresses.
    Utilization,
}

const BUNDLES: &str = "text of bundles";
const UTILIZATION: &str = "text of utilization";

/// What a file of the dump's folder holds, by its name: the kernel (an HLO operation's name: the kernel's own, a dot
/// and a number) and the part of it. `None` is for all the other files.
pub fn dump_of(file_name: &str) -> Option<(&str, DumpKind)> {
    let kinds = [
        ("-packed-bundles-post-ra.txt", DumpKind::Bundles),
        ("-pre-delay_hlo-static-per-bundle-utilization.txt", DumpKind::Utilization),
    ];
    let (rest, kind) = kinds.into_iter().find_map(|(end, kind)| Some((file_name.strip_suffix(end)?, kind)))?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (time, rest) = rest.split_once('-')?;
    let (kernel, pass) = rest.rsplit_once('-')?;
    (number(time) && number(pass)).then_some((kernel, kind))
}

pub(super) fn schedule(bundles: &str, utilization: &str) -> Result<Schedule, ScheduleError> {
    let mut parsed = parse_bundles(bundles)?;
    let (capacity, rows) = parse_utilization(utilization)?;
    if parsed.len() != rows.len() {
        return Err(ScheduleError::Length { bundles: parsed.len(), rows: rows.len() });
    }
    parsed.iter_mut().zip(rows).for_each(|(bundle, used)| bundle.used = used);
    let loops = loops(&parsed);
    Ok(Schedule { bundles: parsed, capacity, loops })
}

/// A bundle is `0x1f LB: >> { op ;; op } /* remarks */`. What precedes the first is a legend, and a line without an
/// address continues the bundle before it.
fn parse_bundles(text: &str) -> Result<Vec<Bundle>, ScheduleError> {
    let mut bundles: Vec<Bundle> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let error = |reason: String| ScheduleError::Line { text: BUNDLES, line: at + 1, reason };
        let Some((address, body)) = split_bundle(line) else {
            if let Some(last) = bundles.last_mut() {
                let address = last.branch.map_or(0, |branch| branch.at);
                read_ops(last, address, line).map_err(error)?;
            }
            continue;
        };
        if address != bundles.len() {
            return Err(error(format!("bundle {address:#x} follows {} others", bundles.len())));
        }
        let mut bundle = Bundle { empty: true, ..Bundle::default() };
        read_ops(&mut bundle, address, body).map_err(error)?;
        bundles.push(bundle);
    }
    let (count, last) = (bundles.len(), text.lines().count());
    let wild = bundles.iter().filter_map(|bundle| bundle.branch).find(|branch| branch.target > count);
    match wild {
        _ if bundles.is_empty() => {
            Err(ScheduleError::Line { text: BUNDLES, line: last, reason: "there is no bundle in it".to_owned() })
        }
        Some(branch) => Err(ScheduleError::Line {
            text: BUNDLES,
            line: last,
            reason: format!("bundle {:#x} jumps to {:#x}, but there are only {count}", branch.at, branch.target),
        }),
        None => Ok(bundles),
    }
}

/// The address and what follows the opening brace.
fn split_bundle(line: &str) -> Option<(usize, &str)> {
    let (head, body) = line.split_once('{')?;
    let mut words = head.split_whitespace();
    let address = match words.next()? {
        "0" => 0,
        hex => usize::from_str_radix(hex.strip_prefix("0x")?, 16).ok()?,
    };
    // A label, the colon, and a `>` for each loop around it.
    let known = |word: &str| word.chars().all(|c| c.is_ascii_uppercase() || c == ':' || c == '>');
    words.all(known).then_some((address, body))
}

fn read_ops(bundle: &mut Bundle, address: usize, body: &str) -> Result<(), String> {
    for op in body.split(";;") {
        let op = op.trim().trim_start_matches('}').trim();
        if op.is_empty() || op.starts_with("/*") {
            continue;
        }
        bundle.empty = false;
        // The name follows the result, or the number that stands in its place.
        let name = op.split_once(" = ").map_or(op, |(_, rest)| rest);
        let name = name.split([' ', '(']).next().unwrap_or_default();
        if name == "dma.done.wait" {
            bundle.dma_waits += 1;
        } else if name.starts_with("dma.") && name.contains("_to_") {
            bundle.dma_starts += 1;
        } else if name == "sbr.rel" || name == "sbr.abs" {
            bundle.branch = Some(branch(address, op)?);
        }
    }
    Ok(())
}

/// `7 = sbr.rel (%p1) target bundleno = 206 (0xce), region = 189`
fn branch(at: usize, op: &str) -> Result<Branch, String> {
    let target = op.split_once("target bundleno = ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let target = target.ok_or_else(|| format!("the target of '{op}' is not understood"))?;
    Ok(Branch { at, target, conditional: op.contains("sbr.rel (") || op.contains("sbr.abs (") })
}

/// A head of column names and capacities, then one row of numbers for each bundle.
fn parse_utilization(text: &str) -> Result<(Slots, Vec<Slots>), ScheduleError> {
    let error = |line: usize, reason: String| ScheduleError::Line { text: UTILIZATION, line: line + 1, reason };
    let columns: Vec<&str> = Unit::ALL.into_iter().map(Unit::name).collect();
    let (mut named, mut rows) = (false, Vec::new());
    for (at, line) in text.lines().enumerate() {
        if line.starts_with("==") || line.trim().is_empty() {
            continue;
        }
        if !named {
            let found: Vec<_> = line.split(',').map(str::trim).collect();
            if found != columns {
                return Err(error(at, format!("the columns are {found:?}, not {columns:?}")));
            }
            named = true;
            continue;
        }
        let numbers: Option<Vec<u32>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
        let row = numbers.and_then(|numbers| Slots::try_from(numbers).ok());
        rows.push(row.ok_or_else(|| error(at, format!("'{line}' is no row of {} numbers", columns.len())))?);
    }
    let mut rows = rows.into_iter();
    let capacity = rows.next().ok_or_else(|| error(0, "there is no row of capacities".to_owned()))?;
    Ok((capacity, rows.collect()))
}

/// A loop for each target of backward branches, with the last of them.
fn loops(bundles: &[Bundle]) -> Vec<Loop> {
    let mut loops: Vec<Loop> = Vec::new();
    for branch in bundles.iter().filter_map(|bundle| bundle.branch).filter(Branch::is_backward) {
        let end = (branch.at + 1 + DELAY_SLOTS).min(bundles.len());
        match loops.iter_mut().find(|other| other.bundles.start == branch.target) {
            Some(same) => same.bundles.end = same.bundles.end.max(end),
            None => loops.push(Loop { bundles: branch.target..end, parent: None }),
        }
    }
    loops.sort_by_key(|found| (found.bundles.start, std::cmp::Reverse(found.bundles.end)));
    for index in 0..loops.len() {
        let inner = loops[index].bundles.clone();
        let around = |outer: &Loop| outer.bundles.start <= inner.start && inner.end <= outer.bundles.end;
        loops[index].parent = loops[..index].iter().rposition(around);
    }
    loops
}
