"""Writes the golden cases of the Granite family: tiny random checkpoints and what Hugging Face transformers makes of
them.

    pip install torch transformers safetensors
    python tests/data/granite/make.py

Each case is a folder with `config.json`, `model.safetensors` and `golden.json`. The script is deterministic.
"""

import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from transformers import GraniteConfig, GraniteForCausalLM

HERE = Path(__file__).parent
GREEDY_STEPS = 16
PROMPT_LENGTHS = [1, 7, 19]
TOP = 5

# All four multipliers are far from what leaving them out would mean (1, and 0.5 for the softmax of heads of size 4).
BASE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
    max_position_embeddings=128,
    rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.4,
    logits_scaling=0.5,
)
CASES = {
    "grouped-untied": {},
    "odd-sizes-tied": dict(
        hidden_size=18,
        intermediate_size=23,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=37,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=500_000.0),
        embedding_multiplier=0.3,
        attention_multiplier=1.1,
        residual_multiplier=1.7,
        logits_scaling=0.15,
    ),
}


def checkpoint(name, changes, seed):
    """A model whose weights are large enough that its attention and its positions matter."""
    torch.manual_seed(seed)
    fields = {**BASE, "tie_word_embeddings": False, **changes}
    config = GraniteConfig(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config._attn_implementation = "eager"
    model = GraniteForCausalLM(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * 1.5 / math.sqrt(weight.shape[-1]))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    if name == "grouped-untied":
        # As published checkpoints have it; newer files keep it in `rope_parameters`.
        written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
        written["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    return model


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
        model = checkpoint(name, changes, seed)
        random = torch.Generator().manual_seed(seed)
        vocab = model.config.vocab_size
        prompts = [torch.randint(0, vocab, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
        written = {"transformers": transformers.__version__, "cases": [golden(model, prompt) for prompt in prompts]}
        (HERE / name / "golden.json").write_text(json.dumps(written) + "\n")
        print(name, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
