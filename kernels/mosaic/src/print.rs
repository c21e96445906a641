//! The versioned textual form, as libtpu reads it: MLIR's generic form, operations of the `stable_mosaic` dialect, one a
//! line. The same kernel gives the same bytes.
//!
//! A version is a promise about attributes, and libtpu reads all versions up to its own. What changed between them, of
//! what is printed here: `dynamic_gather` names its axes as a list from 5 on, `iota` from 6, `wait_dma2` has segment
//! sizes from 7, `enqueue_dma` `strict_ordering` from 8, `matmul` `transpose_lhs_hint` from 13, and 14 made the segment
//! lists of `enqueue_dma` and `sem_signal` longer by one.

use std::{fmt::Write, ops::RangeInclusive};

use crate::{
    Kernel,
    ir::{Binary, Block, Id, Op, OpKind, Predicate, Product, Reduction, Scalar, Types, Unary},
    types::{Elem, Type},
};

/// Versions that can be printed.
pub const VERSIONS: RangeInclusive<u32> = 4..=15;

/// A version that cannot be printed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel '{kernel}' needs a version of the format from {least} to {}, not {version}", VERSIONS.end())]
pub struct VersionError {
    pub kernel: String,
    pub version: u32,
    pub least: u32,
}

impl Kernel {
    /// The kernel's text in a version of the format; [`Kernel::minimum_version`] is the most portable choice.
    pub fn text(&self, version: u32) -> Result<String, VersionError> {
        let least = self.minimum_version();
        if !(least..=*VERSIONS.end()).contains(&version) {
            return Err(VersionError { kernel: self.name.clone(), version, least });
        }
        let mut printer = Printer { types: &self.types, version, out: String::with_capacity(1 << 16) };
        printer.module(self);
        Ok(printer.out)
    }
}

struct Printer<'a> {
    types: &'a Types,
    version: u32,
    out: String,
}

/// Writing to a string cannot fail.
macro_rules! put {
    ($printer:expr, $($argument:tt)*) => {
        let _ = write!($printer.out, $($argument)*);
    };
}

