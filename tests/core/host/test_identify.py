"""What is read from a machine's files and tools becomes a name of the catalogue."""

import sys
from pathlib import Path

import pytest
from kit.machines import NVPMODEL_SUPER, RELEASE, RTX_4090, machine, orin_nano

from vlmedge.host.identify import (
    Power,
    PowerMode,
    Sources,
    detect,
    parse_power_modes,
    read_gpus,
    read_l4t,
    run_tool,
)


def test_orin_nano_with_super_modes_is_the_super_one(tmp_path: Path) -> None:
    found = detect(machine(tmp_path, orin_nano(), {"nvpmodel -q": "NV Power Mode: 25W\n1\n"}))
    assert found.device == "jetson-orin-nano-8gb-super"
    assert found.l4t == "36.4.3" and found.is_jetson
    assert found.jetpack is not None and found.jetpack.python == "3.10"
    assert found.power.mode == PowerMode(1, "25W", 918.0, 3199.0)
    assert found.power.fastest == PowerMode(2, "MAXN_SUPER", None, 3199.0)
    assert "asimddp" in found.cpu_flags


def test_orin_nano_without_super_modes_is_the_plain_one(tmp_path: Path) -> None:
    plain = NVPMODEL_SUPER.replace("MAXN_SUPER", "MAXN")
    assert detect(machine(tmp_path, orin_nano(nvpmodel=plain))).device == "jetson-orin-nano-8gb"


@pytest.mark.parametrize(
    ("module", "device"),
    [
        ("p3701-0005", "jetson-agx-orin-64gb"),
        ("p3767-0000", "jetson-orin-nx-16gb"),
        ("p3834-0008", "jetson-thor-t5000"),
        ("p2888-0004", "jetson-agx-xavier-32gb"),
    ],
)
def test_module_names_the_board(tmp_path: Path, module: str, device: str) -> None:
    dts = f"/dvs/kernel-dts/tegra-{module}-p3737-0000.dts\0"  # older releases have no `compatible`
    files = {"/etc/nv_tegra_release": RELEASE.format(35, "4.1")}
    files["/proc/device-tree/nvidia,dtsfilename"] = dts
    assert detect(machine(tmp_path, files)).device == device


def test_unknown_jetson_is_a_jetson_without_a_name(tmp_path: Path) -> None:
    files = orin_nano(compatible="nvidia,p9999-0001\0", nv_tegra_release=RELEASE.format(99, "1.0"))
    found = detect(machine(tmp_path, files))
    assert found.device is None and found.is_jetson and found.jetpack is None


def test_release_file_of_something_else_is_no_l4t(tmp_path: Path) -> None:
    assert read_l4t(machine(tmp_path, {"/etc/nv_tegra_release": "hello"})) == ""
    assert read_l4t(Sources(tmp_path / "nowhere")) == ""


def test_card_is_known_by_its_name(tmp_path: Path) -> None:
    found = detect(machine(tmp_path, tools={"nvidia-smi --query-gpu=name,compute_cap": RTX_4090}))
    assert found.device == "rtx-4090" and not found.is_jetson
    (gpu,) = found.gpus
    assert (gpu.memory_mib, gpu.free_mib, gpu.driver) == (24564, 23028, "570.86.15")


def test_old_driver_and_shared_memory_leave_gaps(tmp_path: Path) -> None:
    text = "Orin (nvgpu), [Not Supported], [N/A], [N/A], 540.4.0\nNVIDIA-SMI has failed\n"
    (gpu,) = read_gpus(machine(tmp_path, tools={"nvidia-smi": text}))
    assert gpu.name == "Orin" and gpu.compute_capability == ""
    assert gpu.memory_mib == gpu.free_mib == 0


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ("sse2 avx2 fma", "cpu-x86-avx2"),
        ("avx2 fma avx512f avx512bw", "cpu-x86-avx512"),
        ("avx2 fma avx512f avx512bw avx512_vnni", "cpu-x86-avx512-vnni"),
        ("avx2 fma avx512f avx512bw avx512_vnni amx_int8", "cpu-x86-amx"),
        ("sse2", None),
    ],
)
def test_cpu_is_the_best_that_its_flags_allow(tmp_path: Path, flags: str, device: str) -> None:
    files = {"/proc/cpuinfo": f"processor\t: 0\nflags\t\t: fpu {flags}\n\nflags\t\t: other\n"}
    assert detect(machine(tmp_path, files)).device == device


def test_arm_cpu_has_features(tmp_path: Path) -> None:
    files = {"/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"}
    assert detect(machine(tmp_path, files)).device == "cpu-arm64-i8mm"


def test_power_modes_are_read_without_comments() -> None:
    modes = parse_power_modes(NVPMODEL_SUPER)
    assert [(m.id, m.name) for m in modes] == [(0, "15W"), (1, "25W"), (2, "MAXN_SUPER"), (3, "7W")]
    assert parse_power_modes("< POWER_MODEL NAME=x >\n< POWER_MODEL ID=one NAME=y >") == ()
    assert Power().fastest is None and Power(modes, 7).mode is None


def test_power_mode_is_read_from_the_note_when_the_tool_wants_root(tmp_path: Path) -> None:
    files = {**orin_nano(), "/var/lib/nvpmodel/status": "pmode:0003 fmode:fanNull"}
    power = detect(machine(tmp_path, files)).power
    assert power.mode is not None and power.mode.name == "7W"


def test_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert run_tool(("vlmedge-no-such-tool",)) is None
    assert run_tool((sys.executable, "-c", "raise SystemExit(3)")) is None
    assert run_tool((sys.executable, "-c", "print('x')")) == "x\n"
