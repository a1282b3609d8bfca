"""Video-ChatGPT (Maaz et al. 2023, arXiv 2306.05424) and PG-Video-LLaVA's model (arXiv 2311.13435).

Their weights come in parts, which a folder puts together:

    config.json, tokenizer      of the language model, with the architecture's name
    model*.safetensors or .bin  the language model: LLaVA-7B-Lightening v1.1, or LLaVA 1.5
    video_chatgpt*, mm_projector*  (.bin or .safetensors) the projector, and new embeddings; its
                                tensors take the place of the language model's
    vision_tower/               CLIP: config.json, preprocessor_config.json, weights

Source: github.com/mbzuai-oryx/Video-ChatGPT, and PG-Video-LLaVA of the same authors.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import transformers

from vlmedge.spec import (
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ImageText,
    ModelSpec,
    TensorSpec,
    VideoFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import read_generation, read_image_front_end, read_tokenizer
from ._checkpoint.weights import (
    Padded,
    Renamed,
    Together,
    Weights,
    open_weights,
    open_weights_named,
)
from ._parts.decoder import LM_HEAD, describe_decoder
from ._parts.llava import (
    ENCODE,
    VIDEO_REQUEST,
    opened,
    picture_builds,
    seen_patches,
    text_front_end,
    tiny_configs,
)
from ._parts.llava_v1 import PREFIXES, SPARE, TOWER, add_marks, open_tower, read_configs
from ._tiny import save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("VideoChatGPTLlamaForCausalLM",)
ALIASES: dict[str, str] = {}
TINY = ("video-chatgpt", "video-chatgpt-pg")

FRAMES = 100  # each has a row of the soft prompt, of zeros before the projector if it is not there
PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"
PARTS = ("video_chatgpt*", "mm_projector*")
SECOND = "mm_projector.2.weight"
# what it was trained with, to the letter: the two sentences have no space between them
SYSTEM = (
    "You are Video-ChatGPT, a large vision-language assistant. "
    "You are able to understand the video content that the user provides, and assist the user "
    "with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided "
    "video."
)
ASK = f"{SYSTEM} USER: {{question}}\n{{image}} ASSISTANT:"
CAPTION = ASK.replace("{question}", VIDEO_REQUEST) + "{prompt}"


class Projector(torch.nn.Module):
    """The mean of each frame and the mean of each patch over time, then a Linear or an MLP.

    image_embeds [frames, patches, width] -> means over patches [frames, width] -> zeros to 100
                                          -> means over frames [patches, width]
                                             both: Concat -> Linear or MLP
    """

    def __init__(self, seen: int, width: int, deep: bool) -> None:
        super().__init__()
        first = torch.nn.Linear(seen, width)
        layers = [first, torch.nn.GELU(), torch.nn.Linear(width, width)]
        self.mm_projector = torch.nn.Sequential(*layers) if deep else first

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map the frames of one video to soft_prompt [1, 100 + patches, width of the LM]."""
        zeros = image_embeds.new_zeros(FRAMES, image_embeds.shape[2])
        of_frames = torch.cat([image_embeds.mean(1), zeros])[:FRAMES]
        pooled = torch.cat([of_frames, image_embeds.mean(0)])
        soft: torch.Tensor = self.mm_projector(pooled)[None]
        return soft