impl Printer<'_> {
    fn module(&mut self, kernel: &Kernel) {
        put!(self, "module attributes {{stable_mosaic.version = {} : i64}} {{\n", self.version);
        put!(self, "  \"stable_mosaic.func.func\"() ({{\n  ^bb0(");
        let parameters: Vec<Id> = kernel.parameters().collect();
        self.arguments(&parameters);
        put!(self, "):\n");
        for op in &kernel.body.ops {
            self.op(op, 2);
        }
        put!(self, "    \"stable_mosaic.func.return\"() : () -> ()\n  }})");
        put!(self, " {{dimension_semantics = [], function_type = (");
        self.type_list(&parameters);
        let prefetched = kernel.operands.iter().filter(|operand| operand.prefetched).count();
        put!(self, ") -> (), scalar_prefetch = {prefetched} : i64");
        put!(self, ", scratch_operands = {} : i64, sym_name = \"{}\"", kernel.scratch.len(), kernel.name);
        put!(self, ", tpu.core_type = #tpu.core_type<tc>}} : () -> ()\n}}\n");
    }

    fn op(&mut self, op: &Op, depth: usize) {
        self.indent(depth);
        if !op.results.is_empty() {
            self.values(&op.results);
            put!(self, " = ");
        }
        put!(self, "\"stable_mosaic.{}\"(", self.name(op));
        self.values(&op.operands);
        put!(self, ")");
        for (i, region) in op.regions.iter().enumerate() {
            put!(self, "{}", if i == 0 { " (" } else { ", " });
            self.region(region, op, i, depth);
        }
        if !op.regions.is_empty() {
            put!(self, ")");
        }
        let attributes = self.attributes(op);
        if !attributes.is_empty() {
            put!(self, " {{{attributes}}}");
        }
        put!(self, " : (");
        self.type_list(&op.operands);
        put!(self, ") -> (");
        self.type_list(&op.results);
        put!(self, ")\n");
    }

    fn region(&mut self, region: &Block, parent: &Op, index: usize, depth: usize) {
        put!(self, "{{\n");
        if !region.arguments.is_empty() {
            self.indent(depth);
            put!(self, "^bb0(");
            self.arguments(&region.arguments);
            put!(self, "):\n");
        }
        for op in &region.ops {
            self.op(op, depth + 1);
        }
        self.indent(depth + 1);
        let terminator = if parent.kind == OpKind::While && index == 0 { "condition" } else { "yield" };
        put!(self, "\"stable_mosaic.scf.{terminator}\"(");
        self.values(&region.yields);
        put!(self, ") : (");
        self.type_list(&region.yields);
        put!(self, ") -> ()\n");
        self.indent(depth);
        put!(self, "}}");
    }

    fn indent(&mut self, depth: usize) {
        (0..depth).for_each(|_| self.out.push_str("  "));
    }

    fn arguments(&mut self, ids: &[Id]) {
        for (i, id) in ids.iter().enumerate() {
            put!(self, "{}%{}: {}", if i == 0 { "" } else { ", " }, id.index(), self.types[*id]);
        }
    }

    fn values(&mut self, ids: &[Id]) {
        for (i, id) in ids.iter().enumerate() {
            put!(self, "{}%{}", if i == 0 { "" } else { ", " }, id.index());
        }
    }

    fn type_list(&mut self, ids: &[Id]) {
        for (i, id) in ids.iter().enumerate() {
            put!(self, "{}{}", if i == 0 { "" } else { ", " }, self.types[*id]);
        }
    }

    fn elem(&self, id: Id) -> Elem {
        self.types[id].elem().unwrap_or(Elem::I32)
    }

    fn name(&self, op: &Op) -> &'static str {
        let float = op.operands.first().is_some_and(|id| self.elem(*id).is_float());
        match &op.kind {
            OpKind::Constant(_) => "arith.constant",
            OpKind::Unary(unary) => unary_name(*unary),
            OpKind::Binary(binary) => binary_name(*binary, float),
            OpKind::Compare(_) if float => "arith.cmpf",
            OpKind::Compare(_) => "arith.cmpi",
            OpKind::Select => "arith.select",
            OpKind::Cast => cast_name(self.elem(op.operands[0]), self.elem(op.results[0])),
            OpKind::Bitcast if self.types[op.results[0]].dims().is_empty() => "arith.bitcast",
            OpKind::Bitcast => "tpu.bitcast",
            OpKind::IndexCast => "arith.index_cast",
            OpKind::AssumeMultiple(_) => "tpu.assume_multiple",
            OpKind::Broadcast => "vector.broadcast",
            // To the same shape, which the compiler drops: the hardware's lanes always hold something.
            OpKind::ShapeCast | OpKind::Freeze => "vector.shape_cast",
            OpKind::Reduce(..) => "vector.multi_reduction",
            OpKind::Iota(_) => "tpu.iota",
            OpKind::Transpose(_) => "tpu.transpose",
            OpKind::Concatenate(_) => "tpu.concatenate",
            OpKind::Slice(_) => "vector.extract_strided_slice",
            OpKind::Rotate { .. } => "tpu.dynamic_rotate",
            OpKind::Gather(_) => "tpu.dynamic_gather",
            OpKind::Extract(_) => "vector.extract",
            OpKind::Matmul(_) => "tpu.matmul",
            OpKind::Load { strides } if strides.is_empty() => "vector.load",
            OpKind::Load { .. } => "tpu.strided_load",
            OpKind::Store { strides, .. } if strides.is_empty() => "tpu.vector_store",
            OpKind::Store { .. } => "tpu.strided_store",
            OpKind::ScalarLoad => "memref.load",
            OpKind::ScalarStore => "memref.store",
            OpKind::RefSlice => "tpu.memref_slice",
            OpKind::RefSqueeze(_) => "tpu.memref_squeeze",
            OpKind::RefReshape => "tpu.memref_reshape",
            OpKind::RefBitcast => "tpu.memref_bitcast",
            OpKind::DmaStart => "tpu.enqueue_dma",
            OpKind::DmaWait => "tpu.wait_dma2",
            OpKind::SemaphoreSignal => "tpu.sem_signal",
            OpKind::SemaphoreWait => "tpu.sem_wait",
            OpKind::SemaphoreRead => "tpu.sem_read",
            OpKind::For => "scf.for",
            OpKind::If => "scf.if",
            OpKind::While => "scf.while",
        }
    }

    /// The attributes, sorted by name.
    fn attributes(&self, op: &Op) -> String {
        const FASTMATH: &str = "fastmath = #arith.fastmath<none>";
        const OVERFLOW: &str = "overflowFlags = #arith.overflow<none>";
        let float = op.operands.first().is_some_and(|id| self.elem(*id).is_float());
        match &op.kind {
            OpKind::Constant(number) => format!("value = {}", constant(&self.types[op.results[0]], *number)),
            OpKind::Unary(Unary::Reciprocal { approximate }) => format!("approx = {approximate}, full_range = true"),
            OpKind::Unary(Unary::AbsInt) => String::new(),
            OpKind::Unary(_) => FASTMATH.to_owned(),
            OpKind::Binary(_) if float => FASTMATH.to_owned(),
            OpKind::Binary(Binary::Add | Binary::Sub | Binary::Mul | Binary::ShiftLeft) => OVERFLOW.to_owned(),
            OpKind::Compare(predicate) if float => {
                format!("{FASTMATH}, predicate = {} : i64", float_predicate(*predicate))
            }
            OpKind::Compare(predicate) => format!("predicate = {} : i64", int_predicate(*predicate)),
            OpKind::Cast if cast_name(self.elem(op.operands[0]), self.elem(op.results[0])) == "arith.trunci" => {
                OVERFLOW.to_owned()
            }
            OpKind::AssumeMultiple(multiple) => format!("multiple = {multiple} : i32"),
            OpKind::Reduce(reduction, axis) => {
                let kind = reduction_kind(*reduction, float);
                format!("kind = #vector.kind<{kind}>, reduction_dims = array<i64: {axis}>")
            }
            OpKind::Iota(axis) => self.axis_list(*axis, 6),
            OpKind::Gather(axis) => self.axis_list(*axis, 5),
            OpKind::Transpose(permutation) => format!("permutation = array<i64: {}>", list(permutation)),
            OpKind::Concatenate(axis) => format!("dimension = {axis} : i32"),
            OpKind::Slice(offsets) => {
                let sizes = self.types[op.results[0]].dims();
                let ones = vec![1; sizes.len()];
                format!("offsets = [{}], sizes = [{}], strides = [{}]", list(offsets), list(sizes), list(&ones))
            }
            OpKind::Rotate { axis, stride: None } => format!("dimension = {axis} : si32"),
            OpKind::Rotate { axis, stride: Some((stride, row_axis)) } => {
                format!("dimension = {axis} : si32, stride = {stride} : si32, stride_dimension = {row_axis} : si32")
            }
            OpKind::Extract(position) => format!("static_position = array<i64: {}>", list(position)),
            OpKind::Matmul(product) => self.matmul(*product),
            OpKind::Load { strides } if !strides.is_empty() => format!("strides = array<i32: {}>", list(strides)),
            OpKind::Store { strides, .. } if !strides.is_empty() => format!("strides = array<i32: {}>", list(strides)),
            OpKind::Store { masked, .. } => {
                let mask = u32::from(*masked);
                let positions = op.operands.len() - 2 - mask as usize;
                format!(
                    "add = false, operandSegmentSizes = array<i32: 1, 1, {positions}, {mask}>, strides = array<i32>"
                )
            }
            OpKind::RefSlice => {
                let Type::Ref(boxed) = &self.types[op.results[0]] else { return String::new() };
                let dynamic = boxed.dims.iter().filter(|dim| dim.is_none()).count();
                format!("operandSegmentSizes = array<i32: 1, {}, {dynamic}>", boxed.dims.len())
            }
            OpKind::DmaStart => self.dma_start(),
            OpKind::DmaWait => {
                let order = if self.version >= 8 { ", strict_ordering = false" } else { "" };
                format!("operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>{order}")
            }
            OpKind::SemaphoreSignal => {
                let segments = if self.version >= 14 { "1, 1, 0, 0, 0" } else { "1, 1, 0, 0" };
                format!("operandSegmentSizes = array<i32: {segments}>")
            }
            _ => String::new(),
        }
    }

    fn axis_list(&self, axis: usize, since: u32) -> String {
        match self.version >= since {
            true => format!("dimensions = array<i32: {axis}>"),
            false => format!("dimension = {axis} : i32"),
        }
    }

    fn dma_start(&self) -> String {
        let segments = if self.version >= 14 { "1, 0, 1, 1, 0, 0, 0" } else { "1, 0, 1, 1, 0, 0" };
        let order = if self.version >= 8 { ", strict_ordering = false" } else { "" };
        format!("operandSegmentSizes = array<i32: {segments}>, priority = 0 : i32{order}")
    }

    /// The output's axes are the left operand's other axis and the right operand's, as pairs of operand and axis.
    fn matmul(&self, product: Product) -> String {
        let Product { lhs_axis, rhs_axis, exact } = product;
        let (m, n) = (1 - lhs_axis, 1 - rhs_axis);
        let precision = if exact { "precision = #tpu.contract_precision<fp32>, " } else { "" };
        let hint = if self.version >= 13 { "transpose_lhs_hint = false, " } else { "" };
        format!(
            "dimension_numbers = #tpu.dot_dimension_numbers<[{lhs_axis}], [{rhs_axis}], [{m}], [{n}], \
             [0, {m}, 1, {n}], [], []>, {precision}transpose_lhs = false, {hint}transpose_rhs = false"
        )
    }
}

