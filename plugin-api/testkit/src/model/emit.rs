//! What a model emits, without running it.

use std::collections::BTreeSet;

use torus_abi::{
    DType, TensorType,
    fragment::{Fragment, Operand, WeightHandle},
    model::{EmitModel, HostImports, ModelDescription, ModelPart, StateHandle, WeightRole, WeightSpec},
    step::StepShape,
};

use super::Opened;
use crate::{
    Report,
    signature::{disjoint, export, well_formed},
};

/// Both opened models are asked for both parts in several step shapes, dtypes, storages and states, by a host of the first
/// release and by today's.
pub(crate) fn check(models: [&dyn Opened; 2], description: &ModelDescription, report: &mut Report) {
    let shape = |tokens, seqs| StepShape { tokens, seqs, page_size: 16, pages: 9, page_table: 16 };
    let last = description.layers.len().saturating_sub(1);
    let captures = if description.layers.is_empty() { vec![] } else { vec![0, last] };
    for (dtype, storage, state) in
        [(DType::F32, Storage::Dense, State::KeysAndValues), (DType::Bf16, Storage::Quantized, State::Opaque)]
    {
        for (shape, capture) in [(shape(1, 1), vec![]), (shape(16, 4), vec![]), (shape(64, 8), captures.clone())] {
            let name =
                format!("step of {} tokens, {} sequences, {dtype}, {storage:?} weights", shape.tokens, shape.seqs);
            let request = |part| request(description, part, dtype, storage, state);
            let hidden = request(ModelPart::Hidden { shape, capture });
            let head = request(ModelPart::Head { rows: shape.seqs });
            report.result(name, parts(models, description, &hidden, &head));
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Storage {
    Dense,
    /// Two parts, neither of which a model could compute with by itself.
    Quantized,
}

#[derive(Clone, Copy)]
enum State {
    KeysAndValues,
    /// One part of no telling type, and a context of two.
    Opaque,
}

fn request(description: &ModelDescription, part: ModelPart, dtype: DType, storage: Storage, state: State) -> EmitModel {
    let handle = |spec: &WeightSpec| match (storage, spec.role) {
        (_, WeightRole::Vector) => dense(spec, DType::F32),
        (Storage::Dense, _) => dense(spec, dtype),
        (Storage::Quantized, _) => WeightHandle {
            parts: vec![TensorType::new(DType::I8, spec.shape.clone()), TensorType::new(DType::F32, [spec.shape[0]])],
            storage: "testkit-i8".to_owned(),
        },
    };
    let imports = HostImports { block_norms: matches!(storage, Storage::Quantized) };
    let ints = |len| TensorType::new(DType::I32, [len]);
    let state = match state {
        State::KeysAndValues => {
            StateHandle { pool: vec![TensorType::new(dtype, [144, 2, 4]); 2], context: vec![ints(7)] }
        }
        State::Opaque => {
            StateHandle { pool: vec![TensorType::new(DType::U8, [9, 77])], context: vec![ints(3), ints(5)] }
        }
    };
    EmitModel {
        part,
        dtype,
        weights: description.weights.iter().map(|spec| (spec.name.clone(), handle(spec))).collect(),
        state: vec![state; description.kinds.len()],
        imports,
        loops: None,
    }
}

/// A weight kept as one tensor of its shape.
pub(crate) fn dense(spec: &WeightSpec, dtype: DType) -> WeightHandle {
    let dtype = if spec.role == WeightRole::Vector { DType::F32 } else { dtype };
    WeightHandle { parts: vec![TensorType::new(dtype, spec.shape.clone())], storage: format!("dense-{dtype}") }
}

fn parts(
    models: [&dyn Opened; 2],
    description: &ModelDescription,
    hidden: &EmitModel,
    head: &EmitModel,
) -> Result<String, String> {
    let mut fragments = Vec::new();
    for (name, request) in [("hidden", hidden), ("head", head)] {
        let emitted = models[0].emit(request).map_err(|fault| format!("emit of '{name}': {fault}"))?;
        if models[0].emit(request)? != emitted || models[1].emit(request)? != emitted {
            return Err(format!("the same request for '{name}' emits different fragments"));
        }
        fragments.push(checked(description, request, emitted.fragment).map_err(|error| format!("'{name}': {error}"))?);
    }
    disjoint(&fragments[0], &fragments[1]).map_err(|error| format!("'hidden' and 'head': {error}"))?;
    let exports = fragments.iter().flat_map(|fragment| fragment.exports.values());
    let used: BTreeSet<_> = exports.flat_map(|export| export.arguments.clone()).collect();
    for (name, handle) in &hidden.weights {
        for part in 0..handle.parts.len() {
            if !used.contains(&Operand::Weight { name: name.clone(), part }) {
                return Err(format!("part {part} of the weight '{name}' is loaded and never used"));
            }
        }
    }
    let functions: usize = fragments.iter().map(|fragment| fragment.functions.len()).sum();
    Ok(format!("{functions} functions, {} imports", fragments.iter().map(|f| f.imports.len()).sum::<usize>()))
}

/// The fragment, if its export is what the request asked for.
pub(crate) fn checked(
    description: &ModelDescription,
    request: &EmitModel,
    fragment: Fragment,
) -> Result<Fragment, String> {
    well_formed(&fragment)?;
    let (name, expected) = match &request.part {
        ModelPart::Hidden { shape, capture } => ("hidden", hidden_results(description, request, shape, capture)),
        ModelPart::Head { rows } => {
            ("head", vec![(Operand::Logits, TensorType::new(DType::F32, [*rows, description.vocab]))])
        }
    };
    let (export, function) = export(&fragment, name)?;
    let mut seen = BTreeSet::new();
    for (meaning, found) in export.arguments.iter().zip(&function.arguments) {
        match argument_type(description, request, meaning) {
            Some(expected) if expected == *found => {}
            Some(expected) => return Err(format!("it takes {meaning:?} as {found}, which is {expected}")),
            None => return Err(format!("it takes {meaning:?}, which there is not")),
        }
        if !seen.insert(meaning) {
            return Err(format!("it takes {meaning:?} twice"));
        }
    }
    let mut results: Vec<_> = export.results.iter().cloned().zip(function.results.iter().cloned()).collect();
    for (meaning, ty) in expected {
        let Some(place) = results.iter().position(|(found, _)| *found == meaning) else {
            return Err(format!("it does not give {meaning:?}"));
        };
        let (_, found) = results.swap_remove(place);
        if found != ty {
            return Err(format!("it gives {meaning:?} as {found}, not {ty}"));
        }
    }
    match results.first() {
        Some((meaning, _)) => Err(format!("it gives {meaning:?}, which was not asked for or comes twice")),
        None => Ok(fragment),
    }
}

fn hidden_results(
    description: &ModelDescription,
    request: &EmitModel,
    shape: &StepShape,
    capture: &[usize],
) -> Vec<(Operand, TensorType)> {
    let state = TensorType::new(request.dtype, [shape.tokens, description.hidden]);
    let mut results = vec![(Operand::Hidden, state.clone())];
    for (layer, kind) in description.layers.iter().enumerate() {
        let parts = request.state[*kind].pool.iter().enumerate();
        results.extend(parts.map(|(part, ty)| (Operand::Pool { layer, part }, ty.clone())));
    }
    let captured: BTreeSet<_> = capture.iter().collect();
    results.extend(captured.into_iter().map(|layer| (Operand::Captured { layer: *layer }, state.clone())));
    results
}

/// The type of what an export may ask for, or `None` if there is no such thing.
fn argument_type(description: &ModelDescription, request: &EmitModel, meaning: &Operand) -> Option<TensorType> {
    match (meaning, &request.part) {
        (Operand::Weight { name, part }, _) => request.weights.get(name)?.parts.get(*part).cloned(),
        (Operand::Hidden, ModelPart::Head { rows }) => {
            Some(TensorType::new(request.dtype, [*rows, description.hidden]))
        }
        (Operand::Tokens | Operand::Positions, ModelPart::Hidden { shape, .. }) => {
            Some(TensorType::new(DType::I32, [shape.tokens]))
        }
        (Operand::Step(input), ModelPart::Hidden { shape, .. }) => Some(input.tensor_type(shape)),
        (Operand::Pool { layer, part }, ModelPart::Hidden { .. }) => {
            request.state.get(*description.layers.get(*layer)?)?.pool.get(*part).cloned()
        }
        (Operand::Context { kind, part }, ModelPart::Hidden { .. }) => {
            request.state.get(*kind)?.context.get(*part).cloned()
        }
        _ => None,
    }
}
