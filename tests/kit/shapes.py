"""Shapes of real models: one as its config.json is published, and those of the benchmarks."""

import importlib.util
from typing import Any

from kit import ROOT

# llava-hf/llava-1.5-7b-hf's config.json leaves out what Llama and CLIP have by default
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def benchmark_models() -> dict[str, Any]:
    """Return what benchmarks/make_checkpoint.py can make."""
    file = ROOT / "benchmarks" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models: dict[str, Any] = module.MODELS
    return models
