//! A plugin that make.sh builds with `panic = "abort"`.

mod toy;

torus_abi::export_plugin! {
    name: "panic_abort",
    description: "Its panics would end the server",
    attention: toy::Toy,
}
