//! Whole programs of a model and an attention backend.

use std::collections::BTreeMap;

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, Target},
    fragment::{Export, Fragment, Function, Operand},
    model::{EmitModel, HostImports, ModelDescription, ModelPart, StateHandle, StateKind},
    step::{StepInput, StepShape},
};
use torus_hlo::{Builder, Func, Shape, Value, module_text};

use super::{
    Opened,
    emit::{checked, dense},
};
use crate::{
    attention::Backend,
    program::{callee, imports},
    signature::export,
};

/// What every program takes of a step, in order, after weights, pools and tokens.
pub(crate) const INPUTS: [StepInput; 8] = [
    StepInput::Positions,
    StepInput::CuQLens,
    StepInput::KvLens,
    StepInput::PageTable,
    StepInput::PageBegin,
    StepInput::NumSeqs,
    StepInput::TokenSeq,
    StepInput::KvSlot,
];

/// `main(weights…, pools…, tokens, step inputs…) -> (pools…, hidden or logits)`, with the pools updated in place.
pub struct Program {
    pub text: String,
    pub weights: Vec<TensorType>,
    /// Parts of the pools, layer by layer.
    pub pools: Vec<TensorType>,
}

/// Everything that the programs of one model have in common.
pub(crate) struct Assembler<'a> {
    pub model: &'a dyn Opened,
    pub description: &'a ModelDescription,
    pub backend: &'a dyn Backend,
    pub target: &'a Target,
    pub dtype: DType,
}

/// The hidden part of a model for one step shape, with dense weights of `dtype`.
pub fn hidden_program(
    model: &dyn Opened,
    backend: &dyn Backend,
    target: &Target,
    shape: StepShape,
    dtype: DType,
) -> Result<Program, String> {
    let description = &model.describe()?;
    Assembler { model, description, backend, target, dtype }.program(shape, false)
}

/// The fragments of a program.
struct Parts {
    answers: Vec<AttentionAnswer>,
    hidden: Fragment,
    head: Option<Fragment>,
    /// One for each kind of layers.
    attention: Vec<Fragment>,
}

impl Assembler<'_> {
    /// A program that ends with the hidden states or, `with_head`, with the logits of every token.
    pub fn program(&self, shape: StepShape, with_head: bool) -> Result<Program, String> {
        let parts = self.parts(shape, with_head)?;
        let weights = self.description.weights.iter().flat_map(|spec| dense(spec, self.dtype).parts).collect();
        let pools = self.description.layers.iter().flat_map(|kind| parts.answers[*kind].pool.iter().cloned()).collect();
        let mut program = Program { text: String::new(), weights, pools };
        let serving: Vec<Function> = parts
            .attention
            .iter()
            .map(|fragment| export(fragment, "attention").map(|(_, function)| function.clone()))
            .collect::<Result<_, _>>()?;
        let mut functions = self.main(shape, &program, &parts)?;
        for fragment in [&parts.hidden].into_iter().chain(&parts.head) {
            functions.extend(imports(fragment, &serving)?);
            functions.extend(fragment.functions.iter().cloned());
        }
        functions.extend(parts.attention.iter().flat_map(|fragment| fragment.functions.iter().cloned()));
        program.text = module_text("check", 1, &functions);
        Ok(program)
    }

    fn parts(&self, shape: StepShape, with_head: bool) -> Result<Parts, String> {
        let (mut answers, mut attention) = (Vec::new(), Vec::new());
        for (kind, StateKind::Paged(spec)) in self.description.kinds.iter().enumerate() {
            let query = AttentionQuery {
                spec: spec.clone(),
                dtype: self.dtype,
                kv_dtype: self.dtype,
                shape,
                target: self.target.clone(),
                sets_scales: false,
            };
            let answer = self.backend.query(&query)?;
            if answer.score == 0 {
                return Err(format!("attention for layers of kind {kind}: {}", answer.reason));
            }
            attention.push(self.backend.emit(&EmitAttention { kind, query })?.fragment);
            answers.push(answer);
        }
        let state =
            |answer: &AttentionAnswer| StateHandle { pool: answer.pool.clone(), context: answer.context.clone() };
        let emit = |part| {
            let handles = self.description.weights.iter().map(|spec| (spec.name.clone(), dense(spec, self.dtype)));
            let state = answers.iter().map(state).collect();
            let request = EmitModel {
                part,
                dtype: self.dtype,
                weights: handles.collect(),
                state,
                imports: HostImports { block_norms: true },
                loops: None,
            };
            checked(self.description, &request, self.model.emit(&request)?.fragment)
        };
        let hidden = emit(ModelPart::Hidden { shape, capture: Vec::new() })?;
        let head = with_head.then(|| emit(ModelPart::Head { rows: shape.tokens })).transpose()?;
        Ok(Parts { answers, hidden, head, attention })
    }

    fn main(&self, shape: StepShape, program: &Program, parts: &Parts) -> Result<Vec<Function>, String> {
        let mut calls = Vec::new();
        for fragment in &parts.attention {
            calls.push(export(fragment, "context")?);
        }
        calls.push(export(&parts.hidden, "hidden")?);
        if let Some(head) = &parts.head {
            calls.push(export(head, "head")?);
        }
        let builder = Builder::new("check");
        builder.main(|f| {
            let mut known = self.arguments(f, shape, program, parts);
            for (export, function) in calls {
                call(f, export, function, &mut known);
            }
            let last = if parts.head.is_some() { Operand::Logits } else { Operand::Hidden };
            self.pools(parts).chain([last]).filter_map(|meaning| known.get(&meaning).copied()).collect()
        });
        Ok(builder.finish().map_err(|error| error.to_string())?.functions)
    }

    fn pools<'p>(&self, parts: &'p Parts) -> impl Iterator<Item = Operand> + use<'_, 'p> {
        let layers = self.description.layers.iter().enumerate();
        layers.flat_map(|(layer, kind)| {
            (0..parts.answers[*kind].pool.len()).map(move |part| Operand::Pool { layer, part })
        })
    }

    fn arguments<'f>(
        &self,
        f: &'f Func<'f>,
        shape: StepShape,
        program: &Program,
        parts: &Parts,
    ) -> BTreeMap<Operand, Value<'f>> {
        let mut known = BTreeMap::new();
        let argument = |ty: &TensorType| f.argument(Shape::opaque(ty));
        for (spec, ty) in self.description.weights.iter().zip(&program.weights) {
            known.insert(Operand::Weight { name: spec.name.clone(), part: 0 }, argument(ty));
        }
        for (index, (meaning, ty)) in self.pools(parts).zip(&program.pools).enumerate() {
            known.insert(meaning, f.donated_argument(Shape::opaque(ty), index));
        }
        known.insert(Operand::Tokens, argument(&TensorType::new(DType::I32, [shape.tokens])));
        for input in INPUTS {
            known.insert(Operand::Step(input), argument(&input.tensor_type(&shape)));
        }
        known.insert(Operand::Positions, known[&Operand::Step(StepInput::Positions)]);
        known
    }
}

/// Calls an export and takes its results in. That all it asks for is known was checked with its signature.
fn call<'f>(f: &'f Func<'f>, export: &Export, function: &Function, known: &mut BTreeMap<Operand, Value<'f>>) {
    let arguments: Vec<_> = export.arguments.iter().filter_map(|meaning| known.get(meaning).copied()).collect();
    let results = f.call(&callee(function), &arguments);
    known.extend(export.results.iter().cloned().zip(results));
}
