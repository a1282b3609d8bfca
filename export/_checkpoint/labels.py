"""What every closed-set classifier shares: its labels, and a spec of one graph and two tasks."""

from __future__ import annotations

import json
from typing import Any

from vlmedge.errors import CheckpointError
from vlmedge.spec import Component, EmbedTask, ImageFrontEnd, LabelTask, ModelSpec, TensorSpec

LABELS = "assets/labels.json"
ENCODE = ("vision_encoder",)


def read_labels(config: Any) -> list[str]:
    """Return the names of the head's classes in their order, and refuse gaps and repetitions."""
    found = {int(number): str(name) for number, name in config.id2label.items()}
    missing = sorted(set(range(config.num_labels)) - set(found))
    if missing or len(found) != config.num_labels:
        raise CheckpointError(
            f"config.json: id2label names {len(found)} labels, the head has {config.num_labels}: "
            "each needs its name"
        )
    return [found[i] for i in range(len(found))]


def label_file(labels: list[str]) -> dict[str, bytes]:
    """Return the bundle's file of labels."""
    return {LABELS: json.dumps(labels, ensure_ascii=False, indent=0).encode() + b"\n"}


def describe(
    family: str, config: Any, image: ImageFrontEnd, size: tuple[int, int], width: int
) -> ModelSpec:
    """Name the graph and tasks of one classifier.

    Args:
        family: The file in export/.
        config: transformers' config, for the head.
        image: The image front end.
        size: Size of the pictures, (height, width).
        width: Width of the vector that the head reads.
    """
    vision_encoder = Component(
        "vision_encoder",
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, *size)),),
        outputs=(
            TensorSpec("image_embeds", "float32", ("batch", width)),
            TensorSpec("logits", "float32", ("batch", config.num_labels)),
        ),
    )
    several = config.problem_type == "multi_label_classification"
    return ModelSpec(
        family=family,
        components=(vision_encoder,),
        tasks={
            "classify": LabelTask(ENCODE, "logits", LABELS, "sigmoid" if several else "softmax"),
            "embed_image": EmbedTask("image", ENCODE, "image_embeds"),
        },
        front_ends={"pixel_values": image},
    )
