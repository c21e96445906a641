//! Sampling as one call of the CPU's native kernel, which gives what the graph gives.

use torus_abi::DType;
use torus_cpu::{
    ffi::{self, sampling::flag as kernel_flag},
    sampling as kernel,
};
use torus_hlo::{Axis, CustomCall, Shape, Value, axes::ROWS};

use super::{IN_PROMPT, Sampled, SamplingInputs};
use crate::program::{flag, result};

// The kernel is told by the same bits.
const _: () = {
    assert!(kernel::IN_PROMPT == IN_PROMPT);
    assert!(kernel_flag::PENALTIES == flag::PENALTIES && kernel_flag::BIAS == flag::BIAS);
    assert!(kernel_flag::MASK == flag::MASK && kernel_flag::SAMPLE == flag::SAMPLE);
    assert!(kernel_flag::LOGPROBS == flag::LOGPROBS && kernel_flag::TOP_LOGPROBS == flag::TOP_LOGPROBS);
    assert!(result::TOKEN == 0 && result::LOGPROB == 1 && result::BAD == 2 && result::TOP_TOKENS == 3);
};

/// As [`super::sample`], for the first `real_rows` (i32 `[]`) rows; the others are zeros.
pub(crate) fn sample_natively<'f>(inputs: &SamplingInputs<'f>, real_rows: Value<'f>) -> Sampled<'f> {
    let rows = (ROWS, inputs.logits.size(ROWS));
    let results =
        vec![Shape::new(DType::I32, [rows]), Shape::new(DType::I32, [rows, (Axis("top"), result::WIDTH as u64)])];
    let call = CustomCall { row_major: true, ..CustomCall::new(ffi::sample(), results) };
    let row = &inputs.rows;
    let operands = [
        inputs.logits,
        inputs.slots,
        inputs.bias_slots,
        inputs.token_counts,
        inputs.bias,
        inputs.allowed,
        row.temperature,
        row.top_k,
        row.top_p,
        row.min_p,
        row.repetition_penalty,
        row.frequency_penalty,
        row.presence_penalty,
        row.seed_low,
        row.seed_high,
        row.position,
        row.target,
        inputs.flags,
        real_rows,
    ];
    let results = inputs.logits.func().custom_call(&call, &operands);
    Sampled { tokens: results[0], result: results[1] }
}
