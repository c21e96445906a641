//! The sampling graph, on one device and on several that share the vocabulary, and the native kernel, on the CPU plugin
//! against a plain reference.

use torus_abi::{DType, model::Parallel};
use torus_hlo::{
    Builder, Shape,
    axes::{ROWS, SLOTS, VOCAB},
};

use super::{IN_PROMPT, RowParameters, SamplingInputs, Vocabulary, random::threefry, sample, sample_natively};
use crate::{
    program::{flag, result},
    testing::{Array, run_on_all},
};

const VOCABULARY: usize = 50;

/// One row and what it asks for.
#[derive(Clone)]
struct Row {
    logits: Vec<f32>,
    counts: Vec<i32>,
    bias: Vec<f32>,
    allowed: Vec<bool>,
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    frequency: f32,
    presence: f32,
    seed: u64,
    position: u32,
    target: i32,
}

impl Row {
    /// A greedy row with logits that no two tokens share.
    fn new(seed: u64) -> Self {
        let logit = |i: usize| {
            let [bits, _] = threefry([seed as u32, 7], [i as u32, 0]);
            (bits >> 8) as f32 / (1 << 24) as f32 * 8.0 - 4.0
        };
        Self {
            logits: (0..VOCABULARY).map(logit).collect(),
            counts: vec![0; VOCABULARY],
            bias: vec![0.0; VOCABULARY],
            allowed: vec![true; VOCABULARY],
            temperature: 0.0,
            top_k: VOCABULARY as i32,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            frequency: 0.0,
            presence: 0.0,
            seed,
            position: 0,
            target: -1,
        }
    }

    fn adjusted(&self) -> Vec<f32> {
        let adjust = |i: usize| {
            let (mut logit, count) = (self.logits[i], self.counts[i]);
            if count != 0 {
                logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
            }
            let in_output = count % IN_PROMPT;
            logit -= in_output as f32 * self.frequency + if in_output > 0 { self.presence } else { 0.0 };
            if self.allowed[i] { logit + self.bias[i] } else { f32::NEG_INFINITY }
        };
        (0..VOCABULARY).map(adjust).collect()
    }

    fn scaled(&self) -> Vec<f32> {
        let temperature = if self.temperature > 0.0 { self.temperature } else { 1.0 };
        self.adjusted().iter().map(|logit| logit / temperature).collect()
    }

    fn logprobs(&self) -> Vec<f32> {
        let scaled = self.scaled();
        let peak = scaled.iter().copied().fold(f32::MIN, f32::max);
        let total: f64 = scaled.iter().map(|x| f64::from(x - peak).exp()).sum();
        scaled.iter().map(|x| (f64::from(x - peak) - total.ln()) as f32).collect()
    }

    /// Tokens that may be drawn, by sorting.
    fn kept(&self) -> Vec<usize> {
        let logprobs = self.logprobs();
        let mut order: Vec<_> = (0..VOCABULARY).collect();
        order.sort_by(|a, b| logprobs[*b].total_cmp(&logprobs[*a]));
        order.truncate(self.top_k as usize);
        let mass: f32 = order.iter().map(|i| logprobs[*i].exp()).sum();
        let mut sum = 0.0;
        let nucleus = order.iter().take_while(|i| {
            let before = sum;
            sum += logprobs[**i].exp();
            before < self.top_p * mass
        });
        let floor = logprobs[order[0]] + self.min_p.ln();
        let mut kept: Vec<_> = nucleus.copied().filter(|i| logprobs[*i] >= floor).collect();
        kept.sort_unstable();
        kept
    }

    /// The token the row must draw.
    fn drawn(&self) -> usize {
        let scaled = self.scaled();
        if self.temperature == 0.0 {
            return (0..VOCABULARY).max_by(|a, b| scaled[*a].total_cmp(&scaled[*b])).unwrap();
        }
        let noisy = |i: &usize| {
            let key = [self.seed as u32, (self.seed >> 32) as u32];
            let [bits, _] = threefry(key, [*i as u32, self.position]);
            let uniform = ((bits >> 9) as f32 + 0.5) / (1u32 << 23) as f32;
            scaled[*i] - (-uniform.ln()).ln()
        };
        self.kept().into_iter().max_by(|a, b| noisy(a).total_cmp(&noisy(b))).unwrap()
    }
}

