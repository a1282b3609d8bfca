"""Checkpoints as they come: what is read, and what is refused before any work is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from kit.bundles import checkpoint_of
from kit.tiny import KINDS
from safetensors.torch import load_file, save_file

from vlmedge.checkpoints import resolve as checkpoint
from vlmedge.checkpoints.resolve import aliases, family_of, resolve
from vlmedge.errors import CheckpointError, UnknownNameError, VlmEdgeError
from vlmedge.make.export import export
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import FAMILIES


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a random checkpoint of every kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        checkpoint_of(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def clip(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["clip"], tmp_path / "clip"))


@pytest.fixture
def blip2(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["blip2"], tmp_path / "blip2"))


def edit_config(folder: Path, change: Callable[[dict], None], name: str = "config.json") -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def opened(folder: Path, **options: bool):  # type: ignore[no-untyped-def]
    return FAMILIES[family_of(folder)].open(folder, **options)


# ---- what is read

RESIZED = {"model.embeddings.position_embeddings"}  # SegGPT's, once, to the graph's own grid


@pytest.mark.parametrize("kind", [FAMILIES.literal(name, "TINY")[0] for name in FAMILIES.names()])
def test_every_weight_is_read_as_it_is(kind: str, originals: dict[str, Path]) -> None:
    export_ = opened(originals[kind])
    read = {name: export_.read(name) for name in export_.weights.shapes()}
    for name, tensor in load_file(originals[kind] / "model.safetensors").items():
        if name in RESIZED:
            continue
        if name in read:
            np.testing.assert_array_equal(read[name], tensor.numpy())
        else:  # transformers calls it otherwise in memory
            assert any(np.array_equal(found, tensor.numpy()) for found in read.values()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_read_exactly(clip: Path, dtype: torch.dtype) -> None:
    edit_weights(clip, lambda w: w.update({n: t.to(dtype) for n, t in w.items()}))
    name = "visual_projection.weight"
    stored = load_file(clip / "model.safetensors")[name]
    np.testing.assert_array_equal(opened(clip).read(name), stored.float().numpy())


def test_sharded_weights_are_read(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, clip / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (clip / "model.safetensors").unlink()
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    export_ = opened(clip)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(export_.read(name), tensor.numpy())
    (clip / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        opened(clip)


def test_pickled_weights_need_consent(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    torch.save(weights, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can run code when it is read.*--allow-pickle"):
        opened(clip)
    export_ = opened(clip, allow_pickle=True)
    name = "logit_scale"
    np.testing.assert_array_equal(export_.read(name), weights[name].numpy())


def test_tied_head_is_the_table_unless_the_file_has_its_own(blip2: Path) -> None:
    head = "language_model.lm_head.weight"
    table = "language_model.model.decoder.embed_tokens.weight"
    edit_weights(blip2, lambda w: w.pop(head, None))
    np.testing.assert_array_equal(opened(blip2).read(head), opened(blip2).read(table))
    edit_weights(blip2, lambda w: w.update({head: w[table] * 2}))
    np.testing.assert_array_equal(opened(blip2).read(head), 2 * opened(blip2).read(table))


def test_missing_preprocessor_and_generation_config_have_defaults(blip2: Path) -> None:
    (blip2 / "generation_config.json").unlink()
    spec = opened(blip2).spec
    assert spec.image.resize_size == (32, 32)
    assert spec.image.resample == "bicubic"
    assert spec.generation.eos_ids == (2,)
    assert spec.generation.bos_id == 2


def test_preprocessor_and_generation_config_are_read(blip2: Path) -> None:
    front = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    front |= {"image_std": [0.5, 0.5, 0.5], "do_resize": True}
    (blip2 / "preprocessor_config.json").write_text(json.dumps(front))
    generation = {"eos_token_id": [7, 8], "max_new_tokens": 9, "num_beams": 5}
    (blip2 / "generation_config.json").write_text(json.dumps(generation))
    spec = opened(blip2).spec
    assert (spec.image.resample, spec.image.image_mean) == ("bilinear", (0.1, 0.2, 0.3))
    assert (spec.generation.eos_ids, spec.generation.max_tokens) == ((7, 8), 9)
    assert spec.generation.num_beams == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_delta_is_added_to_its_base(
    originals: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Shikra as it is published: what it has more than LLaMA, whose vocabulary is smaller."""
    folder = shikra_delta(originals["shikra"], tmp_path / "delta", dtype)
    merged = load_file(originals["shikra"] / "model.safetensors")
    export_ = opened(folder)
    names = {"model.": "language_model.model.", "model.mm_": "mm_", "lm_": "language_model.lm_"}
    for name, tensor in merged.items():
        old = max((old for old in names if name.startswith(old)), key=len)
        read = export_.read(names[old] + name.removeprefix(old))
        # of halves rounded three times: the base, the delta and their sum
        room = 2e-6 if dtype == torch.float32 else 6e-3
        np.testing.assert_allclose(read, tensor.numpy(), atol=room)
        if dtype == torch.float16:
            np.testing.assert_array_equal(read, read.astype(np.float16))


