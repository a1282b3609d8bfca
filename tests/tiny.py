"""The smallest random checkpoints of each family, in Hugging Face layout.

Every parameter is drawn anew: what a model initialises to 0 (BLIP-2's queries, biases) would make
a comparison with PyTorch vacuous.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 300


def tiny_clip(folder: Path, *, activation: str = "quick_gelu") -> transformers.CLIPModel:
    """Write a random CLIP and return it."""
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
            "hidden_act": activation,
            "bos_token_id": 0,
            "eos_token_id": 3,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": activation,
        },
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    return _save(model, folder, "<s>", "<e>", "<s> $A <e>")


def tiny_blip2(folder: Path) -> transformers.Blip2ForConditionalGeneration:
    """Write a random BLIP-2 with an OPT decoder and return it."""
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 2,
            "vocab_size": VOCABULARY,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
            "word_embed_proj_dim": 32,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        num_query_tokens=6,
        image_token_index=4,
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    return _save(model, folder, "</s>", "</s>", "</s> $A")


def tokenizer(template: str) -> Tokenizer:
    """Build a byte-level BPE that encodes any text."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<e>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    built.train_from_iterator(["a photo of a red circle", "Question: Answer:"], trainer)
    pairs = [(name, built.token_to_id(name)) for name in special]
    built.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return built


def _save(model, folder: Path, bos: str, eos: str, template: str):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            drawn *= parameter.shape[-1] ** -0.5
        elif parameter.ndim == 1:
            drawn = 0.1 * drawn + ("norm" in name and name.endswith("weight"))
        parameter.data = drawn
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(template), bos_token=bos, eos_token=eos, pad_token="<pad>"
    ).save_pretrained(folder)
    return model
