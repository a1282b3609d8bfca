"""Counts from config.json alone are those of PyTorch's own models on its meta device."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kit import ROOT
from kit.shapes import LLAVA, benchmark_models
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from vlmedge.errors import CheckpointError, UnknownNameError
from vlmedge.plan.plan import read_shape
from vlmedge.plan.shape import Shape


def on_meta(architecture: Any, config: Any) -> Any:
    with torch.device("meta"):
        return architecture(config)


def count(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def counted(folder: Path, config: Any) -> Shape:
    config.save_pretrained(folder)
    return read_shape(folder)


def test_clip_b16_counts_as_torch_does(tmp_path: Path) -> None:
    make, architecture = benchmark_models()["clip-vit-b-16"]
    shape, model = counted(tmp_path, make()), on_meta(architecture, make())
    vision, text = shape.parts
    assert vision.parameters == count(model.vision_model, model.visual_projection)
    assert text.parameters == count(model.text_model, model.text_projection)
    assert shape.parameters == count(model) == 149_620_737


def test_blip2_opt_counts_as_torch_does(tmp_path: Path) -> None:
    make, architecture = benchmark_models()["blip2-opt-2.7b"]
    shape, model = counted(tmp_path, make()), on_meta(architecture, make())
    inner = model.model if hasattr(model, "model") else model
    vision, qformer, projector, decoder = shape.parts
    assert vision.parameters == count(inner.vision_model)
    assert qformer.parameters == count(inner.qformer) + inner.query_tokens.numel()
    assert projector.parameters == count(inner.language_projection)
    assert decoder.parameters == count(inner.language_model)
    assert shape.parameters == count(model)


def test_llava_counts_as_torch_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAVA))
    shape = read_shape(tmp_path)
    config = transformers.LlavaConfig.from_dict(LLAVA)
    model = on_meta(transformers.LlavaForConditionalGeneration, config)
    vision, projector, _decoder = shape.parts
    tower = model.model.vision_tower  # of which the layer before the last one is looked at
    assert vision.parameters == count(tower) - count(tower.encoder.layers[-1], tower.post_layernorm)
    assert projector.parameters == count(model.model.multi_modal_projector)
    assert shape.parameters == count(model)
    assert shape.soft_rows == 576


def test_llava_next_counts_as_torch_does(tmp_path: Path) -> None:
    """Its rows are those that transformers' processor has for the largest picture."""
    text = {"model_type": "mistral", "vocab_size": 32064}  # as llava-v1.6-mistral-7b-hf's
    raw = {**LLAVA, "architectures": ["LlavaNextForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shape = read_shape(tmp_path)
    config = transformers.LlavaNextConfig.from_dict({**raw, "model_type": "llava_next"})
    model = on_meta(transformers.LlavaNextForConditionalGeneration, config)
    vision, projector, _decoder = shape.parts
    assert vision.parameters + shape.extra == count(model.model.vision_tower)
    newline = model.model.image_newline.numel()
    assert projector.parameters == count(model.model.multi_modal_projector) + newline
    assert shape.parameters == count(model)
    assert (vision.runs, projector.runs) == (5, 5)
    assert shape.soft_rows == 5 * 576 + 48
    raw["image_grid_pinpoints"] = [[336, "672"]]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints has \[336, '672'\]: it must"):
        read_shape(tmp_path)


def test_grouped_heads_and_tied_words_count_as_torch_does(tmp_path: Path) -> None:
    config = transformers.LlavaConfig.from_dict(
        {
            **LLAVA,
            "text_config": {
                "model_type": "llama",
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 96,
                "hidden_size": 512,
                "tie_word_embeddings": True,
            },
            "tie_word_embeddings": True,
            "multimodal_projector_bias": False,
        }
    )
    model = on_meta(transformers.LlavaForConditionalGeneration, config)
    assert counted(tmp_path, config).parameters == count(model)


def test_smaller_models_count_as_torch_does(tmp_path: Path) -> None:
    for name in ("tiny-clip", "tiny-blip2"):
        folder = ROOT / "vlmedge" / "checkpoints" / name
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, config.architectures[0])
        assert read_shape(folder).parameters == count(on_meta(architecture, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "config.json has no 'text_config': it is needed to plan"),
        ({"vision_config": {"hidden_size": "wide"}}, "hidden_size is 'wide': it must be a whole"),
        ({"vision_config": {"patch_size": 0}}, "patch_size is 0: it must be a whole number of 1"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer has 'last': it must be a number"),
        (
            {"vision_config": {"model_type": "vit"}},
            "'vit' cannot be planned: llava is planned with 'clip_",
        ),
        (
            {"text_config": {"model_type": "phi"}},
            "'phi' cannot be planned: llava is planned with 'llama' or",
        ),
    ],
)
def test_config_with_a_fault_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAVA, **change}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [2, 0]}, "depths has 0: it must be a whole number of 1 or more"),
        ({"depths": [2, True]}, "depths has True: it must be a whole number of 1 or more"),
        ({"mlp_ratio": "wide"}, "mlp_ratio is 'wide': it must be above 0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0: it must be above 0"),
    ],
)
def test_swin_with_a_fault_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {"architectures": ["SwinForImageClassification"], "model_type": "swin", **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_shape(tmp_path)


# Configs as their hubs have them: what is left out must be filled as transformers fills it
DEFAULTS = {
    "ViTForImageClassification": transformers.ViTConfig,
    "SwinForImageClassification": transformers.SwinConfig,
    "Swinv2ForImageClassification": transformers.Swinv2Config,
    "SiglipModel": transformers.SiglipConfig,
    "SegGptForImageSegmentation": transformers.SegGptConfig,
    "BlipForConditionalGeneration": transformers.BlipConfig,
    "BlipForQuestionAnswering": transformers.BlipConfig,
    "BlipForImageTextRetrieval": transformers.BlipConfig,
    "Blip2ForImageTextRetrieval": transformers.Blip2Config,
    "InstructBlipForConditionalGeneration": transformers.InstructBlipConfig,
    "Florence2ForConditionalGeneration": transformers.Florence2Config,
}
NEEDED = {"Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}}}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_gaps_are_filled_as_transformers_fills_them(architecture: str, tmp_path: Path) -> None:
    needed = NEEDED.get(architecture, {})
    config = DEFAULTS[architecture](**needed)
    bare: dict[str, Any] = {"architectures": [architecture], "model_type": config.model_type}
    for part in ("text_config", "vision_config", "qformer_config"):
        if hasattr(config, part):
            bare[part] = {}
    bare |= needed
    (tmp_path / "config.json").write_text(json.dumps(bare))
    shape = read_shape(tmp_path)
    assert shape.parameters == count(on_meta(getattr(transformers, architecture), config))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("Blip2ForConditionalGeneration", "'bart': blip2 is planned with 'opt' or 't5'"),
        ("InstructBlipForConditionalGeneration", "'bart': instructblip is .* 'opt' or 'llama'"),
    ],
)
def test_another_language_model_behind_a_qformer_is_refused(
    tmp_path: Path, architecture: str, message: str
) -> None:
    config = {"architectures": [architecture], "text_config": {"model_type": "bart"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_shape(tmp_path)


def test_retrieval_without_words_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["Blip2ForImageTextRetrieval"], "qformer_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_qformer_text_input false.*: choose a"):
        read_shape(tmp_path)


def test_t5gemma2_counts_as_torch_does(tmp_path: Path) -> None:
    """Both sides read one table, and one row that ends a picture."""
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    config = transformers.T5Gemma2Config(
        encoder={"text_config": text, "vision_config": {"model_type": "siglip_vision_model"}},
        decoder=text,
        architectures=["T5Gemma2ForConditionalGeneration"],
    )
    model = on_meta(transformers.T5Gemma2ForConditionalGeneration, config)
    model.tie_weights()
    assert counted(tmp_path, config).parameters == count(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"dim_embed": [256, 512]}}, "Microsoft's layout: use the same"),
        ({"text_config": {"model_type": "opt"}}, "'opt': florence2 is planned with 'bart'"),
        ({"vision_config": {"num_heads": [4]}}, "num_heads has 1 entries, depths 4: give one for"),
        ({"vision_config": {"patch_prenorm": [True]}}, "patch_prenorm has 1 entries, depths 4"),
    ],
)
def test_florence2_with_a_fault_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {"architectures": ["Florence2ForConditionalGeneration"]}
    config |= {"vision_config": {}, "text_config": {}, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_shape(tmp_path)


def test_arithmetic_of_florence2s_tower_is_torchs(tmp_path: Path) -> None:
    """One number of rows, and of rows looked at, stands for stages of unlike sizes."""
    config = transformers.Florence2Config(architectures=["Florence2ForConditionalGeneration"])
    tower = counted(tmp_path, config).parts[0]
    assert tower.rows is not None and tower.keys is not None
    model = on_meta(Florence2VisionBackbone, config.vision_config)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 768, 768, device="meta"))
    products = 2 * tower.linear * tower.rows
    attention = 4 * tower.layers * tower.rows * tower.keys * tower.width
    assert products + attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def write_pali(folder: Path, **fields: Any) -> None:
    config = {"architectures": ["PaLIForConditionalGeneration"], **fields}
    (folder / "config.json").write_text(json.dumps(config))


