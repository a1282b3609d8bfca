"""LLaVA-NeXT-Video (Zhang et al. 2024): LLaVA-NeXT, and frames whose patches are pooled.

Source: llava-vl.github.io/blog/2024-04-30-llava-next-video, and transformers'
modeling_llava_next_video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    ChatTask,
    Generation,
    ImageFrontEnd,
    ImageText,
    ModelSpec,
    TensorSpec,
    VideoFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.chat_template import write_template
from ._checkpoint.folder import read_generation, read_tokenizer
from ._checkpoint.weights import Renamed, Weights, open_weights
from ._parts.anyres import (
    SIZES,
    LineProjector,
    check_patches,
    line_prompt,
    read_anyres_front_end,
    save_tiny_anyres,
)
from ._parts.llava import (
    CHAT,
    ENCODE,
    PREFIXES,
    opened,
    picture_builds,
    picture_components,
    picture_tasks,
    read_chats,
    read_checked_config,
    read_placeholders,
    read_video_front_end,
    text_front_end,
    tiny_configs,
    video_tasks,
)
from ._tiny import free_id
from ._trace.hub_export import HubExport

ARCHITECTURES = ("LlavaNextVideoForConditionalGeneration",)
ALIASES = {
    "llava-next-video": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "llava-next-video-dpo": "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf",
    "llava-next-video-34b": "llava-hf/LLaVA-NeXT-Video-34B-hf",
}
TINY = ("llava-next-video", "llava-next-video-conv")

FRAMES = 8  # as transformers' own example has it; it was trained with 32, which need 4608 tokens
POOLS = ("average", "max", "conv")


class VideoProjector(LineProjector):
    """LLaVA-NeXT's projector, and the same over the pooled patches, for frames."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stride, width = config.spatial_pool_stride, config.vision_config.hidden_size
        pools: dict[str, torch.nn.Module] = {
            "average": torch.nn.AvgPool2d(stride),
            "max": torch.nn.MaxPool2d(stride),
        }
        if config.spatial_pool_mode == "conv":
            pools["conv"] = torch.nn.Conv2d(width, width, stride, stride)
        self._side = config.vision_config.image_size // config.vision_config.patch_size
        self.vision_resampler = torch.nn.ModuleDict({"pool": pools[config.spatial_pool_mode]})

    def forward(  # type: ignore[override]
        self, image_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [batch, patches, width] to the soft prompts of a picture's piece and of a frame."""
        plane = torch.unflatten(image_embeds.transpose(1, 2), 2, (self._side, self._side))
        pooled = self.vision_resampler["pool"](plane).flatten(2).transpose(1, 2)
        return super().forward(image_embeds), self.project(pooled)


def describe(
    config: Any,
    image: ImageFrontEnd,
    video: VideoFrontEnd,
    generation: Generation,
    placeholders: tuple[str, str],
    chats: tuple[ChatTask | None, ChatTask | None],
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint; pairs are of pictures and of videos."""
    vision, width = config.vision_config, config.text_config.hidden_size
    pooled = (vision.image_size // vision.patch_size // config.spatial_pool_stride) ** 2
    moving = TensorSpec("video_prompt", "float32", ("batch", pooled, width))
    image_text = ImageText(placeholders[0], placeholders[0], whole=placeholders[0])
    return ModelSpec(
        family="llava_next_video",
        components=picture_components(config, line_prompt(config), moving),
        tasks={
            **picture_tasks(config, image_text, chats[0]),
            **video_tasks(config, ENCODE, moving.name, placeholders[1], chats[1]),
        },
        front_ends={
            "pixel_values": image,
            "pixel_values_videos": video,
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


class LlavaNextVideo:
    """LLaVA-NeXT-Video checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_checked_config(folder)
        check_patches(folder, config)
        if config.spatial_pool_mode not in POOLS:
            raise CheckpointError(
                f"{folder}: spatial_pool_mode is {config.spatial_pool_mode!r}: "
                f"choose from {', '.join(POOLS)}"
            )
        weights: Weights = Renamed(
            open_weights(folder, allow_pickle=allow_pickle),
            {
                **PREFIXES,
                "model.image_newline": "image_newline",
                "model.vision_resampler.": "vision_resampler.",
            },
        )
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        front = read_anyres_front_end(folder, config)
        default = presets.clip(config.vision_config.image_size)
        video = read_video_front_end(folder, default, FRAMES)
        generation = read_generation(folder, config.text_config)
        placeholders = read_placeholders(folder, config, tokenizer)
        chats = read_chats(folder, placeholders)
        spec = describe(config, front, video, generation, placeholders, chats)
        builds = picture_builds(config, lambda: VideoProjector(config))
        return opened(folder, config, spec, builds, weights, tokenizer)

    def tiny(self, name: str, folder: Path) -> transformers.LlavaNextVideoForConditionalGeneration:
        """Write a random LLaVA-NeXT-Video of 3 and 2 layers.

        Its own processor asks for torchvision, for the videos; LLaVA-NeXT's does the same with
        pictures.
        """
        config = transformers.LlavaNextVideoConfig(
            **tiny_configs(max_position_embeddings=512),
            image_token_index=4,
            video_token_index=free_id(),
            image_grid_pinpoints=SIZES,
            image_seq_length=16,
            video_seq_length=FRAMES * 4,
            spatial_pool_mode="conv" if name == "llava-next-video-conv" else "average",
        )
        model = transformers.LlavaNextVideoForConditionalGeneration(config)
        save_tiny_anyres(model, folder, more=("<video>",))
        write_template(folder, CHAT)
        return model


FAMILY = LlavaNextVideo()
