"""Writes rope.json: frequencies of rotary embeddings as Hugging Face transformers computes them.

    pip install torch transformers
    python rope.py > rope.json
"""

import json

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {
    "rope_type": "longrope",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.03 * i for i in range(8)],
    "long_factor": [1.5 + 1.7 * i for i in range(8)],
}

# name, dimensions that turn, theta, scaling, longest sequence
CASES = [
    ("default", 64, 10000.0, {"rope_type": "default"}, 2048),
    ("large theta", 128, 1000000.0, {"rope_type": "default"}, 32768),
    ("linear", 32, 10000.0, {"rope_type": "linear", "factor": 2.5}, 8192),
    ("llama 3.1", 128, 500000.0, LLAMA3, 131072),
    ("llama 3.2", 64, 500000.0, LLAMA3 | {"factor": 32.0}, 131072),
    ("yarn", 64, 10000.0, YARN, 16384),
    ("yarn, own betas", 32, 1000000.0, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, 16384),
    ("yarn, attention factor", 64, 10000.0, YARN | {"attention_factor": 0.75}, 16384),
    ("yarn, not truncated", 64, 150000.0, YARN | {"factor": 32.0, "truncate": False}, 131072),
    ("yarn, mscale", 64, 10000.0, YARN | {"factor": 40.0, "mscale": 0.8, "mscale_all_dim": 1.0}, 163840),
    ("yarn, one mscale", 64, 10000.0, YARN | {"factor": 40.0, "mscale": 0.8}, 163840),
    ("long, short table", 16, 10000.0, LONG, 4096),
    ("long, long table", 16, 10000.0, LONG, 4097),
    ("long, attention factor", 16, 10000.0, LONG | {"attention_factor": 1.25}, 131072),
]


def main():
    cases = []
    for name, rotary_dim, theta, scaling, max_length in CASES:
        config = LlamaConfig(
            hidden_size=rotary_dim * 2,
            num_attention_heads=2,
            head_dim=rotary_dim,
            max_position_embeddings=max_length,
            rope_parameters=scaling | {"rope_theta": theta},
        )
        if scaling["rope_type"] == "default":
            radians, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            radians, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=max_length)
        cases.append(
            {
                "name": name,
                "rotary_dim": rotary_dim,
                "theta": theta,
                "scaling": scaling,
                "max_length": max_length,
                "radians": radians.tolist(),
                "attention_factor": float(factor),
            }
        )
    print("[" + ",\n".join(json.dumps(case) for case in cases) + "]")


main()