fn list(numbers: &[usize]) -> String {
    let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
    numbers.join(", ")
}

fn unary_name(unary: Unary) -> &'static str {
    match unary {
        Unary::Exp => "math.exp",
        Unary::Exp2 => "math.exp2",
        Unary::Log => "math.log",
        Unary::Tanh => "math.tanh",
        Unary::Sqrt => "math.sqrt",
        Unary::Rsqrt => "math.rsqrt",
        Unary::AbsFloat => "math.absf",
        Unary::AbsInt => "math.absi",
        Unary::Floor => "math.floor",
        Unary::Ceil => "math.ceil",
        Unary::RoundEven => "math.roundeven",
        Unary::Reciprocal { .. } => "tpu.reciprocal",
    }
}

fn binary_name(binary: Binary, float: bool) -> &'static str {
    match (binary, float) {
        (Binary::Add, true) => "arith.addf",
        (Binary::Add, false) => "arith.addi",
        (Binary::Sub, true) => "arith.subf",
        (Binary::Sub, false) => "arith.subi",
        (Binary::Mul, true) => "arith.mulf",
        (Binary::Mul, false) => "arith.muli",
        (Binary::Div, true) => "arith.divf",
        (Binary::Div, false) => "arith.divsi",
        (Binary::Max, true) => "arith.maximumf",
        (Binary::Max, false) => "arith.maxsi",
        (Binary::Min, true) => "arith.minimumf",
        (Binary::Min, false) => "arith.minsi",
        (Binary::Rem, _) => "arith.remsi",
        (Binary::And, _) => "arith.andi",
        (Binary::Or, _) => "arith.ori",
        (Binary::Xor, _) => "arith.xori",
        (Binary::ShiftLeft, _) => "arith.shli",
        (Binary::ShiftRight, _) => "arith.shrsi",
        (Binary::ShiftRightLogical, _) => "arith.shrui",
    }
}

