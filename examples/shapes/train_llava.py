"""Train tiny-llava: LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744) on drawn scenes.

As LLaVA does, it looks through the tower of a CLIP: that of the built-in tiny-clip. Two linear
layers turn its 64 patches into tokens of a small LLaMA. A row of training is a conversation about
one picture; what the assistant says is learnt.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scoring import REQUEST, Writer, llava_writer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from words import llama_tokenizer
from writing import IGNORED, IMAGES, LIMIT, SQUARE, Run, next_token_loss, options_parser, pad

from vlmedge.checkpoints.scenes import IMAGE_SIZE_PX, Plan

CLIP = Path(str(resources.files("vlmedge.checkpoints"))) / "tiny-clip"
CONTEXT = 384  # a picture's 64 patches, and some twenty turns
FIRST, LATER = "USER: <image>\n{} ASSISTANT:", "USER: {} ASSISTANT:"
CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '</s>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TURNS = 6


class LlavaRun(Run):
    """Captions and answers, as turns of a conversation."""

    tokenizer: PreTrainedTokenizerFast
    name = "tiny-llava"

    def __init__(self, options: argparse.Namespace) -> None:
        self._known: dict[str, list[int]] = {}
        super().__init__(options, caption=True, ask=True)

    @property
    def tower(self) -> nn.Module:
        """CLIP's ViT."""
        tower: nn.Module = self.model.model.vision_tower
        return tower

    def make(self, sample: list[Plan]) -> Any:
        """A new model and its tokenizer, or those of `--resume`."""
        options = self.options
        if options.resume:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(options.resume)
            model = LlavaForConditionalGeneration.from_pretrained(
                options.resume, dtype=torch.float32
            )
        else:
            written = [f" {plan.caption}" for plan in sample]
            written += [FIRST.format(REQUEST)] * 1000
            written += [f"{FIRST.format(q)} {a}" for plan in sample for q, a in plan.questions]
            self.tokenizer = llama_tokenizer([text.replace("<image>", "") for text in written])
            model = LlavaForConditionalGeneration(build(self.tokenizer, options))
            take_tower(model.model.vision_tower)
        self.tokenizer.model_max_length = CONTEXT
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=LIMIT,
        )
        self.image_id = model.config.image_token_id
        self.patches = model.config.image_seq_length
        return model

    def loss(self, pixels: Tensor, batch: list[Plan]) -> tuple[Tensor, Tensor]:
        """A conversation about each picture."""
        written = [self.conversation(plan) for plan in batch]
        ids = pad([row for row, _ in written], int(self.tokenizer.pad_token_id)).to(self.device)
        labels = pad([row for _, row in written], IGNORED).to(self.device)
        seen: list[Tensor] = []
        hook = self.tower.register_forward_hook(lambda *run: seen.append(run[2].last_hidden_state))
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # no token sees the padding after it
            pixel_values=pixels,
        ).logits
        hook.remove()
        return next_token_loss(logits, labels), seen[0]

    def conversation(self, plan: Plan) -> tuple[list[int], list[int]]:
        """Turns about a picture: ids, and labels of the same length.

        Most have many turns; some have one, as it will be asked.
        """
        turns = self.rng.sample(plan.questions, min(TURNS, len(plan.questions)))
        is_scene = len(plan.things) <= 2  # crowds have no captions
        if is_scene and self.rng.random() < 0.6:
            turns.insert(self.rng.randrange(len(turns)), (REQUEST, plan.caption))
        if self.rng.random() < 0.3:
            turns = turns[:1]
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, reply) in enumerate(turns):
            head = self.ids((FIRST if number == 0 else LATER).format(question), number == 0)
            tail = [*self.ids(f" {reply}", False), int(self.tokenizer.eos_token_id)]
            ids += head + tail
            labels += [IGNORED] * len(head) + tail
        return ids, labels

    def ids(self, text: str, whole: bool) -> list[int]:
        """Token ids; most texts come again and again.

        Args:
            text: with at most one <image>, which becomes as many as it has patches.
            whole: whether a row begins here.
        """
        if text not in self._known:
            found = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
            self._known[text] = [
                i for one in found for i in [one] * (self.patches if one == self.image_id else 1)
            ]
        return self._known[text]

    def processor(self) -> LlavaProcessor:
        """What prepares pictures and texts."""
        images = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE_PX}, crop_size=SQUARE, **IMAGES
        )
        return LlavaProcessor(
            images,
            self.tokenizer,
            patch_size=self.model.config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT,
        )

    def writer(self) -> Writer:
        """The model as what writes."""
        return llava_writer(self.model, self.processor())

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, the chat template and what prepares the pictures."""
        processor = self.processor()
        processor.image_processor.save_pretrained(folder)
        processor.save_pretrained(folder)


def build(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> LlavaConfig:
    """The configuration: tiny-clip's tower and a LLaMA; every width a multiple of 32."""
    vision = CLIPVisionConfig.from_pretrained(CLIP)
    width, heads = options.width, options.width // 32
    return LlavaConfig(
        vision_config={**vision.to_dict(), "model_type": "clip_vision_model"},
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 32) * 32,  # whole blocks of 32 quantize well
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": options.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,  # LLaVA's -2 leaves a layer out; there are only four
        vision_feature_select_strategy="default",
    )


def take_tower(tower: nn.Module) -> None:
    """Copy tiny-clip's image tower; transformers' releases differ in how deep its names go."""
    inside = ".vision_model."
    found = {
        f".{name}".partition(inside)[2]: tensor.float()
        for name, tensor in load_file(CLIP / "model.safetensors").items()
        if inside in f".{name}"
    }
    state = tower.state_dict()
    tower.load_state_dict(
        {name: found[f".{name}".rpartition(inside)[2].removeprefix(".")] for name in state}
    )


def main() -> None:
    """Train."""
    LlavaRun(options_parser("train tiny-llava", "tiny-llava").parse_args()).run()


if __name__ == "__main__":
    main()
