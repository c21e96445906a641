//! The attention half of a layer: norm, QKV, rotary embeddings, attention over pages, and the output, added to the input.

use super::{Inputs, KvElement, Params, Rows, Step, attention, pages};
use crate::{
    Epilogue, Norm,
    activations::{Element, Prepared},
    level, linear_normed, linear_prepared,
    packed::PackedMatrix,
    product,
    rotary::{HeadNorms, Heads, rotate},
    shared::Shared,
    workspace::Buffer,
};

/// Tokens of a step at most, for which the pages that will be written are fetched during the product before: few lie side
/// by side, and the first product waits for little memory.
const FETCHED_ROWS: usize = 64;

/// What [`Block::apply`] computes with.
pub struct Block<'a> {
    pub params: Params,
    /// Before QKV; `eps` is that of all norms.
    pub norm: Norm<'a>,
    pub qkv: PackedMatrix<'a>,
    pub bias: Option<&'a [f32]>,
    pub output: PackedMatrix<'a>,
    /// `[tokens, rotary]` each.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Pairs of dimensions that turn.
    pub rotary: usize,
    /// `[head_dim]` each, of queries and keys.
    pub head_norms: Option<[&'a [f32]; 2]>,
    pub o_bias: Option<&'a [f32]>,
    pub post_norm: Option<&'a [f32]>,
    pub step: Step<'a>,
}

impl Block<'_> {
    fn check(&self, rows: usize) -> Result<(), String> {
        let Params { q_heads, kv_heads, head_dim, .. } = self.params;
        let width = (q_heads + 2 * kv_heads) * head_dim;
        let fit = |what: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(format!("{what} is {found}, and the weights say {expected}")),
        };
        fit("the number of tokens", self.step.tokens(), rows)?;
        fit("the norm's size", self.norm.weights.len(), self.qkv.columns())?;
        fit("the size of queries, keys and values", self.qkv.rows(), width)?;
        fit("the size of the output's input", self.output.columns(), q_heads * head_dim)?;
        fit("the size of the output", self.output.rows(), self.qkv.columns())?;
        fit("the size of the bias", self.bias.map_or(width, <[f32]>::len), width)?;
        for norm in self.head_norms.into_iter().flatten() {
            fit("the size of a norm of heads", norm.len(), head_dim)?;
        }
        for vector in [self.o_bias, self.post_norm].into_iter().flatten() {
            fit("the size of the output's bias or norm", vector.len(), self.output.rows())?;
        }
        fit("the sines", self.sin.len(), self.cos.len())
    }

    /// `y = x + output · attention(rotary(qkv · norm(x) + bias))`, with the norms of heads and of what is added to `x`, and
    /// the output's bias, that there are. `x` and `y` are `[tokens, hidden]`.
    ///
    /// # Errors
    /// If sizes do not fit each other, or the step's metadata reach outside of the pool.
    pub fn apply<X: Element, K: KvElement>(
        &self,
        x: &[X],
        pool: &mut [K],
        scales: &mut [f32],
        y: &mut [X],
    ) -> Result<(), String> {
        let Params { q_heads, kv_heads, head_dim, .. } = self.params;
        let (queries, keys) = (q_heads * head_dim, kv_heads * head_dim);
        let (rows, width, level) = (x.len() / self.qkv.columns(), queries + 2 * keys, level());
        self.check(rows)?;
        let normed = Prepared::normed(level, x, self.norm.weights, self.norm.eps, &self.qkv);
        let mut joint = Buffer::<X>::take(rows * width);
        self.project(&normed, pool, &mut joint);
        let norms = self.head_norms.map(|[queries, keys]| HeadNorms { queries, keys, q_heads, eps: self.norm.eps });
        let heads = Heads { range: 0..q_heads + kv_heads, head_dim, norms };
        rotate(level, &mut joint, width, &heads, [self.cos, self.sin], self.rotary);
        let part = |from: usize| Rows { data: &joint[from.min(joint.len())..], stride: width };
        let inputs = Inputs { q: part(0), k: part(queries), v: part(queries + keys) };
        let mut attended = Buffer::<X>::take(rows * queries);
        attention(&self.params, &self.step, &inputs, pool, scales, &mut attended)?;
        let attended = Prepared::of(level, &attended, &self.output);
        match self.post_norm {
            Some(weights) => {
                linear_normed(&attended, &self.output, self.o_bias, Norm { weights, ..self.norm }, x, y);
            }
            None => linear_prepared(&attended, &self.output, Epilogue { bias: self.o_bias, residual: Some(x) }, y),
        }
        Ok(())
    }

    /// `joint [tokens, queries + keys + values] = qkv · x + bias`; what the step will write of `pool` is fetched meanwhile.
    fn project<X: Element, K: KvElement>(&self, x: &Prepared, pool: &[K], joint: &mut [X]) {
        let (rows, width, lines) = (x.rows(), self.qkv.rows(), pages::lines_of_token::<K>(&self.params));
        let shared = Shared::new(joint);
        product(x, &self.qkv, |tile| {
            let column = tile.first_column();
            if rows <= FETCHED_ROWS {
                let lines = lines * column / width..lines * (column + tile.width()) / width;
                for row in 0..tile.rows() {
                    pages::fetch(&self.params, &self.step, pool, tile.first_row() + row, lines.clone());
                }
            }
            for index in 0..tile.rows() {
                let start = (tile.first_row() + index) * width + column;
                let values = tile.row_mut(index);
                if let Some(bias) = self.bias {
                    values.iter_mut().zip(&bias[column..]).for_each(|(value, bias)| *value += bias);
                }
                // SAFETY: each element is finished once.
                X::store(x.level(), values, unsafe { shared.part(start..start + values.len()) });
            }
        });
    }
}
