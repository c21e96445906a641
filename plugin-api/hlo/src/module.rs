//! The text of a whole module: what PJRT compiles.

use torus_abi::fragment::Function;

use crate::print;

/// Puts functions, one of them the public `@main`, into a module for `partitions` devices that run it together.
pub fn module_text<'a>(name: &str, partitions: u32, functions: impl IntoIterator<Item = &'a Function>) -> String {
    let mut text = format!(
        "module {} attributes {{mhlo.num_partitions = {partitions} : i32, mhlo.num_replicas = 1 : i32}} {{\n",
        print::symbol(name)
    );
    for function in functions {
        text.push_str(&function.text);
    }
    text.push_str("}\n");
    text
}
