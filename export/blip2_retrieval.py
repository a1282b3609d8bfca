"""BLIP-2's first stage (Li et al. 2023, arXiv 2301.12597, 3.2): pictures matched with texts.

One BERT is three graphs. Its queries alone look at the picture (qformer), its words alone are read
(text_encoder), and both see each other (fusion):

    pixels -> vision_encoder -> image_states --> qformer -> image_embeds    nearest query's cosine
                                      |    text -> text_encoder -> text_embeds
                                      '----------> fusion -> match_logits   with the text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    Component,
    EmbedTask,
    MatchTask,
    ModelSpec,
    ScoreTask,
    Task,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import TOKENIZER, read_config, read_image_front_end, read_tokenizer
from ._checkpoint.weights import open_weights
from ._parts import qformer as _qformer
from ._parts.cross_attention import padding_mask
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("Blip2ForImageTextRetrieval",)
ALIASES = {
    "blip2-itm": "Salesforce/blip2-itm-vit-g",
    "blip2-itm-coco": "Salesforce/blip2-itm-vit-g-coco",
}
TINY = ("blip2-itm",)

TEMPLATE = "a photo of {}"
# Its training began at this temperature (LAVIS, blip2_qformer.py, recalled) and transformers'
# class keeps no learnt one; a ranking does not depend on it.
TEMPERATURE = 0.07


class QFormer(_qformer.QFormer):
    """The queries look at the picture, and each becomes a vector to compare."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in _layers(self.qformer):
            del layer.intermediate, layer.output  # for words
        self.vision_projection = torch.nn.Linear(
            config.qformer_config.hidden_size, config.image_text_hidden_size
        )

    def forward(self, image_states: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches + 1, width] to image_embeds [batch, queries, width of a vector]."""
        embeds: torch.Tensor = self.vision_projection(super().forward(image_states))
        return embeds


class TextEncoder(torch.nn.Module):
    """The words alone; the first of them becomes the vector."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text = config.qformer_config
        self.embeddings = Blip2TextEmbeddings(text)
        self.qformer = transformers.Blip2QFormerModel(text)
        for layer in _layers(self.qformer):
            del layer.intermediate_query, layer.output_query
            if layer.has_cross_attention:
                del layer.crossattention
        self.text_projection = torch.nn.Linear(text.hidden_size, config.image_text_hidden_size)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, tokens] twice to text_embeds [batch, width of a vector]."""
        out = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids),
            query_length=0,
            attention_mask=padding_mask(attention_mask),
        )
        embeds: torch.Tensor = self.text_projection(out.last_hidden_state[:, 0])
        return embeds


class Fusion(_qformer.QFormer):
    """Queries and words see each other, and each query votes on whether they belong together."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.itm_head = torch.nn.Linear(config.qformer_config.hidden_size, 2)

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_states: torch.Tensor
    ) -> torch.Tensor:
        """Map int64 [batch, tokens] twice and image_states to match_logits [batch, 2]."""
        count = self.query_tokens.shape[1]
        queries = self.query_tokens.expand(image_states.shape[0], -1, -1)
        seen = torch.ones_like(attention_mask[:, :1]).expand(-1, count)
        out = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids, query_embeds=queries),
            query_length=count,
            attention_mask=padding_mask(torch.cat([seen, attention_mask], dim=1)),
            encoder_hidden_states=image_states,
        )
        logits: torch.Tensor = self.itm_head(out.last_hidden_state[:, :count]).mean(dim=1)
        return logits


def _layers(qformer: Any) -> Any:
    return qformer.encoder.layer


def components(config: Any) -> tuple[Component, ...]:
    """Describe the four graphs."""
    sees = _qformer.vision_encoder(config, "image_states")
    width = config.image_text_hidden_size
    asked = (
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
        TensorSpec("attention_mask", "int64", ("batch", "tokens")),
    )
    image = TensorSpec("image_embeds", "float32", ("batch", config.num_query_tokens, width))
    return (
        sees,
        Component("qformer", inputs=sees.outputs, outputs=(image,)),
        Component(
            "text_encoder",
            inputs=asked,
            outputs=(TensorSpec("text_embeds", "float32", ("batch", width)),),
        ),
        Component(
            "fusion",
            inputs=(*asked, *sees.outputs),
            outputs=(TensorSpec("match_logits", "float32", ("batch", 2)),),
        ),
    )


BUILDS: Mapping[str, Callable[[Any], torch.nn.Module]] = {
    "vision_encoder": _qformer.VisionEncoder,
    "qformer": QFormer,
    "text_encoder": TextEncoder,
    "fusion": Fusion,
}

_IMAGE, _TEXT = ("vision_encoder", "qformer"), ("text_encoder",)
TASKS: Mapping[str, Task] = {
    "classify": MatchTask(
        image=_IMAGE,
        image_output="image_embeds",
        text=_TEXT,
        text_output="text_embeds",
        logit_scale=1 / TEMPERATURE,
        template=TEMPLATE,
    ),
    "match": ScoreTask(image=("vision_encoder",), text=("fusion",), output="match_logits"),
    "embed_image": EmbedTask("image", _IMAGE, "image_embeds"),
    "embed_text": EmbedTask("text", _TEXT, "text_embeds"),
}


class Blip2Retrieval:
    """Checkpoints of BLIP-2's first stage in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("vision_config", "qformer_config"))
        text = config.qformer_config
        if not text.use_qformer_text_input:
            raise CheckpointError(
                f"{folder}: qformer_config says use_qformer_text_input false, so its Q-Former "
                "reads no text: choose a checkpoint whose Q-Former does"
            )
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        image = presets.clip_stretched(config.vision_config.image_size)
        spec = ModelSpec(
            family="blip2_retrieval",
            components=components(config),
            tasks=dict(TASKS),
            front_ends={
                "pixel_values": read_image_front_end(folder, image),
                "input_ids": TextFrontEnd(
                    TOKENIZER, text.max_position_embeddings, text.pad_token_id or 0, "right"
                ),
            },
        )
        builds = {name: partial(build, config) for name, build in BUILDS.items()}
        return HubExport(folder, spec, builds, weights, tokenizer)

    def tiny(self, name: str, folder: Path) -> transformers.Blip2ForImageTextRetrieval:
        """Write a random one of 2 and 4 layers."""
        parts = _qformer.tiny_parts(VOCABULARY)
        parts["qformer_config"] |= {
            "use_qformer_text_input": True,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
        }
        config = transformers.Blip2Config(**parts, image_text_hidden_size=20, image_token_index=4)
        model = transformers.Blip2ForImageTextRetrieval(config)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        save(
            model,
            folder,
            template="<s> $A </s>",
            image_processor=images,
            processor=lambda tokenizer: transformers.Blip2Processor(
                images, tokenizer, config.num_query_tokens
            ),
        )
        return model


FAMILY = Blip2Retrieval()
