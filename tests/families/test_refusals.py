"""Checkpoints of the families with texts of their own kind that cannot be exported, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from kit.bundles import checkpoint_of
from safetensors.numpy import load_file, save_file

from vlmedge.errors import CheckpointError, InputError
from vlmedge.make.export import export
from vlmedge.run.decode.prompt import Prompt


def test_mask_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    checkpoint_of("flava", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["mask_token"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its tokenizer has no mask token '\[MASK\]'"):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tokenizer_that_names_no_picture_is_refused(tmp_path: Path) -> None:
    checkpoint_of("t5gemma2", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["boi_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="lacks the tokens that begin, stand for and end a pict"
    ):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_qformer_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    checkpoint_of("blip2-itm", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    config["qformer_config"]["use_qformer_text_input"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_qformer_text_input false, so its Q-Former"):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_table_without_its_end_row_is_refused(tmp_path: Path) -> None:
    checkpoint_of("t5gemma2", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    kept = {
        n: w for n, w in weights.items() if not n.endswith("encoder.embed_tokens.eoi_embedding")
    }
    assert len(kept) == len(weights) - 1
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens.eoi_embedding' is missing"):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")


def test_qformer_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint_of("instructblip", tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "qformer_tokenizer")
    with pytest.raises(
        CheckpointError, match="has no qformer_tokenizer/, the Q-Former's tokenizer"
    ):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tokenizer_without_a_fast_form_is_refused(tmp_path: Path) -> None:
    checkpoint_of("siglip", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    (tmp_path / "checkpoint" / "spiece.model").write_bytes(b"pieces")
    file = tmp_path / "checkpoint" / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))  # one of Python alone
    with pytest.raises(
        CheckpointError, match="CanineTokenizer has no fast version, and the runtime"
    ):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_is_held_must_have_a_row_for_each_prompt() -> None:
    ones = np.ones((2, 3), np.int64)
    with pytest.raises(InputError, match="prompt: cross.0.key has 1 rows, embeds has 2"):
        Prompt(np.zeros((2, 3, 4), np.float32), ones, ones, held={"cross.0.key": ones[:1]})