fn cast_name(from: Elem, to: Elem) -> &'static str {
    match (from.is_float(), to.is_float()) {
        (true, true) if from.bits() < to.bits() => "arith.extf",
        (true, true) => "arith.truncf",
        (true, false) => "arith.fptosi",
        (false, true) => "arith.sitofp",
        (false, false) if from == Elem::I1 => "arith.extui",
        (false, false) if from.bits() < to.bits() => "arith.extsi",
        (false, false) => "arith.trunci",
    }
}

/// MLIR's numbers of the comparisons. For floats those that are false for NaN.
fn float_predicate(predicate: Predicate) -> u32 {
    match predicate {
        Predicate::Eq => 1,
        Predicate::Gt => 2,
        Predicate::Ge => 3,
        Predicate::Lt => 4,
        Predicate::Le => 5,
        Predicate::Ne => 6,
    }
}

fn int_predicate(predicate: Predicate) -> u32 {
    match predicate {
        Predicate::Eq => 0,
        Predicate::Ne => 1,
        Predicate::Lt => 2,
        Predicate::Le => 3,
        Predicate::Gt => 4,
        Predicate::Ge => 5,
    }
}

fn reduction_kind(reduction: Reduction, float: bool) -> &'static str {
    match (reduction, float) {
        (Reduction::Sum, _) => "add",
        (Reduction::Max, true) => "maximumf",
        (Reduction::Max, false) => "maxsi",
        (Reduction::Min, true) => "minimumf",
        (Reduction::Min, false) => "minsi",
    }
}

/// Floats as bit patterns: exact, infinities included.
fn constant(ty: &Type, number: Scalar) -> String {
    let elem = ty.elem().unwrap_or(Elem::I32);
    let text = match (number, elem) {
        (Scalar::Int(value), Elem::I1) => (value != 0).to_string(),
        (Scalar::Int(value), _) => value.to_string(),
        (Scalar::Float(value), Elem::Bf16) => format!("0x{:04X}", half::bf16::from_f32(value).to_bits()),
        (Scalar::Float(value), _) => format!("0x{:08X}", value.to_bits()),
    };
    match ty {
        Type::Vector(_) => format!("dense<{text}> : {ty}"),
        _ if elem == Elem::I1 => text,
        _ => format!("{text} : {ty}"),
    }
}
