"""The store of bundles that tests share, and the tiers: nothing is stale, nothing is left out."""

from __future__ import annotations

import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
from kit import ROOT, bundles
from kit.bundles import ABOVE, bundle_of, checkpoint_of, exported, key, once, sources
from kit.tiny import FIRST, KINDS, kinds, schemes, tiny

from vlmedge.bundle import Bundle
from vlmedge.shelves.registry import FAMILIES, SCHEMES
from vlmedge.spec import Task


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def test_checkpoint_is_what_the_family_writes(tmp_path: Path) -> None:
    """PyTorch's model is made anew in each test, and must be the one that was exported."""
    tiny("clip", tmp_path / "new")
    assert files(checkpoint_of("clip", tmp_path / "kept")) == files(tmp_path / "new")


def test_copy_may_be_broken(tmp_path: Path) -> None:
    first = bundle_of("vit", tmp_path / "a")
    whole = files(first)
    (first / "manifest.json").write_bytes(b"")
    assert files(bundle_of("vit", tmp_path / "b")) == whole
    assert not Bundle.load(tmp_path / "b").verified


def test_changed_checkpoint_has_a_bundle_of_its_own(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("vit", tmp_path / "checkpoint")
    before = Bundle.load(exported(checkpoint, tmp_path / "a"))
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"LABEL_0"', '"cat"').replace("}", "} ", 1))
    after = Bundle.load(exported(checkpoint, tmp_path / "b"))
    assert before.manifest.checkpoint.sha256 != after.manifest.checkpoint.sha256


def test_one_makes_and_the_others_wait(tmp_path: Path) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        folder.mkdir()

    threads = [threading.Thread(target=once, args=(tmp_path / "it", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and (tmp_path / "it").is_dir()


def test_what_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "part").touch()
        if not made:
            made.append(1)
            raise KeyboardInterrupt

    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "it", make)
    assert not (tmp_path / "it").exists()
    assert once(tmp_path / "it", make) == tmp_path / "it"


@pytest.mark.parametrize(
    ("file", "plain", "scheme"),
    [
        ("export/clip.py", True, True),
        ("export/shapes/clip.py", True, True),
        ("vlmedge/new/room.py", True, True),
        ("quantize/int8.py", False, True),
        ("runtimes/ort.py", False, True),
        ("devices/cpu.py", False, False),
        ("vlmedge/cli.py", False, False),
        ("vlmedge/cli/build.py", False, False),
    ],
)
def test_key_changes_with_what_bundles_are_made_by(
    file: str, plain: bool, scheme: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("export", "vlmedge", "quantize", "runtimes", "tests/kit"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(bundles, "ROOT", tmp_path)
    monkeypatch.setattr(bundles, "__file__", str(tmp_path / "tests" / "kit" / "bundles.py"))
    for name in ("bundles.py", "tiny.py"):
        (tmp_path / "tests" / "kit" / name).touch()
    before = [key.__wrapped__(one) for one in ("float32", "int8")]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("x = 1\n")
    after = [key.__wrapped__(one) for one in ("float32", "int8")]
    assert [a != b for a, b in zip(before, after, strict=True)] == [plain, scheme]


def test_bundles_of_older_code_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_cache", None)
    for name in ("0123", key("float32"), key("int8")):
        (tmp_path / name).mkdir()
    bundles.keep_in(tmp_path, alone=False)  # a worker: another may be reading
    assert len(list(tmp_path.iterdir())) == 3
    bundles.keep_in(tmp_path, alone=True)
    assert {f.name for f in tmp_path.iterdir()} == {key("float32"), key("int8")}


def test_no_export_imports_what_the_key_leaves_out() -> None:
    """Neither the exporter nor a family, in a fresh process."""
    out = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "vlmedge").rglob("*.py")
        if file not in sources(ROOT / "vlmedge")
    }
    assert out and all(name.split(".")[1].startswith(ABOVE) for name in out)
    code = (
        "import sys, vlmedge.make.export\n"
        "from vlmedge.shelves.registry import FAMILIES, SCHEMES, ENGINES\n"
        "[[registry[name] for name in registry.names()] for registry in (FAMILIES, SCHEMES)]\n"
        "ENGINES['ort']\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vlmedge.make.export" in done.stdout.split()
    assert out.isdisjoint(done.stdout.split())


def test_quick_tier_has_every_family_and_every_kind_of_task(tmp_path: Path) -> None:
    assert {KINDS[kind] for kind in FIRST} == set(FAMILIES.names())
    assert [param.values[0] for param in kinds()] == list(KINDS)
    assert [param.values[0] for param in schemes()] == SCHEMES.names()
    quick = [p.values[0] for p in kinds() if not any(m.name == "rest" for m in p.marks)]
    assert set(quick) == FIRST
    tasks = set()
    for kind in quick:
        opened = FAMILIES[KINDS[kind]].open(checkpoint_of(kind, tmp_path / kind))
        tasks |= {type(task) for task in opened.spec.tasks.values()}
    assert tasks == set(typing.get_args(Task))
