"""The token embedding table on disk: rounded, looked up, kept, and put to the gate."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.tiny import tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.bundle.embedding_table import TABLE, open_rows, round_rows
from vlmedge.bundle.weights import SafeWeights, row_reader
from vlmedge.checkpoints.resolve import family_of, resolve
from vlmedge.errors import CheckpointError
from vlmedge.make.check import samples_for
from vlmedge.make.quantize import quantize
from vlmedge.make.recipe import Recipe
from vlmedge.parity.gate import run_gate
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import FAMILIES
from vlmedge.spec import EmbeddingTable

FILE = "assets/embed_tokens.bin"


@pytest.fixture
def rows() -> NDArray[np.float32]:
    """Rows of very different size, one of them zero; more than are rounded at once."""
    found = np.random.default_rng(0).standard_normal((1500, 24)).astype(np.float32)
    found *= np.logspace(-3, 3, len(found), dtype=np.float32)[:, None]
    found[7] = 0
    return found


def write(folder: Path, rows: NDArray[np.float32]) -> EmbeddingTable:
    (folder / "assets").mkdir()
    rows.tofile(folder / FILE)
    return EmbeddingTable(FILE, 0, str(rows.dtype), (rows.shape[0], rows.shape[1]))


def test_int8_rows_are_within_half_a_step_of_their_own_scale(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    table = round_rows(tmp_path, write(tmp_path, rows), "int8")
    opened = open_rows(tmp_path, table)
    assert opened.rows.dtype == np.int8 and opened.scale is not None
    steps = np.abs(rows).max(axis=1, keepdims=True) / 127
    ids = np.arange(len(rows)).reshape(2, -1)
    assert opened[ids].shape == (2, len(rows) // 2, rows.shape[1])
    assert np.all(np.abs(opened[ids].reshape(rows.shape) - rows) <= 0.5001 * steps)
    assert (tmp_path / FILE).stat().st_size <= rows.size + 4 * len(rows) + 64


def test_float16_rows_are_rounded_unless_they_would_overflow(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    table = write(tmp_path, rows)
    half = round_rows(tmp_path, table, "float16")
    np.testing.assert_array_equal(
        open_rows(tmp_path, half)[np.arange(3)], rows[:3].astype(np.float16).astype(np.float32)
    )
    loud = tmp_path / "loud"
    loud.mkdir()
    table = write(loud, rows * np.float32(1e5))
    assert round_rows(loud, table, "float16") == table


def test_table_that_is_a_graphs_weight_stays(tmp_path: Path) -> None:
    tied = EmbeddingTable("graphs/decoder.bin", 64, "float32", (4, 2))
    assert round_rows(tmp_path, tied, "int8") == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_a_weight_are_those_of_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "model.safetensors"
    tensor = torch.randn(11, 3, 2).to(dtype)
    save_file({"before": torch.ones(5), "w": tensor, "after": torch.ones(7)}, file)
    weights = SafeWeights([file])
    read, whole = row_reader(weights, "w"), weights.read("w")
    np.testing.assert_array_equal(whole, tensor.float().numpy())
    for start, stop in ((0, 11), (4, 5), (3, 9), (8, 99), (11, 12)):
        np.testing.assert_array_equal(read(start, stop), whole[start:stop])
    tensor[7, 1, 0] = torch.nan
    save_file({"w": tensor}, file)
    read = row_reader(SafeWeights([file]), "w")
    assert len(read(0, 7)) == 7
    with pytest.raises(
        CheckpointError, match="weight 'w' has NaN values: choose another checkpoint"
    ):
        read(6, 8)


def test_wide_vocabulary_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Neither when a bundle gets it nor when the gate looks it up."""
    tiny("paligemma", tmp_path)
    rows = 60_000
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name] = torch.randn(rows, weights[name].shape[1]).bfloat16()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = FAMILIES["paligemma"].open(tmp_path)
    write = dict(opened.assets())[FILE]
    (tmp_path / "assets").mkdir()
    whole = weights[name].float().numpy() * np.float32(32**0.5)
    ids = np.array([0, 59_999, 7])
    tracemalloc.start()
    try:
        write(tmp_path / FILE)
        table = opened.rows()
        assert table is not None
        looked_up = table[ids]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(looked_up, whole[ids])
    stored = np.fromfile(tmp_path / FILE, np.float32).reshape(whole.shape)
    np.testing.assert_array_equal(stored, whole)
    assert peak < whole.nbytes / 10


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "int8"), ("fp16", "float16")])
def test_scheme_rounds_the_table_and_the_gate_sees_it(
    blip2_bundle: Path, tmp_path: Path, scheme: str, dtype: str
) -> None:
    bundle = quantize(blip2_bundle, Recipe(scheme, keep_slower=True), tmp_path / "b")
    assert bundle.manifest.embeddings is not None
    assert bundle.manifest.embeddings.dtype == dtype
    assert bundle.manifest.parity is not None
    result = next(r for r in bundle.manifest.parity.components if r.component == TABLE)
    assert bundle.verified and result.cosine > 0.999
    assert vlmedge.load(bundle.path).bundle.manifest == bundle.manifest


def test_gate_finds_a_table_that_is_not_the_checkpoints(blip2_int8: Path, tmp_path: Path) -> None:
    """A wrong scale changes no graph, and this model's answers neither."""
    copy = tmp_path / "copy"
    shutil.copytree(blip2_int8, copy)
    bundle = Bundle.load(copy)
    table = bundle.manifest.embeddings
    assert table is not None and table.scale_offset_bytes is not None
    with (copy / FILE).open("r+b") as stream:
        stream.seek(table.scale_offset_bytes)
        scales = np.fromfile(copy / FILE, np.float32, offset=table.scale_offset_bytes)
        stream.write(np.ascontiguousarray(scales[::-1]).data)
    found = resolve("tiny-blip2", SILENT)
    opened = FAMILIES[family_of(found.folder)].open(found.folder)
    parity = run_gate(bundle, opened, samples_for(True), SILENT)
    assert {r.component for r in parity.components if not r.passed} == {TABLE}


def test_table_is_kept_by_its_name(blip2_bundle: Path, tmp_path: Path) -> None:
    recipe = Recipe("int8", keep={TABLE: "float32"}, keep_slower=True)
    bundle = quantize(blip2_bundle, recipe, tmp_path / "b", check=False)
    before = Bundle.load(blip2_bundle).manifest.embeddings
    assert bundle.manifest.embeddings == before