def test_delta_is_refused_without_its_base_and_with_another(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shikra_delta(originals["shikra"], tmp_path / "delta", torch.float32)
    shutil.move(folder / "base", tmp_path / "base")
    with pytest.raises(CheckpointError, match="holds a delta, which needs LLaMA's weights: put"):
        opened(folder)
    whole = Path(shutil.copytree(originals["shikra"], tmp_path / "whole"))
    shutil.copytree(tmp_path / "base", whole / "base")
    with pytest.raises(CheckpointError, match="holds no delta: remove its folder base/"):
        opened(whole)
    shutil.copytree(tmp_path / "base", folder / "base")
    edit_weights(folder / "base", lambda w: w.update({"lm_head.weight": torch.zeros(3, 16)}))
    with pytest.raises(CheckpointError, match=r"'.*lm_head.weight' is \[.*, 32\] in the delta and"):
        opened(folder)
    edit_weights(folder / "base", lambda w: w.pop("lm_head.weight"))
    with pytest.raises(
        CheckpointError, match="the base has no weight '.*', which the delta changes"
    ):
        opened(folder)


def shikra_delta(whole: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Take a random base of 3 tokens less from a checkpoint's weights; it lies in base/."""
    shutil.copytree(whole, folder)
    generator = torch.Generator().manual_seed(7)
    base: dict[str, torch.Tensor] = {}

    def subtract(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "mm_projector" not in name:
                wide = name in ("model.embed_tokens.weight", "lm_head.weight")
                rows = len(tensor) - 3 * wide
                noise = 0.01 * torch.randn(tensor[:rows].shape, generator=generator)
                base[name] = (tensor[:rows] + noise).to(dtype)
                tensor[:rows] -= base[name].float()
            weights[name] = tensor.to(dtype)

    edit_weights(folder, subtract)
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda f: shutil.rmtree(f / "vision_tower"), "has no vision_tower/config.json: put the"),
        (
            lambda f: edit_config(
                f, lambda c: c.update(eos_token_id=9999), "generation_config.json"
            ),
            r"its tokenizer has no eos_token_id \[9999\]: download both again",
        ),
        (
            lambda f: edit_weights(
                f, lambda w: w.update({"model.embed_tokens.weight": torch.zeros(200, 32)})
            ),
            r"<im_end> is token \d+ of its tokenizer, and the embedding table has 200 rows",
        ),
    ],
)
def test_shikra_with_a_part_missing_is_refused(
    change: Callable[[Path], object], refusal: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(originals["shikra"], tmp_path / "shikra"))
    change(folder)
    with pytest.raises(CheckpointError, match=refusal):
        opened(folder)


