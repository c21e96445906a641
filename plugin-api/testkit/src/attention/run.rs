//! Runs what a backend emits and compares the numbers.

use torus_abi::{
    TensorType,
    attention::{AttentionAnswer, Target},
    fragment::Fragment,
};
use torus_hlo::{Builder, Shape, module_text};

use super::{Backend, Case, Checked, Oracle, Rows, cases, examine, tolerance};
use crate::{
    Device, Outcome, Report, Tensor,
    numbers::{decode, floats, noise, zeros},
    program::callee,
    signature::export,
    step,
};

/// Checks and runs every case.
pub fn run(backend: &dyn Backend, device: &impl Device, target: &Target) -> Report {
    let mut report = Report::default();
    for case in cases() {
        let outcome = examine(backend, &case, target).and_then(|checked| match checked {
            Checked::Declined(reason) => Ok((Outcome::Declined, reason)),
            Checked::Emitted(answer, fragment) => {
                let difference = run_case(&case, &answer, &fragment, device)?;
                Ok((Outcome::Passed, format!("score {}, differs by {difference:.1e}", answer.score)))
            }
        });
        match outcome {
            Ok((outcome, detail)) => report.add(&case.name, outcome, detail),
            Err(reason) => report.failed(&case.name, reason),
        }
    }
    if report.findings.iter().all(|finding| finding.outcome == Outcome::Declined) {
        report.failed("attention", "it serves none of the kinds that were asked for");
    }
    report
}

/// `main(query, key, value, pool…, step inputs…) -> (attended, pool…)`, with the pool updated in place.
pub fn program(case: &Case, answer: &AttentionAnswer, fragment: &Fragment) -> Result<String, String> {
    let (_, context) = export(fragment, "context")?;
    let (_, attention) = export(fragment, "attention")?;
    let builder = Builder::new("check");
    builder.main(|f| {
        let new: Vec<_> = new_types(case).iter().map(|ty| f.argument(Shape::opaque(ty))).collect();
        let pool = answer.pool.iter().enumerate();
        let pool: Vec<_> = pool.map(|(part, ty)| f.donated_argument(Shape::opaque(ty), 1 + part)).collect();
        let inputs = answer.inputs.iter().map(|input| f.argument(Shape::opaque(&input.tensor_type(&case.shape))));
        let parts = f.call(&callee(context), &inputs.collect::<Vec<_>>());
        f.call(&callee(attention), &[new, pool, parts].concat())
    });
    let main = builder.finish().map_err(|error| error.to_string())?;
    Ok(module_text("check", 1, fragment.functions.iter().chain(&main.functions)))
}

/// Types of query, key and value.
fn new_types(case: &Case) -> [TensorType; 3] {
    let spec = &case.spec;
    [spec.q_heads, spec.kv_heads, spec.kv_heads]
        .map(|heads| TensorType::new(case.dtype, [case.shape.tokens, heads, spec.head_dim]))
}

/// Runs all steps of a case. Returns the largest difference from the oracle, or where it is larger than allowed.
pub fn run_case(
    case: &Case,
    answer: &AttentionAnswer,
    fragment: &Fragment,
    device: &impl Device,
) -> Result<f32, String> {
    let program = device.compile(&program(case, answer, fragment)?).map_err(|e| format!("it does not compile: {e}"))?;
    let mut pool: Vec<Tensor> = answer.pool.iter().map(zeros).collect::<Result<_, _>>()?;
    if let Some(part) = answer.scales {
        pool[part] = floats(answer.pool[part].clone(), &[1.0; 2]);
    }
    let tables = case.schedule.tables(&case.shape, case.seed);
    let mut oracle = Oracle::new(&case.spec, &case.schedule);
    let mut largest = 0f32;
    for (number, chunks) in case.schedule.steps.iter().enumerate() {
        let rows = draw(case, number as u64);
        let types = new_types(case);
        let mut arguments: Vec<_> = types.iter().zip(&rows).map(|(ty, row)| floats(ty.clone(), row)).collect();
        arguments.append(&mut pool);
        let mut inputs = step::inputs(&case.shape, &tables, chunks);
        for input in &answer.inputs {
            arguments.push(inputs.remove(input).ok_or_else(|| format!("it asks for {input:?} twice"))?);
        }
        let arguments: Vec<_> = arguments.iter().collect();
        let mut results = device.run(&program, &arguments).map_err(|error| format!("it does not run: {error}"))?;
        if results.len() != 1 + answer.pool.len() {
            return Err(format!("it gives {} results", results.len()));
        }
        let attended = decode(&results.remove(0), case.dtype);
        pool = answer.pool.iter().cloned().zip(results).map(|(ty, bytes)| Tensor { ty, bytes }).collect();
        let expected = oracle.step(chunks, &Rows { queries: &rows[0], keys: &rows[1], values: &rows[2] });
        let difference = compare(case, &attended, &expected);
        largest = largest.max(difference.map_err(|error| format!("step {number}, {error}"))?);
    }
    Ok(largest)
}

/// Queries, keys and values of a step, for padding tokens too.
fn draw(case: &Case, step: u64) -> [Vec<f32>; 3] {
    const QUERY_RANGE: f32 = 6.0;
    let types = new_types(case);
    std::array::from_fn(|i| {
        let seed = case.seed * 1_000 + step * 10 + i as u64;
        let range = if i == 0 { QUERY_RANGE } else { 1.0 };
        noise(seed, types[i].elements().unwrap_or(0) as usize, range, case.dtype)
    })
}

/// The largest difference of real tokens; an error if it is too large, or padding is not finite.
fn compare(case: &Case, found: &[f32], expected: &[f32]) -> Result<f32, String> {
    let (dim, heads) = (case.spec.head_dim as usize, case.spec.q_heads as usize);
    let place = |i: usize| format!("token {}, head {}, element {}", i / dim / heads, i / dim % heads, i % dim);
    let allowed = tolerance(case.dtype);
    let mut largest = 0f32;
    if found.len() < expected.len() {
        return Err(format!("{} elements come out, and {} are tokens'", found.len(), expected.len()));
    }
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        if difference.is_nan() || difference > allowed {
            return Err(format!("{}: {found}, and {expected} is right (within {allowed:e})", place(i)));
        }
        largest = largest.max(difference);
    }
    match found.iter().position(|value| !value.is_finite()) {
        Some(i) => Err(format!("{}, which is padding: {}, not a finite number", place(i), found[i])),
        None => Ok(largest),
    }
}