/// Devices that share the vocabulary, which they do not divide.
const SHARED: u32 = 4;

/// What computes.
#[derive(Clone, Copy, PartialEq)]
enum Sampler {
    Kernel,
    /// The graph on so many devices.
    Graph(u32),
}

/// Samples rows, each in a slot of its own, in reverse order of slots: by the graph and by the kernel, which must agree.
fn run_rows(rows: &[Row], flags: i32) -> Vec<Vec<i32>> {
    let [graph, kernel] = [Sampler::Graph(1), Sampler::Kernel].map(|sampler| run_one(rows, flags, sampler).remove(0));
    agree(&graph, &kernel);
    let shared = run_one(rows, flags, Sampler::Graph(SHARED));
    assert!(shared.iter().all(|results| *results == shared[0]), "the devices find different tokens");
    agree(&graph, &shared[0]);
    kernel
}

fn agree(graph: &[Vec<i32>], other: &[Vec<i32>]) {
    for (graph, kernel) in graph.iter().zip(other) {
        assert_eq!(graph[result::BAD], kernel[result::BAD]);
        if graph[result::BAD] == 0 {
            assert_eq!(graph[result::TOKEN], kernel[result::TOKEN]);
            let tops = result::TOP_TOKENS..result::TOP_LOGPROBS;
            assert_eq!(graph[tops.clone()], kernel[tops]);
            for word in (result::TOP_LOGPROBS..result::WIDTH).chain([result::LOGPROB]) {
                let [one, other] = [graph, kernel].map(|row| f32::from_bits(row[word] as u32));
                assert!((one - other).abs() < 1e-5, "{one} and {other}");
            }
        }
    }
}

