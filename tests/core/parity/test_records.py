"""`vlmedge check --record`: runs of the gate that are kept for the family table."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.command import Run

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.parity.records import read_records, record


def test_check_records_what_the_gate_found_once_for_each_weights_and_scheme(
    clip_bundle: Path, clip_int8: Path, tmp_path: Path, vlmedge: Run
) -> None:
    file = tmp_path / "real-weights.json"
    for _ in range(2):
        ran = vlmedge("check", clip_int8, "--against", "tiny-clip", "--record", file, "--quiet")
        assert ran.code == 0, ran.err
    record(Bundle.load(clip_bundle), file)
    small, whole = read_records(file)
    assert (small.family, small.checkpoint, small.passed) == ("clip", "tiny-clip", True)
    assert (small.scheme, whole.scheme) == ("int8", "float32")
    assert whole.max_rel < 1e-4 < small.max_rel


def test_file_of_something_else_is_refused_before_the_work(
    clip_int8: Path, tmp_path: Path, vlmedge: Run
) -> None:
    file = tmp_path / "notes.json"
    file.write_text('{"a": 1}')
    ran = vlmedge("check", clip_int8, "--against", "tiny-clip", "--record", file)
    assert ran.code == 1 and "holds no records" in ran.err and file.read_text() == '{"a": 1}'


def test_bundle_that_was_not_checked_is_refused(blip2_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="has not been compared with PyTorch: run vlmedge check first"
    ):
        record(Bundle.load(blip2_bundle), tmp_path / "records.json")
    assert not (tmp_path / "records.json").exists()
