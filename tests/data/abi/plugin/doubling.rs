//! A native kernel that doubles.

use torus_abi::{
    fault::Fault,
    kernel::{Call, Kernel},
};

pub struct Doubling;

impl Kernel for Doubling {
    const NAME: &'static str = "doubling";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        let (from, mut to) = (call.argument::<f32>(0)?, call.result::<f32>(0)?);
        to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to = 2.0 * from);
        Ok(())
    }
}
