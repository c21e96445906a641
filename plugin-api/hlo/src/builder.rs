//! A fragment under construction.

use std::{cell::RefCell, collections::BTreeMap, collections::BTreeSet, collections::HashMap, panic::Location};

use torus_abi::{
    TensorType,
    fragment::{Export, Fragment, Function, Import, Operand, Operation},
};

use crate::{
    BuildError, Shape, Value,
    func::{Finished, Func},
    import::DefaultBody,
    print,
};

/// Collects functions, imports and exports of one fragment. Its methods take `&self`, so that a function can ask for
/// further functions while it is being built.
pub struct Builder {
    prefix: String,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    error: Option<BuildError>,
    functions: Vec<Function>,
    symbols: BTreeSet<String>,
    /// From an outlined function's name and text to its symbol.
    outlined: HashMap<(String, String), String>,
    imports: Vec<Import>,
    exports: BTreeMap<String, Export>,
}

/// A function that can be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Callee {
    pub symbol: String,
    pub arguments: Vec<Shape>,
    pub results: Vec<Shape>,
}

impl Callee {
    /// A function that is defined elsewhere, for example an export of another fragment. The axes of its results are
    /// anonymous until they are named ([`Value::named`]).
    pub fn external(symbol: impl Into<String>, arguments: &[TensorType], results: &[TensorType]) -> Self {
        let opaque = |types: &[TensorType]| types.iter().map(Shape::opaque).collect();
        Self { symbol: symbol.into(), arguments: opaque(arguments), results: opaque(results) }
    }
}

/// Who sees a function: the whole module or, as `@main`, the compiler's caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visibility {
    Public,
    Private,
}

