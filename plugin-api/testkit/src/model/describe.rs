//! What a model says of itself.

use std::collections::BTreeSet;

use torus_abi::model::{AttentionSpec, ModelDescription, StateKind, Transform, WeightSource, WeightSpec};

use crate::Report;

pub(crate) fn check(description: &ModelDescription, report: &mut Report) {
    report.result("sizes and layers", layers(description));
    report.result("weights", weights(description));
}

fn layers(description: &ModelDescription) -> Result<String, String> {
    let ModelDescription { hidden, vocab, context_length, layers, kinds, dtype, .. } = description;
    for (name, size) in [("hidden", hidden), ("vocab", vocab), ("context_length", context_length)] {
        if *size == 0 {
            return Err(format!("'{name}' is 0"));
        }
    }
    if !dtype.is_float() {
        return Err(format!("'dtype' is {dtype}, which activations cannot be"));
    }
    if let Some(kind) = layers.iter().find(|kind| **kind >= kinds.len()) {
        return Err(format!("a layer is of kind {kind}, and there are {} kinds", kinds.len()));
    }
    if let Some(kind) = (0..kinds.len()).find(|kind| !layers.contains(kind)) {
        return Err(format!("no layer is of kind {kind}"));
    }
    for StateKind::Paged(AttentionSpec { q_heads, kv_heads, head_dim, scale, window, soft_cap }) in kinds {
        let sized = *kv_heads > 0 && *q_heads > 0 && q_heads.is_multiple_of(*kv_heads) && *head_dim > 0;
        let positive = |factor: f32| factor.is_finite() && factor > 0.0;
        if !sized || !positive(*scale) || !soft_cap.is_none_or(positive) || *window == Some(0) {
            return Err(format!("a kind of layers makes no sense: {kinds:?}"));
        }
    }
    Ok(format!("{} layers of {} kinds, hidden size {hidden}, {vocab} tokens", layers.len(), kinds.len()))
}

fn weights(description: &ModelDescription) -> Result<String, String> {
    let mut names = BTreeSet::new();
    let mut tensors = BTreeSet::new();
    for spec in &description.weights {
        if !names.insert(&spec.name) {
            return Err(format!("'{}' is listed twice", spec.name));
        }
        shape(spec).map_err(|error| format!("'{}': {error}", spec.name))?;
        tensors.extend(spec.sources.iter().map(|source| source.tensor.as_str()));
    }
    for ignored in &description.ignored_tensors {
        let matches = |tensor: &&str| match ignored.strip_suffix('*') {
            Some(start) => tensor.starts_with(start),
            None => tensor == ignored,
        };
        if let Some(tensor) = tensors.iter().copied().find(|tensor| matches(tensor)) {
            return Err(format!("the tensor '{tensor}' is needed, and ignored as '{ignored}'"));
        }
    }
    Ok(format!("{} weights from {} tensors", names.len(), tensors.len()))
}

/// Whether what the sources become is of the weight's shape.
fn shape(spec: &WeightSpec) -> Result<(), String> {
    let mut joined: Option<Vec<u64>> = None;
    for source in &spec.sources {
        let dims =
            transformed(source).map_err(|error| format!("'{}' of {:?}: {error}", source.tensor, source.shape))?;
        joined = Some(match joined {
            None => dims,
            Some(mut joined) if joined.len() == dims.len() && joined[1..] == dims[1..] => {
                joined[0] += dims[0];
                joined
            }
            Some(joined) => return Err(format!("'{}' is {dims:?} and cannot follow {joined:?}", source.tensor)),
        });
    }
    match joined {
        Some(joined) if joined == spec.shape => Ok(()),
        Some(joined) => Err(format!("its tensors make {joined:?}, and it is said to be {:?}", spec.shape)),
        None => Err("it has no source".to_owned()),
    }
}

/// The shape of a tensor after its transforms.
fn transformed(source: &WeightSource) -> Result<Vec<u64>, String> {
    let mut dims = source.shape.clone();
    if source.tensor.is_empty() || dims.is_empty() || dims.contains(&0) {
        return Err("a tensor needs a name and a shape".to_owned());
    }
    for transform in &source.transforms {
        match transform {
            Transform::Transpose if dims.len() == 2 => dims.swap(0, 1),
            Transform::Transpose => return Err(format!("{dims:?} cannot be transposed")),
            Transform::Rows { start, len } => match start.checked_add(*len) {
                Some(end) if end <= dims[0] && *len > 0 => dims[0] = *len,
                _ => return Err(format!("there are no {len} rows from {start} in {dims:?}")),
            },
            Transform::PermuteRopeRows { heads } if *heads > 0 && dims[0].is_multiple_of(2 * heads) => {}
            Transform::PermuteRopeRows { heads } => return Err(format!("{dims:?} is not {heads} heads of pairs")),
            Transform::AddConstant(_) => {}
        }
    }
    Ok(dims)
}

#[cfg(test)]
mod tests {
    use torus_abi::{fragment::LinearRole, model::WeightRole};

    use super::*;

    fn spec(shape: &[u64], sources: Vec<WeightSource>) -> WeightSpec {
        let role = WeightRole::Linear(LinearRole::Column);
        WeightSpec { name: "w".into(), shape: shape.into(), role, sources }
    }

    fn source(shape: &[u64], transforms: Vec<Transform>) -> WeightSource {
        WeightSource { tensor: "t".into(), shape: shape.into(), transforms, units: None }
    }

    #[test]
    fn shapes_follow_the_transforms() {
        let joint = vec![
            source(&[8, 3], vec![Transform::Rows { start: 2, len: 4 }]),
            source(&[3, 5], vec![Transform::Transpose]),
        ];
        assert_eq!(shape(&spec(&[9, 3], joint.clone())), Ok(()));
        assert!(shape(&spec(&[9, 4], joint)).unwrap_err().contains("make [9, 3]"));
        let beyond = vec![source(&[8, 3], vec![Transform::Rows { start: 5, len: 4 }])];
        assert!(shape(&spec(&[4, 3], beyond)).unwrap_err().contains("no 4 rows from 5"));
        let odd = vec![source(&[6, 3], vec![Transform::PermuteRopeRows { heads: 2 }])];
        assert!(shape(&spec(&[6, 3], odd)).unwrap_err().contains("not 2 heads"));
        assert!(shape(&spec(&[6, 3], vec![])).unwrap_err().contains("no source"));
    }
}
