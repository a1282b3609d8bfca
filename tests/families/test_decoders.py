"""What the families with a language model refuse, by name, before any work is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.bundles import bundle_of, checkpoint_of
from kit.tiny import tiny

import vlmedge
from vlmedge.checkpoints.resolve import family_of
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import CheckpointError, InputError
from vlmedge.run.tasks.prompt import Example
from vlmedge.shelves.registry import FAMILIES

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one checkpoint of each of these families."""
    root = tmp_path_factory.mktemp("decoders")
    for kind in ("llava", "llava-next", "smolvlm", "paligemma", "flamingo"):
        checkpoint_of(kind, root / kind)
    return root


def text(**fields: Any) -> Change:
    return lambda config: config["text_config"].update(fields)


def whole(**fields: Any) -> Change:
    return lambda config: config.update(fields)


@pytest.mark.parametrize(
    ("kind", "name", "change", "refusal"),
    [
        ("llava", "config.json", text(model_type="phi"), "'phi': .* llama, mistral, qwen2"),
        ("paligemma", "config.json", text(model_type="llama"), "'llama': .* gemma, gemma2"),
        (
            "llava",
            "config.json",
            lambda config: config["vision_config"].update(model_type="dinov2"),
            "vision tower is 'dinov2': .* clip_vision_model, siglip_vision_model",
        ),
        (
            "llava",
            "config.json",
            text(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "positions are 'dynamic'",
        ),
        ("llava", "config.json", whole(image_token_index=299999), "image_token_index is 299999"),
        ("smolvlm", "config.json", whole(image_token_id=299999), "image_token_id is 299999"),
        (
            "smolvlm",
            "preprocessor_config.json",
            whole(max_image_size={"longest_edge": 64}),
            "its tiles are 64 pixels, its vision tower takes 32",
        ),
        (
            "llava-next",
            "config.json",
            whole(vision_feature_select_strategy="full"),
            "'full' keeps the tower's class token",
        ),
        (
            "llava-next",
            "preprocessor_config.json",
            whole(crop_size={"height": 48, "width": 48}),
            "its tiles are 48 x 48 pixels, its vision tower takes 32 x 32",
        ),
        (
            "llava-next",
            "preprocessor_config.json",
            whole(image_grid_pinpoints=[[32, 32]]),
            r"image_grid_pinpoints are \[\[32, 32\]\] .* they must be the same",
        ),
        ("flamingo", "config.json", whole(use_resampler=False), "use_resampler is false"),
    ],
)
def test_checkpoint_is_refused_by_name(
    originals: Path, tmp_path: Path, kind: str, name: str, change: Change, refusal: str
) -> None:
    folder = Path(shutil.copytree(originals / kind, tmp_path / kind))
    if not (folder / name).is_file():  # newer releases keep it inside the processor's
        inside = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        (folder / name).write_text(json.dumps(inside))
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=refusal):
        FAMILIES[family_of(folder)].open(folder)


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_weights_of_the_older_layout_are_the_same(
    originals: Path, tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(originals / kind, tmp_path / kind))
    file = folder / "model.safetensors"
    newer = "vision_tower."
    older = {
        f"{newer}vision_model.{n.removeprefix(newer)}" if n.startswith(newer) else n: t
        for n, t in load_file(file).items()
    }
    save_file(older, file, metadata={"format": "pt"})
    before, after = (FAMILIES[kind].open(f) for f in (originals / kind, folder))
    assert after.spec == before.spec
    name = "vision_tower.embeddings.position_embedding.weight"
    assert (after.read(name) == before.read(name)).all()  # type: ignore[attr-defined]


def test_tasks_refuse_what_a_model_does_not_do(tmp_path: Path) -> None:
    path = bundle_of("paligemma", tmp_path / "bundle")
    model, image = vlmedge.load(path), draw_scene(0, "heldout").image
    with pytest.raises(InputError, match="leave the prompt out"):
        model.caption(image, "a")
    for other in ("ask", "detect"):
        with pytest.raises(InputError, match=f"task '{other}' describes no picture: use ask or"):
            model.caption(image, task=other)
    with pytest.raises(InputError, match="takes no examples"):
        model.ask(image, "what?", examples=[Example(image, "a star", "what?")])
    with pytest.raises(InputError, match="answers in words"):
        model.detect(image, "cat", task="ask")
    for nothing in (" ", " ; "):
        with pytest.raises(InputError, match="nothing to look for"):
            model.detect(image, nothing)
    assert isinstance(model.detect(image, "cat", max_tokens=4), list)


def test_t5_with_two_embedding_tables_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("blip2-flan-t5", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shared = tensors["language_model.shared.weight"]
    name = "language_model.encoder.embed_tokens.weight"
    save_file({**tensors, name: shared.clone()}, file, metadata={"format": "pt"})
    FAMILIES["blip2"].open(tmp_path)  # the same once more, as older checkpoints have it
    save_file({**tensors, name: shared + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight' differs from"):
        FAMILIES["blip2"].open(tmp_path)
    del tensors["language_model.shared.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'language_model\.shared\.weight' is missing"):
        FAMILIES["blip2"].open(tmp_path)
