//! What a kernel is made for.

use torus_mosaic::Generation;

use crate::layout::Part;

/// How keys and values are kept in their pages.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum KvFormat {
    Bf16,
    /// `f8E4M3FN` without subnormal numbers (they become 0): a number is `scale` times its eight bits.
    Fp8 {
        scales: Scales,
    },
    /// Whole numbers from -127 to 127: a number is `scale` times it.
    Int8 {
        scales: Scales,
    },
}

/// What a cache's small numbers are multiplied by, for all heads and tokens of a layer; those that are only known at run
/// time are operands of the graph ([`crate::graph::Layer::scales`]), and these 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scales {
    pub keys: f32,
    pub values: f32,
}

impl Scales {
    pub const ONE: Self = Self { keys: 1.0, values: 1.0 };

    pub fn of(self, part: Part) -> f32 {
        match part {
            Part::Key => self.keys,
            Part::Value => self.values,
        }
    }
}

impl KvFormat {
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 { .. } | Self::Int8 { .. } => 1,
        }
    }
}

/// One kind of attention layer, on one device.
#[derive(Clone, PartialEq, Debug)]
pub struct Spec {
    pub q_heads: usize,
    pub kv_heads: usize,
    /// 64, 128 or 256.
    pub head_dim: usize,
    pub kv: KvFormat,
    /// Tokens of a page: 128.
    pub page_size: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Only the last `window` tokens are seen, the current one included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Each query head has a score that takes weight and adds no value, given as an operand.
    pub sinks: bool,
    /// Which of a sequence's new tokens see each other is given as an operand (trees of draft tokens); otherwise each
    /// sees those before it.
    pub mask: bool,
    pub generation: Generation,
}

/// Sizes of one launch, fixed when the kernel is compiled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Rows of the query, padding included.
    pub tokens: usize,
    /// Most sequences.
    pub seqs: usize,
    /// Pages of the pool.
    pub pages: usize,
    /// Entries of the page table, which bounds the pages that all sequences have together.
    pub page_table: usize,
    /// A sequence with at most so many new tokens is decoded: it goes through decode's queue. Longer ones are
    /// prefilled.
    pub draft: usize,
}

/// Why there is no kernel.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Unsupported {
    #[error("{q_heads} query heads do not divide among {kv_heads} KV heads")]
    Heads { q_heads: usize, kv_heads: usize },
    #[error("heads of {0}: the kernel is made for 64, 128 and 256")]
    HeadDim(usize),
    #[error("pages of {0} tokens: the kernel wants 128 (`--page-size 128`)")]
    PageSize(usize),
    #[error("{what}: {reason}")]
    Feature { what: String, reason: &'static str },
    #[error("a window of no tokens")]
    Window,
    #[error("{what} is {found}, and the kernel's queue has room for {limit}: lower `{option}`")]
    Limit { what: &'static str, found: usize, limit: usize, option: &'static str },
    #[error(
        "the queue of a batch takes {bytes} bytes of SMEM, and there are {available}: lower `--max-running-requests` or `--context-length`"
    )]
    Smem { bytes: usize, available: usize },
    #[error(transparent)]
    Call(#[from] torus_mosaic::CallError),
    #[error(transparent)]
    Build(#[from] torus_mosaic::BuildError),
}

impl Spec {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    pub fn check(&self) -> Result<(), Unsupported> {
        let Self { q_heads, kv_heads, head_dim, page_size, .. } = *self;
        if kv_heads == 0 || q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return Err(Unsupported::Heads { q_heads, kv_heads });
        }
        if ![64, 128, 256].contains(&head_dim) {
            return Err(Unsupported::HeadDim(head_dim));
        }
        if page_size != 128 {
            return Err(Unsupported::PageSize(page_size));
        }
        if self.window == Some(0) {
            return Err(Unsupported::Window);
        }
        if self.window.is_some() && self.mask {
            let what = "a window over trees of draft tokens".to_owned();
            return Err(Unsupported::Feature { what, reason: "a token's place in the tree is not its position" });
        }
        Ok(())
    }
}
