//! Text in MLIR's generic form: one operation a line, attributes sorted, no locations. The same graph gives the same
//! bytes, so text may serve as a cache key.
//!
//! Generic form is chosen over the pretty one because custom syntax is what changes between versions of StableHLO.

use std::fmt::Write;

use crate::{
    Shape,
    ir::{Attribute, Attributes, Op, Region, Ssa},
};

/// The types of the values of a function, by number.
pub(crate) type Types<'a> = &'a [Shape];

/// One argument of a function as its signature shows it.
pub(crate) struct Parameter {
    pub ssa: Ssa,
    pub attributes: Attributes,
}

/// Everything of a function's text after its name: signature and body.
pub(crate) fn function_tail(parameters: &[Parameter], results: &[Ssa], body: &Region, types: Types) -> String {
    let mut out = String::with_capacity(128 * (body.ops.len() + 4));
    out.push('(');
    for (i, parameter) in parameters.iter().enumerate() {
        comma(i, &mut out);
        let _ = write!(out, "{}: ", parameter.ssa);
        tensor(&types[parameter.ssa.0 as usize], &mut out);
        attributes(&parameter.attributes, &mut out);
    }
    out.push_str(") -> (");
    type_list(results, types, &mut out);
    out.push_str(") {\n");
    let printer = Printer { types };
    for op in &body.ops {
        printer.op(op, 1, &mut out);
    }
    let terminator = Op {
        name: "func.return",
        operands: results.to_vec(),
        attributes: Vec::new(),
        regions: Vec::new(),
        results: Vec::new(),
    };
    printer.op(&terminator, 1, &mut out);
    out.push_str("}\n");
    out
}

struct Printer<'a> {
    types: Types<'a>,
}

impl Printer<'_> {
    fn op(&self, op: &Op, depth: usize, out: &mut String) {
        indent(depth, out);
        values(&op.results, out);
        if !op.results.is_empty() {
            out.push_str(" = ");
        }
        let _ = write!(out, "\"{}\"(", op.name);
        values(&op.operands, out);
        out.push(')');
        for (i, region) in op.regions.iter().enumerate() {
            out.push_str(if i == 0 { " (" } else { ", " });
            self.region(region, depth, out);
        }
        if !op.regions.is_empty() {
            out.push(')');
        }
        attributes(&op.attributes, out);
        out.push_str(" : (");
        type_list(&op.operands, self.types, out);
        out.push_str(") -> (");
        type_list(&op.results, self.types, out);
        out.push_str(")\n");
    }

    fn region(&self, region: &Region, depth: usize, out: &mut String) {
        out.push_str("{\n");
        if !region.arguments.is_empty() {
            indent(depth, out);
            out.push_str("^bb0(");
            for (i, argument) in region.arguments.iter().enumerate() {
                comma(i, out);
                let _ = write!(out, "{argument}: ");
                tensor(&self.types[argument.0 as usize], out);
            }
            out.push_str("):\n");
        }
        for op in &region.ops {
            self.op(op, depth + 1, out);
        }
        indent(depth, out);
        out.push('}');
    }
}

fn indent(depth: usize, out: &mut String) {
    (0..depth).for_each(|_| out.push_str("  "));
}

fn comma(index: usize, out: &mut String) {
    if index > 0 {
        out.push_str(", ");
    }
}

fn values(list: &[Ssa], out: &mut String) {
    for (i, value) in list.iter().enumerate() {
        comma(i, out);
        let _ = write!(out, "{value}");
    }
}

fn tensor(shape: &Shape, out: &mut String) {
    out.push_str("tensor<");
    for dim in shape.dims() {
        let _ = write!(out, "{dim}x");
    }
    out.push_str(shape.dtype.mlir());
    out.push('>');
}

fn type_list(list: &[Ssa], types: Types, out: &mut String) {
    for (i, value) in list.iter().enumerate() {
        comma(i, out);
        tensor(&types[value.0 as usize], out);
    }
}

/// ` {a = 1 : i32, b}`, or nothing.
pub(crate) fn attributes(list: &[(String, Attribute)], out: &mut String) {
    if !list.is_empty() {
        out.push(' ');
        dictionary(list, out);
    }
}

fn dictionary(list: &[(String, Attribute)], out: &mut String) {
    let mut sorted: Vec<_> = list.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    out.push('{');
    for (i, (name, value)) in sorted.into_iter().enumerate() {
        comma(i, out);
        attribute_name(name, out);
        if *value != Attribute::Unit {
            out.push_str(" = ");
            attribute(value, out);
        }
    }
    out.push('}');
}

fn attribute_name(name: &str, out: &mut String) {
    if name.chars().all(|c| c.is_ascii_alphanumeric() || "_.$".contains(c)) {
        out.push_str(name);
    } else {
        text(name, out);
    }
}

fn attribute(value: &Attribute, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = match value {
        Attribute::Unit => write!(out, "unit"),
        Attribute::Bool(value) => write!(out, "{value}"),
        Attribute::I32(value) => write!(out, "{value} : i32"),
        Attribute::I64(value) => write!(out, "{value} : i64"),
        // Bit patterns: exact, infinities included.
        Attribute::F32(value) => write!(out, "0x{:08X} : f32", value.to_bits()),
        Attribute::F64(value) => write!(out, "0x{:016X} : f64", value.to_bits()),
        Attribute::Symbol(name) => {
            out.push_str(&symbol(name));
            Ok(())
        }
        Attribute::Verbatim(text) => {
            out.push_str(text);
            Ok(())
        }
        Attribute::Text(value) => {
            text(value, out);
            Ok(())
        }
        Attribute::Array(values) => {
            out.push_str("array<i64");
            for (i, value) in values.iter().enumerate() {
                let _ = write!(out, "{}{value}", if i == 0 { ": " } else { ", " });
            }
            write!(out, ">")
        }
        Attribute::List(values) => {
            out.push('[');
            for (i, value) in values.iter().enumerate() {
                comma(i, out);
                attribute(value, out);
            }
            write!(out, "]")
        }
        Attribute::Dictionary(values) => {
            dictionary(values, out);
            Ok(())
        }
        Attribute::Dense(literal) => {
            literal.print(out);
            Ok(())
        }
    };
}

/// A string in quotes; bytes that MLIR's strings do not take as they are become `\XX`.
fn text(value: &str, out: &mut String) {
    out.push('"');
    for byte in value.bytes() {
        match byte {
            b'"' | b'\\' | 0..=31 | 127.. => {
                let _ = write!(out, "\\{byte:02X}");
            }
            _ => out.push(byte as char),
        }
    }
    out.push('"');
}

/// `@name`, quoted where the name is no identifier.
pub(crate) fn symbol(name: &str) -> String {
    let mut out = String::from("@");
    let identifier = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.$".contains(c));
    if identifier {
        out.push_str(name);
    } else {
        text(name, &mut out);
    }
    out
}
