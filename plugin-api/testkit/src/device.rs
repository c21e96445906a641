//! What a check runs programs on.

use torus_abi::TensorType;

/// A tensor in host memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub ty: TensorType,
    /// Row by row, in little endian.
    pub bytes: Vec<u8>,
}

/// Compiles and runs programs. Errors are the device's own words.
pub trait Device {
    type Program;

    /// Compiles a module whose function is `@main`.
    fn compile(&self, text: &str) -> Result<Self::Program, String>;

    /// Runs a program; what comes back are the bytes of its results, in order.
    fn run(&self, program: &Self::Program, arguments: &[&Tensor]) -> Result<Vec<Vec<u8>>, String>;
}
