#!/usr/bin/env python3
"""Writes mixed.gguf, with a tensor of every format Torus reads, and mixed-f32.gguf, what the gguf package reads from it.

    pip install gguf==0.19.0 numpy && python make_goldens.py

Blocks are random bytes, so that every bit of every field matters, with scales that are random halves: tiny, subnormal,
zero and negative ones included. A second tensor of the simple formats is quantized from normal values.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, GGUFWriter
from gguf.quants import dequantize, quantize

FORMATS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K]
# Byte offsets of the f16 scales in a block.
SCALES = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}
ROWS, COLUMNS = 3, 512
here = Path(__file__).parent
random = np.random.default_rng(20)


def halves(count):
    values = (random.standard_normal(count) * 0.05).astype(np.float16)
    values[::7] = random.integers(0, 0x400, len(values[::7]), dtype=np.uint16).view(np.float16)  # subnormal
    values[::11] = 0
    values[3::13] = 65504
    return values


def random_rows(kind):
    elements, size = GGML_QUANT_SIZES[kind]
    if kind == Type.F32:
        return random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if kind in (Type.F16, Type.BF16):
        rows = halves(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
        return rows if kind == Type.F16 else quantize(rows.astype(np.float32), kind)
    blocks = random.integers(0, 256, (ROWS * COLUMNS // elements, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        blocks[:, offset : offset + 2] = halves(len(blocks)).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, COLUMNS // elements * size)


def write(name, tensors, convert):
    out = GGUFWriter(str(here / name), "llama")
    out.add_string("general.name", "mixed \u00e9")
    out.add_uint8("test.u8", 200)
    out.add_int8("test.i8", -100)
    out.add_uint16("test.u16", 60000)
    out.add_int16("test.i16", -30000)
    out.add_uint32("llama.block_count", 3)
    out.add_int32("test.i32", -(2**31))
    out.add_uint64("test.u64", 2**64 - 1)
    out.add_int64("test.i64", -(2**63))
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    out.add_float64("test.f64", 0.1)
    out.add_bool("test.bool", True)
    out.add_array("test.array", [1, -2, 3])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(["<s>", "</s>", "a", "\u0120b"])
    out.add_token_types([3, 3, 1, 1])
    out.add_token_scores([0.0, -1.0, -2.5, -3.25])
    out.add_token_merges(["a b", "\u0120 b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_add_bos_token(False)
    out.add_chat_template("{{ messages }}")
    for tensor, kind, data in tensors:
        if convert:
            out.add_tensor(tensor, dequantize(data, kind).astype(np.float32))
        elif kind in (Type.F32, Type.F16):
            out.add_tensor(tensor, data)
        else:
            out.add_tensor(tensor, data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


tensors = [(f"{kind.name}.random", kind, random_rows(kind)) for kind in FORMATS]
for kind in (Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1):
    tensors.append((f"{kind.name}.normal", kind, quantize(random.standard_normal((ROWS, 64)).astype(np.float32), kind)))
write("mixed.gguf", tensors, convert=False)
write("mixed-f32.gguf", tensors, convert=True)
