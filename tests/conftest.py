"""What many tests share: the built-in checkpoints as bundles, and the command line in-process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from kit.bundles import bundle_of, keep_in, once
from kit.command import Ran, Run
from kit.tiny import KINDS
from PIL import Image

from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.make.check import check


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several worker processes its share of the cores, not all to all."""
    config.addinivalue_line("markers", "xdist_group: known where pytest-xdist is not installed")
    worker = getattr(config, "workerinput", None)
    keep_in(config.cache.mkdir("bundles"), alone=worker is None)
    if worker is not None and hasattr(os, "sched_setaffinity"):  # Linux alone has it
        cores = sorted(os.sched_getaffinity(0))
        number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        os.sched_setaffinity(0, cores[number % len(cores) :: workers])


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one kind of checkpoint on one worker; all others go where there is room."""
    for item in items:
        call = getattr(item, "callspec", None)
        given = [] if call is None else call.params.values()
        for kind in (value for value in given if isinstance(value, str) and value in KINDS):
            item.add_marker(pytest.mark.xdist_group(kind))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name the folder of this run that all workers see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder that holds every bundle of the session."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def clip_bundle(bundles: Path, shared: Path) -> Path:
    """Copy tiny-clip in float32, after its gate."""
    return gated("tiny-clip", "float32", bundles, shared)


@pytest.fixture(scope="session")
def blip2_bundle(bundles: Path) -> Path:
    """Copy tiny-blip2 in float32, without the gate: it is unverified."""
    return bundle_of("tiny-blip2", bundles / "tiny-blip2-float32")


@pytest.fixture(scope="session")
def clip_int8(bundles: Path, shared: Path) -> Path:
    """Copy tiny-clip in int8, after its gate."""
    return gated("tiny-clip", "int8", bundles, shared)


@pytest.fixture(scope="session")
def blip2_int8(bundles: Path, shared: Path) -> Path:
    """Copy tiny-blip2 in int8, after its gate."""
    return gated("tiny-blip2", "int8", bundles, shared)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Save three held-out scenes as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"scene-{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(draw_scene(i, "heldout").image).save(file)
    return files


@pytest.fixture
def vlmedge(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    from vlmedge.cli.app import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return Ran(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run


def gated(name: str, scheme: str, folder: Path, shared: Path) -> Path:
    """Put a built-in bundle to the gate, once a run, and copy it."""

    def make(half: Path) -> None:
        bundle_of(name, half, scheme)
        if "VLMEDGE_TEST_BUNDLES" not in os.environ:  # else torch may not be there
            check(half, name)

    whole = once(shared / f"{name}-{scheme}", make)
    return Path(shutil.copytree(whole, folder / whole.name))
