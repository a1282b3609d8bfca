"""What many tests share: the built-in checkpoints as bundles, and the command line in-process."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from vlmedge.checkpoints.scenes import draw_scene


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several worker processes its share of the cores, not all to all."""
    config.addinivalue_line("markers", "xdist_group: known where pytest-xdist is not installed")
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):  # Linux alone has it
        cores = sorted(os.sched_getaffinity(0))
        number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        os.sched_setaffinity(0, cores[number % len(cores) :: workers])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what shares fixtures on one worker: a file, or one kind of checkpoint in it."""
    for item in items:
        call = getattr(item, "callspec", None)
        kind = call.params.get("case", "") if call is not None else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {kind}"))


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder that holds every bundle of the session."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def clip_bundle(bundles: Path) -> Path:
    """Export tiny-clip in float32, with the gate."""
    return export(bundles, "tiny-clip", check=True)


@pytest.fixture(scope="session")
def blip2_bundle(bundles: Path) -> Path:
    """Export tiny-blip2 in float32, without the gate: it is unverified."""
    return export(bundles, "tiny-blip2", check=False)


@pytest.fixture(scope="session")
def clip_int8(clip_bundle: Path) -> Path:
    """Quantize tiny-clip, with the gate."""
    return quantize(clip_bundle)


@pytest.fixture(scope="session")
def blip2_int8(blip2_bundle: Path) -> Path:
    """Quantize tiny-blip2, with the gate."""
    return quantize(blip2_bundle)


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


def export(folder: Path, name: str, *, check: bool) -> Path:
    """Export a built-in checkpoint in float32; $VLMEDGE_TEST_BUNDLES has them where torch is not.

    An engine may be there for a Python that has no torch: TensorRT's bindings often are.
    """
    if made := os.environ.get("VLMEDGE_TEST_BUNDLES"):
        return Path(shutil.copytree(Path(made) / f"{name}-float32", folder / f"{name}-float32"))
    from vlmedge.make import export as exporting

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        return exporting.export(name, folder / f"{name}-float32", check=check).path


def quantize(bundle: Path) -> Path:
    """Quantize a bundle to INT8, with the gate; a busy machine's times decide nothing."""
    from vlmedge.make import quantize
    from vlmedge.make.recipe import Recipe

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize.quantize(bundle, Recipe("int8", keep_slower=True)).path
