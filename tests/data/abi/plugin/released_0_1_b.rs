//! Layout 0.1-b: with speculative plugins.

mod counting;
mod toy;

torus_abi::export_plugin! {
    name: "released_0_1_b",
    description: "The tables of layout 0.1-b",
    model: toy::Toy,
    attention: toy::Toy,
    speculative: counting::Counting,
}

fn opening() -> String {
    "opening a toy".into()
}