def test_absent_image_token_is_no_obstacle(blip2: Path) -> None:
    edit_config(blip2, lambda c: c.update(image_token_index=None))
    assert opened(blip2).spec.tasks["caption"].image_token_id is None


def test_tokenizer_of_vocab_and_merges_alone_is_built(clip: Path, tmp_path: Path) -> None:
    """As the first CLIP and OPT checkpoints on the hub have it."""
    built = tokenizers.Tokenizer.from_file(str(clip / "tokenizer.json"))
    built.model.save(str(clip))
    (clip / "tokenizer.json").unlink()
    special = {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<e>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "CLIPTokenizer", **special}
    (clip / "tokenizer_config.json").write_text(json.dumps(config))
    assets = dict(opened(clip).assets())
    assets["assets/tokenizer.json"](tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_gelu_and_quick_gelu_are_told_apart(originals: dict[str, Path], clip: Path) -> None:
    for part in ("vision_config", "text_config"):
        edit_config(clip, lambda c, part=part: c[part].update(hidden_act="gelu"))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    outputs = []
    for folder, expected in ((originals["clip"], "Sigmoid"), (clip, "Gelu")):
        export_ = opened(folder)
        kinds = {node.op_type for node in export_.trace("vision_encoder").graph}
        assert expected in kinds
        outputs.append(export_.open("vision_encoder").run({"pixel_values": pixels})["image_embeds"])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual_projection.weight"), "'visual_projection.weight' is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "weight 'extra' belongs to no part"),
        (
            lambda w: w.update({"visual_projection.weight": torch.zeros(2, 3)}),
            r"weight 'visual_projection.weight' is \[2, 3\]: config.json asks for \[24, 32\]",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_wrong_weights_are_refused_by_name(
    clip: Path, change: Callable[[dict], None], message: str
) -> None:
    edit_weights(clip, change)
    with pytest.raises(CheckpointError, match=message):
        opened(clip)


def test_nan_is_refused_by_name_and_leaves_nothing(clip: Path, tmp_path: Path) -> None:
    edit_weights(clip, lambda w: w["text_projection.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="weight 'text_projection.weight' has NaN"):
        export(str(clip), tmp_path / "out", "int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]


def test_truncated_weights_are_refused(clip: Path) -> None:
    file = clip / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ends inside"):
        opened(clip)


def edit_header(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header["logit_scale"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [10**12, 10**12]}, r"'logit_scale' is F32\[1000000000000, .* and has 4 bytes"),
        ({"shape": [-1]}, "has a broken header"),
        ({"shape": 3}, "has a broken header"),
        ({"data_offsets": [-8, 4]}, "has a broken header"),
        ({"data_offsets": [0, 10**15]}, "ends inside 'logit_scale'"),
        ({"dtype": "F8"}, "'logit_scale' is F8: only F32, F16"),
        ({"dtype": "F64"}, "'logit_scale' is F64.* and has 4 bytes"),
    ],
)
def test_absurd_header_is_refused(clip: Path, fields: dict, message: str) -> None:
    edit_header(clip, lambda entry: entry.update(fields))
    with pytest.raises(CheckpointError, match=message):
        opened(clip)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "index.json cannot be read: download it again"),
        ({"weight_map": {"a": 3}}, "index.json cannot be read: download it again"),
        (
            {"weight_map": {"a": "../../secret"}},
            "names ../../secret, outside the folder: do not use it",
        ),
        (
            {"weight_map": {"a": "/etc/hostname"}},
            "names /etc/hostname, outside the folder: do not use it",
        ),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "is not a safetensors file"),
    ],
)
def test_absurd_index_is_refused(clip: Path, index: object, message: str) -> None:
    (clip / "model.safetensors").unlink()
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        opened(clip)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": -4}, r"describes a model that cannot be built \(RuntimeError: .*negative"),
        ({"patch_size": 0}, r"describes a model that cannot be built \(ZeroDivisionError"),
        ({"hidden_act": "nope"}, r"describes a model that cannot be built \(KeyError: 'nope'"),
        ({"hidden_size": "a"}, "is refused: .*hidden_size.*(int|integer)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_absurd_config_is_refused(clip: Path, fields: dict, message: str) -> None:
    edit_config(clip, lambda config: config["vision_config"].update(fields))
    with pytest.raises(CheckpointError, match=message):
        opened(clip)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_brackets_without_end_are_refused(clip: Path, name: str) -> None:
    (clip / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=f"{name} is not valid JSON"):
        family_of(clip)
        opened(clip)


def test_file_that_is_no_safetensors_is_refused(clip: Path) -> None:
    (clip / "model.safetensors").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        opened(clip)


def test_no_weights_are_refused(clip: Path) -> None:
    (clip / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: add model\.safetensors, or"):
        opened(clip)


def test_no_tokenizer_is_refused(clip: Path) -> None:
    (clip / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: add tokenizer\.json"):
        opened(clip)


def test_config_without_a_needed_field_is_refused(blip2: Path) -> None:
    edit_config(blip2, lambda c: c.pop("qformer_config"))
    with pytest.raises(
        CheckpointError, match="lacks the field 'qformer_config': download it again"
    ):
        opened(blip2)


def test_other_language_model_is_refused(blip2: Path) -> None:
    edit_config(blip2, lambda c: c.update(text_config={"model_type": "bloom"}))
    with pytest.raises(CheckpointError, match="language model is 'bloom'.*opt, t5, mt5"):
        opened(blip2)


def test_unknown_architecture_lists_the_known_and_the_nearest(clip: Path) -> None:
    edit_config(clip, lambda c: c.update(architectures=["CLIPModell"]))
    with pytest.raises(UnknownNameError, match="did you mean 'CLIPModel'.*Blip2ForConditional"):
        family_of(clip)


def test_config_without_architectures_is_refused(clip: Path) -> None:
    edit_config(clip, lambda c: c.pop("architectures"))
    with pytest.raises(CheckpointError, match="has no 'architectures'"):
        family_of(clip)


def test_config_that_is_no_json_is_refused(clip: Path) -> None:
    (clip / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        family_of(clip)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("blib2", "no checkpoint 'blib2': did you mean 'blip2'"),
        (__file__, "is a file: give the folder"),
    ],
)
def test_unknown_checkpoint_is_refused(name: str, message: str) -> None:
    with pytest.raises(VlmEdgeError, match=message):
        resolve(name, SILENT)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint: it has no config"):
        resolve(str(tmp_path), SILENT)


def test_aliases_stand_for_hub_ids() -> None:
    assert aliases()["clip"] == "openai/clip-vit-base-patch32"
    assert all("/" in hub_id for hub_id in aliases().values())


def test_what_is_fetched_is_what_an_export_reads() -> None:
    """By the hub's own filter, on what repositories hold."""
    from huggingface_hub.utils import filter_repo_objects

    needed = [
        *("config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "text/merges.txt"),
        *("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        *("vision/config.json", "vision/model.safetensors", "text/spiece.model"),
    ]
    spared = ["README.md", "pytorch_model.bin", "tf_model.h5", "cat.png", "onnx/model.onnx"]
    found = filter_repo_objects([*needed, *spared], allow_patterns=list(checkpoint._WANTED))
    assert sorted(found) == sorted(needed)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "text/model.safetensors", "text/config.json"]
)
def test_checkpoints_whose_parts_differ_are_told_apart(file: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("config.json", "text/config.json", "a.safetensors", "text/a.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    opened = checkpoint.Checkpoint(tmp_path, "it", None, "it", False)
    before = opened.identity()
    assert opened.identity() == before
    (tmp_path / file).write_bytes(b"[]")
    assert opened.identity() != before


def test_unreachable_hub_says_how_to_pass_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A closed port on this machine is the hub."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="give the path of a local folder"):
        resolve("someone/something", SILENT)