def test_pali_is_its_parts(tmp_path: Path) -> None:
    """By preset, by folders, and by a config inside; each part by the last that tells it."""
    write_pali(tmp_path, preset="17B")
    large = read_shape(tmp_path)
    assert large.parameters == pytest.approx(16.9e9, rel=0.02)  # 3.9 and 13, by the paper
    assert large.soft_rows == 256
    for place, config, architecture in (
        ("vit", transformers.SiglipConfig(), transformers.SiglipVisionModel),
        ("mt5", transformers.MT5Config(), transformers.MT5ForConditionalGeneration),
    ):
        config.save_pretrained(tmp_path / place)
        part = getattr(config, "vision_config", config)
        part.vision_use_head = False
        model = on_meta(architecture, part)
        if place == "vit":
            seen = count(model)
    write_pali(tmp_path, preset="17B", vision="vit")
    mixed = read_shape(tmp_path)
    assert mixed.parts[0].parameters == seen
    assert mixed.parts[2].parameters == large.parts[2].parameters
    write_pali(tmp_path, text="mt5", vision="vit")
    shape = read_shape(tmp_path)
    bridge = 768 * 512 + 512
    head = 0 if not model.config.tie_word_embeddings else 250112 * 512  # a PaLI's is its own
    assert shape.parameters == seen + bridge + count(model) + head
    inside = {"model_type": "vit", "image_size": 32, "patch_size": 8}
    write_pali(tmp_path, text="mt5", vision_config=inside)
    assert read_shape(tmp_path).soft_rows == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "5B"}, "preset is '5B': choose from 3B, 15B, 17B"),
        ({}, "does not describe its vision part: give a 'preset', a 'vision_config', or a folder"),
        ({"preset": "3B", "vision": "vit"}, "vit/config.json is missing: .* put it there"),
        ({"preset": "3B", "text_config": {"model_type": "t5"}}, "text part is 't5': choose one of"),
        ({"preset": "3B", "vision": "broken"}, "broken/config.json is not a JSON object: download"),
        ({"preset": "3B", "vision": "list"}, "list/config.json is not a JSON object: download"),
    ],
)
def test_pali_with_a_fault_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    for name, text in (("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    write_pali(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_shape(tmp_path)


def test_unknown_architecture_lists_what_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ClipModel"]}')
    with pytest.raises(UnknownNameError, match="did you mean 'CLIPModel'.*Llava"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no 'architectures'"),
        ("{", "is not valid JSON: download it again"),
        ('{"architectures": []}', "has no 'architectures'"),
    ],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_shape(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="nowhere.*no such file or folder"):
        read_shape(tmp_path / "nowhere")
