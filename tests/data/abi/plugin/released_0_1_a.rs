//! Layout 0.1-a: models and attention.

mod toy;

torus_abi::export_plugin! {
    name: "released_0_1_a",
    description: "The tables of layout 0.1-a",
    model: toy::Toy,
    attention: toy::Toy,
}

fn opening() -> String {
    "opening a toy".into()
}
