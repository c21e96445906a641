"""Writes the golden cases of the Gemma family: tiny random checkpoints and what Hugging Face transformers makes of them.

    pip install torch transformers safetensors
    python tests/data/gemma/make.py

Each case is a folder with `config.json`, `model.safetensors` and `golden.json`. The script is deterministic.
"""

import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

HERE = Path(__file__).parent
GREEDY_STEPS = 16
PROMPT_LENGTHS = [1, 7, 19]
TOP = 5

WINDOW, FULL = "sliding_attention", "full_attention"
BASE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    vocab_size=48,
    max_position_embeddings=128,
    sliding_window=4,
    layer_types=[WINDOW, FULL, WINDOW],
)
LINEAR = {
    WINDOW: dict(rope_type="default", rope_theta=10_000.0),
    FULL: dict(rope_type="linear", factor=4.0, rope_theta=500_000.0),
}
CASES = {
    "grouped": {},
    "multi-head-windows-only": dict(num_key_value_heads=4, sliding_window=8, layer_types=[WINDOW, WINDOW, WINDOW]),
    "odd-sizes-untied": dict(
        hidden_size=15,
        intermediate_size=23,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        vocab_size=37,
        sliding_window=5,
        num_hidden_layers=4,
        layer_types=[FULL, WINDOW, FULL, WINDOW],
        tie_word_embeddings=False,
    ),
    "rope-linear": dict(rope_parameters=LINEAR, query_pre_attn_scalar=4),
    "soft-caps": dict(attn_logit_softcapping=1.5, final_logit_softcapping=4.0, query_pre_attn_scalar=2),
}


def checkpoint(name, changes, seed):
    """A model whose weights are large enough that its attention and its positions matter."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(**{**BASE, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config._attn_implementation = "eager"
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "post_" in key or key == "model.norm.weight":
                # Layers outweigh the embedding, or else a tied head repeats the last token.
                weight.copy_(1.5 + 0.2 * torch.randn_like(weight))
            elif "norm" in key:
                weight.copy_(0.2 * torch.randn_like(weight))
            else:
                gain = 0.8 if "embed" in key else 1.5
                weight.copy_(torch.randn_like(weight) * gain / math.sqrt(weight.shape[-1]))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    if name == "grouped":
        # As most published checkpoints have it; newer files list the types and keep what is rotary in `rope_parameters`.
        parameters = written.pop("rope_parameters")
        written.pop("layer_types")
        written.pop("_sliding_window_pattern", None)
        written["sliding_window_pattern"] = 2
        written["rope_theta"] = parameters[FULL]["rope_theta"]
        written["rope_local_base_freq"] = parameters[WINDOW]["rope_theta"]
        written["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    return model, folder


def logprobs(model, ids):
    # Gemma3Attention does not hand the cap of its config on, but the function below it has it.
    cap = model.config.attn_logit_softcapping
    return model(torch.tensor([ids]), **({} if cap is None else {"softcap": cap})).logits[0].float().log_softmax(-1)


@torch.no_grad()
def golden(model, prompt):
    ids, margins, first = list(prompt), [], None
    for _ in range(GREEDY_STEPS):
        top = logprobs(model, ids)[-1].topk(TOP)
        first = first or [
            {"id": i, "logprob": round(p, 5)} for i, p in zip(top.indices.tolist(), top.values.tolist())
        ]
        margins.append(round((top.values[0] - top.values[1]).item(), 4))
        ids.append(top.indices[0].item())
    scored = logprobs(model, prompt)
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
        prompts = [torch.randint(0, vocab, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
        written = {"transformers": transformers.__version__, "cases": [golden(model, prompt) for prompt in prompts]}
        (folder / "golden.json").write_text(json.dumps(written) + "\n")
        print(name, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
