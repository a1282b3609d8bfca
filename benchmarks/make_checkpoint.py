"""Write a checkpoint with the exact shape of a published one and random weights.

    python benchmarks/make_checkpoint.py blip2-opt-2.7b /tmp/blip2-opt-2.7b      (7.5 GB)
    python benchmarks/make_checkpoint.py clip-vit-b-16 /tmp/clip-vit-b-16        (0.3 GB)
    python benchmarks/make_checkpoint.py blip2-opt-2.7b /tmp/blip2-cut 6    (of each part 6 layers)
    python benchmarks/make_checkpoint.py blip-base /tmp/blip-base                (0.5 GB)
    python benchmarks/make_checkpoint.py blip-itm-base /tmp/blip-itm-base        (0.4 GB)
    python benchmarks/make_checkpoint.py blip2-opt-cut /tmp/blip2-opt-cut        (1.1 GB)
    python benchmarks/make_checkpoint.py llava-1.1b /tmp/llava-1.1b              (2.2 GB)
    python benchmarks/make_checkpoint.py llava-1.5-7b /tmp/llava-1.5-7b          (14 GB)

blip2-opt-cut is BLIP-2 OPT-2.7b with fewer layers: 1 of the image tower, 2 of the Q-Former, 4 of
OPT. llava-1.1b has the smallest of towers before TinyLlama's decoder; llama-1.1b and opt-2.7b are
decoders alone, for those who run nothing else, and blip2-vit-g is hardly more than BLIP-2's tower.

Speed and memory depend on shapes alone, and parity is harder on random weights than on trained
ones. Tensors are drawn and written one at a time, as float16 (or bfloat16, where float16 is too
narrow or PyTorch is to read them as they are) in shards of about 5 GB, as the hub has them. Every
parameter is drawn anew: what a model initialises to 0 (queries) would hide bugs. Special tokens are
the first of every vocabulary, wherever the published tokenizer has them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SHARD_BYTES = 5 * 10**9


def blip2_opt() -> Any:
    """Return the config of Salesforce/blip2-opt-2.7b."""
    return transformers.Blip2Config(
        vision_config={"image_size": 224, "patch_size": 14},
        qformer_config={"vocab_size": 30523},
        text_config={
            "model_type": "opt",
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "ffn_dim": 10240,
            "num_attention_heads": 32,
            "word_embed_proj_dim": 2560,
            "vocab_size": 50304,
            "bos_token_id": 2,
            "eos_token_id": 50118,
            "pad_token_id": 1,
        },
        num_query_tokens=32,
        image_token_index=50265,
        architectures=["Blip2ForConditionalGeneration"],
    )


def blip2_opt_cut() -> Any:
    """Return the same config with few layers, each of its published size."""
    config = blip2_opt()
    config.vision_config.num_hidden_layers = 1
    config.qformer_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = 4
    return config


def blip2_vit_g() -> Any:
    """Return BLIP-2's config with its whole image tower and next to nothing behind it."""
    config = blip2_opt()
    config.qformer_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = 1
    return config


def opt() -> Any:
    """Return the config of the OPT in Salesforce/blip2-opt-2.7b."""
    config = blip2_opt().text_config
    config.architectures = ["OPTForCausalLM"]
    return config


def llama() -> Any:
    """Return the config of TinyLlama/TinyLlama-1.1B-Chat-v1.0."""
    return transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        architectures=["LlamaForCausalLM"],
    )


def llava() -> Any:
    """Return the config of a LLaVA around it whose tower costs next to nothing."""
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        text_config=llama().to_dict(),
        image_token_index=4,
        image_seq_length=4,
        architectures=["LlavaForConditionalGeneration"],
    )


def llava_7b() -> Any:
    """Return the config of llava-hf/llava-1.5-7b-hf."""
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        image_token_index=4,
        image_seq_length=576,
        architectures=["LlavaForConditionalGeneration"],
    )


def paligemma() -> Any:
    """Return the config of google/paligemma-3b-pt-224."""
    return transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "vocab_size": 257216,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        image_token_index=4,
        projection_dim=2048,
        hidden_size=2048,
        architectures=["PaliGemmaForConditionalGeneration"],
    )