def describe(config: Any, frame: ImageFrontEnd, generation: Generation, patch: int) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    size, patches, text = config.vision_config.image_size, seen_patches(config), config.text_config
    width = config.vision_config.hidden_size
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, width))
    clip = msgspec.structs.replace(seen, shape=("frames", patches, width))
    soft = TensorSpec("soft_prompt", "float32", (1, FRAMES + patches, text.hidden_size))
    ask = GenerateTask(
        encode=ENCODE,
        soft_prompt=soft.name,
        decoder="decoder",
        prompt=ASK,
        image_token_id=patch,
        image_text=ImageText(PATCH, f"{START}{PATCH}{END}"),
        source="video",
    )
    return ModelSpec(
        family="video_chatgpt",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
                outputs=(seen,),
            ),
            Component("projector", inputs=(clip,), outputs=(soft,)),
            describe_decoder(text),
        ),
        tasks={"caption_video": msgspec.structs.replace(ask, prompt=CAPTION), "ask_video": ask},
        front_ends={
            "pixel_values_videos": VideoFrontEnd(frame, FRAMES, rule="middle", limit=FRAMES),
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


def read_frame_front_end(folder: Path, size: int) -> ImageFrontEnd:
    """Return how a frame becomes pixels: the authors shrink it by the simplest rule first."""
    front = read_image_front_end(folder / TOWER, presets.clip(size))
    return msgspec.structs.replace(
        front, resize="exact", resize_size=(size, size), resample="floor", crop_size=None
    )


class VideoChatGpt:
    """Video-ChatGPT and PG-Video-LLaVA, whose parts lie in one folder."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_configs(folder)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        parts = [open_weights(folder, allow_pickle=allow_pickle)]
        parts += open_weights_named(folder, PARTS, allow_pickle=allow_pickle)
        tower = open_tower(folder, allow_pickle=allow_pickle)
        weights: Weights = Together(Renamed(Together(*parts), PREFIXES), tower)
        cure = f"put {PARTS[0]}.bin beside it, which brings them"
        patch, words = add_marks(folder, tokenizer, weights, (PATCH, START, END), cure)
        config.text_config.vocab_size = words
        weights = Padded(weights, {LM_HEAD: words})
        generation = read_generation(folder, config.text_config)
        size = config.vision_config.image_size
        frame = read_frame_front_end(folder, size)
        spec = describe(config, frame, generation, patch)
        deep = SECOND in weights.shapes()
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        builds = picture_builds(config, lambda: Projector(*widths, deep))
        return opened(folder, config, spec, builds, weights, tokenizer, spare=SPARE)

    def tiny(self, name: str, folder: Path) -> Reference:
        """Write a random one of 3 and 2 layers; PG-Video-LLaVA's projector has two Linears."""
        configs = tiny_configs(max_position_embeddings=512)
        vision = {k: v for k, v in configs["vision_config"].items() if k != "model_type"}
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**configs["text_config"]))
        deep = name == "video-chatgpt-pg"
        model = Reference(tower, language, deep)
        save(language, folder, words=0.3, template="<s> $A", more=(PATCH, START, END))
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save(tower, folder / TOWER, image_processor=images)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.mm_projector.parameters():
            parameter.data = 2.0 * torch.randn(parameter.shape, generator=generator)
        _write_parts(model, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": list(ARCHITECTURES), "model_type": "VideoChatGPT"}
        (folder / "config.json").write_text(json.dumps(config))
        return model.eval()


class Reference(torch.nn.Module):
    """The model as its authors run it, out of transformers' parts: what the tests compare with."""

    def __init__(self, tower: torch.nn.Module, language: Any, deep: bool) -> None:
        super().__init__()
        self.tower, self.language = tower, language
        width = language.config.hidden_size
        first = torch.nn.Linear(tower.config.hidden_size, width)  # type: ignore[union-attr, arg-type]
        layers = [first, torch.nn.GELU(), torch.nn.Linear(width, width)]
        self.mm_projector = torch.nn.Sequential(*layers) if deep else first

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> Any:
        """Pool the tower's last layer but one over patches and over time, and project both."""
        seen = self.tower(pixel_values_videos[0], output_hidden_states=True).hidden_states[-2][
            :, 1:
        ]
        pooled = torch.zeros(FRAMES + seen.shape[1], seen.shape[2])
        pooled[: len(seen)] = seen.mean(dim=1)
        pooled[FRAMES:] = seen.mean(dim=0)
        return SimpleNamespace(pooler_output=self.mm_projector(pooled)[None])

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values_videos: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Write on, with the video's rows where its patches' tokens are."""
        rows = self.get_video_features(pixel_values_videos).pooler_output[0]
        embeds = self.language.get_input_embeddings()(input_ids)
        place = int((input_ids[0] == input_ids[0].mode().values).nonzero()[0])
        embeds[0, place : place + len(rows)] = rows
        new = self.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
        return torch.cat([input_ids, new], dim=1)


def _write_parts(model: Reference, folder: Path) -> None:
    """Write the projector and the embeddings in a file of their own, as they are released."""
    from safetensors.torch import save_file

    parts = {f"model.mm_projector.{n}": p.data for n, p in model.mm_projector.named_parameters()}
    parts["model.embed_tokens.weight"] = model.language.get_input_embeddings().weight.data
    save_file(parts, folder / "video_chatgpt-tiny.safetensors", metadata={"format": "pt"})


FAMILY = VideoChatGpt()
