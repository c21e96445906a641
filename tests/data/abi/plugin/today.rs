//! The layout of the tree: what the next release's plugin will be made from. `make test` builds it as it is today.

mod counting;
mod toy;

torus_abi::export_plugin! {
    name: "abi_today",
    description: "The tables as they are today",
    model: toy::Toy,
    attention: toy::Toy,
    speculative: counting::Counting,
}

fn opening() -> String {
    "opening a toy".into()
}
