"""PaLI's checkpoints: presets of the paper's sizes, parts of the hub's, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kit.bundles import checkpoint_of, exported
from PIL import Image
from safetensors.torch import load_file, save_file

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import CheckpointError
from vlmedge.make.export import export
from vlmedge.shelves.registry import FAMILIES

FAMILY = FAMILIES["pali"]
WEIGHTS = "model.safetensors"
# of the paper, in thousands of millions of parameters: ViT, mT5
SIZES = {"3B": (1.8, 1.2), "15B": (1.8, 13), "17B": (3.9, 13)}
WIDTHS = {"3B": (1664, 1024), "15B": (1664, 4096), "17B": (1792, 4096)}
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pali")
    return checkpoint_of("pali-parts", folder / "parts")


@pytest.fixture
def parts(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "parts"))


def edit(folder: Path, **fields: Any) -> None:
    """Change config.json; none takes a field out."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def write_holes(shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Write weights of full size that take no room on the disk: all zeros, never written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + end)


# ---- what is read


@pytest.mark.parametrize("preset", SIZES)
def test_presets_are_of_the_papers_sizes(preset: str, original: Path, tmp_path: Path) -> None:
    module: Any = sys.modules[type(FAMILY).__module__]
    configs = [module.make_config(fields) for fields in module.PRESETS[preset].values()]
    with torch.device("meta"):
        model = module.PaliModel(*configs)
    write_holes({n: tuple(p.shape) for n, p in model.named_parameters()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"preset": preset}))
    shutil.copy(original / "tokenizer.json", tmp_path)
    shutil.copy(original / "tokenizer_config.json", tmp_path)
    opened = FAMILY.open(tmp_path)
    seen, width = WIDTHS[preset]
    (soft,) = opened.spec.component("projector").outputs
    assert soft.shape == ("batch", 256, width)
    assert opened.spec.component("projector").inputs[0].shape == ("batch", 256, seen)
    counts = [0.0, 0.0]
    for name, shape in opened.weights.shapes().items():
        counts[name.startswith("language_model.")] += math.prod(shape) / 1e9
    assert counts == pytest.approx(SIZES[preset], rel=0.03)


def siglip() -> Any:
    config = transformers.SiglipConfig(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        text_config={**SMALL, "vocab_size": 50},
    )
    return transformers.SiglipModel(config)


def siglip_vision() -> Any:
    config = transformers.SiglipVisionConfig(**SMALL, image_size=32, patch_size=8)
    return transformers.SiglipVisionModel(config)


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))