impl Builder {
    /// `prefix` goes into every symbol, so that fragments can be concatenated: the plugin's name.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "_"),
            state: RefCell::default(),
        }
    }

    /// Adds the private function `{prefix}.{name}`. What the closure returns are its results.
    #[track_caller]
    pub fn function(&self, name: &str, body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>) -> Callee {
        self.define(&format!("{}.{name}", self.prefix), body)
    }

    /// Adds a private function under a symbol that someone else chose: the definition of another fragment's import.
    #[track_caller]
    pub fn define(&self, symbol: &str, body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>) -> Callee {
        self.add(symbol, Visibility::Private, Location::caller(), body)
    }

    /// Adds the public function `@main`, which is what gets compiled.
    #[track_caller]
    pub fn main(&self, body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>) -> Callee {
        self.add("main", Visibility::Public, Location::caller(), body)
    }

    fn add(
        &self,
        symbol: &str,
        visibility: Visibility,
        location: &'static Location<'static>,
        body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>,
    ) -> Callee {
        let func = Func::new(self, symbol, None);
        let results = body(&func);
        let finished = func.finish(&results, location);
        self.insert(symbol.to_owned(), visibility, finished, location)
    }

    /// Adds the function `{prefix}.{name}` and exports it under `name`. Arguments are declared together with their
    /// meaning ([`Func::input`], [`Func::weight`], …); so are the results.
    #[track_caller]
    pub fn export(&self, name: &str, body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<(Operand, Value<'f>)>) -> Callee {
        let location = Location::caller();
        let symbol = format!("{}.{name}", self.prefix);
        let func = Func::new(self, &symbol, None);
        let (meanings, results): (Vec<_>, Vec<_>) = body(&func).into_iter().unzip();
        let arguments = func.take_inputs(location);
        let finished = func.finish(&results, location);
        let callee = self.insert(symbol.clone(), Visibility::Private, finished, location);
        self.state.borrow_mut().exports.insert(name.to_owned(), Export { symbol, arguments, results: meanings });
        callee
    }

    /// The fragment, or the first mistake that was made.
    pub fn finish(self) -> Result<Fragment, BuildError> {
        let State { error, functions, imports, exports, .. } = self.state.into_inner();
        match error {
            Some(error) => Err(error),
            None => Ok(Fragment { functions, imports, exports }),
        }
    }

    fn insert(
        &self,
        symbol: String,
        visibility: Visibility,
        finished: Finished,
        location: &'static Location<'static>,
    ) -> Callee {
        let callee = finished.callee(&symbol);
        if self.state.borrow().symbols.contains(&symbol) {
            self.fail(BuildError {
                reason: format!("the symbol '{symbol}' is defined twice"),
                function: symbol,
                location,
                operation: "function",
                operands: Vec::new(),
            });
            return callee;
        }
        let keyword = if visibility == Visibility::Public { "public" } else { "private" };
        let text = format!("func.func {keyword} {}{}", print::symbol(&symbol), finished.tail);
        let types = |shapes: &[Shape]| shapes.iter().map(Shape::tensor_type).collect();
        let mut state = self.state.borrow_mut();
        state.symbols.insert(symbol.clone());
        state.functions.push(Function {
            symbol,
            arguments: types(&callee.arguments),
            results: types(&callee.results),
            calls: finished.calls.into_iter().collect(),
            kernels: finished.kernels.into_iter().collect(),
            text,
        });
        callee
    }

    /// Adds a helper under a symbol made from `name`, or finds the one with the same name and text.
    pub(crate) fn insert_shared(&self, name: &str, finished: Finished, location: &'static Location<'static>) -> Callee {
        let key = (name.to_owned(), finished.tail.clone());
        let known = self.state.borrow().outlined.get(&key).cloned();
        if let Some(symbol) = known {
            return finished.callee(&symbol);
        }
        let symbol = self.fresh_symbol(name);
        self.state.borrow_mut().outlined.insert(key, symbol.clone());
        self.insert(symbol, Visibility::Private, finished, location)
    }

    /// `{prefix}.{name}`, or with the first number that makes it new.
    fn fresh_symbol(&self, name: &str) -> String {
        let base = format!("{}.{name}", self.prefix);
        let state = self.state.borrow();
        let taken = |symbol: &String| state.symbols.contains(symbol);
        if !taken(&base) {
            return base;
        }
        let mut number = 1;
        loop {
            let symbol = format!("{base}.{number}");
            if !taken(&symbol) {
                return symbol;
            }
            number += 1;
        }
    }

    /// The symbol of an import, if an equal one was recorded.
    pub(crate) fn find_import(
        &self,
        operation: &Operation,
        arguments: &[TensorType],
        results: &[TensorType],
    ) -> Option<String> {
        let state = self.state.borrow();
        let equal = |import: &&Import| {
            import.operation == *operation && import.arguments == arguments && import.results == results
        };
        state.imports.iter().find(equal).map(|import| import.symbol.clone())
    }

    /// Adds the default body of an import and gives its symbol.
    pub(crate) fn default_body(
        &self,
        name: &str,
        arguments: &[Shape],
        location: &'static Location<'static>,
        body: DefaultBody<'_>,
    ) -> String {
        let name = format!("{name}.default");
        let func = Func::new(self, &name, None);
        let arguments: Vec<_> = arguments.iter().map(|shape| func.argument(shape.clone())).collect();
        let finished = func.finish(&body(&func, &arguments), location);
        self.insert_shared(&name, finished, location).symbol
    }

    /// Records an import; `name` is its operation's.
    pub(crate) fn add_import(
        &self,
        name: &str,
        operation: Operation,
        arguments: Vec<TensorType>,
        results: Vec<TensorType>,
        default: Option<String>,
    ) -> String {
        let mut state = self.state.borrow_mut();
        let start = format!("{}.import.{name}.", self.prefix);
        let number = state.imports.iter().filter(|import| import.symbol.starts_with(&start)).count();
        let symbol = format!("{start}{number}");
        state.imports.push(Import { symbol: symbol.clone(), operation, arguments, results, default });
        symbol
    }

    pub(crate) fn fail(&self, error: BuildError) {
        self.state.borrow_mut().error.get_or_insert(error);
    }
}
