"""The catalogue says what NVIDIA says, in one way for all boards."""

import json

import pytest

from vlmedge.errors import UnknownNameError
from vlmedge.host.jetpack import JETPACKS, jetpack_of
from vlmedge.shelves.contracts import Device
from vlmedge.shelves.registry import DEVICES, ENGINES, device, devices

# What a published total counts: sparse is twice dense, and a Jetson's has the DLA's in it.
TOTAL_TOPS = {
    "jetson-agx-orin-64gb": 275,
    "jetson-agx-orin-32gb": 200,
    "jetson-orin-nx-16gb": 100,
    "jetson-orin-nx-8gb": 70,
    "jetson-orin-nx-16gb-super": 157,
    "jetson-orin-nano-8gb": 40,
    "jetson-orin-nano-8gb-super": 67,
    "jetson-orin-nano-4gb": 20,
}


@pytest.mark.parametrize("name", list(devices()))
def test_device_is_whole(name: str) -> None:
    found = device(name)
    assert isinstance(found, Device) and name == name.lower()
    rated = {"fp32", "fp16", "int8", "fp8", "fp4"}
    for precision in rated & set(found.precisions):
        assert getattr(found.rates, precision) > 0, precision
    for precision in rated - set(found.precisions):
        assert getattr(found.rates, precision) is None, precision
    assert found.bandwidth_gb_s > 0
    assert (found.memory_gib is None) == (found.kind == "cpu")
    assert (found.compute_capability is None) == (found.kind == "cpu")
    assert bool(found.jetpacks) == (found.kind == "jetson") == bool(found.power_modes)
    assert found.marks and found.shared_memory == (found.kind != "gpu")
    known = {j.name for j in JETPACKS}
    assert all(any(k.startswith(jetpack) for k in known) for jetpack in found.jetpacks)


def test_device_names_only_engines_that_are() -> None:
    for found in devices().values():
        assert set(found.engines) <= set(ENGINES.names())


def test_device_names_are_unique_over_all_lines() -> None:
    assert sum(len(DEVICES[line]) for line in DEVICES.names()) == len(devices())


@pytest.mark.parametrize("name", list(TOTAL_TOPS))
def test_dense_rates_give_the_published_total(name: str) -> None:
    found = device(name)
    assert found.rates.int8 is not None
    # published totals are sparse, the GPU's and the DLA's: twice the dense figures
    total = 2 * found.rates.int8 + 2 * found.dla_int8_tops
    assert total == pytest.approx(TOTAL_TOPS[name], rel=0.05)


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'rtx-4090'\? choose from .*h100"):
        device("rtx4090")


def test_list_shows_devices(vlmedge) -> None:
    assert "jetson-orin-nano-8gb" in vlmedge("list").out
    assert "cpu-x86-avx512-vnni" in json.loads(vlmedge("list", "--json").out)["devices"]


@pytest.mark.parametrize(
    ("l4t", "jetpack", "tensorrt"),
    [
        ("36.3.0", "6.0", "8.6.2"),
        ("36.4.0", "6.1", "10.3.0"),
        ("36.4.3", "6.2", "10.3.0"),
        ("36.4.7", "6.2.1", "10.3.0"),
        ("35.4.1", "5.1.2", "8.5.2"),
        ("39.2.0", "7.2", "10.16.2"),
    ],
)
def test_jetpack_is_known_by_its_linux(l4t: str, jetpack: str, tensorrt: str) -> None:
    found = jetpack_of(l4t)
    assert found is not None and (found.name, found.tensorrt) == (jetpack, tensorrt)


def test_unknown_linux_has_no_jetpack() -> None:
    assert jetpack_of("36.40.1") is None and jetpack_of("99.1") is None
