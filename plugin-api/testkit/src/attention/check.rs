//! What a backend answers and emits, without running it.

use torus_abi::{
    TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, Target, scales_type},
    fragment::{Fragment, Operand},
};

use super::{Backend, Case, cases};
use crate::{
    Outcome, Report,
    signature::{disjoint, expect, export, well_formed},
};

/// What a backend makes of a case.
pub enum Checked {
    /// It does not serve it, for this reason.
    Declined(String),
    Emitted(AttentionAnswer, Fragment),
}

/// Checks answer and fragment of every case, for a CPU.
pub fn check_backend(backend: &dyn Backend) -> Report {
    let target = Target { platform: "cpu".to_owned(), device_kind: "cpu".to_owned() };
    let mut report = Report::default();
    for case in cases() {
        match examine(backend, &case, &target) {
            Ok(Checked::Declined(reason)) => report.add(&case.name, Outcome::Declined, reason),
            Ok(Checked::Emitted(answer, fragment)) => {
                let functions = fragment.functions.len();
                report.passed(&case.name, format_args!("score {}, {functions} functions", answer.score));
            }
            Err(reason) => report.failed(&case.name, reason),
        }
    }
    report
}

/// Asks for one case, and checks that the answer keeps the rules.
pub fn examine(backend: &dyn Backend, case: &Case, target: &Target) -> Result<Checked, String> {
    let query = case.query(target);
    let answer = backend.query(&query).map_err(|fault| format!("query: {fault}"))?;
    if backend.query(&query)? != answer {
        return Err("the same query gives different answers".to_owned());
    }
    if answer.score == 0 {
        if answer.reason.is_empty() {
            return Err("it declines without a reason".to_owned());
        }
        return Ok(Checked::Declined(answer.reason));
    }
    check_pool(&query, &answer)?;
    let request = |kind| EmitAttention { kind, query: query.clone() };
    let emit = |kind| backend.emit(&request(kind)).map_err(|fault| format!("emit: {fault}"));
    let package = emit(0)?;
    if emit(0)? != package {
        return Err("the same request emits different fragments".to_owned());
    }
    for (kind, fragment) in [(0, &package.fragment), (1, &emit(1)?.fragment)] {
        check_fragment(kind, &query, &answer, fragment)
            .map_err(|error| format!("for layers of kind {kind}: {error}"))?;
    }
    disjoint(&package.fragment, &emit(1)?.fragment).map_err(|error| format!("two kinds of layers: {error}"))?;
    Ok(Checked::Emitted(answer, package.fragment))
}

fn check_pool(query: &AttentionQuery, answer: &AttentionAnswer) -> Result<(), String> {
    if answer.scales.is_some_and(|part| !query.sets_scales || answer.pool.get(part) != Some(&scales_type())) {
        let set = if query.sets_scales { "sets" } else { "does not set" };
        return Err(format!(
            "part {:?} of its pool {:?} is to hold scales of type {}, which the host {set}",
            answer.scales,
            answer.pool,
            scales_type()
        ));
    }
    let paged = answer.pool.iter().enumerate().filter(|(part, _)| answer.scales != Some(*part));
    let bytes: Option<u64> = paged.map(|(_, tensor)| tensor.bytes()).sum();
    let said = answer.page_bytes.checked_mul(query.shape.pages);
    match (bytes, said) {
        (Some(bytes), Some(said)) if bytes == said && bytes > 0 => Ok(()),
        _ => Err(format!(
            "a layer's pool of {} pages takes {bytes:?} bytes by its types and {said:?} by 'page_bytes'",
            query.shape.pages
        )),
    }
}

fn check_fragment(
    kind: usize,
    query: &AttentionQuery,
    answer: &AttentionAnswer,
    fragment: &Fragment,
) -> Result<(), String> {
    well_formed(fragment)?;
    if let Some(import) = fragment.imports.first() {
        return Err(format!("it imports '{}', and attention is given nothing to import", import.symbol));
    }
    let numbered = |types: &[TensorType], meaning: &dyn Fn(usize) -> Operand| -> Vec<_> {
        types.iter().enumerate().map(|(part, ty)| (meaning(part), ty.clone())).collect()
    };
    let context = numbered(&answer.context, &|part| Operand::Context { kind, part });
    let pool = numbered(&answer.pool, &|part| Operand::Pool { layer: 0, part });
    let inputs: Vec<_> =
        answer.inputs.iter().map(|input| (Operand::Step(*input), input.tensor_type(&query.shape))).collect();
    let spec = &query.spec;
    let rows = |heads| TensorType::new(query.dtype, [query.shape.tokens, heads, spec.head_dim]);
    let (q, kv) = (rows(spec.q_heads), rows(spec.kv_heads));
    let new = vec![(Operand::Query, q.clone()), (Operand::Key, kv.clone()), (Operand::Value, kv)];
    let signatures = [
        ("context", inputs, context.clone()),
        ("attention", [new, pool.clone(), context].concat(), [vec![(Operand::Attended, q)], pool].concat()),
    ];
    for (name, arguments, results) in signatures {
        let (export, function) = export(fragment, name)?;
        expect(&format!("argument of '{name}'"), &export.arguments, &function.arguments, &arguments)?;
        expect(&format!("result of '{name}'"), &export.results, &function.results, &results)?;
    }
    Ok(())
}
