"""Train BLIP (Li et al. 2022, arXiv 2201.12086) on drawn scenes: --task caption, or ask.

BLIP has an architecture for each task, so these are two checkpoints. tiny-blip writes captions:
a tower, and a decoder that looks at it. tiny-blip-vqa answers: its decoder looks at a question
that an encoder has read while it looked at the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from patches import PATCH_SIZE_PX
from scoring import Writer, blip_writer
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    GenerationConfig,
)
from words import bert_tokenizer
from writing import IGNORED, IMAGES, LIMIT, SQUARE, Run, next_token_loss, options_parser, pad

from vlmedge.checkpoints.scenes import IMAGE_SIZE_PX, Plan

CONTEXT = 64
MODELS = {"caption": BlipForConditionalGeneration, "ask": BlipForQuestionAnswering}


class BlipRun(Run):
    """Both tasks."""

    tokenizer: BertTokenizer

    def __init__(self, options: argparse.Namespace) -> None:
        self._known: dict[str, list[int]] = {}
        caption = options.task == "caption"
        super().__init__(options, caption=caption, ask=not caption)

    @property
    def name(self) -> str:
        """Of the checkpoint of this task."""
        return "tiny-blip" if self.caption else "tiny-blip-vqa"

    @property
    def tower(self) -> nn.Module:
        """The ViT."""
        tower: nn.Module = self.model.vision_model
        return tower

    def make(self, sample: list[Plan]) -> Any:
        """A new model and its tokenizer, or those of `--resume`."""
        kind = MODELS[self.options.task]
        if self.options.resume:
            self.tokenizer = BertTokenizer.from_pretrained(self.options.resume)
            model = kind.from_pretrained(self.options.resume, dtype=torch.float32)
        else:
            written = [plan.caption for plan in sample]
            written += [f"{q} {a}" for plan in sample for q, a in plan.questions]
            self.tokenizer = bert_tokenizer(written)
            model = kind(build(self.tokenizer, self.options))
        self.tokenizer.model_max_length = CONTEXT
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=LIMIT,
        )
        if self.options.task == "ask":
            heed_padding(model.text_decoder)
        return model

    def loss(self, pixels: Tensor, batch: list[Plan]) -> tuple[Tensor, Tensor]:
        """A caption of each picture, or answers to some questions about it."""
        states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        if self.caption:
            return self.written(states, None, [plan.caption for plan in batch]), states
        each = self.options.questions
        asked = [pair for plan in batch for pair in self.rng.sample(plan.questions, each)]
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        padding = self.tokenizer.pad_token_id
        ids = pad([[first, *self.ids(q), last] for q, _ in asked], padding).to(self.device)
        mask = (ids != padding).long()
        read = self.model.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=states.repeat_interleave(each, 0),
        ).last_hidden_state
        return self.written(read, mask, [answer for _, answer in asked]), states

    def written(self, looked_at: Tensor, mask: Tensor | None, texts: list[str]) -> Tensor:
        """The decoder's loss of texts.

        Args:
            looked_at: float32 (rows, states, width).
            mask: int64 (rows, states), 0 where they are padding.
            texts: what is right, one a row.
        """
        first, last = self.tokenizer.bos_token_id, self.tokenizer.sep_token_id
        rows = [[first, *self.ids(text), last] for text in texts]
        ids = pad(rows, self.tokenizer.pad_token_id).to(self.device)
        logits = self.model.text_decoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # no token sees the padding after it
            encoder_hidden_states=looked_at,
            encoder_attention_mask=mask,
        ).logits
        return next_token_loss(logits, pad(rows, IGNORED).to(self.device))

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens; most texts come again and again."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def processor(self) -> BlipProcessor:
        """What prepares pictures and texts."""
        return BlipProcessor(BlipImageProcessor(size=SQUARE, **IMAGES), self.tokenizer)

    def writer(self) -> Writer:
        """The model as what writes."""
        return blip_writer(self.model, self.processor())

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer and what prepares the pictures."""
        processor = self.processor()
        processor.image_processor.save_pretrained(folder)
        processor.save_pretrained(folder)


def build(tokenizer: BertTokenizer, options: argparse.Namespace) -> BlipConfig:
    """The configuration: every width a multiple of 32."""
    width = options.width
    common = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 32,
        "projection_dim": width,
        "initializer_range": 0.02,
    }
    return BlipConfig(
        vision_config={
            **common,
            "num_hidden_layers": options.vision_layers,
            "image_size": IMAGE_SIZE_PX,
            "patch_size": PATCH_SIZE_PX,
        },
        text_config={
            **common,
            "vocab_size": -(-len(tokenizer) // 32) * 32,  # whole blocks of 32 quantize well
            "encoder_hidden_size": width,
            "num_hidden_layers": options.layers,
            "max_position_embeddings": CONTEXT,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "label_smoothing": 0.0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "is_decoder": True,
        },
        projection_dim=width,
        image_text_hidden_size=width,
    )


def heed_padding(decoder: nn.Module) -> None:
    """Make cross-attention leave padding out.

    transformers 5 hands the mask of what is looked at to BLIP's cross-attention as if it were the
    mask of the text, which is not used there.
    """

    def hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"encoder_attention_mask": kwargs["attention_mask"]}

    for name, module in decoder.named_modules():
        if name.endswith("crossattention.self"):
            module.register_forward_pre_hook(hand_over, with_kwargs=True)


def main() -> None:
    """Train one of the two."""
    parser = options_parser("train tiny-blip or tiny-blip-vqa", "folder of the same task")
    parser.add_argument("--task", choices=tuple(MODELS), default="caption")
    parser.add_argument("--vision-layers", type=int, default=5)
    parser.add_argument("--questions", type=int, default=4, help="of a picture at each step")
    BlipRun(parser.parse_args()).run()


if __name__ == "__main__":
    main()