def blip2_flan_t5() -> Any:
    """Return the config of Salesforce/blip2-flan-t5-xl."""
    return transformers.Blip2Config(
        vision_config={"image_size": 224, "patch_size": 14},
        qformer_config={"vocab_size": 30523},
        text_config={
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
        num_query_tokens=32,
        image_token_index=4,
        architectures=["Blip2ForConditionalGeneration"],
    )


def flava() -> Any:
    """Return the config of facebook/flava-full."""
    return transformers.FlavaConfig(
        text_config={"pad_token_id": 1}, architectures=["FlavaForPreTraining"]
    )


def seggpt() -> Any:
    """Return the config of BAAI/seggpt-vit-large."""
    return transformers.SegGptConfig(architectures=["SegGptForImageSegmentation"])


def clip_b16() -> Any:
    """Return the config of openai/clip-vit-base-patch16."""
    return transformers.CLIPConfig(
        vision_config={"patch_size": 16},
        text_config={"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 1},
        projection_dim=512,
        architectures=["CLIPModel"],
    )


def clip_l14() -> Any:
    """Return the config of openai/clip-vit-large-patch14."""
    config = clip_b16()
    for part, width, heads in ((config.text_config, 768, 12), (config.vision_config, 1024, 16)):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = width, 4 * width, heads
    config.vision_config.num_hidden_layers, config.vision_config.patch_size = 24, 14
    config.projection_dim = 768
    return config


def blip() -> Any:
    """Return the config of Salesforce/blip-image-captioning-base."""
    return transformers.BlipConfig(
        vision_config={"image_size": 384},
        text_config={"encoder_hidden_size": 768, "eos_token_id": 102},
        architectures=["BlipForConditionalGeneration"],
    )


def blip_itm() -> Any:
    """Return the config of Salesforce/blip-itm-base-coco."""
    config = blip()
    config.image_text_hidden_size = 256
    config.architectures = ["BlipForImageTextRetrieval"]
    return config


def blip_large() -> Any:
    """Return the config of Salesforce/blip-image-captioning-large."""
    config = blip()
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 1024, 4096
    config.vision_config.num_hidden_layers, config.vision_config.num_attention_heads = 24, 16
    config.text_config.encoder_hidden_size = 1024
    return config


MODELS = {
    "blip-base": (blip, transformers.BlipForConditionalGeneration),
    "blip-itm-base": (blip_itm, transformers.BlipForImageTextRetrieval),
    "blip-large": (blip_large, transformers.BlipForConditionalGeneration),
    "blip2-opt-2.7b": (blip2_opt, transformers.Blip2ForConditionalGeneration),
    "blip2-opt-cut": (blip2_opt_cut, transformers.Blip2ForConditionalGeneration),
    "blip2-vit-g": (blip2_vit_g, transformers.Blip2ForConditionalGeneration),
    "opt-2.7b": (opt, transformers.OPTForCausalLM),
    "llama-1.1b": (llama, transformers.LlamaForCausalLM),
    "llava-1.1b": (llava, transformers.LlavaForConditionalGeneration),
    "llava-1.5-7b": (llava_7b, transformers.LlavaForConditionalGeneration),
    "paligemma-3b": (paligemma, transformers.PaliGemmaForConditionalGeneration),
    "blip2-flan-t5-xl": (blip2_flan_t5, transformers.Blip2ForConditionalGeneration),
    "flava-full": (flava, transformers.FlavaForPreTraining),
    "seggpt-vit-large": (seggpt, transformers.SegGptForImageSegmentation),
    "clip-vit-b-16": (clip_b16, transformers.CLIPModel),
    "clip-vit-l-14": (clip_l14, transformers.CLIPModel),
}
BFLOAT16 = ("llava-1.5-7b", "paligemma-3b", "blip2-flan-t5-xl")


def tokenizer(bos: str, eos: str, bos_id: int, eos_id: int, template: str) -> Tokenizer:
    """Build a byte-level tokenizer whose special tokens have the published ids."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    built.train_from_iterator(["a photo of a cat and a dog", "Question: Answer:"], trainer)
    data = json.loads(built.to_str())
    for content, number in ((bos, bos_id), (eos, eos_id)):
        if content not in data["model"]["vocab"]:
            data["model"]["vocab"][content] = number
            token = {"id": number, "content": content, "special": True}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append({**token, **flags})
    built = Tokenizer.from_str(json.dumps(data))
    pairs = [(name, built.token_to_id(name)) for name in dict.fromkeys((bos, eos))]
    built.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return built


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw one parameter so that activations stay of order 1."""
    values = rng.standard_normal(shape, np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    if len(shape) == 1:
        return 0.1 * values
    if name == "logit_scale":
        return np.float32(4.6) + 0 * values
    return values / np.float32(math.sqrt(math.prod(shape[1:])))


def bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round float32 to bfloat16, which numpy does not have: its bits as uint16."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def write(kind: str, folder: Path, layers: int | None = None) -> None:
    """Write the checkpoint, with no more than `layers` layers in each part."""
    make, architecture = MODELS[kind]
    config = make()
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if layers is not None and hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = min(part.num_hidden_layers, layers)
    folder.mkdir(parents=True, exist_ok=True)
    half = "bfloat16" if kind in BFLOAT16 else "float16"
    config.dtype = half
    config.save_pretrained(folder)
    config.dtype = "float32"
    with torch.device("meta"):
        model = architecture(config)
    tied = set(model.all_tied_weights_keys)
    if "t5" in kind:  # transformers ties the head, the hub's has weights of its own
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        tied.remove("language_model.lm_head.weight")
    parameters = model.named_parameters(remove_duplicate=False)  # a tied name may be the first
    shapes = {n: tuple(p.shape) for n, p in parameters if n not in tied}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    rng = np.random.default_rng(0)
    code = "BF16" if half == "bfloat16" else "F16"
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + 2 * math.prod(shapes[name])
            header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                values = draw(name, shapes[name], rng)
                stored = bfloat16(values) if half == "bfloat16" else values.astype(np.float16)
                stored.tofile(stream)
                print(f"\r{name:80.80}", end="", file=sys.stderr)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind.startswith("seggpt"):  # reads no text
        return
    if kind.startswith(("llama", "llava", "paligemma")):
        bos, eos = "<s>", "</s>"
        built = tokenizer(bos, eos, 0, 2, "<s> $A")
    elif kind.startswith(("blip2-flan", "flava")):
        bos, eos = "<s>", "</s>"
        built = tokenizer(bos, eos, 0, 2, "$A </s>" if "t5" in kind else "<s> $A </s>")
    elif kind.startswith(("blip2", "opt")):
        built = tokenizer("</s>", "\n", 2, 50118, "</s> $A")
        bos, eos = "</s>", "</s>"
    elif kind.startswith("blip-"):
        bos, eos = "[DEC]", "[SEP]"
        built = tokenizer(bos, eos, 30522, 102, f"$A {eos}")
    else:
        bos, eos = "<|startoftext|>", "<|endoftext|>"
        built = tokenizer(bos, eos, 49406, 49407, f"{bos} $A {eos}")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        mask_token="<image>" if kind.startswith("flava") else None,
    ).save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
