"""Writes the golden cases of the Qwen family: tiny random checkpoints and what Hugging Face transformers makes of them.

    pip install torch transformers safetensors gguf
    python tests/data/qwen/make.py

Each case is a folder with `config.json`, `model.safetensors` and `golden.json`; those in GGUF also have the same model as
`model.gguf`. The script is deterministic.
"""

import json
import math
import shutil
from pathlib import Path

import gguf
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
GREEDY_STEPS = 16
PROMPT_LENGTHS = [1, 7, 19]
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
    tie_word_embeddings=False,
)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
CASES = {
    "qwen2-grouped-untied": (QWEN2, {}),
    "qwen2-multi-head-tied": (QWEN2, dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=1_000_000.0)),
    "qwen2-odd-sizes": (
        QWEN2,
        dict(
            hidden_size=18, intermediate_size=23, num_attention_heads=3, num_key_value_heads=1, vocab_size=37,
            num_hidden_layers=3,
        ),
    ),
    "qwen3-grouped-tied": (QWEN3, dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3-multi-head-untied-odd-sizes": (
        QWEN3,
        dict(
            hidden_size=15, intermediate_size=23, num_attention_heads=3, num_key_value_heads=3, head_dim=6,
            vocab_size=37,
        ),
    ),
    "qwen3-biases": (QWEN3, dict(head_dim=8, attention_bias=True, num_attention_heads=2, num_key_value_heads=1)),
    "qwen3-rope-yarn": (QWEN3, dict(head_dim=8, rope_scaling=YARN)),
}
IN_GGUF = ["qwen2-grouped-untied", "qwen3-grouped-tied"]


def checkpoint(name, kind, changes, seed):
    """A model whose weights are large enough that its attention and its positions matter."""
    torch.manual_seed(seed)
    make_config, make_model = kind
    config = make_config(**{**BASE, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config._attn_implementation = "eager"
    model = make_model(config).eval()
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
    written = json.loads((folder / "config.json").read_text())
    # Most published checkpoints keep what newer ones have in `rope_parameters` in two fields.
    if name != "qwen3-rope-yarn":
        parameters = written.pop("rope_parameters")
        written["rope_theta"] = parameters["rope_theta"]
        written["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    return model, folder


def write_gguf(model, path):
    """As llama.cpp's converter writes it, but for the tokenizer: the same rows in the same order, under other names."""
    config = model.config
    architecture = gguf.MODEL_ARCH.QWEN3 if config.model_type == "qwen3" else gguf.MODEL_ARCH.QWEN2
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    for seed, (name, (kind, changes)) in enumerate(CASES.items()):
        model, folder = checkpoint(name, kind, changes, seed)
        if name in IN_GGUF:
            write_gguf(model, folder / "model.gguf")
        random = torch.Generator().manual_seed(seed)
        vocab = model.config.vocab_size
        prompts = [torch.randint(0, vocab, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
        cases = [golden(model, prompt) for prompt in prompts]
        written = {"transformers": transformers.__version__, "cases": cases}
        (folder / "golden.json").write_text(json.dumps(written) + "\n")
        clear = [sum(margin >= 0.01 for margin in case["top1_minus_top2"]) for case in cases]
        print(name, sum(p.numel() for p in model.parameters()), "clear steps", clear)


if __name__ == "__main__":
    main()
