//! The kernels as calls in StableHLO graphs.

use torus_abi::DType;
use torus_hlo::{Axis, Shape, Value};
use torus_mosaic::{Generation, Tensor};

use crate::{Matmul, MatmulError, PageCopy};

/// What a product takes.
#[derive(Clone, Copy)]
pub struct Operands<'f> {
    /// `bf16 [rows, in]`; with experts, rows sorted by expert.
    pub x: Value<'f>,
    /// As [`crate::Weights::stored`] says; without experts also `[in, out]` or `[out, in]`. Bytes may be signed or not.
    pub weights: Value<'f>,
    /// `f32 [experts, groups, out]`; without experts also `[groups, out]`.
    pub scales: Option<Value<'f>>,
    /// `f32 [experts, 1, out]`; without experts also `[1, out]` or `[out]`.
    pub biases: Option<Value<'f>>,
    /// First row of each expert and the end, `i32 [experts + 1]`.
    pub starts: Option<Value<'f>>,
}

impl Matmul {
    /// The product on a generation as an operation of a graph: `bf16 [rows, out]`, with the axes of `x` but for the last,
    /// which is `out`. Rows that belong to no expert are undefined.
    #[track_caller]
    pub fn emit<'f>(
        &self,
        generation: Generation,
        operands: &Operands<'f>,
        out: Axis,
    ) -> Result<Value<'f>, MatmulError> {
        let tiles = self.tiles(generation)?;
        let kernel = self.kernel(&tiles)?;
        let options = self.call_options(&kernel, &tiles, generation)?;
        let Some((rows, _)) = operands.x.shape().axes.first().copied() else {
            return Err(MatmulError::Shape { field: "x", value: 0, remedy: "it has no rows".to_owned() });
        };
        let missing = (self.padded_rows(&tiles) - self.rows) as u64;
        let x = if missing == 0 { operands.x } else { operands.x.pad(rows, 0, missing, 0.0) };
        let weights =
            if operands.weights.dtype() == DType::U8 { operands.weights.bitcast(DType::I8) } else { operands.weights };
        let wanted = [None, Some(self.weights.stored()), self.weights.scales(), self.weights.biases()];
        let given = [Some(x), Some(weights), operands.scales, operands.biases];
        let mut arguments: Vec<Value<'f>> = operands.starts.into_iter().collect();
        arguments.extend(given.into_iter().zip(wanted).filter_map(|(value, wanted)| match wanted {
            Some(tensor) => value.map(|value| in_dims(value, &tensor)),
            None => value,
        }));
        if arguments.len() != kernel.operands().len() {
            let remedy = format!(
                "the product takes {} operands: scales, biases and starts as its weights say",
                kernel.operands().len()
            );
            return Err(MatmulError::Shape { field: "operands", value: arguments.len(), remedy });
        }
        let result = self.out(&tiles);
        let shape = Shape::new(DType::Bf16, [(rows, result.dims[0] as u64), (out, result.dims[1] as u64)]);
        let call = kernel.custom_call(&options, vec![shape])?;
        let result = x.func().custom_call(&call, &arguments)[0];
        Ok(if missing == 0 { result } else { result.slice(rows, 0..self.rows as u64) })
    }
}

impl PageCopy {
    /// The copy as an operation of a graph. `operands` are those of [`PageCopy::kernel`]. Gives the pool that is
    /// written, with its operand's axes; the operand must not be used afterwards.
    #[track_caller]
    pub fn emit<'f>(&self, generation: Generation, operands: &[Value<'f>]) -> Result<Value<'f>, MatmulError> {
        let kernel = self.kernel()?;
        let expected = kernel.operands().len();
        let Some(pool) = operands.last().filter(|_| operands.len() == expected) else {
            let remedy = format!("the copy takes {expected} operands");
            return Err(MatmulError::Shape { field: "operands", value: operands.len(), remedy });
        };
        let call = kernel.custom_call(&self.call_options(generation), vec![pool.shape()])?;
        Ok(pool.func().custom_call(&call, operands)[0])
    }
}

/// The same elements in a tensor's dimensions, with names of no meaning.
#[track_caller]
fn in_dims<'f>(value: Value<'f>, tensor: &Tensor) -> Value<'f> {
    let axes: Vec<_> = tensor.dims.iter().enumerate().map(|(i, dim)| (Axis::anonymous(i), *dim as u64)).collect();
    if value.shape().dims().eq(axes.iter().map(|(_, size)| *size)) { value } else { value.reshape(&axes) }
}
