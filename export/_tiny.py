"""What the families' smallest checkpoints share: a tokenizer, and weights drawn anew.

Every parameter is drawn: what a model initialises to 0 (BLIP-2's queries, gates, biases) would make
a comparison with PyTorch vacuous.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 300
SPECIAL = ("<s>", "<pad>", "</s>", "<e>", "<image>")  # ids 0 to 4


def save(
    model: transformers.PreTrainedModel,
    folder: Path,
    *,
    bos: str = "<s>",
    eos: str = "</s>",
    template: str | None = None,
    image_processor: Any = None,
    processor: Callable[[transformers.PreTrainedTokenizerFast], Any] | None = None,
    gain: float = 1.0,
    words: float = 1.0,
    more: tuple[str, ...] = (),
) -> None:
    """Draw every parameter of a model and write it with its processors, in the hub's layout.

    Args:
        model: In place; it goes into eval mode.
        folder: Where to.
        bos: The tokenizer's first token.
        eos: Its last.
        template: Where they stand around a text, such as "<s> $A </s>"; none writes no tokenizer.
        image_processor: Written as preprocessor_config.json, if given.
        processor: Makes the processor of pictures and texts from the tokenizer, if there is one.
        gain: Multiplies every matrix. Below 1 a layer adds less to its input than it is, as in
            trained models; at 1 random gated layers make ten times more of int4's rounding.
        words: Multiplies the table of embeddings. Below 1 what was seen and read weighs more than
            the last word, which alone decides on the next one in some random decoders.
        more: Further special tokens; the first has `free_id`.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            drawn *= gain * parameter.shape[-1] ** -0.5
        elif parameter.ndim == 1:
            drawn = 0.1 * drawn
            if "norm" in name.lower() and name.endswith("weight"):
                # Gemma's begin with zeros: they scale by 1 + weight, also what a layer adds
                drawn += 1 if parameter.any() else gain - 1
        parameter.data = drawn
    if words != 1:
        table: Any = model.get_input_embeddings()
        table.weight.data *= words
    model.eval().save_pretrained(folder)
    if template is not None:
        full = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer(template), bos_token=bos, eos_token=eos, pad_token="<pad>"
        )
        full.add_special_tokens({"additional_special_tokens": list(more)})
        full.save_pretrained(folder)
        if processor is not None:
            processor(full).save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_pretrained(folder)


def free_id() -> int:
    """Return the id of the first token that comes as one `more`."""
    return tokenizer("$A").get_vocab_size()


def tokenizer(
    template: str, texts: tuple[str, ...] = ("a photo of a red circle", "Question: Answer:")
) -> Tokenizer:
    """Build a byte-level BPE of `VOCABULARY` tokens, learnt from `texts`, that encodes any text."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    pairs = [(name, built.token_to_id(name)) for name in SPECIAL]
    built.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return built
