"""OpenFlamingo's checkpoints: every layout that their parts come in, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kit.bundles import checkpoint_of
from safetensors.torch import load_file, save_file

from vlmedge.checkpoints.resolve import resolve
from vlmedge.errors import CheckpointError
from vlmedge.make.export import export
from vlmedge.plan.plan import read_shape
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import FAMILIES

FAMILY = FAMILIES["openflamingo"]
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
TABLES = {
    "openflamingo-neox": "lang_encoder.gpt_neox.embed_in.weight",
    "openflamingo-mpt": "lang_encoder.transformer.wte.weight",
}
LAYERS = {
    "openflamingo-neox": "lang_encoder.gpt_neox.layers",
    "openflamingo-mpt": "lang_encoder.transformer.blocks",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openflamingo")
    for kind in TABLES:
        checkpoint_of(kind, root / kind)
    return root


@pytest.fixture(params=list(TABLES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(originals: Path, tmp_path: Path, kind: str) -> Path:
    return Path(shutil.copytree(originals / kind, tmp_path / kind))


@pytest.fixture
def neox(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "openflamingo-neox", tmp_path / "neox"))


def edit(file: Path, **fields: Any) -> None:
    """Change a config; none takes a field out."""
    config = json.loads(file.read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(config))


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def same(one: Any, other: Any) -> bool:
    """Compare every weight that the graphs need, and the specs."""
    assert one.spec == other.spec
    names = {n for build in one.builds.values() for n, _ in build().named_parameters()}
    return all(np.array_equal(one.read(n), other.read(n)) for n in {*names, one.embed_tokens})


# ---- what is read


@pytest.mark.parametrize(
    ("wrapped", "prefix"), [(False, ""), (True, "module.")], ids=["released", "of a training"]
)
def test_checkpoint_of_the_authors_is_read(
    originals: Path, folder: Path, kind: str, wrapped: bool, prefix: str
) -> None:
    tensors: Any = {f"{prefix}{n}": t for n, t in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    torch.save({"epoch": 1, "model_state_dict": tensors} if wrapped else tensors,
               folder / "checkpoint.pt")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"pickle file \(checkpoint.pt\).*--allow-pickle"):
        FAMILY.open(folder)
    assert same(FAMILY.open(folder, allow_pickle=True), FAMILY.open(originals / kind))


def test_names_of_layers_that_stand_twice_are_one(originals: Path, folder: Path, kind: str) -> None:
    """A training that filters nothing saves the frozen parts too, and all layers twice."""
    place = LAYERS[kind]
    frozen = load_file(folder / "lm" / WEIGHTS)

    def change(found: Tensors) -> Tensors:
        gated = {n: t for n, t in found.items() if ".gated_cross_attn_layer." in n}
        moved = {
            n.replace(place, "lang_encoder.gated_cross_attn_layers").replace(
                ".gated_cross_attn_layer.", "."
            ): t
            for n, t in gated.items()
        }
        begins = place.removeprefix("lang_encoder.") + "."
        layers = {n.removeprefix(begins): t for n, t in frozen.items() if n.startswith(begins)}
        for name, tensor in layers.items():
            number, _, rest = name.partition(".")
            moved[f"{place}.{number}.decoder_layer.{rest}"] = tensor.clone()
            moved[f"lang_encoder.old_decoder_blocks.{number}.{rest}"] = tensor.clone()
        moved["vision_encoder.conv1.weight"] = torch.zeros(2)
        return {n: t for n, t in found.items() if n not in gated} | moved

    rewrite(folder / WEIGHTS, change)
    assert same(FAMILY.open(folder), FAMILY.open(originals / kind))


def test_rows_that_no_token_has_are_cut(originals: Path, folder: Path, kind: str) -> None:
    """Language models come with more rows than tokens; the checkpoint's table has its own."""
    padded = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm")
    padded.resize_token_embeddings(320, mean_resizing=False)
    padded.save_pretrained(folder / "lm")
    assert same(FAMILY.open(folder), FAMILY.open(originals / kind))
    rewrite(folder / WEIGHTS, lambda found: {n: t for n, t in found.items() if "embed" not in n
                                             and n != TABLES[kind]})  # fmt: skip
    opened = FAMILY.open(folder)
    rows = opened.tokenizer.token_to_id("<|endofchunk|>") + 1
    assert rows == opened.tokenizer.get_vocab_size() < 320
    assert opened.weights.shapes()[TABLES[kind]] == (rows, 32)
    assert opened.spec.component("decoder").outputs[0].shape[-1] == rows
    own = padded.get_input_embeddings().weight[:rows].detach().numpy()
    np.testing.assert_array_equal(opened.read(TABLES[kind]), own)
    head = padded.get_output_embeddings().weight[:rows].detach().numpy()
    np.testing.assert_array_equal(opened.read("lang_encoder.lm_head.weight"), head)


def test_whole_of_clip_is_a_vision_part(originals: Path, folder: Path, kind: str) -> None:
    tower = transformers.CLIPVisionModel.from_pretrained(folder / "clip")
    config = transformers.CLIPConfig(
        vision_config=tower.config.to_dict(),
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 50},
    )  # fmt: skip
    whole = transformers.CLIPModel(config)
    whole.vision_model.load_state_dict(tower.state_dict())
    whole.save_pretrained(folder / "clip")
    assert same(FAMILY.open(folder), FAMILY.open(originals / kind))


