//! Links fragments: from the functions a program starts with to everything they reach.
//!
//! Each import met on the way is given an implementation by the host; signatures are compared before anything is
//! compiled, so a mismatch names the symbol and both types instead of a line of a compiler's error.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use torus_abi::{
    TensorType,
    fragment::{Export, Fragment, Function, Import},
};

use crate::{Kernels, LinkError};

/// A fragment and the plugin that emitted it.
#[derive(Clone, Copy)]
pub struct Unit<'a> {
    pub plugin: &'a str,
    pub fragment: &'a Fragment,
    /// What the plugin exports, if anything.
    pub kernels: Option<&'a Kernels>,
}

/// How the host supplies an import.
pub enum Implementation {
    /// By a function of its own, of the import's symbol and signature, and what that calls.
    Functions(Vec<Function>),
    /// By a function of another fragment, of the same signature.
    Alias(String),
    /// Not as a whole: by the default body the fragment carries.
    Default,
}

/// An export's function with its meaning, checked to exist.
pub fn export<'a>(unit: Unit<'a>, name: &str) -> Result<(&'a Export, &'a Function), LinkError> {
    let plugin = || unit.plugin.to_owned();
    let missing = || LinkError::MissingExport { plugin: plugin(), export: name.to_owned() };
    let export = unit.fragment.exports.get(name).ok_or_else(missing)?;
    let function = unit.fragment.functions.iter().find(|function| function.symbol == export.symbol);
    let function = function.ok_or_else(|| LinkError::MissingFunction {
        plugin: plugin(),
        export: name.to_owned(),
        symbol: export.symbol.clone(),
    })?;
    if export.arguments.len() != function.arguments.len() || export.results.len() != function.results.len() {
        let message = format!(
            "export '{name}' describes {} arguments and {} results, its function has {} and {}",
            export.arguments.len(),
            export.results.len(),
            function.arguments.len(),
            function.results.len()
        );
        return Err(LinkError::Malformed { plugin: plugin(), message });
    }
    Ok((export, function))
}

/// All functions that `roots` reach, each once, in a deterministic order. `implement` is asked once for each import.
/// The kernels that the functions list are then whole targets.
pub fn link(
    units: &[Unit<'_>],
    roots: &[&str],
    implement: &mut dyn FnMut(&Import) -> Result<Implementation, LinkError>,
) -> Result<Vec<Function>, LinkError> {
    let mut linker =
        Linker { symbols: symbols(units)?, taken: BTreeSet::new(), linked: Vec::new(), queue: VecDeque::new() };
    for root in roots {
        linker.want(root);
    }
    while let Some(symbol) = linker.queue.pop_front() {
        linker.resolve(&symbol, implement)?;
    }
    Ok(linker.linked)
}

/// Where a symbol of the fragments comes from.
#[derive(Clone, Copy)]
enum Definition<'a> {
    Function(&'a Function),
    Import(&'a Import),
}

struct Symbol<'a> {
    plugin: &'a str,
    kernels: Option<&'a Kernels>,
    definition: Definition<'a>,
}

fn symbols<'a>(units: &[Unit<'a>]) -> Result<BTreeMap<&'a str, Symbol<'a>>, LinkError> {
    let mut symbols: BTreeMap<&str, Symbol<'_>> = BTreeMap::new();
    for unit in units {
        let functions = unit.fragment.functions.iter().map(|f| (f.symbol.as_str(), Definition::Function(f)));
        let imports = unit.fragment.imports.iter().map(|i| (i.symbol.as_str(), Definition::Import(i)));
        for (symbol, definition) in functions.chain(imports) {
            if let Some(known) =
                symbols.insert(symbol, Symbol { plugin: unit.plugin, kernels: unit.kernels, definition })
            {
                return Err(LinkError::DuplicateSymbol {
                    symbol: symbol.to_owned(),
                    first: known.plugin.to_owned(),
                    second: unit.plugin.to_owned(),
                });
            }
        }
    }
    Ok(symbols)
}

struct Linker<'a> {
    symbols: BTreeMap<&'a str, Symbol<'a>>,
    /// Symbols that are linked or queued.
    taken: BTreeSet<String>,
    linked: Vec<Function>,
    queue: VecDeque<String>,
}

