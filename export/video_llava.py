"""Video-LLaVA (Lin et al. 2023, arXiv 2311.10122): a tower for pictures, one for frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from vlmedge.spec import (
    ChatTask,
    Component,
    Generation,
    ImageFrontEnd,
    ImageText,
    ModelSpec,
    TensorSpec,
    VideoFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.chat_template import write_template
from ._checkpoint.folder import read_generation, read_image_front_end, read_tokenizer
from ._checkpoint.weights import Renamed, Weights, open_weights
from ._parts.decoder import Decoder, describe_decoder
from ._parts.llava import (
    CHAT,
    PREFIXES,
    Projector,
    VisionEncoder,
    opened,
    picture_tasks,
    read_chats,
    read_checked_config,
    read_placeholders,
    read_video_front_end,
    save_tiny,
    seen_patches,
    seen_width,
    text_front_end,
    tiny_configs,
    video_tasks,
)
from ._tiny import free_id
from ._trace.hub_export import HubExport

ARCHITECTURES = ("VideoLlavaForConditionalGeneration",)
ALIASES = {"video-llava": "LanguageBind/Video-LLaVA-7B-hf"}
TINY = ("video-llava",)

FRAMES = 8  # as it was trained, and as transformers' own example has it
VIDEO_ENCODE = ("video_encoder", "video_projector")
TOWERS = {
    f"{outer}{tower}_tower.{inner}": f"{tower}_tower."
    for tower in ("image", "video")
    for outer in ("model.", "")
    for inner in ("vision_model.", "")
    if outer or inner
}


def describe(
    config: Any,
    image: ImageFrontEnd,
    video: VideoFrontEnd,
    generation: Generation,
    placeholders: tuple[str, str],
    chats: tuple[ChatTask | None, ChatTask | None],
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint; pairs are of pictures and of videos."""
    size, text = config.vision_config.image_size, config.text_config
    patches, every = seen_patches(config), (size // config.vision_config.patch_size) ** 2 + 1
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, size, size))
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, seen_width(config)))
    soft = TensorSpec("soft_prompt", "float32", ("batch", patches, text.hidden_size))
    frames = TensorSpec("video_embeds", "float32", ("batch", every, seen_width(config)))
    moving = TensorSpec("video_prompt", "float32", ("batch", every, text.hidden_size))
    image_text = ImageText(placeholders[0], placeholders[0])
    return ModelSpec(
        family="video_llava",
        components=(
            Component("vision_encoder", inputs=(pixels,), outputs=(seen,)),
            Component("projector", inputs=(seen,), outputs=(soft,)),
            Component("video_encoder", inputs=(pixels,), outputs=(frames,)),
            Component("video_projector", inputs=(frames,), outputs=(moving,)),
            describe_decoder(text),
        ),
        tasks={
            **picture_tasks(config, image_text, chats[0]),
            **video_tasks(config, VIDEO_ENCODE, moving.name, placeholders[1], chats[1]),
        },
        front_ends={
            "pixel_values": image,
            "pixel_values_videos": video,
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


class VideoLlava:
    """Video-LLaVA checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_checked_config(folder)
        weights: Weights = Renamed(
            open_weights(folder, allow_pickle=allow_pickle), {**PREFIXES, **TOWERS}
        )
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        default = presets.clip(config.vision_config.image_size)
        front = read_image_front_end(folder, default)
        video = read_video_front_end(folder, default, FRAMES)
        generation = read_generation(folder, config.text_config)
        placeholders = read_placeholders(folder, config, tokenizer)
        chats = read_chats(folder, placeholders)
        spec = describe(config, front, video, generation, placeholders, chats)
        builds = {
            "vision_encoder": lambda: VisionEncoder(config, "image_tower"),
            "projector": lambda: Projector(config),
            "video_encoder": lambda: VisionEncoder(config, "video_tower", keeps_class=True),
            "video_projector": lambda: Projector(config),
            "decoder": lambda: Decoder(config.text_config),
        }
        towers = "image_tower", "video_tower"
        return opened(folder, config, spec, builds, weights, tokenizer, towers)

    def tiny(self, name: str, folder: Path) -> transformers.VideoLlavaForConditionalGeneration:
        """Write a random Video-LLaVA of 3, 3 and 2 layers.

        Its own processor asks for torchvision, for the videos; LLaVA's does the same with pictures.
        """
        config = transformers.VideoLlavaConfig(
            **tiny_configs(max_position_embeddings=512),
            image_token_index=4,
            video_token_index=free_id(),
            image_seq_length=16,
            video_seq_length=FRAMES * 17,
        )
        model = transformers.VideoLlavaForConditionalGeneration(config)
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save_tiny(model, folder, images, transformers.LlavaProcessor, more=("<video>",))
        write_template(folder, CHAT)
        return model


FAMILY = VideoLlava()
