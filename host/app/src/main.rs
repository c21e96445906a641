//! The `torus` binary.

fn main() -> std::process::ExitCode {
    torus_app::main()
}