/// The results of each device.
fn run_one(rows: &[Row], flags: i32, sampler: Sampler) -> Vec<Vec<Vec<i32>>> {
    let count = rows.len();
    let words = VOCABULARY.div_ceil(32);
    let parallel = Parallel { tensor: if let Sampler::Graph(devices) = sampler { devices } else { 1 } };
    let part = parallel.vocab(VOCABULARY as u64) as usize;
    let (n, v) = (count as u64, part as u64);
    let builder = Builder::new("test");
    builder.main(|f| {
        let argument = |dtype, axes: &[_]| f.argument(Shape::new(dtype, axes));
        let row = |dtype| argument(dtype, &[(ROWS, n)]);
        let index = argument(DType::I32, &[]);
        let inputs = SamplingInputs {
            vocabulary: Vocabulary::new(VOCABULARY as u64, parallel, Some(index)),
            logits: argument(DType::F32, &[(ROWS, n), (VOCAB, v)]),
            slots: row(DType::I32),
            bias_slots: row(DType::I32),
            token_counts: argument(DType::I32, &[(SLOTS, n), (VOCAB, v)]),
            bias: argument(DType::F32, &[(SLOTS, n), (VOCAB, v)]),
            allowed: argument(DType::U32, &[(SLOTS, n), (torus_hlo::Axis("words"), words as u64)]),
            rows: RowParameters {
                temperature: row(DType::F32),
                top_k: row(DType::I32),
                top_p: row(DType::F32),
                min_p: row(DType::F32),
                repetition_penalty: row(DType::F32),
                frequency_penalty: row(DType::F32),
                presence_penalty: row(DType::F32),
                seed_low: row(DType::U32),
                seed_high: row(DType::U32),
                position: row(DType::U32),
                target: row(DType::I32),
            },
            flags: argument(DType::I32, &[]),
        };
        let sampled = match sampler {
            Sampler::Kernel => sample_natively(&inputs, f.scalar(DType::I32, count as i64)),
            Sampler::Graph(_) => sample(&inputs),
        };
        vec![sampled.result]
    });
    let text = torus_hlo::module_text("sampling", parallel.tensor, &builder.finish().unwrap().functions);
    let slots = || rows.iter().rev();
    let mask = |row: &Row| -> Vec<u32> {
        let word = |chunk: &[bool]| chunk.iter().enumerate().map(|(i, on)| u32::from(*on) << i).sum();
        row.allowed.chunks(32).map(word).collect()
    };
    let column = |of: &dyn Fn(&Row) -> f32| Array::f32(&rows.iter().map(of).collect::<Vec<_>>(), &[count]);
    let ints = |of: &dyn Fn(&Row) -> i32| Array::i32(&rows.iter().map(of).collect::<Vec<_>>(), &[count]);
    let words_of = |of: &dyn Fn(&Row) -> u32| Array::u32(&rows.iter().map(of).collect::<Vec<_>>(), &[count]);
    let arguments = |device: usize| {
        vec![
            Array::i32(&[device as i32], &[]),
            Array::f32(
                &rows.iter().flat_map(|row| part_of(&row.logits, device, part)).collect::<Vec<_>>(),
                &[count, part],
            ),
            Array::i32(&(0..count as i32).rev().collect::<Vec<_>>(), &[count]),
            Array::i32(&(0..count as i32).rev().collect::<Vec<_>>(), &[count]),
            Array::i32(&slots().flat_map(|row| part_of(&row.counts, device, part)).collect::<Vec<_>>(), &[count, part]),
            Array::f32(&slots().flat_map(|row| part_of(&row.bias, device, part)).collect::<Vec<_>>(), &[count, part]),
            Array::u32(&slots().flat_map(mask).collect::<Vec<_>>(), &[count, words]),
            column(&|row| row.temperature),
            ints(&|row| row.top_k),
            column(&|row| row.top_p),
            column(&|row| row.min_p),
            column(&|row| row.repetition),
            column(&|row| row.frequency),
            column(&|row| row.presence),
            words_of(&|row| row.seed as u32),
            words_of(&|row| (row.seed >> 32) as u32),
            words_of(&|row| row.position),
            ints(&|row| row.target),
            Array::i32(&[flags], &[]),
        ]
    };
    let lists: Vec<_> = (0..parallel.tensor as usize).map(arguments).collect();
    let rows_of = |results: Vec<Array>| results[0].to_i32().chunks(result::WIDTH).map(<[i32]>::to_vec).collect();
    run_on_all(&text, &lists).into_iter().map(rows_of).collect()
}

/// What a device holds of a row over the vocabulary; zeros follow the last token.
fn part_of<T: Copy + Default>(row: &[T], device: usize, part: usize) -> Vec<T> {
    let mut held: Vec<T> = row.iter().skip(device * part).take(part).copied().collect();
    held.resize(part, T::default());
    held
}

fn tokens(rows: &[Row], flags: i32) -> Vec<usize> {
    run_rows(rows, flags).iter().map(|row| row[result::TOKEN] as usize).collect()
}

#[test]
fn greedy_rows_take_the_largest_logit_and_ties_the_first() {
    let mut rows: Vec<_> = (0..5).map(Row::new).collect();
    rows[4].logits = vec![1.0; VOCABULARY];
    let expected = [rows[0].drawn(), rows[1].drawn(), rows[2].drawn(), rows[3].drawn(), 0];
    assert_eq!(tokens(&rows, 0), expected);
}

#[test]
fn penalties_bias_and_masks_change_what_is_largest() {
    let mut rows: Vec<_> = (0..6).map(Row::new).collect();
    let best: Vec<_> = rows.iter().map(Row::drawn).collect();
    rows[0].counts[best[0]] = IN_PROMPT;
    rows[0].repetition = 3.0;
    rows[1].counts[best[1]] = IN_PROMPT + 4;
    rows[1].frequency = 0.5;
    rows[2].counts[best[2]] = 1;
    rows[2].presence = 2.0;
    // In the prompt only: frequency and presence count the output.
    rows[3].counts[best[3]] = IN_PROMPT;
    (rows[3].frequency, rows[3].presence) = (9.0, 9.0);
    rows[4].bias[11] = 100.0;
    rows[5].allowed = (0..VOCABULARY).map(|i| i == 3 || i == 40).collect();
    let all = flag::PENALTIES | flag::BIAS | flag::MASK;
    let expected: Vec<_> = rows.iter().map(Row::drawn).collect();
    assert_eq!(tokens(&rows, all), expected);
    assert!(expected[0] != best[0] && expected[3] == best[3] && expected[4] == 11 && [3, 40].contains(&expected[5]));
    assert_eq!(tokens(&rows, 0), best, "without flags nothing applies");
}

