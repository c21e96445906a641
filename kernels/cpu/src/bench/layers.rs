//! Whole layers as a step runs them, from whose memory much more is read than caches hold.

use half::bf16;

use super::{Arithmetic, AttentionCase, Memory, Noise, Timing, World};
use crate::{
    Norm,
    attention::{Block, Params, PoolShape},
    gated_mlp,
    packed::{Format, Layout, PackedMatrix, Segment, pack},
};
use torus_abi::fragment::Activation;

/// The sizes of a model's layers.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
}

/// What a layer reads, one part after the other in memory: QKV, output, gate and up, down.
fn matrices(format: Format, params: &Params, sizes: Sizes) -> Result<[Layout; 4], String> {
    let Sizes { hidden, intermediate, .. } = sizes;
    let (queries, keys) = (params.q_heads * params.head_dim, params.kv_heads * params.head_dim);
    let layout = |columns: usize, rows: &[usize]| {
        let segments = rows.iter().map(|rows| Segment { format, rows: *rows }).collect();
        Layout::new(columns, segments).map_err(|error| error.to_string())
    };
    Ok([
        layout(hidden, &[queries, keys, keys])?,
        layout(queries, &[hidden])?,
        layout(hidden, &[intermediate, intermediate])?,
        layout(intermediate, &[hidden])?,
    ])
}

/// The layers of a model over a case's tokens, with bf16 pages that lie scattered.
///
/// # Errors
/// If the sizes are not served.
pub fn whole_layers(
    format: Format,
    params: &Params,
    sizes: Sizes,
    case: AttentionCase,
    rounds: usize,
) -> Result<Timing, String> {
    params.supports()?;
    let world = World::new(params, case);
    let layouts = matrices(format, params, sizes)?;
    let weights: usize = layouts.iter().map(Layout::bytes).sum();
    let page = PoolShape::new(params).page_elements() * size_of::<bf16>();
    let (pool, used) = (world.pages * page, case.pages(params.page_size) * page);
    let mut memory = Memory::zeroed(sizes.layers * (weights + pool));
    let (packed, _) = memory.split_at_mut(sizes.layers * weights);
    for layer in packed.chunks_exact_mut(weights) {
        let mut at = 0;
        for layout in &layouts {
            let end = at + layout.bytes();
            pack(layout, &Noise::new(format, layout.columns()), &mut layer[at..end])
                .map_err(|error| error.to_string())?;
            at = end;
        }
    }
    let tokens = world.kv_slot.len();
    let mut x = vec![bf16::from_f32(0.25); tokens * sizes.hidden];
    let mut y = x.clone();
    let norm_weights = vec![1f32; sizes.hidden];
    let angles = vec![0.5f32; tokens * params.head_dim / 2];
    let products = sizes.hidden * (2 * params.head_dim * (params.q_heads + params.kv_heads) + 3 * sizes.intermediate);
    let operations = 2.0 * (products * tokens * sizes.layers) as f64 + case.operations(params, sizes.layers);
    let mut outcome = Ok(());
    let mut run = |memory: &mut Memory| -> Result<(), String> {
        let (weights_of_all, pools) = memory.split_at_mut(sizes.layers * weights);
        for (layer, pool) in weights_of_all.chunks_exact(weights).zip(pools.chunks_exact_mut(pool)) {
            let mut at = 0;
            let mut next = |layout: &Layout| {
                at += layout.bytes();
                PackedMatrix::parse(&layer[at - layout.bytes()..]).map_err(|error| error.to_string())
            };
            let [qkv, output, gate_up, down] =
                [next(&layouts[0])?, next(&layouts[1])?, next(&layouts[2])?, next(&layouts[3])?];
            let norm = Norm { weights: &norm_weights, eps: 1e-5 };
            let block = Block {
                params: *params,
                norm,
                qkv,
                bias: None,
                output,
                cos: &angles,
                sin: &angles,
                rotary: params.head_dim / 2,
                head_norms: None,
                o_bias: None,
                post_norm: None,
                step: world.step(),
            };
            block.apply(&x, super::memory::elements_mut::<bf16>(pool), &mut [], &mut y)?;
            gated_mlp(&y, (norm, None), &gate_up, &down, Activation::Silu, &mut x);
        }
        x.fill(bf16::from_f32(0.25));
        Ok(())
    };
    let run = |memory: &mut Memory| outcome = std::mem::replace(&mut outcome, Ok(())).and(run(memory));
    let read = sizes.layers * (weights + used);
    let timing =
        Timing::of(rounds, operations, Arithmetic::of(format, tokens), &mut memory, run, |memory| &memory[..read]);
    outcome.map(|()| timing)
}
