"""Every check finds the fault that is seeded for it, and is content with a sound machine."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from kit.machines import MEMINFO, RELEASE, RTX_4090, machine, orin_nano, seed

from vlmedge.doctor.engine_checks import CHECKS as ENGINE_CHECKS
from vlmedge.doctor.engine_checks import prove
from vlmedge.doctor.examine import checks, examine
from vlmedge.doctor.patient import Finding, Patient, disk_bytes, this_patient
from vlmedge.doctor.proof import judge, write_graph
from vlmedge.doctor.proof import prove as multiply
from vlmedge.errors import ParityError
from vlmedge.host.identify import detect

GIB = 2**30
SMI_NAME = "nvidia-smi --query-gpu=name"
SMI_POWER = "nvidia-smi --query-gpu=power.limit"
JP6_WHEEL = "pip install onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6/cu126"

# A desktop: a card, and a processor with every core free
DESKTOP = {
    "/proc/cpuinfo": "processor\t: 0\nflags\t\t: avx2 fma\n",
    "/proc/meminfo": MEMINFO.format(16 * 2**20, 0, 0).replace("7802876", str(32 * 2**20)),
}


@pytest.fixture
def patient(tmp_path: Path) -> Callable[..., Patient]:
    """Make a patient of files, tools and packages; what is not said is sound."""

    def make(
        files: Mapping[str, str],
        tools: Mapping[str, str] | None = None,
        packages: Mapping[str, str] = {},
        **changes: object,
    ) -> Patient:
        root, site = tmp_path / f"root-{len(list(tmp_path.iterdir()))}", tmp_path / "site"
        sources = machine(root, files, tools)
        site.mkdir(exist_ok=True)
        for name, version in packages.items():
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            folder = f"{name.replace('-', '_')}-{version}.dist-info"
            seed(site, {f"{folder}/METADATA": text})
        found = detect(sources)
        python = found.jetpack.python if found.jetpack else "3.12"
        major, minor = python.split(".")
        made = Patient(
            sources,
            found,
            (site,),
            (int(major), int(minor)),
            "aarch64" if found.is_jetson else "x86_64",
            cpus=6,
            all_cpus=6,
            threads=6,
            cache=tmp_path / "cache",
            disk_bytes=lambda path: (100 * GIB, 200 * GIB),
        )
        return dataclasses.replace(made, **changes)  # type: ignore[arg-type]

    return make


def told(check: str, patient: Patient) -> list[Finding]:
    return checks()[check](patient)


def only(check: str, patient: Patient, level: str) -> Finding:
    """Return the one finding of a level."""
    (finding,) = [f for f in told(check, patient) if f.level == level]
    return finding


def gpu_wheel(site: Path, built_for: str, **libraries: str) -> None:
    """Seed the folder of an onnxruntime-gpu wheel, with provider libraries of some content."""
    info = (
        f"package_name = 'onnxruntime-gpu'\n__version__ = '1.30.0'\ncuda_version = '{built_for}'\n"
    )
    files = {"onnxruntime/capi/build_and_package_info.py": info}
    for name, text in libraries.items():
        files[f"onnxruntime/capi/libonnxruntime_providers_{name}.so"] = text
    seed(site, files)


def test_sound_board_has_no_fault(patient) -> None:
    files = {
        **orin_nano(),
        "/sys/class/devfreq/17000000.gpu/min_freq": "1020000000",
        "/sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    }
    tools = {"nvpmodel -q": "NV Power Mode: MAXN_SUPER\n2\n"}
    packages = {"tensorrt": "10.3.0", "onnxruntime-gpu": "1.23.2"}
    board = patient(files, tools, packages)
    findings = [f for name in checks() if name != "proof" for f in told(name, board)]
    assert {f.level for f in findings} == {"ok"}
    assert not any(f.cure for f in findings)
    assert "JetPack 6.2 (L4T 36.4.3)" in findings[0].what


def test_little_memory(patient) -> None:
    board = patient(orin_nano(meminfo=MEMINFO.format(1500000, 0, 0)))
    finding = only("memory", board, "warn")
    assert finding.what == "1.4 of 7.4 GiB free" and "multi-user.target" in finding.cure
    board = patient(orin_nano(meminfo=MEMINFO.format(300000, 0, 0)))
    assert only("memory", board, "bad").what == "0.3 of 7.4 GiB free"


def test_memory_limit_of_a_container(patient) -> None:
    limited = patient({**DESKTOP, "/sys/fs/cgroup/memory.max": str(4 * GIB)})
    finding = only("memory", limited, "warn")
    assert finding.what == "a control group allows 4.0 of 32.0 GiB"
    assert "--free-gib" in finding.cure
    old = {**DESKTOP, "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB)}
    assert "allows 2.0" in only("memory", patient(old), "warn").what


def test_card_whose_memory_is_taken(patient) -> None:
    taken = RTX_4090.replace("23028", "2048")
    finding = only("memory", patient(DESKTOP, {SMI_NAME: taken}), "warn")
    assert finding.what == "NVIDIA GeForce RTX 4090: 2.0 of 24.0 GiB free"


def test_small_board_without_swap(patient) -> None:
    finding = only("swap", patient(orin_nano(meminfo=MEMINFO.format(6000000, 0, 0))), "warn")
    assert "out of memory" in finding.what and "swapon /swapfile" in finding.cure
    assert [f.level for f in told("swap", patient(DESKTOP))] == ["ok"]


def test_swap_in_use(patient) -> None:
    finding = only("swap", patient(orin_nano(meminfo=MEMINFO.format(6, 4194304, 1048576))), "warn")
    assert finding.what == "3.0 of 4.0 GiB used"


@pytest.mark.parametrize(("free", "level"), [(3 * GIB, "warn"), (GIB // 2, "bad")])
def test_full_disk(patient, free: int, level: str) -> None:
    finding = only("disk", patient(DESKTOP, disk_bytes=lambda path: (free, 64 * GIB)), level)
    assert "of 64.0 GiB free for" in finding.what and "VLMEDGE_CACHE" in finding.cure


def test_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert disk_bytes(tmp_path / "a" / "b")[1] == shutil.disk_usage(tmp_path).total


def test_process_kept_to_some_cores(patient) -> None:
    finding = only("cores", patient(DESKTOP, cpus=2), "warn")
    assert finding.what.startswith("2 of 6 cores") and "taskset" in finding.cure


@pytest.mark.parametrize(
    "files",
    [
        {"/sys/fs/cgroup/cpu.max": "150000 100000"},
        {
            "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
            "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["cgroup2", "cgroup1"],
)
def test_container_with_less_time_than_cores(patient, files: dict[str, str]) -> None:
    finding = only("cores", patient({**DESKTOP, **files}), "warn")
    assert finding.what == "a control group allows 1.5 cores' time, the CPU engine uses 2 threads"
    assert "--cpuset-cpus" in finding.cure


def test_container_without_a_limit(patient) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"}
    sound = patient({**DESKTOP, **files})
    assert {f.level for f in told("cores", sound) + told("memory", sound)} == {"ok"}


def test_slow_power_mode(patient) -> None:
    slow = patient(orin_nano(), {"nvpmodel -q": "NV Power Mode: 15W\n0\n"})
    finding = only("power", slow, "warn")
    assert finding.what == "mode 15W (GPU at most 612 MHz), the fastest is MAXN_SUPER"
    assert finding.cure == "sudo nvpmodel -m 2"
    assert only("power", patient(orin_nano()), "warn").what == "the power mode is not known"
    bare = patient(orin_nano(nvpmodel=""))
    assert only("power", bare, "warn").what == "/etc/nvpmodel.conf has no power modes"


def test_battery_in_use(patient) -> None:
    battery = {"/sys/class/power_supply/BAT0/type": "Battery"}
    battery["/sys/class/power_supply/BAT0/status"] = "Discharging"
    finding = only("power", patient(DESKTOP | battery), "warn")
    assert finding.what.startswith("on its battery: the CPU engine's threads sleep")
    assert "spin=True" in finding.cure


def test_card_with_a_power_limit(patient) -> None:
    tools = {SMI_NAME: RTX_4090, SMI_POWER: "300.00, 450.00\n"}
    finding = only("power", patient(DESKTOP, tools), "warn")
    assert finding.what == "the card is limited to 300.00 W of 450.00"
    assert finding.cure == "sudo nvidia-smi -pl 450.00"


def test_clocks_that_move(patient) -> None:
    files = {
        "/sys/class/devfreq/17000000.gpu/min_freq": "306000000",
        "/sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    }
    finding = only("clocks", patient({**orin_nano(), **files}), "warn")
    assert "between 306 and 1020 MHz" in finding.what and finding.cure == "sudo jetson_clocks"


def test_governor_that_saves_power(patient) -> None:
    place = "/sys/devices/system/cpu/cpu0/cpufreq"
    saving = patient({**DESKTOP, f"{place}/scaling_governor": "powersave"})
    assert "performance" in only("clocks", saving, "warn").cure
    driver = {f"{place}/scaling_driver": "intel_pstate", f"{place}/scaling_governor": "powersave"}
    intel = patient({**DESKTOP, **driver})
    assert told("clocks", intel) == []


def test_unknown_release(patient) -> None:
    board = patient(orin_nano(nv_tegra_release=RELEASE.format(99, "1.0")))
    assert only("device", board, "warn").what == "L4T '99.1.0' is not known"


def test_machine_that_is_not_in_the_catalogue(patient) -> None:
    strange = patient(DESKTOP, {SMI_NAME: RTX_4090.replace("RTX 4090", "RTX 9999")})
    finding = only("device", strange, "warn")
    assert "RTX 9999" in finding.what and "vlmedge plan" in finding.cure


def test_python_that_vlmedge_does_not_run_in(patient) -> None:
    board = patient(orin_nano(nv_tegra_release=RELEASE.format(35, "4.1")), python=(3, 12))
    finding = only("device", board, "bad")
    assert finding.what == "JetPack 5.1.2 has Python 3.8, vlmedge needs 3.10"


def test_python_without_the_systems_tensorrt(patient) -> None:
    finding = only("device", patient(orin_nano(), python=(3, 12)), "warn")
    assert "is not the system's 3.10" in finding.what
    assert finding.cure.startswith("python3.10 -m venv --system-site-packages")


def test_no_engine(patient) -> None:
    finding = only("engines", patient(DESKTOP), "bad")
    assert finding.cure == "pip install 'vlmedge[cpu]'"


def test_old_onnxruntime(patient) -> None:
    finding = only("engines", patient(DESKTOP, packages={"onnxruntime": "1.20.1"}), "bad")
    assert "1.20.1 is older than 1.22" in finding.what


def test_tensorrt_missing_on_a_board_and_on_a_desktop(patient) -> None:
    board = patient(orin_nano(), packages={"onnxruntime-gpu": "1.23.2"})
    finding = only("engines", board, "warn")
    assert finding.what == "TensorRT 10.3.0 of JetPack 6.2 is not in this Python"
    assert "python3-libnvinfer" in finding.cure
    desktop = patient(DESKTOP, {SMI_NAME: RTX_4090})
    assert only("engines", desktop, "warn").cure == "pip install tensorrt"


def test_tensorrt_of_another_release(patient) -> None:
    board = patient(orin_nano(), packages={"tensorrt": "10.13.0", "onnxruntime": "1.23.2"})
    finding = only("engines", board, "bad")
    assert finding.what == "tensorrt 10.13.0 is not the 10.3.0 of JetPack 6.2"


def test_wheel_for_the_cpu_on_a_board_names_the_right_one(patient) -> None:
    finding = only("wheel", patient(orin_nano(), packages={"onnxruntime": "1.23.2"}), "warn")
    assert "is the CPU wheel" in finding.what
    assert finding.cure == f"pip uninstall -y onnxruntime && {JP6_WHEEL}"


def test_wheel_for_the_cpu_on_jetpack_7_names_pypis(patient) -> None:
    thor = orin_nano(nv_tegra_release=RELEASE.format(38, "2.0"), compatible="nvidia,p3834-0008\0")
    finding = only("wheel", patient(thor, packages={"onnxruntime": "1.32.0"}), "warn")
    assert finding.cure.endswith("&& pip install onnxruntime-gpu")


def test_wheel_for_another_cuda_on_a_board_names_the_right_one(patient, tmp_path: Path) -> None:
    gpu_wheel(tmp_path / "site", "13.1")
    finding = only("wheel", patient(orin_nano(), packages={"onnxruntime-gpu": "1.30.0"}), "bad")
    assert finding.what == "onnxruntime-gpu 1.30.0 is not built for JetPack 6.2 (CUDA 12.6)"
    assert finding.cure == JP6_WHEEL


def test_two_wheels_in_one_folder(patient) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    finding = only("wheel", patient(DESKTOP, {SMI_NAME: RTX_4090}, both), "bad")
    assert "share one folder" in finding.what and "pip uninstall -y onnxruntime" in finding.cure


def test_provider_that_is_broken(patient, tmp_path: Path) -> None:
    gpu_wheel(tmp_path / "site", "12.8", cuda="this is no library" * 10)
    finding = only("providers", patient(DESKTOP), "bad")
    assert finding.what.startswith("cuda does not load: ") and "invalid ELF" in finding.what
    assert finding.cure == "pip install --force-reinstall onnxruntime-gpu"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a linker")
def test_provider_whose_library_is_missing(patient, tmp_path: Path) -> None:
    """A real library that was linked with a cuDNN which is not there any more."""
    gpu_wheel(tmp_path / "site", "12.8")
    capi = tmp_path / "site/onnxruntime/capi"
    link = ("gcc", "-shared", "-x", "c", "/dev/null", "-o")
    cudnn, name = tmp_path / "libcudnn.so.9", "libonnxruntime_providers_cuda.so"
    subprocess.run([*link, str(cudnn), "-Wl,-soname,libcudnn.so.9"], check=True)
    with_cudnn = (str(capi / name), "-Wl,--no-as-needed", "-x", "none", str(cudnn))
    subprocess.run([*link, *with_cudnn], check=True)
    cudnn.unlink()
    finding = only("providers", patient(DESKTOP), "bad")
    assert finding.what == "cuda does not load: libcudnn.so.9 is not found"
    assert finding.cure == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert only("providers", patient(orin_nano()), "bad").cure == JP6_WHEEL


def test_cuda_of_another_version(patient, tmp_path: Path) -> None:
    gpu_wheel(tmp_path / "site", "13.1")
    files = {
        "/usr/local/cuda-12.6/lib64/libcudart.so.12.6.68": "",
        "/usr/lib/x86_64-linux-gnu/libcudnn.so.9.3.0": "",
    }
    finding = only("cuda", patient({**DESKTOP, **files}), "bad")
    assert finding.what == "onnxruntime-gpu needs CUDA 13: it is not installed, only 12"
    assert finding.cure == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_cudnn_of_another_version(patient, tmp_path: Path) -> None:
    gpu_wheel(tmp_path / "site", "12.8")
    seed(tmp_path / "site", {"nvidia/cuda_runtime/lib/libcudart.so.12": ""})
    files = {"/usr/lib/x86_64-linux-gnu/libcudnn.so.8": ""}
    finding = only("cuda", patient({**DESKTOP, **files}), "bad")
    assert finding.what == "onnxruntime-gpu needs cuDNN 9: it is not installed, only 8"


def test_driver_that_is_too_old(patient, tmp_path: Path) -> None:
    gpu_wheel(tmp_path / "site", "13.1")
    seed(tmp_path / "site", {"nvidia/cu13/lib/libcudart.so.13": ""})
    seed(tmp_path / "site", {"nvidia/cudnn/lib/libcudnn.so.9": ""})
    heading = "| NVIDIA-SMI 570.86.15   Driver Version: 570.86.15   CUDA Version: 12.8 |\n"
    finding = only("cuda", patient(DESKTOP, {SMI_NAME: RTX_4090, "nvidia-smi": heading}), "bad")
    assert finding.what.endswith("is built for CUDA 13.1, the driver supports 12.8 at most")


def test_engine_of_another_version_and_machine(patient, tmp_path: Path) -> None:
    identity = {"component": "decoder", "tensorrt": "10.13.0", "compute_capability": "8.9"}
    identity |= {"gpu": "NVIDIA GeForce RTX 4090", "platform": "linux-x86_64"}
    bundle = tmp_path / "bundle"
    record = json.dumps({"identity": identity})
    seed(bundle, {"engines/trt-1/engine.json": record, "engines/trt-2/engine.json": "{"})
    board = patient(orin_nano(), packages={"tensorrt": "10.3.0.30"}, bundles=(bundle,))
    other, broken = told("cache", board)
    assert "decoder is for tensorrt 10.13.0 (here 10.3.0.30)" in other.what
    assert "compute_capability 8.9 (here 8.7), platform linux-x86_64 (here linux-aarch64)" in (
        other.what
    )
    assert other.level == "warn" and other.cure == f"vlmedge build {bundle}"
    assert "has no record of what it was built for" in broken.what
    shutil.rmtree(bundle / "engines" / "trt-2")
    shutil.rmtree(tmp_path / "site")
    desktop = patient(DESKTOP, {SMI_NAME: RTX_4090}, {"tensorrt": "10.13.0.35"}, bundles=(bundle,))
    assert [f.level for f in told("cache", desktop)] == ["ok"]


def test_proof_of_an_engine_that_fails_or_crashes() -> None:
    failed = prove((sys.executable, "-c", "raise SystemExit('libnvinfer.so is missing')"), "trt")
    assert failed.level == "bad" and failed.what == "trt: libnvinfer.so is missing"
    code = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    crashed = prove((sys.executable, "-c", code), "trt")
    assert crashed.level == "bad" and crashed.what == "trt: it was ended by signal 4"


def test_proof_of_an_engine_that_multiplies_wrongly() -> None:
    right = np.ones((2, 2), np.float32)
    judge(right + 0.01, right)
    with pytest.raises(ParityError, match="the matrix product is wrong by 1.0e-01"):
        judge(right + 0.1, right)
    with pytest.raises(ParityError, match="wrong by nan"):
        judge(right * np.float32("nan"), right)


def test_proof_runs_on_onnxruntime_for_real(tmp_path: Path) -> None:
    import onnx

    assert multiply("ort", tmp_path / "a") > 0
    write_graph(tmp_path / "b" / "matmul.onnx", np.eye(64, dtype=np.float32))
    onnx.checker.check_model(str(tmp_path / "b" / "matmul.onnx"), full_check=True)
    (finding,) = ENGINE_CHECKS["proof"](this_patient())
    assert finding.level == "ok" and finding.what.startswith("ort: a product of 64 x 64 is right")


def test_this_machine_is_examined(vlmedge, clip_int8: Path) -> None:
    findings = examine(this_patient((clip_int8,)))
    assert {f.check for f in findings} >= {"device", "memory", "disk", "cores", "engines", "proof"}
    ran = vlmedge("doctor", clip_int8)
    assert "ort: onnxruntime" in ran.out and "a product of 64 x 64 is right" in ran.out
    assert ran.out.splitlines()[-1].endswith(" ok")
    found = json.loads(vlmedge("doctor", "--json").out)
    assert {"check", "level", "what", "cure"} == found[0].keys()
    assert ran.code == int(any(f["level"] == "bad" for f in found))


def test_doctor_refuses_what_is_no_bundle(vlmedge, tmp_path: Path) -> None:
    ran = vlmedge("doctor", tmp_path)
    assert ran.code == 1 and "is no bundle: it has no manifest.json" in ran.err