impl Linker<'_> {
    fn want(&mut self, symbol: &str) {
        if self.taken.insert(symbol.to_owned()) {
            self.queue.push_back(symbol.to_owned());
        }
    }

    fn resolve(
        &mut self,
        symbol: &str,
        implement: &mut dyn FnMut(&Import) -> Result<Implementation, LinkError>,
    ) -> Result<(), LinkError> {
        let Some(found) = self.symbols.get(symbol) else {
            let (plugin, caller) = (String::from("host"), String::from("main"));
            return Err(LinkError::UnresolvedCall { plugin, caller, symbol: symbol.to_owned() });
        };
        let (plugin, kernels) = (found.plugin, found.kernels);
        match found.definition {
            Definition::Function(function) => self.take(bind_kernels(function.clone(), plugin, kernels)?, plugin),
            Definition::Import(import) => match implement(import)? {
                Implementation::Functions(functions) => self.take_implementation(import, functions, plugin),
                Implementation::Alias(target) => self.take_alias(import, &target),
                Implementation::Default => {
                    let default = import.default.clone().ok_or_else(|| LinkError::UnknownOperation {
                        plugin: plugin.to_owned(),
                        operation: operation_name(import),
                    })?;
                    self.take_alias(import, &default)
                }
            },
        }
    }

    /// Links a function of a fragment; what it calls must be known.
    fn take(&mut self, function: Function, plugin: &str) -> Result<(), LinkError> {
        for callee in &function.calls {
            if !self.symbols.contains_key(callee.as_str()) {
                return Err(LinkError::UnresolvedCall {
                    plugin: plugin.to_owned(),
                    caller: function.symbol.clone(),
                    symbol: callee.clone(),
                });
            }
            self.want(callee);
        }
        self.linked.push(function);
        Ok(())
    }

    /// Links the host's own functions for an import. They call only one another.
    fn take_implementation(
        &mut self,
        import: &Import,
        functions: Vec<Function>,
        plugin: &str,
    ) -> Result<(), LinkError> {
        let entry = functions.iter().find(|function| function.symbol == import.symbol);
        let entry = entry.ok_or_else(|| LinkError::Malformed {
            plugin: "host".into(),
            message: format!("its implementation of '{}' has no function of that name", import.symbol),
        })?;
        check(plugin, &import.symbol, "the arguments", &entry.arguments, &import.arguments)?;
        check(plugin, &import.symbol, "the results", &entry.results, &import.results)?;
        for function in functions {
            if function.symbol == import.symbol || self.taken.insert(function.symbol.clone()) {
                self.linked.push(function);
            }
        }
        Ok(())
    }

    /// Makes the import's symbol call another function of the same signature.
    fn take_alias(&mut self, import: &Import, target: &str) -> Result<(), LinkError> {
        let Some(found) = self.symbols.get(target) else {
            return Err(LinkError::UnresolvedCall {
                plugin: "host".into(),
                caller: import.symbol.clone(),
                symbol: target.to_owned(),
            });
        };
        let (arguments, results) = match found.definition {
            Definition::Function(function) => (&function.arguments, &function.results),
            Definition::Import(other) => (&other.arguments, &other.results),
        };
        check(found.plugin, target, "the arguments", arguments, &import.arguments)?;
        check(found.plugin, target, "the results", results, &import.results)?;
        self.linked.push(forward(import, target));
        self.want(target);
        Ok(())
    }
}

/// A fragment whose kernels are whole targets, for who links it by other means.
pub fn bind(unit: Unit<'_>) -> Result<Fragment, LinkError> {
    let bind = |function: &Function| bind_kernels(function.clone(), unit.plugin, unit.kernels);
    let functions = unit.fragment.functions.iter().map(bind).collect::<Result<_, _>>()?;
    Ok(Fragment { functions, ..unit.fragment.clone() })
}

/// Puts the plugin's namespace into the targets of the kernels that the function lists.
fn bind_kernels(mut function: Function, plugin: &str, kernels: Option<&Kernels>) -> Result<Function, LinkError> {
    for kernel in &mut function.kernels {
        let target = kernels.and_then(|kernels| kernels.target(kernel)).ok_or_else(|| LinkError::UnknownKernel {
            plugin: plugin.to_owned(),
            function: function.symbol.clone(),
            kernel: kernel.clone(),
        })?;
        function.text = function.text.replace(&format!("\"{{ns}}.{kernel}\""), &format!("\"{target}\""));
        *kernel = target;
    }
    Ok(function)
}