def vit_with_a_head() -> Any:
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("build", [siglip, siglip_vision, vit, vit_with_a_head])
def test_every_patch_of_any_vit_is_seen(parts: Path, build: Callable[[], Any]) -> None:
    model = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shutil.rmtree(parts / "vit")
    model.eval().save_pretrained(parts / "vit")
    pixels = torch.randn(2, 3, 32, 32)
    tower = getattr(model, "vision_model", getattr(model, "vit", model))
    with torch.no_grad():
        theirs = tower(pixels).last_hidden_state[:, -16:].numpy()
    ours = FAMILY.open(parts).open("vision_encoder").run({"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(ours["image_embeds"], theirs, atol=1e-5)


def test_parts_bring_what_the_checkpoint_lacks(parts: Path) -> None:
    (parts / "mt5" / "generation_config.json").write_text(json.dumps({"num_beams": 5}))
    config = json.loads((parts / "vit" / "preprocessor_config.json").read_text())
    config["image_mean"] = [0.1, 0.2, 0.3]
    (parts / "vit" / "preprocessor_config.json").write_text(json.dumps(config))
    with_its_own = FAMILY.open(parts)
    assert with_its_own.spec.image.image_mean == (0.5, 0.5, 0.5)
    for file in parts.glob("*.json"):
        if file.name != "config.json":
            file.unlink()
    without = FAMILY.open(parts)
    assert without.spec.image.image_mean == (0.1, 0.2, 0.3)
    assert without.spec.generation.num_beams == 5
    assert without.tokenizer.to_str() == with_its_own.tokenizer.to_str()


def test_weights_of_the_checkpoint_go_before_its_parts(parts: Path) -> None:
    weights = load_file(parts / WEIGHTS)
    trained = {
        "vision_model.layernorm.weight": torch.full((24,), 2.0),
        "language_model.lm_head.weight": torch.full((300, 32), 3.0),
    }
    before = FAMILY.open(parts)
    save_file({**weights, **trained}, parts / WEIGHTS, metadata={"format": "pt"})
    after = FAMILY.open(parts)
    for name, tensor in trained.items():
        np.testing.assert_array_equal(after.read(name), tensor.numpy())
        assert not np.array_equal(before.read(name), tensor.numpy())


def test_prompts_may_be_the_checkpoints(parts: Path) -> None:
    edit(parts, prompts={"caption": "Generate the alt_text in DE at 0:"})
    tasks = FAMILY.open(parts).spec.tasks
    assert tasks["caption"].prompt == "Generate the alt_text in DE at 0:"
    assert tasks["ask"].prompt == "Answer in EN: {question}"


def test_picture_and_question_both_count(parts: Path, tmp_path: Path) -> None:
    model = vlmedge.load(exported(parts, tmp_path / "bundle"))
    images = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(4)]
    assert len(set(model.caption(images, max_tokens=12))) > 1
    asked = [model.ask(images[0], text, max_tokens=12) for text in ("what?", "a red star?", "é")]
    assert len(set(asked)) > 1


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": "nowhere"}, r"nowhere.config\.json is missing: .*its vision part lies there"),
        ({"text": "nowhere"}, r"nowhere.config\.json is missing: .*its text part lies there"),
        ({"vision": "mt5"}, "its vision part is 'mt5': choose one of siglip_vision_model, vit"),
        ({"text": "vit"}, "its text part is 'vit': choose one of mt5"),
        (
            {"text": None, "text_config": {"model_type": "t5"}},
            "its text part is 't5': choose one of mt5",
        ),
        ({"vision": None, "vision_config": {}}, "its vision part is None: choose one of siglip"),
        ({"text": None}, "does not describe its text part: give a 'preset', a 'text_config', or"),
        ({"text": None, "preset": "5B"}, "preset is '5B': choose from 3B, 15B, 17B"),
        ({"text": None, "preset": ["3B"]}, r"preset is \['3B'\]: choose from 3B, 15B, 17B"),
        ({"prompts": {"detect": "x"}}, "prompts is .*: give texts for caption, ask"),
        ({"prompts": ["caption"]}, "prompts is .*: give texts for caption, ask"),
        ({"prompts": {"ask": 3}}, "prompts is .*: give texts for caption, ask"),
        ({"prompts": {"ask": "Answer:"}}, "the prompt of ask is 'Answer:': write {question}"),
    ],
)
def test_configs_that_name_no_two_parts_are_refused(
    parts: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    edit(parts, **fields)
    with pytest.raises(CheckpointError, match=message):
        export(str(parts), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_parts_of_other_widths_are_refused(parts: Path) -> None:
    config = transformers.ViTConfig(**{**SMALL, "hidden_size": 32}, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(parts / "vit")
    message = r"'projector.weight' is \[32, 24\], and its mT5 is 32 wide, its ViT 32: take the"
    with pytest.raises(CheckpointError, match=message):
        FAMILY.open(parts)


def test_parts_without_a_projector_are_refused(parts: Path) -> None:
    save_file({"projector.bias": torch.zeros(32)}, parts / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight 'projector.weight' is missing"):
        FAMILY.open(parts)
    (parts / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"parts has no weights: add model\.safetensors, or"):
        FAMILY.open(parts)


def test_part_without_weights_is_refused(parts: Path) -> None:
    (parts / "mt5" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"mt5 has no weights: add model\.safetensors, or"):
        FAMILY.open(parts)
