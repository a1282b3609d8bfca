"""What goes wrong: no GPU, no TensorRT, no memory, no disk, and interrupted builds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit import ROOT
from kit.fake_cuda import Notes
from kit.tensorrt import Use, api, build, builder, cuda, engine, forbidden, left, only

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, InputError, MissingExtraError, VlmEdgeError
from vlmedge.shelves.build_options import Finding


def test_no_gpu_is_told(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    monkeypatch.setattr(engine, "connect", cuda.connect)
    monkeypatch.setattr(cuda, "_load", lambda names: None)
    with pytest.raises(VlmEdgeError, match=r"no NVIDIA GPU: its driver .* or use --engine ort"):
        build(clip)


def test_driver_without_a_gpu_is_told() -> None:
    class Runtime:
        class cudaGetErrorString:
            restype: Any = None

            def __new__(cls, error: int) -> Any:
                return b"no CUDA-capable device is detected"

        @staticmethod
        def cudaGetDeviceCount(count: Any) -> int:
            return 100

    with pytest.raises(VlmEdgeError, match="no NVIDIA GPU: no CUDA-capable device is detected"):
        cuda.Cudart(Runtime, None)


def test_missing_tensorrt_is_told(clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="TensorRT is not installed: pip install tensorrt"):
        build(clip)


def test_empty_package_from_pypi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match="TensorRT cannot be loaded .*: pip install"):
        api.load()


HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.parametrize(
    ("release", "python", "words"),
    [
        ("# R36 (release), REVISION: 4.3", "3.10", "python3-libnvinfer"),
        ("# R36 (release), REVISION: 4.3", "3.99", "python3.10 -m venv --system-site-packages"),
        ("# R39 (release), REVISION: 2.0", "3.99", "python3.12 -m venv --system-site-packages"),
        ("# R35 (release), REVISION: 6.1", "3.10", "L4T R35 has TensorRT 8.5 or older"),
        ("# R32 (release), REVISION: 7.6", "3.10", "L4T R32 has TensorRT 8.5 or older"),
    ],
)
def test_jetpack_is_told_how_to_get_tensorrt(
    release: str, python: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(release + ", GCID: 1, BOARD: generic")
    major, minor = python.split(".")
    monkeypatch.setattr(api.sys, "version_info", (int(major), int(minor), 0))
    assert words in api.how_to_get(tmp_path)


def test_jetpack_s_own_tensorrt_is_found_outside_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3")
    (tmp_path / "usr/lib/python3.10/dist-packages/tensorrt").mkdir(parents=True)
    monkeypatch.setattr(api.sys, "version_info", (3, 10, 0))
    assert "venv --system-site-packages" in api.how_to_get(tmp_path)


def test_too_old_tensorrt_is_refused(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt86")
    monkeypatch.setattr(import_module("tensorrt"), "__version__", "8.5.2.2")
    with pytest.raises(InputError, match=r"TensorRT 8\.5\.2\.2 is too old: 8\.6"):
        api.load()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("memory", r"vision_encoder: the build ran out of memory .*--level 1; --workspace 256"),
        ("killed", r"vision_encoder: the build ran out of memory .*add swap"),
        ("refuses", r"TensorRT cannot build it: .*Could not find any implementation"),
        ("unready", r"TensorRT cannot build it: CUDA initialization failure with error: 35"),
        ("crash", r"builder ended with signal 11: .*free\(\): invalid pointer"),
    ],
)
def test_failed_build_ends_in_one_line_and_leaves_nothing(
    fault: str, words: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", fault)
    with pytest.raises(BundleError, match=words) as got:
        build(clip, only("vision_encoder"))
    assert "\n" not in str(got.value)
    assert left(clip) == []


def test_build_that_takes_too_much_memory_is_stopped(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "hog")
    start = time.monotonic()
    with pytest.raises(BundleError, match=r"ran out of memory \(it took \d+ MiB"):
        build(clip, only("vision_encoder", memory_mib=200))
    assert time.monotonic() - start < 25  # it would have slept for 30 s
    assert left(clip) == []


def test_weights_that_do_not_fit_the_gpu_are_refused_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    gpu.free = 2**18
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(BundleError, match=r"the GPU has 0 MiB free, its weights alone take 1 MiB"):
        build(clip, only("vision_encoder"))


def test_full_disk_is_refused_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(BundleError, match=r"the disk has 1 MiB free, building takes about \d+"):
        build(clip, only("vision_encoder"))
    assert left(clip) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
def test_disk_that_fills_up_in_the_build_is_told(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    make = builder._write

    def full(model: Any, changed: bool, bundle: Bundle, name: str, partial: Path) -> Path:
        (partial / "engine.plan").symlink_to("/dev/full")
        found: Path = make(model, changed, bundle, name, partial)
        return found

    monkeypatch.setattr(builder, "_write", full)
    with pytest.raises(BundleError, match=r"vision_encoder: the disk is full .*VLMEDGE_CACHE"):
        build(clip, only("vision_encoder"))
    assert left(clip) == []


def test_graph_that_a_version_refuses_is_named_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(builder, "_run", forbidden)
    finding = Finding("vision_encoder", "n1", "Det", "no such operator", "decompose it")
    monkeypatch.setattr(builder, "lowered", lambda *a, **_: (None, False, [finding]))
    with pytest.raises(BundleError, match=r"TensorRT 10\.3 refuses Det 'n1': no such operator"):
        build(clip, only("vision_encoder"))


def test_two_builds_at_once_build_once(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads hold the lock as two processes do: a file handle each."""
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "pause")
    monkeypatch.setattr(engine, "terminate_as_interrupt", no_signals)
    notes, found = [Notes(), Notes()], []

    def run(i: int) -> None:
        found.extend(build(clip, only("vision_encoder"), notes[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(b.reused for b in found) == [False, True]
    said = notes[0].lines + notes[1].lines
    assert said == ["vision_encoder: another process builds it, waiting"]
    assert len([name for name in left(clip) if name.startswith("trt-") and "." not in name]) == 1


def no_signals() -> Any:
    return _Nothing()


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path.insert(0, sys.argv[2])
from kit.fake_cuda import FakeCuda
from kit.tensorrt import engine
engine.connect = FakeCuda
from vlmedge.cli.app import main
main(["build", sys.argv[1], "--component", "vision_encoder", "--precision", "float32"])
"""


def start(bundle: Bundle, mark: Path, fault: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TRT_STANDIN_FAULT": fault, "TRT_STANDIN_MARK": str(mark)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(bundle.path), str(ROOT / "tests")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path, child: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if file.exists():
            return
        if child.poll() is not None:
            raise AssertionError(child.communicate())
        time.sleep(0.1)
    raise AssertionError(f"{file} did not come")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)], ids=["ctrl-c", "kill"]
)
def test_interrupted_build_leaves_nothing(
    number: int, code: int, use: Use, clip: Bundle, tmp_path: Path
) -> None:
    use("trt103")
    mark = tmp_path / "mark"
    child = start(clip, mark, "slow")
    wait_for(mark, child)
    began = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert child.returncode == code, err
    assert err.splitlines()[-1] == "vlmedge: interrupted"
    assert "Traceback" not in err + out
    assert time.monotonic() - began < 15  # the builder would have slept for 30 s
    assert left(clip) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the child there")
def test_killed_build_is_cleaned_up_by_the_next(use: Use, clip: Bundle, tmp_path: Path) -> None:
    use("trt103")
    mark = tmp_path / "mark"
    child = start(clip, mark, "slow")
    wait_for(mark, child)
    child.kill()
    child.communicate(timeout=20)
    assert [name for name in left(clip) if name.startswith(".")]
    build(clip, only("vision_encoder"))
    assert not [name for name in left(clip) if name.startswith(".")]