fn check(
    plugin: &str,
    symbol: &str,
    what: &'static str,
    found: &[TensorType],
    expected: &[TensorType],
) -> Result<(), LinkError> {
    if found == expected {
        return Ok(());
    }
    Err(LinkError::Signature {
        plugin: plugin.to_owned(),
        symbol: symbol.to_owned(),
        what,
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}

/// The name an operation has in messages: the `op` tag of its JSON.
fn operation_name(import: &Import) -> String {
    let json = serde_json::to_value(&import.operation).unwrap_or_default();
    json["op"].as_str().unwrap_or("unknown").to_owned()
}

/// A function of the import's symbol that calls `target`.
fn forward(import: &Import, target: &str) -> Function {
    let types = |list: &[TensorType]| list.iter().map(TensorType::mlir).collect::<Vec<_>>().join(", ");
    let (arguments, results) = (types(&import.arguments), types(&import.results));
    let names: Vec<_> = (0..import.arguments.len()).map(|i| format!("%arg{i}")).collect();
    let typed: Vec<_> =
        names.iter().zip(&import.arguments).map(|(name, ty)| format!("{name}: {}", ty.mlir())).collect();
    let returned: Vec<_> = match import.results.len() {
        1 => vec!["%0".to_owned()],
        n => (0..n).map(|i| format!("%0#{i}")).collect(),
    };
    let bind = match import.results.len() {
        0 => String::new(),
        1 => "%0 = ".to_owned(),
        n => format!("%0:{n} = "),
    };
    let text = format!(
        "\"func.func\"() ({{\n^bb0({typed}):\n  {bind}\"func.call\"({names}) {{callee = @{target}}} : ({arguments}) -> \
         ({results})\n  \"func.return\"({returned}) : ({results}) -> ()\n}}) {{function_type = ({arguments}) -> \
         ({results}), sym_name = \"{symbol}\", sym_visibility = \"private\"}} : () -> ()\n",
        typed = typed.join(", "),
        names = names.join(", "),
        returned = returned.join(", "),
        target = quoted(target),
        symbol = import.symbol,
    );
    Function {
        symbol: import.symbol.clone(),
        arguments: import.arguments.clone(),
        results: import.results.clone(),
        calls: vec![target.to_owned()],
        kernels: Vec::new(),
        text,
    }
}

/// A symbol reference: quoted unless it is a plain identifier.
fn quoted(symbol: &str) -> String {
    let plain = symbol.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$'))
        && !symbol.starts_with(|c: char| c.is_ascii_digit());
    if plain { symbol.to_owned() } else { format!("\"{symbol}\"") }
}

#[cfg(test)]
mod tests {
    use torus_abi::{
        DType,
        fragment::{Operand, Operation},
    };

    use super::*;

    fn ty(text: &str) -> TensorType {
        text.parse().unwrap()
    }

    fn function(symbol: &str, argument: &str, calls: &[&str]) -> Function {
        Function {
            symbol: symbol.into(),
            arguments: vec![ty(argument)],
            results: vec![ty(argument)],
            calls: calls.iter().map(|call| (*call).into()).collect(),
            kernels: Vec::new(),
            text: format!("// {symbol}\n"),
        }
    }

    fn import(symbol: &str, argument: &str, default: Option<&str>) -> Import {
        Import {
            symbol: symbol.into(),
            operation: Operation::Attention { kind: 0, pool_parts: 0, context_parts: 0 },
            arguments: vec![ty(argument)],
            results: vec![ty(argument)],
            default: default.map(Into::into),
        }
    }

    fn fragment(functions: Vec<Function>, imports: Vec<Import>) -> Fragment {
        let export =
            Export { symbol: "a.main".into(), arguments: vec![Operand::Hidden], results: vec![Operand::Hidden] };
        Fragment { functions, imports, exports: [("main".to_owned(), export)].into() }
    }

    fn linked(
        units: &[Unit<'_>],
        implement: &mut dyn FnMut(&Import) -> Result<Implementation, LinkError>,
    ) -> Result<Vec<String>, LinkError> {
        Ok(link(units, &["a.main"], implement)?.into_iter().map(|function| function.symbol).collect())
    }

    fn unit<'a>(plugin: &'a str, fragment: &'a Fragment) -> Unit<'a> {
        Unit { plugin, fragment, kernels: None }
    }

    #[test]
    fn only_what_is_reached_is_linked_and_defaults_are_taken_where_the_host_has_nothing() {
        let a = fragment(
            vec![
                function("a.main", "f32[2]", &["a.import.0", "a.leaf"]),
                function("a.leaf", "f32[2]", &[]),
                function("a.body", "f32[2]", &["a.leaf"]),
                function("a.unused", "f32[2]", &[]),
            ],
            vec![import("a.import.0", "f32[2]", Some("a.body")), import("a.import.1", "f32[2]", None)],
        );
        let names = linked(&[unit("a", &a)], &mut |_| Ok(Implementation::Default)).unwrap();
        assert_eq!(names, ["a.main", "a.import.0", "a.leaf", "a.body"]);
    }

    #[test]
    fn kernels_get_the_plugins_namespace_and_must_be_exported() {
        let mut main = function("a.main", "f32[2]", &[]);
        main.kernels = vec!["add".into(), "add-more".into()];
        main.text = r#"call_target_name = "{ns}.add" … call_target_name = "{ns}.add-more""#.into();
        let a = fragment(vec![main], vec![]);
        let with = |names: &[&str]| {
            let kernels = crate::kernels::tests::kernels(names);
            let unit = Unit { kernels: Some(&kernels), ..unit("a", &a) };
            link(&[unit], &["a.main"], &mut |_| Ok(Implementation::Default))
        };
        let linked = with(&["add", "add-more"]).unwrap();
        let expected = r#"call_target_name = "mine-0123.add" … call_target_name = "mine-0123.add-more""#;
        assert_eq!(linked[0].text, expected);
        assert_eq!(linked[0].kernels, ["mine-0123.add", "mine-0123.add-more"]);
        let error = with(&["add"]).unwrap_err().to_string();
        assert!(error.starts_with("plugin 'a': function 'a.main' calls kernel 'add-more'"), "{error}");
    }

    #[test]
    fn an_alias_crosses_fragments_and_its_signature_is_checked() {
        let a =
            fragment(vec![function("a.main", "f32[2]", &["a.import.0"])], vec![import("a.import.0", "f32[2]", None)]);
        let b = |argument| fragment(vec![function("b.attention", argument, &[])], vec![]);
        let fits = b("f32[2]");
        let alias = &mut |_: &Import| Ok(Implementation::Alias("b.attention".into()));
        let functions = link(&[unit("a", &a), unit("b", &fits)], &["a.main"], alias).unwrap();
        assert!(functions[1].text.contains("callee = @b.attention"), "{}", functions[1].text);
        let misfit = b("bf16[2]");
        let error = linked(&[unit("a", &a), unit("b", &misfit)], alias).unwrap_err();
        assert_eq!(error.to_string(), "plugin 'b': 'b.attention': the arguments are [bf16[2]], expected [f32[2]]");
    }

    #[test]
    fn what_does_not_resolve_is_named() {
        let a = fragment(vec![function("a.main", "f32[2]", &["a.gone"])], vec![]);
        let error = linked(&[unit("a", &a)], &mut |_| Ok(Implementation::Default)).unwrap_err();
        assert_eq!(
            error,
            LinkError::UnresolvedCall { plugin: "a".into(), caller: "a.main".into(), symbol: "a.gone".into() }
        );
        let a =
            fragment(vec![function("a.main", "f32[2]", &["a.import.0"])], vec![import("a.import.0", "f32[2]", None)]);
        let error = linked(&[unit("a", &a)], &mut |_| Ok(Implementation::Default)).unwrap_err();
        assert!(matches!(error, LinkError::UnknownOperation { operation, .. } if operation == "attention"));
        let error = linked(&[unit("a", &a), unit("b", &a)], &mut |_| Ok(Implementation::Default)).unwrap_err();
        assert!(matches!(error, LinkError::DuplicateSymbol { symbol, .. } if symbol == "a.main"));
    }

    #[test]
    fn a_host_implementation_must_have_the_imports_signature() {
        let a =
            fragment(vec![function("a.main", "f32[2]", &["a.import.0"])], vec![import("a.import.0", "f32[2]", None)]);
        let with = |argument: &'static str| {
            let a = &a;
            move || {
                linked(&[unit("a", a)], &mut |import| {
                    let entry = function(&import.symbol, argument, &["host.helper"]);
                    Ok(Implementation::Functions(vec![entry, function("host.helper", "f32[9]", &[])]))
                })
            }
        };
        assert_eq!(with("f32[2]")().unwrap(), ["a.main", "a.import.0", "host.helper"]);
        assert!(matches!(with("f32[3]")(), Err(LinkError::Signature { what: "the arguments", .. })));
    }

    #[test]
    fn exports_are_checked_against_their_functions() {
        let a = fragment(vec![function("a.main", "f32[2]", &[])], vec![]);
        assert_eq!(export(unit("a", &a), "main").unwrap().1.symbol, "a.main");
        assert!(matches!(export(unit("a", &a), "head"), Err(LinkError::MissingExport { .. })));
        let mut wrong = a.clone();
        wrong.functions[0].results.push(TensorType::scalar(DType::F32));
        assert!(matches!(export(unit("a", &wrong), "main"), Err(LinkError::Malformed { .. })));
    }
}
