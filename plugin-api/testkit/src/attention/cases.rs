//! The cases.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_abi::{
    DType,
    attention::{AttentionQuery, Target},
    model::AttentionSpec,
    step::StepShape,
};

use crate::step::Schedule;

/// One kind of attention over one schedule.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub spec: AttentionSpec,
    /// Of queries, keys, values and the result.
    pub dtype: DType,
    pub kv_dtype: DType,
    pub shape: StepShape,
    pub schedule: Schedule,
    pub seed: u64,
}

impl Case {
    pub fn new(name: &str, spec: AttentionSpec, dtype: DType, schedule: Schedule) -> Self {
        Self { name: name.to_owned(), spec, dtype, kv_dtype: dtype, shape: schedule.shape(), schedule, seed: 1 }
    }

    pub fn query(&self, target: &Target) -> AttentionQuery {
        AttentionQuery {
            spec: self.spec.clone(),
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
            shape: self.shape,
            target: target.clone(),
            sets_scales: true,
        }
    }
}

fn spec(q_heads: u64, kv_heads: u64, head_dim: u64) -> AttentionSpec {
    let scale = (head_dim as f32).sqrt().recip();
    AttentionSpec { q_heads, kv_heads, head_dim, scale, window: None, soft_cap: None }
}

/// Prompts of lengths at and around whole pages, all in one step.
fn prefill(page: usize) -> Schedule {
    Schedule::new(page, &[&[1], &[page - 1], &[page], &[page + 1], &[2 * page], &[3 * page + 2]])
}

/// The same prompts, each decoded over the end of its page.
fn decode(page: usize) -> Schedule {
    let prompts = [1, page - 1, page, page + 1, 2 * page - 2, 3 * page + 2];
    let mut schedule = Schedule::new(page, &[]);
    for prompt in prompts {
        schedule.push(None, &[prompt, 1, 1, 1]);
    }
    schedule
}

/// Chunked prompts, decoding and new prompts in the same steps; sequences end and their rows move up.
fn mixed(page: usize) -> Schedule {
    Schedule::new(page, &[&[page + 3, page - 3, 1, 1], &[4, 1], &[0, 2 * page - 1, page], &[0, 1, 1, 1], &[0, 0, 2, 9]])
}

/// Two sequences go on from the whole pages of another, which goes on itself.
fn shared(page: usize) -> Schedule {
    let mut schedule = Schedule::new(page, &[&[2 * page + 3, 1, 1]]);
    schedule.push(Some((0, 2)), &[0, 3, 1]);
    schedule.push(Some((0, 1)), &[0, page, 2]);
    schedule
}

/// Ragged steps drawn from a seed.
fn random(page: usize, seed: u64) -> Schedule {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut schedule = Schedule::new(page, &[]);
    for _ in 0..5 {
        let tokens: Vec<usize> = (0..5)
            .map(|_| match random.random_range(0..5) {
                0 => 0,
                1 | 2 => 1,
                _ => random.random_range(2..2 * page),
            })
            .collect();
        schedule.push(None, &tokens);
    }
    schedule
}

/// What a backend is asked for on any device. One that does not serve a case says so with a score of 0.
pub fn cases() -> Vec<Case> {
    [DType::F32, DType::Bf16].into_iter().flat_map(cases_in).collect()
}

fn cases_in(dtype: DType) -> Vec<Case> {
    let plain = || spec(4, 2, 64);
    let mut cases = Vec::new();
    let mut add = |name: &str, spec, schedule| {
        let mut case = Case::new(&format!("{name}, {dtype}"), spec, dtype, schedule);
        case.seed = cases.len() as u64 + 1;
        cases.push(case);
    };
    add("prefill", plain(), prefill(16));
    add("decode", plain(), decode(16));
    add("mixed steps", plain(), mixed(16));
    add("shared pages", plain(), shared(16));
    add("random steps", plain(), random(16, 1));
    add("random steps, pages of 32", plain(), random(32, 2));
    add("pages of 4", plain(), mixed(4));
    add("pages of 64", plain(), decode(64));
    add("1 query head a KV head, heads of 80", spec(2, 2, 80), mixed(16));
    add("4 query heads a KV head, heads of 96", spec(8, 2, 96), mixed(16));
    add("8 query heads a KV head, heads of 128", spec(16, 2, 128), mixed(16));
    add("one KV head, heads of 256", spec(4, 1, 256), mixed(16));
    for window in [1, 16, 23] {
        add(&format!("window of {window}"), AttentionSpec { window: Some(window), ..plain() }, decode(16));
    }
    add("soft cap", AttentionSpec { soft_cap: Some(2.0), ..plain() }, mixed(16));
    let both = AttentionSpec { window: Some(9), soft_cap: Some(30.0), ..spec(8, 1, 128) };
    add("window and soft cap, one KV head", both, random(16, 3));
    cases
}

/// Steps of the size that servers run, in bf16: to compile for a device that need not be there.
pub fn target_cases() -> Vec<Case> {
    let shape = |tokens, seqs| StepShape { tokens, seqs, page_size: 128, pages: 512, page_table: 1024 };
    let case = |name: &str, spec, shape| Case { shape, ..Case::new(name, spec, DType::Bf16, Schedule::new(128, &[])) };
    let fp8 = |case| Case { kv_dtype: DType::F8E4M3, ..case };
    vec![
        case("decode of 64 sequences, 32 heads of 128 over 8", spec(32, 8, 128), shape(64, 64)),
        case("prefill of 512 tokens, 32 heads of 128 over 8", spec(32, 8, 128), shape(512, 64)),
        case("decode of 64 sequences, 8 heads of 64 over 2", spec(8, 2, 64), shape(64, 64)),
        fp8(case("decode of 64 sequences, 8 heads of 128 over 2, cache of fp8", spec(8, 2, 128), shape(64, 64))),
        case("decode of 64 sequences, 4 heads of 256 over 1", spec(4, 1, 256), shape(64, 64)),
        case(
            "prefill of 512 tokens, window of 1024 and soft cap",
            AttentionSpec { window: Some(1024), soft_cap: Some(50.0), ..spec(8, 4, 256) },
            shape(512, 64),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_steps_fit_their_shape() {
        let cases = cases();
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        for case in &cases {
            for step in &case.schedule.steps {
                let tokens: usize = step.iter().map(|chunk| chunk.len).sum();
                assert!(tokens < case.shape.tokens as usize && step.len() <= case.shape.seqs as usize, "{}", case.name);
            }
            let tables = case.schedule.tables(&case.shape, case.seed);
            for (sequence, table) in case.schedule.sequences.iter().zip(&tables) {
                assert!(table.len() * case.schedule.page_size >= sequence.tokens, "{}", case.name);
            }
            assert!(tables.concat().len() <= case.shape.page_table as usize, "{}", case.name);
        }
    }
}