#[test]
fn draws_follow_seed_and_position_and_stay_within_the_filters() {
    let mut rows = Vec::new();
    for i in 0..40u64 {
        let mut row = Row::new(i % 4);
        row.seed = i << 31 | 5;
        row.position = i as u32 * 3;
        row.temperature = 0.5 + i as f32 / 20.0;
        row.top_k = [VOCABULARY as i32, 5, 1, 20][i as usize % 4];
        row.top_p = [1.0, 0.9, 0.3][i as usize % 3];
        row.min_p = [0.0, 0.1][i as usize % 2];
        rows.push(row);
    }
    let expected: Vec<_> = rows.iter().map(Row::drawn).collect();
    let flags = flag::SAMPLE | flag::TOP_K | flag::TOP_P;
    assert_eq!(tokens(&rows, flags), expected);
    // The same rows in another batch, in another order.
    let mut reversed = rows[20..].to_vec();
    reversed.reverse();
    let mut expected = expected[20..].to_vec();
    expected.reverse();
    assert_eq!(tokens(&reversed, flags), expected);
}

#[test]
fn draws_are_distributed_as_the_probabilities() {
    let mut row = Row::new(3);
    (row.temperature, row.seed) = (1.0, 99);
    let positions = 0..4000;
    let rows: Vec<_> = positions.map(|position| Row { position, ..row.clone() }).collect();
    let mut counts = [0f64; VOCABULARY];
    for token in tokens(&rows, flag::SAMPLE) {
        counts[token] += 1.0;
    }
    let expected = row.logprobs().into_iter().map(|logprob| f64::from(logprob.exp()) * rows.len() as f64);
    let chi_squared: f64 = expected.zip(counts).map(|(wanted, found)| (found - wanted).powi(2) / wanted).sum();
    // 49 degrees of freedom: 85.4 is exceeded with probability 0.001; the seed is fixed.
    assert!(chi_squared < 85.4, "{chi_squared}");
}

#[test]
fn logprobs_are_those_of_the_tempered_row() {
    let mut rows: Vec<_> = (0..3).map(Row::new).collect();
    rows[1].temperature = 0.7;
    rows[2].target = 13;
    let flags = flag::SAMPLE | flag::LOGPROBS | flag::TOP_LOGPROBS;
    for (row, found) in rows.iter().zip(run_rows(&rows, flags)) {
        let logprobs = row.logprobs();
        let float = |word: i32| f32::from_bits(word as u32);
        let token = if row.target >= 0 { row.target } else { found[result::TOKEN] };
        assert!((float(found[result::LOGPROB]) - logprobs[token as usize]).abs() < 1e-5);
        let mut order: Vec<_> = (0..VOCABULARY).collect();
        order.sort_by(|a, b| logprobs[*b].total_cmp(&logprobs[*a]));
        for rank in 0..result::TOP {
            assert_eq!(found[result::TOP_TOKENS + rank] as usize, order[rank]);
            assert!((float(found[result::TOP_LOGPROBS + rank]) - logprobs[order[rank]]).abs() < 1e-5);
        }
        assert_eq!(found[result::BAD], 0);
    }
}

#[test]
fn rows_that_are_not_numbers_are_told() {
    let mut rows: Vec<_> = (0..3).map(Row::new).collect();
    rows[1].logits[5] = f32::NAN;
    rows[2].logits = vec![f32::NEG_INFINITY; VOCABULARY];
    let bad: Vec<_> = run_rows(&rows, 0).iter().map(|row| row[result::BAD]).collect();
    assert_eq!(bad, [0, 1, 1]);
}
