"""`vlmedge build --device`: what the catalogue refuses, and where a build may run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.host.jetpack import has_dla
from vlmedge.plan import target as targeting
from vlmedge.progress import SILENT
from vlmedge.shelves import registry


def check(bundle: Bundle, device: str, tensorrt: str | None = None) -> tuple[str, ...]:
    return targeting.refuse_unfit(bundle, device, "float16", tensorrt, SILENT)


def test_boards_have_the_tensorrt_of_their_jetpacks() -> None:
    versions = targeting.tensorrt_versions
    assert versions("jetson-orin-nano-8gb") == ("8.5", "8.6", "10.3", "10.16")
    assert versions("jetson-nano-4gb") == ("8.0", "8.2")
    assert versions("rtx-4090") == ()
    for name, device in registry.devices().items():
        assert bool(versions(name)) == (device.kind == "jetson")


def test_versions_to_check_are_those_of_the_device_or_the_one_that_is_asked_for(
    clip_bundle: Path,
) -> None:
    bundle = Bundle.load(clip_bundle)
    assert check(bundle, "jetson-orin-nano-8gb") == ("8.6", "10.3", "10.16")
    assert check(bundle, "jetson-orin-nano-8gb", "10.3.0") == ("10.3.0",)
    assert check(bundle, "rtx-4090", "11.x") == ("11.x",)
    assert check(bundle, "rtx-4090") == ()


@pytest.mark.parametrize(
    ("device", "tensorrt", "words"),
    [
        ("jetson-nano-4gb", None, r"has TensorRT 8\.0, 8\.2: engines are built with 8\.6"),
        ("jetson-xavier-nx-8gb", None, r"has TensorRT 8\.5: engines are built with 8\.6"),
        ("jetson-orin-nano-8gb", "11.0", r"has no TensorRT 11\.0: its JetPack has 8\.6, 10\.3"),
        ("jetson-orin-nano-8gb", "8.5", r"has no TensorRT 8\.5: its JetPack has 8\.6, 10\.3"),
        ("orin", None, "no device 'orin': choose from"),
    ],
)
def test_unfit_version_is_refused(
    device: str, tensorrt: str | None, words: str, clip_bundle: Path
) -> None:
    with pytest.raises(VlmEdgeError, match=words):
        check(Bundle.load(clip_bundle), device, tensorrt)


def test_device_without_tensorrt_is_refused(clip_bundle: Path) -> None:
    cpu = next(name for name, device in registry.devices().items() if device.kind == "cpu")
    with pytest.raises(InputError, match=f"{cpu} has no TensorRT: use --engine ort there"):
        check(Bundle.load(clip_bundle), cpu)


@pytest.mark.parametrize(
    ("device", "tensorrt", "words"),
    [
        (
            "jetson-orin-nano-8gb",
            "10.3",
            r"orin-nano-8gb has no DLA: .*one: jetson-xavier-nx-8gb, ",
        ),
        ("jetson-agx-orin-64gb", "10.16", r"TensorRT 10\.16 has no DLA \(8\.5 to 10\.7, and 11\.4"),
    ],
)
def test_missing_accelerator_is_refused(
    device: str, tensorrt: str, words: str, clip_bundle: Path, vlmedge: Any
) -> None:
    asked = ("--device", device, "--tensorrt", tensorrt, "--check-only", "--dla")
    ran = vlmedge("build", clip_bundle, *asked, "faster")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert re.search(words, ran.err)
    assert vlmedge("build", clip_bundle, *asked, "auto").code == 0


@pytest.mark.parametrize(
    ("tensorrt", "has"),
    [
        *((version, True) for version in ("8.5", "10.3.0.30", "10.7.0", "11.4.1.2", "11.5.0")),
        *((version, False) for version in ("10.13.3", "10.16", "11.0", "11.4.0.106")),
    ],
)
def test_versions_with_accelerators_are_those_of_nvidia_s_guide(tensorrt: str, has: bool) -> None:
    assert has_dla(tensorrt) is has


def test_missing_arithmetic_is_refused(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(clip_bundle)
    manifest = msgspec.structs.replace(bundle.manifest, scheme="fp8")
    monkeypatch.setattr("vlmedge.plan.plan.read_manifest", lambda path: manifest)
    with pytest.raises(InputError, match=r"in fp8: .* cannot compute in it"):
        check(Bundle(bundle.path, manifest), "jetson-orin-nano-8gb")


def test_missing_memory_is_refused(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmedge.plan.plan.SYSTEM_GIB", 6.5)
    with pytest.raises(
        InputError, match=r"in fp16 needs \d\.\d GiB, jetson-orin-nano-8gb has 0\.\d"
    ):
        check(Bundle.load(clip_bundle), "jetson-orin-nano-8gb")


def test_build_elsewhere_is_refused(
    clip_bundle: Path, vlmedge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SimpleNamespace(device="rtx-4090", model=None, gpus=())
    monkeypatch.setattr(targeting, "detect", lambda: here)
    targeting.refuse_elsewhere("rtx-4090")
    ran = vlmedge("build", clip_bundle, "--device", "jetson-orin-nano-8gb")
    assert ran.code == 1
    assert "this is rtx-4090, not jetson-orin-nano-8gb, and TensorRT's engines run" in ran.err


def test_check_only_runs_anywhere_for_all_versions_of_a_device(
    clip_bundle: Path, vlmedge: Any
) -> None:
    ran = vlmedge("build", clip_bundle, "--device", "jetson-orin-nano-8gb", "--check-only")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.rstrip().replace("\n", " ").endswith("tensorrt 8.6, 10.3, 10.16 takes it")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check-only"], "--check-only needs --tensorrt VERSION or --device NAME"),
        (["--check-only", "--device", "rtx-4090"], "rtx-4090 takes any TensorRT: give --tensorrt"),
    ],
)
def test_check_without_a_version_is_refused(
    arguments: list[str], words: str, clip_bundle: Path, vlmedge: Any
) -> None:
    ran = vlmedge("build", clip_bundle, *arguments)
    assert ran.code in (1, 2)
    assert words.split(":")[0] in ran.err
