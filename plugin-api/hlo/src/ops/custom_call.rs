//! Calls of code that is not StableHLO: kernels.

use crate::{Attribute, Func, Shape, Value, func::OpSpec};

/// A call of a kernel that the compiler or the host knows by name.
#[derive(Clone, Debug)]
pub struct CustomCall {
    pub target: String,
    pub results: Vec<Shape>,
    pub config: BackendConfig,
    /// `(result, operand)`: the result is written into the operand's buffer.
    pub aliases: Vec<(usize, usize)>,
    /// It must run even if its results are not used.
    pub has_side_effect: bool,
    /// Require row-major operands and results.
    pub row_major: bool,
    /// Further attributes: `kernel_name`.
    pub attributes: Vec<(String, Attribute)>,
}

/// What the kernel is told beside its operands. It also selects the calling convention.
#[derive(Clone, Debug)]
pub enum BackendConfig {
    /// Typed attributes, `api_version = 4`: XLA FFI.
    Typed(Vec<(String, Attribute)>),
    /// A string, `api_version = 1`: Mosaic kernels take JSON so.
    Text(String),
}

impl CustomCall {
    /// An XLA FFI call without attributes.
    pub fn new(target: impl Into<String>, results: Vec<Shape>) -> Self {
        Self {
            target: target.into(),
            results,
            config: BackendConfig::Typed(Vec::new()),
            aliases: Vec::new(),
            has_side_effect: false,
            row_major: false,
            attributes: Vec::new(),
        }
    }

    /// An XLA FFI call of a kernel of the plugin itself, with row-major operands and results. The function lists the
    /// kernel, and the linker puts the plugin's namespace into the target.
    pub fn kernel(name: &str, results: Vec<Shape>) -> Self {
        Self { row_major: true, ..Self::new(format!("{NAMESPACE}{name}"), results) }
    }

    /// Adds an attribute that the kernel reads by its name. Without effect on a call whose config is a text.
    pub fn with(mut self, name: &str, value: Attribute) -> Self {
        if let BackendConfig::Typed(entries) = &mut self.config {
            entries.push((name.to_owned(), value));
        }
        self
    }

    /// Writes a result into an operand's buffer.
    pub fn alias(mut self, result: usize, operand: usize) -> Self {
        self.aliases.push((result, operand));
        self
    }

    fn spec(&self, operands: &[Shape]) -> OpSpec {
        let (version, config) = match &self.config {
            BackendConfig::Typed(entries) => (4, Attribute::Dictionary(entries.clone())),
            BackendConfig::Text(text) => (1, Attribute::Text(text.clone())),
        };
        let mut spec = OpSpec::new("stablehlo.custom_call")
            .with("call_target_name", Attribute::Text(self.target.clone()))
            .with("api_version", Attribute::I32(version))
            .with("backend_config", config)
            .with("has_side_effect", Attribute::Bool(self.has_side_effect));
        if !self.aliases.is_empty() {
            let alias = |(result, operand): &(usize, usize)| {
                // A single result is no tuple.
                let tuple = if self.results.len() == 1 { String::new() } else { result.to_string() };
                Attribute::Verbatim(format!(
                    "#stablehlo.output_operand_alias<output_tuple_indices = [{tuple}], operand_index = {operand}, \
                     operand_tuple_indices = []>"
                ))
            };
            let list = Attribute::List(self.aliases.iter().map(alias).collect());
            spec = spec.with("output_operand_aliases", list);
        }
        if self.row_major {
            spec = spec.with("operand_layouts", layouts(operands)).with("result_layouts", layouts(&self.results));
        }
        spec.attributes.extend(self.attributes.iter().cloned());
        spec
    }
}

/// What stands before a kernel's name in a target until the fragment is linked.
const NAMESPACE: &str = "{ns}.";

/// Row-major order as XLA writes it: the axes from innermost to outermost.
fn layouts(shapes: &[Shape]) -> Attribute {
    let layout = |shape: &Shape| {
        let order: Vec<_> = (0..shape.rank()).rev().collect();
        let body = if order.is_empty() { String::new() } else { format!("{order:?}") };
        Attribute::Verbatim(format!("dense<{body}> : tensor<{}xindex>", order.len()))
    };
    Attribute::List(shapes.iter().map(layout).collect())
}

impl<'f> Func<'f> {
    #[track_caller]
    pub fn custom_call(&'f self, call: &CustomCall, operands: &[Value<'f>]) -> Vec<Value<'f>> {
        let shapes: Vec<_> = operands.iter().map(Value::shape).collect();
        if let Some(kernel) = call.target.strip_prefix(NAMESPACE) {
            self.note_kernel(kernel);
        }
        self.emit_many(call.spec(&shapes), operands, call.results.len(), |shapes| {
            for (result, operand) in &call.aliases {
                let types = (call.results.get(*result), shapes.get(*operand));
                match types {
                    (Some(a), Some(b)) if a.tensor_type() == b.tensor_type() => {}
                    _ => return Err(format!("result {result} and operand {operand} differ and cannot share a buffer")),
                }
            }
            Ok(call.results.clone())
        })
    }
}