def test_names_of_older_releases_are_read(originals: Path, neox: Path) -> None:
    """GPT-NeoX's head was called otherwise, and its masks were saved."""

    def change(found: Tensors) -> Tensors:
        buffers = {
            f"gpt_neox.layers.0.attention.{n}": torch.zeros(1)
            for n in ("bias", "masked_bias", "rotary_emb.inv_freq")
        }
        heads = {"lm_head.weight", "embed_out.weight"}
        renamed = {"embed_out.weight" if n in heads else n: t for n, t in found.items()}
        assert "embed_out.weight" in renamed
        return renamed | buffers

    rewrite(neox / "lm" / WEIGHTS, change)
    rewrite(neox / WEIGHTS, lambda found: {n: t for n, t in found.items() if "embed_out" not in n})
    opened, before = FAMILY.open(neox), FAMILY.open(originals / "openflamingo-neox")
    assert opened.spec == before.spec
    head = load_file(neox / "lm" / WEIGHTS)["embed_out.weight"]
    np.testing.assert_array_equal(opened.read("lang_encoder.lm_head.weight"), head.numpy())


def test_new_tokens_end_a_text_and_mark_a_picture(folder: Path) -> None:
    opened = FAMILY.open(folder)
    end, image = (opened.tokenizer.token_to_id(t) for t in ("<|endofchunk|>", "<image>"))
    assert opened.spec.generation.eos_ids == (end,)
    assert opened.spec.tasks["ask"].image_token_id == image
    ids = opened.tokenizer.encode("<image>Output:a cat<|endofchunk|><image>").ids
    assert (ids[0], ids[-2], ids[-1]) == (image, end, image)


def test_identity_tells_two_trainings_apart(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    torch.save(weights, folder / "checkpoint.pt")
    before = resolve(str(folder), SILENT).identity()
    torch.save({n: t + 1 for n, t in weights.items()}, folder / "checkpoint.pt")
    assert resolve(str(folder), SILENT).identity() != before


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": None}, r"config\.json has no 'vision': name the folder of its vision part"),
        ({"text": 3}, r"config\.json has no 'text': name the folder of its text part"),
        ({"vision": "nowhere"}, r"nowhere.config\.json is missing: .*its vision part lies there"),
        ({"vision": "lm"}, "its vision part is 'gpt_neox': choose a CLIP, such as openai/clip"),
        ({"text": "clip"}, "its language model is 'clip_vision_model': .* with gpt_neox, mpt"),
        ({"cross_attn_every_n_layers": None}, "cross_attn_every_n_layers is None: it must be a"),
        ({"cross_attn_every_n_layers": True}, "cross_attn_every_n_layers is True: it must be a"),
        ({"perceiver_depth": 0}, "perceiver_depth is 0: it must be a whole number of 1 or more"),
        ({"perceiver_latents": "2"}, "perceiver_latents is '2': it must be a whole number"),
        (
            {"cross_attn_every_n_layers": 4},
            r"stand before layers \[1, 3\] of 4: cross_attn_every_n_layers 4 asks for \[3\]",
        ),
        ({"perceiver_depth": 3}, r"weight 'perceiver.layers.2.*' is missing"),
        ({"perceiver_latents": 64}, r"weight 'perceiver.latents' is \[2, 24\]: .* \[64, 24\]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    neox: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    edit(neox / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        export(str(neox), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": None}, "config.json has no 'vision': name the folder of its vision part"),
        ({"text": "clip"}, "its language model is 'clip_vision_model': choose one of gpt_neox"),
    ],
)
def test_plan_refuses_them_too(neox: Path, fields: dict[str, Any], message: str) -> None:
    edit(neox / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        read_shape(neox)


@pytest.mark.parametrize(
    "fields", [{"alibi": False}, {"alibi_bias_max": 4}, {"qk_ln": True}, {"prefix_lm": True}]
)
def test_mpt_of_another_attention_is_refused(
    originals: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(originals / "openflamingo-mpt", tmp_path / "mpt"))
    edit(folder / "lm" / "config.json", attn_config=fields)
    [(name, value)] = fields.items()
    with pytest.raises(CheckpointError, match=f"{name} is {value!r}: choose an MPT with"):
        FAMILY.open(folder)


@pytest.mark.parametrize("name", ["frame_embs", "media_time_embs"])
def test_perceiver_for_videos_is_refused(neox: Path, name: str) -> None:
    rewrite(neox / WEIGHTS, lambda found: {**found, f"perceiver.{name}": torch.zeros(2, 24)})
    with pytest.raises(
        CheckpointError, match=f"'perceiver.{name}' belongs to a Perceiver for videos"
    ):
        FAMILY.open(neox)


def test_table_without_rows_for_the_new_tokens_is_refused(folder: Path, kind: str) -> None:
    last = FAMILY.open(folder).tokenizer.token_to_id("<|endofchunk|>")
    rewrite(folder / WEIGHTS, lambda found: {**found, TABLES[kind]: found[TABLES[kind]][:last]})
    with pytest.raises(CheckpointError, match=f"are tokens up to {last}, .* has {last} rows"):
        FAMILY.open(folder)


def test_folder_without_the_trained_layers_is_refused(neox: Path) -> None:
    (neox / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: put checkpoint\.pt there"):
        FAMILY.open(neox)


def test_part_without_weights_is_refused(folder: Path) -> None:
    (folder / "lm" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"lm has no weights: add model\.safetensors, or"):
        FAMILY.open(folder)
