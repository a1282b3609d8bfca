"""Write a LLaMA or OPT checkpoint as a GGUF, and quantize it with llama.cpp's own quantizer.

    python make_gguf.py CHECKPOINT OUT.gguf Q4_0|Q8_0

llama.cpp has no OPT: its GPT-2 has the same matrices, biases and learned positions, and GELU for
ReLU, so it does the same work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = Any
OPT_FIRST_POSITION = 2  # of OPT's table of positions the first rows are never used


def tensors(folder: Path) -> dict[str, Array]:
    """Map every float16 tensor of a checkpoint's safetensors files, none of them read yet."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, fact in header.items():
            if fact["dtype"] != "F16":
                raise ValueError(f"{file}: {name} is {fact['dtype']}: it must be F16")
            start = 8 + size + fact["data_offsets"][0]
            found[name] = np.memmap(file, np.float16, "r", start, tuple(fact["shape"]))
    return found


def turned(weight: Array, heads: int) -> Array:
    """Reorder rows for llama.cpp, which rotates neighbours and not halves of a head."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def llama(config: dict[str, Any], found: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield LLaMA's tensors by llama.cpp's names."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    yield "token_embd.weight", found["model.embed_tokens.weight"]
    yield "output_norm.weight", found["model.norm.weight"]
    yield "output.weight", found["lm_head.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, name in names.items():
            weight = found[f"model.layers.{layer}.{name}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = turned(weight, heads if theirs == "attn_q" else groups)
            yield f"blk.{layer}.{theirs}.weight", weight


def opt(config: dict[str, Any], found: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield OPT's tensors by the names of llama.cpp's GPT-2."""
    top = "model.decoder."
    yield "token_embd.weight", found[f"{top}embed_tokens.weight"]
    yield "output.weight", found[f"{top}embed_tokens.weight"]
    yield "position_embd.weight", found[f"{top}embed_positions.weight"][OPT_FIRST_POSITION:]
    names = {
        "attn_norm": "self_attn_layer_norm",
        "attn_output": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn_up": "fc1",
        "ffn_down": "fc2",
    }
    for kind in ("weight", "bias"):
        yield f"output_norm.{kind}", found[f"{top}final_layer_norm.{kind}"]
        for layer in range(config["num_hidden_layers"]):
            here = f"{top}layers.{layer}."
            parts = [found[f"{here}self_attn.{one}_proj.{kind}"] for one in "qkv"]
            yield f"blk.{layer}.attn_qkv.{kind}", np.concatenate(parts)
            for theirs, name in names.items():
                yield f"blk.{layer}.{theirs}.{kind}", found[f"{here}{name}.{kind}"]


KINDS: dict[str, tuple[str, Callable[..., Iterator[tuple[str, Array]]]]] = {
    "llama": ("llama", llama),
    "opt": ("gpt2", opt),
}


def write(checkpoint: Path, out: Path) -> None:
    """Write a GGUF of float16 matrices, without a vocabulary: ids go in and come out."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture, named = KINDS[config["model_type"]]
    writer = gguf.GGUFWriter(str(out), architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size") or config["ffn_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    if architecture == "llama":
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    else:
        writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, weight in named(config, tensors(checkpoint)):
        whole = np.ascontiguousarray(weight)
        writer.add_tensor(name, whole.astype(np.float32) if whole.ndim == 1 else whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: str) -> None:
    """Let llama.cpp quantize a GGUF."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise RuntimeError(f"{source} cannot be quantized to {kind}: see the log")


def main(checkpoint: str, out: str, kind: str) -> None:
    """Write both files, keep the second."""
    whole = Path(f"{out}.f16")
    write(Path(checkpoint), whole)
    quantize(whole, Path(out), kind)
    whole.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
