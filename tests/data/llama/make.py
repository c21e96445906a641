"""Writes the golden cases of the Llama family: tiny random checkpoints and what Hugging Face transformers makes of them.

    pip install torch transformers safetensors
    python tests/data/llama/make.py

Each case is a folder with `config.json`, `model.safetensors` and `golden.json`. The script is deterministic.
"""

import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
GREEDY_STEPS = 16
PROMPT_LENGTHS = [1, 7, 19]
# transformers takes the long factors only past the original length, Torus for all lengths.
PROMPT_LENGTHS_LONGROPE = [33, 40, 51]
TOP = 5

BASE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
    max_position_embeddings=128,
    rope_theta=10_000.0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONGROPE = dict(
    rope_type="longrope",
    factor=4.0,
    original_max_position_embeddings=32,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.0, 3.0, 4.0],
)
CASES = {
    "grouped-untied": {},
    "multi-head-tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "odd-sizes": dict(
        hidden_size=15, intermediate_size=23, num_attention_heads=3, num_key_value_heads=1, head_dim=6, vocab_size=37
    ),
    "rope-llama3": dict(rope_scaling=LLAMA3, rope_theta=500_000.0),
    "rope-linear": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "rope-yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "rope-longrope": dict(
        rope_scaling=LONGROPE, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    ),
}


def checkpoint(name, changes, seed):
    """A model whose weights are large enough that its attention and its positions matter."""
    torch.manual_seed(seed)
    fields = {**BASE, "tie_word_embeddings": False, **changes}
    config = LlamaConfig(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif key.endswith("bias"):
                weight.copy_(0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * 1.5 / math.sqrt(weight.shape[-1]))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # As most published checkpoints have it; newer files keep both in `rope_parameters`.
    written = json.loads((folder / "config.json").read_text())
    parameters = written.pop("rope_parameters", None)
    if parameters is not None and name != "rope-yarn":
        written["rope_theta"] = parameters.pop("rope_theta")
        written["rope_scaling"] = None if parameters.get("rope_type") == "default" else parameters
    elif parameters is not None:
        written["rope_parameters"] = parameters
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    return model, folder


@torch.no_grad()
def golden(model, prompt):
    ids, margins, first = list(prompt), [], None
    for _ in range(GREEDY_STEPS):
        logprobs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        top = logprobs.topk(TOP)
        first = first or [
            {"id": i, "logprob": round(p, 5)} for i, p in zip(top.indices.tolist(), top.values.tolist())
        ]
        margins.append(round((top.values[0] - top.values[1]).item(), 4))
        ids.append(top.indices[0].item())
    scored = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    prompt_logprobs = [round(scored[i, token].item(), 5) for i, token in enumerate(prompt[1:])]
    return {
        "input_ids": prompt,
        "prompt_logprobs": prompt_logprobs,
        "greedy_ids": ids[len(prompt) :],
        "top1_minus_top2": margins,
        "first_step_top5": first,
    }


def main():
    for seed, (name, changes) in enumerate(CASES.items()):
        model, folder = checkpoint(name, changes, seed)
        random = torch.Generator().manual_seed(seed)
        vocab = model.config.vocab_size
        lengths = PROMPT_LENGTHS_LONGROPE if name == "rope-longrope" else PROMPT_LENGTHS
        prompts = [torch.randint(0, vocab, (length,), generator=random).tolist() for length in lengths]
        written = {"transformers": transformers.__version__, "cases": [golden(model, prompt) for prompt in prompts]}
        (folder / "golden.json").write_text(json.dumps(written) + "\n")
        print(name, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
