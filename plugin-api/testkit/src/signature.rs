//! What exports and fragments must look like, whatever kind of plugin emitted them.

use std::collections::BTreeSet;

use torus_abi::{
    TensorType,
    fragment::{Export, Fragment, Function, Operand, Operation},
};

/// An export with its function. Meanings and types are as many as each other.
pub(crate) fn export<'a>(fragment: &'a Fragment, name: &str) -> Result<(&'a Export, &'a Function), String> {
    let export = fragment.exports.get(name).ok_or_else(|| format!("there is no export '{name}'"))?;
    let function = fragment.functions.iter().find(|function| function.symbol == export.symbol);
    let function = function.ok_or_else(|| format!("export '{name}': there is no function '{}'", export.symbol))?;
    let described = (export.arguments.len(), export.results.len());
    let has = (function.arguments.len(), function.results.len());
    if described != has {
        return Err(format!("export '{name}' describes {described:?} arguments and results, its function has {has:?}"));
    }
    Ok((export, function))
}

/// Compares meanings and types, in order.
pub(crate) fn expect(
    what: &str,
    meanings: &[Operand],
    types: &[TensorType],
    expected: &[(Operand, TensorType)],
) -> Result<(), String> {
    let found: Vec<_> = meanings.iter().zip(types).collect();
    for (i, (meaning, ty)) in expected.iter().enumerate() {
        match found.get(i) {
            Some((found_meaning, found_type)) if *found_meaning == meaning && *found_type == ty => {}
            Some((found_meaning, found_type)) => {
                return Err(format!("{what} {i} is {found_meaning:?}: {found_type}, not {meaning:?}: {ty}"));
            }
            None => return Err(format!("{what} {i} is missing: {meaning:?}: {ty}")),
        }
    }
    match found.get(expected.len()) {
        Some((meaning, ty)) => Err(format!("there is one {what} too many: {meaning:?}: {ty}")),
        None => Ok(()),
    }
}

/// Symbols are defined once, calls lead somewhere, and coarse imports have default bodies of their signature.
pub(crate) fn well_formed(fragment: &Fragment) -> Result<(), String> {
    let mut symbols = BTreeSet::new();
    let functions = fragment.functions.iter().map(|function| &function.symbol);
    for symbol in functions.chain(fragment.imports.iter().map(|import| &import.symbol)) {
        if symbol == "main" || !symbols.insert(symbol) {
            return Err(format!("the symbol '{symbol}' is defined twice or not the plugin's to define"));
        }
    }
    for function in &fragment.functions {
        if let Some(callee) = function.calls.iter().find(|callee| !symbols.contains(callee)) {
            return Err(format!("'{}' calls '{callee}', which is nowhere", function.symbol));
        }
        if !function.text.contains(&function.symbol) {
            return Err(format!("the text of '{}' does not define it", function.symbol));
        }
    }
    for import in &fragment.imports {
        let coarse = matches!(import.operation, Operation::GatedMlp { .. } | Operation::AttentionBlock { .. });
        let Some(default) = &import.default else {
            if coarse {
                return Err(format!("the import '{}' has no default body, and hosts need not know it", import.symbol));
            }
            continue;
        };
        let body = fragment.functions.iter().find(|function| function.symbol == *default);
        let body = body.ok_or_else(|| format!("the default body '{default}' is not in the fragment"))?;
        if (&body.arguments, &body.results) != (&import.arguments, &import.results) {
            return Err(format!("the default body '{default}' has not the signature of '{}'", import.symbol));
        }
    }
    Ok(())
}

/// No symbol of one is one of the other: they are linked into one program.
pub(crate) fn disjoint(one: &Fragment, other: &Fragment) -> Result<(), String> {
    fn symbols(fragment: &Fragment) -> BTreeSet<&String> {
        let functions = fragment.functions.iter().map(|function| &function.symbol);
        functions.chain(fragment.imports.iter().map(|import| &import.symbol)).collect()
    }
    match symbols(one).intersection(&symbols(other)).next() {
        Some(symbol) => Err(format!("both define '{symbol}', though they are linked into one program")),
        None => Ok(()),
    }
}
