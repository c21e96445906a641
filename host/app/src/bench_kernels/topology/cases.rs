//! The kernels and batches that are costed.

use torus_attention::{KvFormat, Layout, Scales, Shape, Spec, Tuning, Unsupported, queue::Sequence};
use torus_mosaic::Generation;

/// A kernel, with the batches that it is costed for.
pub struct Case {
    pub name: String,
    pub spec: Spec,
    pub shape: Shape,
    pub tuning: Tuning,
    pub batches: Vec<Batch>,
}

pub struct Batch {
    pub name: String,
    pub sequences: Vec<Sequence>,
}

/// Sequences that decode together.
const DECODED: usize = 64;
const CONTEXTS: [usize; 4] = [512, 1024, 4096, 32_768];
const PAGE: usize = 128;

pub fn all(generation: Generation) -> Result<Vec<Case>, Unsupported> {
    let spec = |q_heads, kv_heads, head_dim| Spec {
        q_heads,
        kv_heads,
        head_dim,
        kv: KvFormat::Bf16,
        page_size: PAGE,
        scale: (head_dim as f32).sqrt().recip(),
        window: None,
        soft_cap: None,
        sinks: false,
        mask: false,
        generation,
    };
    let scales = Scales { keys: 1.0, values: 1.0 };
    let decode = |name: &str, spec: Spec| Case::new(name, spec, 1, decodes(1));
    let base = spec(8, 2, 128);
    [
        decode("decode 8/2x128", base.clone()),
        decode("decode 16/2x128", spec(16, 2, 128)),
        decode("decode 8/1x128", spec(8, 1, 128)),
        decode("decode 4/4x128", spec(4, 4, 128)),
        decode("decode 32/8x128", spec(32, 8, 128)),
        decode("decode 8/2x64", spec(8, 2, 64)),
        decode("decode 8/2x256", spec(8, 2, 256)),
        decode("decode window 1024", Spec { window: Some(1024), ..base.clone() }),
        decode("decode fp8", Spec { kv: KvFormat::Fp8 { scales }, ..base.clone() }),
        decode("decode int8", Spec { kv: KvFormat::Int8 { scales }, ..base.clone() }),
        Case::new("decode 4 drafted", base.clone(), 4, decodes(4)),
        Case::new("prefill 8/2x128", base, 1, prefills()),
    ]
    .into_iter()
    .collect()
}

/// Sequences with so many new tokens each.
fn decodes(new: usize) -> Vec<Batch> {
    let lengths = |context: usize| [(new, context - new); DECODED];
    let batch = |context: usize| Batch { name: format!("kv {context}"), sequences: sequences(&lengths(context)) };
    CONTEXTS.map(batch).into()
}

fn prefills() -> Vec<Batch> {
    let batch = |name: &str, lengths: &[(usize, usize)]| Batch { name: name.to_owned(), sequences: sequences(lengths) };
    let mut mixed = vec![(1, 1023); 60];
    mixed.push((2048, 8192));
    vec![
        batch("2048 over 8192", &[(2048, 8192)]),
        batch("2048 from 0", &[(2048, 0)]),
        batch("60 decodes and a chunk", &mixed),
    ]
}

/// Sequences `(new, old)`, with pages one after another.
fn sequences(lengths: &[(usize, usize)]) -> Vec<Sequence> {
    let mut page = 1;
    let sequence = |(new, old): &(usize, usize)| {
        let first = page;
        page += (new + old).div_ceil(PAGE);
        Sequence { new: *new, old: *old, pages: (first..page).collect() }
    };
    lengths.iter().map(sequence).collect()
}

impl Batch {
    /// Those that are decoded and those that are prefilled, where there are any.
    pub fn parts(&self, draft: usize) -> Vec<Vec<Sequence>> {
        let (decoded, prefilled): (Vec<_>, Vec<_>) =
            self.sequences.iter().cloned().partition(|sequence| sequence.new <= draft);
        [decoded, prefilled].into_iter().filter(|part| !part.is_empty()).collect()
    }
}

impl Case {
    /// Why a batch may take much longer than its floors, as far as its kind is the reason.
    pub fn reasons(&self, batch: &Batch) -> Vec<&'static str> {
        let Spec { head_dim, kv, generation, .. } = self.spec;
        let prefills = batch.sequences.iter().any(|sequence| sequence.new > self.shape.draft);
        let decodes = batch.sequences.iter().any(|sequence| sequence.new <= self.shape.draft);
        let wide = generation != Generation::V5e;
        let reasons = [
            (head_dim == 64 && prefills, "a key or a value of 64 takes 128 lanes of a product"),
            (matches!(kv, KvFormat::Fp8 { .. }), "8 bits are half of the bytes for the same products"),
            (
                matches!(kv, KvFormat::Int8 { .. }),
                "8 bits are half of the bytes for the same products, and are widened before them",
            ),
            (
                decodes && prefills,
                "decode waits for bytes and the chunk for products, one after the other; the floor is the longer of both sums",
            ),
            (
                generation == Generation::Tpu7x && !prefills,
                "a core has 2.25 times the bandwidth of a v6e for the same products",
            ),
            (
                prefills && wide && head_dim < 256,
                "heads of less than 256 leave a part of each matrix unit idle, which the floor counts",
            ),
            (prefills, "a block at an edge is multiplied in quarters, of which a part is seen"),
        ];
        reasons.into_iter().filter_map(|(holds, reason)| holds.then_some(reason)).collect()
    }

    /// `draft` is how many new tokens a decoded sequence has at most.
    fn new(name: &str, spec: Spec, draft: usize, batches: Vec<Batch>) -> Result<Self, Unsupported> {
        let of = |count: fn(&Batch) -> usize| batches.iter().map(count).max().unwrap_or(0);
        let tokens = of(|batch| batch.sequences.iter().map(|sequence| sequence.new).sum());
        let pages = of(|batch| batch.sequences.iter().map(|sequence| sequence.pages.len()).sum());
        let seqs = of(|batch| batch.sequences.len());
        let shape = Shape { tokens: tokens.next_multiple_of(8), seqs, pages: pages + 1, page_table: pages, draft };
        let tuning = Tuning::for_slots(&spec, &Layout::new(&spec)?, draft);
        Ok(Self { name: name.to_owned(), spec, shape, tuning, batches })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use torus_attention::Work;

    use super::*;

    #[test]
    fn every_case_is_a_kernel_with_work() {
        for generation in [Generation::V5e, Generation::V6e, Generation::Tpu7x] {
            let cases = all(generation).unwrap();
            assert_eq!(cases.iter().map(|case| &case.name).collect::<BTreeSet<_>>().len(), cases.len());
            for case in &cases {
                let kernel = torus_attention::kernel(&case.spec, &case.shape, &case.tuning).unwrap();
                assert!(kernel.program(&torus_attention::call_options(&case.spec)).is_ok(), "{}", case.name);
                for batch in &case.batches {
                    let parts = batch.parts(case.shape.draft);
                    assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), batch.sequences.len());
                    let work = Work::of(&case.spec, &case.shape, &case.tuning, &batch.sequences).unwrap();
                    assert!(work.kv_bytes > 0 && work.flops > 0, "{} {}", case.name, batch.name);
                }
            }
        }
    }
}
