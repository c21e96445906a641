//! The kernels as native functions that step programs call through XLA's FFI.
//!
//! A packed matrix comes as three operands: the arena `u8 [bytes]` that holds all matrices of a model, the place in it
//! `i32 []`, in units of [`ALIGNMENT`] bytes, and how many rows of activations are real `i32 []`: the others are padding,
//! and their results zeros. Kernels are named for the dtypes of their activations.

pub mod attention;
mod blocks;
mod profile;
pub mod sampling;

use half::bf16;
use torus_abi::{
    DType,
    fault::Fault,
    fragment::Activation,
    kernel::{Bf16, Call, Element as Tensorial, Entry, Handler, Kernel, KernelList, Tensor},
};

pub use profile::{KernelTime, start_profile, stop_profile};

use crate::{
    Epilogue,
    activations::Element,
    linear as apply_linear,
    packed::{ALIGNMENT, PackedMatrix, embed as apply_embed},
};

/// What all targets begin with. The number changes with what a kernel expects, for compiled programs are kept.
const NAMESPACE: &str = "torus-cpu-2";

/// Activations by the number that `gated_mlp` takes.
pub const ACTIVATIONS: [Activation; 4] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu];

/// The kernels' targets and handlers, to be registered with the device before a program is compiled or loaded.
pub fn handlers() -> impl Iterator<Item = (String, Handler)> {
    Kernels::ENTRIES.iter().map(|entry| (target(entry.name), entry.handler))
}

fn target(name: &str) -> String {
    format!("{NAMESPACE}.{name}")
}

fn is_f32(dtype: DType) -> bool {
    dtype == DType::F32
}

/// The target of `(tokens i32 [tokens], matrix) -> [tokens, hidden]`.
pub fn embed(result: DType) -> String {
    target(if is_f32(result) { f32::EMBED } else { Bf16::EMBED })
}

/// The target of `(x [rows, in], matrix, bias f32 [out]?, residual [rows, out]?) -> [rows, out]`; attributes
/// `bias` and `residual` say which there are, and `clears` whether rows of padding become zeros, or hold anything: those of
/// logits are many megabytes, and nobody reads them.
pub fn linear(input: DType, result: DType) -> String {
    let names = if is_f32(input) { f32::LINEAR } else { Bf16::LINEAR };
    target(names[if is_f32(result) { f32::RESULT } else { Bf16::RESULT }])
}

/// The target of `(x [tokens, hidden], norm f32 [hidden], matrix of gate and up, matrix of down, norm of the result f32
/// [hidden]?) -> [tokens, hidden]`; attributes `activation` (an index into [`ACTIVATIONS`]), `norm_eps`, and `post_norm`
/// where there is the last.
pub fn gated_mlp(dtype: DType) -> String {
    target(if is_f32(dtype) { f32::GATED_MLP } else { Bf16::GATED_MLP })
}

/// The target of the attention half of a layer over pages of [`crate::attention::LAYOUT`]: `(x [tokens, hidden], norm,
/// matrix of QKV, bias?, matrix of the output, cos f32 [tokens, rotary], sin, norms of the heads of queries and of keys f32
/// [head_dim]?, bias of the output?, norm of the output?, pool…, context…) -> ([tokens, hidden], pool…)`; attributes as
/// those of [`attention`], `bias` and `norm_eps`, and `head_norms`, `o_bias` and `post_norm` where there are these. `None`
/// for a cache that it does not have.
pub fn attention_block(dtype: DType, kv_dtype: DType) -> Option<String> {
    let names = if is_f32(dtype) { f32::ATTENTION_BLOCK } else { Bf16::ATTENTION_BLOCK };
    Some(target(names[cache_index(kv_dtype)?]))
}

/// The target of [`sampling`]; what goes in and comes out is said at [`sampling::Sample`].
pub fn sample() -> String {
    target(<sampling::Sample as Kernel>::NAME)
}

fn cache_index(kv_dtype: DType) -> Option<usize> {
    [DType::F32, DType::Bf16, DType::I8].iter().position(|known| *known == kv_dtype)
}

struct Kernels;

impl KernelList for Kernels {
    const PLUGIN: &'static str = "host";
    const ENTRIES: &'static [Entry] = &[
        Entry::new::<Self, Embed<f32>>(),
        Entry::new::<Self, Embed<Bf16>>(),
        Entry::new::<Self, Linear<f32, f32>>(),
        Entry::new::<Self, Linear<f32, Bf16>>(),
        Entry::new::<Self, Linear<Bf16, f32>>(),
        Entry::new::<Self, Linear<Bf16, Bf16>>(),
        Entry::new::<Self, blocks::GatedMlp<f32>>(),
        Entry::new::<Self, blocks::GatedMlp<Bf16>>(),
        Entry::new::<Self, attention::AttentionBlock<f32, f32>>(),
        Entry::new::<Self, attention::AttentionBlock<f32, Bf16>>(),
        Entry::new::<Self, attention::AttentionBlock<f32, i8>>(),
        Entry::new::<Self, attention::AttentionBlock<Bf16, f32>>(),
        Entry::new::<Self, attention::AttentionBlock<Bf16, Bf16>>(),
        Entry::new::<Self, attention::AttentionBlock<Bf16, i8>>(),
        Entry::new::<Self, sampling::Sample>(),
    ];
}

/// An element of activations as XLA's FFI and as the kernels know it.
pub trait Activations: Tensorial {
    /// The kernels' names.
    const EMBED: &'static str;
    const GATED_MLP: &'static str;
    /// With a cache of f32, bf16 and int8.
    const ATTENTION: [&'static str; 3];
    const ATTENTION_BLOCK: [&'static str; 3];
    /// With this input, and results of f32 and bf16.
    const LINEAR: [&'static str; 2];
    /// Index into `LINEAR` of this result.
    const RESULT: usize;
    type Own: Element;

    fn own(values: &[Self]) -> &[Self::Own];
    fn own_mut(values: &mut [Self]) -> &mut [Self::Own];
}

impl Activations for f32 {
    const EMBED: &'static str = "embed_f32";
    const GATED_MLP: &'static str = "gated_mlp_f32";
    const ATTENTION: [&'static str; 3] = ["attention_f32_f32", "attention_f32_bf16", "attention_f32_int8"];
    const ATTENTION_BLOCK: [&'static str; 3] =
        ["attention_block_f32_f32", "attention_block_f32_bf16", "attention_block_f32_int8"];
    const LINEAR: [&'static str; 2] = ["linear_f32_f32", "linear_f32_bf16"];
    const RESULT: usize = 0;
    type Own = f32;

    fn own(values: &[f32]) -> &[f32] {
        values
    }

    fn own_mut(values: &mut [f32]) -> &mut [f32] {
        values
    }
}

impl Activations for Bf16 {
    const EMBED: &'static str = "embed_bf16";
    const GATED_MLP: &'static str = "gated_mlp_bf16";
    const ATTENTION: [&'static str; 3] = ["attention_bf16_f32", "attention_bf16_bf16", "attention_bf16_int8"];
    const ATTENTION_BLOCK: [&'static str; 3] =
        ["attention_block_bf16_f32", "attention_block_bf16_bf16", "attention_block_bf16_int8"];
    const LINEAR: [&'static str; 2] = ["linear_bf16_f32", "linear_bf16_bf16"];
    const RESULT: usize = 1;
    type Own = bf16;

    fn own(values: &[Bf16]) -> &[bf16] {
        // SAFETY: both are transparent over the 16 bits of a bfloat16.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }

    fn own_mut(values: &mut [Bf16]) -> &mut [bf16] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
    }
}

/// Operands of a matrix.
const MATRIX: usize = 3;

/// The packed matrix whose operands are the arguments from `index` on.
fn matrix<'c>(call: &'c Call<'_>, index: usize) -> Result<PackedMatrix<'c>, Fault> {
    let (arena, place): (Tensor<'c, u8>, _) = (call.argument(index)?, call.argument::<i32>(index + 1)?);
    let start = place.first().map_or(0, |place| *place as usize * ALIGNMENT);
    let bytes = arena.as_slice().get(start..);
    let bytes = bytes.ok_or_else(|| Fault::invalid(format!("a matrix at byte {start} lies past the arena")))?;
    PackedMatrix::parse(bytes).map_err(|error| Fault::invalid(format!("the matrix at byte {start}: {error}")))
}

/// How many of `rows` rows are real, as the matrix from argument `index` on says.
fn real_rows(call: &Call<'_>, index: usize, rows: usize) -> Result<usize, Fault> {
    let said = call.argument::<i32>(index + 2)?;
    Ok(said.first().map_or(rows, |said| (*said).max(0) as usize).min(rows))
}

/// The first `len` elements, and zeros after them.
fn cleared<Y: Element>(y: &mut [Y], len: usize) -> &mut [Y] {
    let (real, padding) = y.split_at_mut(len);
    Y::clear(padding);
    real
}

/// Fails unless an argument has the size that another one says.
fn expect(what: &str, found: usize, expected: usize) -> Result<(), Fault> {
    match found == expected {
        true => Ok(()),
        false => Err(Fault::invalid(format!("{what} is {found}, and the weights say {expected}"))),
    }
}

struct Embed<Y>(std::marker::PhantomData<Y>);

impl<Y: Activations> Kernel for Embed<Y> {
    const NAME: &'static str = Y::EMBED;

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let (tokens, weight) = (call.argument::<i32>(0)?, matrix(call, 1)?);
            let mut y = call.result::<Y>(0)?;
            expect("the size of a row", y.dims::<2>()?[1], weight.columns())?;
            let rows = real_rows(call, 1, tokens.len())?;
            let y = cleared(Y::own_mut(&mut y), rows * weight.columns());
            apply_embed(&tokens[..rows], &weight, y);
            Ok(())
        })
    }
}

struct Linear<X, Y>(std::marker::PhantomData<(X, Y)>);

impl<X: Activations, Y: Activations> Kernel for Linear<X, Y> {
    const NAME: &'static str = X::LINEAR[Y::RESULT];

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let (x, weight) = (call.argument::<X>(0)?, matrix(call, 1)?);
            let bias = call.attribute::<bool>("bias")?.then(|| call.argument::<f32>(1 + MATRIX)).transpose()?;
            let last = call.arguments() - 1;
            let residual = call.attribute::<bool>("residual")?.then(|| call.argument::<Y>(last)).transpose()?;
            let mut y = call.result::<Y>(0)?;
            let [rows, columns] = x.dims()?;
            expect("the input's size", columns, weight.columns())?;
            expect("the result's size", y.dims::<2>()?[1], weight.rows())?;
            let rows = real_rows(call, 1, rows)?;
            let (y, len) = (Y::own_mut(&mut y), rows * weight.rows());
            let y = if call.attribute("clears")? { cleared(y, len) } else { &mut y[..len] };
            let residual = residual.as_deref().map(|residual| &Y::own(residual)[..y.len()]);
            apply_linear(&X::own(&x)[..rows * columns], &weight, Epilogue { bias: bias.as_deref(), residual }, y);
            Ok(())
        })
    }
}
