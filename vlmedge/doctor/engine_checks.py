"""Checks of the software: engines, their wheels and providers, CUDA and cuDNN, cached engines."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.doctor.patient import Check, Finding, Patient
from vlmedge.host.identify import Runner
from vlmedge.shelves.engine_store import SIDECAR
from vlmedge.shelves.registry import ENGINES, devices

PROOF_S = 120  # TensorRT builds an engine for it
LOAD_S = 60
OLDEST_ORT = (1, 22)
ORT, ORT_GPU = "onnxruntime", "onnxruntime-gpu"
PACKAGES = {"ort": (ORT_GPU, ORT), "tensorrt": ("tensorrt",)}
# NVIDIA's libraries that ONNX Runtime's CUDA provider opens, in the system or from pip
LIBRARIES = ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", "usr/lib/*-linux-gnu")
WHEELS = ("nvidia/*/lib", "nvidia/*/*/lib")

# Loads a provider as ONNX Runtime does, its helper first, and prints why it cannot be.
_LOAD = """
import ctypes, pathlib, sys
file = pathlib.Path(sys.argv[1])
helper = file.with_name("libonnxruntime_providers_shared.so")
try:
    if helper.exists() and helper != file:
        ctypes.CDLL(str(helper), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(file))
except OSError as error:
    print(error)
    sys.exit(1)
"""


def check_engines(patient: Patient) -> list[Finding]:
    """List the engines that are installed, and name the one that this device lacks."""
    findings = []
    for name in ENGINES.names():
        for package in PACKAGES.get(name, ()):
            if version := patient.version(package):
                findings.append(Finding("engines", "ok", f"{name}: {package} {version}"))
                if package in (ORT, ORT_GPU) and _numbers(version) < OLDEST_ORT:
                    oldest = ".".join(map(str, OLDEST_ORT))
                    what = f"{package} {version} is older than {oldest}: graphs will not open"
                    cure = f"pip install --upgrade {package}"
                    findings[-1] = Finding("engines", "bad", what, cure)
    if not findings:
        cure = "pip install 'vlmedge[cpu]'"
        findings = [Finding("engines", "bad", "no engine is installed: nothing can run", cure)]
    if (patient.found.gpus or patient.found.is_jetson) and not patient.version("tensorrt"):
        findings.append(Finding("engines", "warn", *_get_tensorrt(patient)))
    jetpack, version = patient.found.jetpack, patient.version("tensorrt")
    if jetpack and version and not _same(version, jetpack.tensorrt):
        what = f"tensorrt {version} is not the {jetpack.tensorrt} of JetPack {jetpack.name}"
        cure = "pip uninstall tensorrt; sudo apt install --reinstall python3-libnvinfer"
        findings.append(Finding("engines", "bad", what, cure))
    return findings


def check_wheel(patient: Patient) -> list[Finding]:
    """Look for a wheel of ONNX Runtime that this machine cannot use, and name the right one."""
    cpu, gpu = patient.version(ORT), patient.version(ORT_GPU)
    jetpack, jetson = patient.found.jetpack, patient.found.is_jetson
    if cpu and gpu:
        what = f"{ORT} {cpu} and {ORT_GPU} {gpu} share one folder: the later overwrote the other"
        cure = f"pip uninstall -y {ORT} {ORT_GPU} && pip install {ORT_GPU}"
        return [Finding("wheel", "bad", what, _jetson_wheel(patient) or cure)]
    if jetson and gpu and jetpack and not _for_jetpack(patient, gpu):
        what = f"{ORT_GPU} {gpu} is not built for JetPack {jetpack.name} (CUDA {jetpack.cuda})"
        cure = _jetson_wheel(patient) or f"pip uninstall {ORT_GPU}; TensorRT needs no ONNX Runtime"
        return [Finding("wheel", "bad", what, cure)]
    if (jetson or patient.found.gpus) and cpu and not gpu:
        what = f"{ORT} {cpu} is the CPU wheel: it does not use the GPU"
        right = _jetson_wheel(patient) or ("" if jetson else f"pip install {ORT_GPU}")
        cure = f"pip uninstall -y {ORT} && {right}" if right else "use TensorRT: there is no wheel"
        return [Finding("wheel", "warn", what, cure)]
    if cpu or gpu:
        return [
            Finding("wheel", "ok", f"{ORT_GPU if gpu else ORT} {gpu or cpu} suits this machine")
        ]
    return []


def check_providers(patient: Patient) -> list[Finding]:
    """Load every provider that ONNX Runtime ships, and say why one cannot be."""
    folder = patient.folder(ORT)
    findings = []
    for file in sorted((folder / "capi").glob("libonnxruntime_providers_*.so") if folder else ()):
        name = file.stem.removeprefix("libonnxruntime_providers_")
        if name == "shared":
            continue
        why = _why_not(file)
        if why is None:
            findings.append(Finding("providers", "ok", f"{name} loads"))
            continue
        missing = re.search(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file", why)
        what = f"{name} does not load: {missing[1] + ' is not found' if missing else why}"
        findings.append(Finding("providers", "bad", what, _cure(patient, missing and missing[1])))
    return findings


def check_cuda(patient: Patient) -> list[Finding]:
    """Compare the CUDA and cuDNN that ONNX Runtime was built for with those that are there."""
    built = _built_for(patient).get("cuda_version", "")
    if not built:
        return []
    major, findings = built.split(".")[0], []
    driver = _driver_cuda(patient.sources.run)
    if driver and _numbers(driver) < (int(major), 0):
        what = f"{ORT_GPU} is built for CUDA {built}, the driver supports {driver} at most"
        findings.append(Finding("cuda", "bad", what, f"update the driver to one with CUDA {major}"))
    for library, wanted in (("libcudart", major), ("libcudnn", _cudnn_for(major))):
        there = sorted(_majors(patient, library))
        name = {"libcudart": "CUDA", "libcudnn": "cuDNN"}[library]
        if wanted in there:
            findings.append(Finding("cuda", "ok", f"{name} {wanted} is installed"))
            continue
        others = f", only {', '.join(there)}" if there else ""
        what = f"{ORT_GPU} needs {name} {wanted}: it is not installed{others}"
        cure = f"pip install '{ORT_GPU}[cuda,cudnn]'"
        if jetpack := patient.found.jetpack:
            cure = _jetson_wheel(patient) or f"use TensorRT: JetPack {jetpack.name} has no wheel"
        findings.append(Finding("cuda", "bad", what, cure))
    return findings


def check_cached_engines(patient: Patient) -> list[Finding]:
    """Compare what engines in a bundle's cache were built for with this machine."""
    here = {
        "tensorrt": patient.version("tensorrt"),
        "gpu": patient.found.gpus[0].name if patient.found.gpus else None,
        "compute_capability": _capability(patient),
        "platform": f"{sys.platform}-{patient.architecture}",
    }
    findings = []
    for bundle in patient.bundles:
        good = 0
        for file in sorted((bundle / ENGINE_CACHE).glob(f"*/{SIDECAR}")):
            identity = _identity(file)
            if identity is None:
                what = f"{file.parent} has no record of what it was built for"
                findings.append(Finding("cache", "warn", what, f"rm -r {file.parent}"))
                continue
            wrong = [
                f"{name} {identity[name]} (here {value or 'none'})"
                for name, value in here.items()
                if name in identity and not _matches(name, str(identity[name]), value)
            ]
            component = identity.get("component", file.parent.name)
            if wrong:
                what = f"{bundle}: the engine of {component} is for {', '.join(wrong)}"
                cure = (
                    f"vlmedge build {bundle}"
                    if here["tensorrt"]
                    else "nothing to do: it is not used here"
                )
                findings.append(Finding("cache", "warn", what, cure))
            else:
                good += 1
        if good:
            findings.append(Finding("cache", "ok", f"{bundle}: {good} engines fit this machine"))
    return findings


def check_proof(patient: Patient) -> list[Finding]:
    """Multiply two matrices on every installed engine, each in a process of its own."""
    findings = []
    for name in ENGINES.names():
        if not any(patient.version(package) for package in PACKAGES.get(name, (name,))):
            continue
        findings.append(prove((sys.executable, "-m", "vlmedge.doctor.proof", name), name))
    return findings


def prove(command: tuple[str, ...], name: str) -> Finding:
    """Run one proof; its last line is the time, or why there is none."""
    again = f"{' '.join(command[1:])} shows more"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROOF_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Finding("proof", "bad", f"{name}: no result after {PROOF_S} s", again)
    if done.returncode < 0:
        what = f"{name}: it was ended by signal {-done.returncode}"
        return Finding("proof", "bad", what, f"install the engine again; python {again}")
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["?"]
    if done.returncode:
        return Finding("proof", "bad", f"{name}: {said[-1]}", f"python {again}")
    return Finding("proof", "ok", f"{name}: {said[-1]}")


def _get_tensorrt(patient: Patient) -> tuple[str, str]:
    jetpack = patient.found.jetpack
    if jetpack is None:
        return "TensorRT is not installed", "pip install tensorrt"
    what = f"TensorRT {jetpack.tensorrt} of JetPack {jetpack.name} is not in this Python"
    venv = f"use python{jetpack.python} -m venv --system-site-packages"
    return what, f"sudo apt install python3-libnvinfer; {venv}"


def _jetson_wheel(patient: Patient) -> str:
    """Return how this JetPack gets ONNX Runtime with CUDA; "" where it does not."""
    jetpack = patient.found.jetpack
    return (jetpack.wheel or "") if jetpack else ""


def _for_jetpack(patient: Patient, version: str) -> bool:
    """Return whether the installed GPU wheel is built for this JetPack's CUDA."""
    jetpack, built = patient.found.jetpack, _built_for(patient).get("cuda_version", "")
    assert jetpack is not None
    if not built:  # older wheels do not tell; PyPI's for Arm begin with 1.29 and are for CUDA 13
        built = "13" if _numbers(version) >= (1, 29) else jetpack.cuda
    return built.split(".")[0] == jetpack.cuda.split(".")[0]


def _why_not(file: Path) -> str | None:
    """Load a library in another process, where a crash does no harm; none: it loads."""
    try:
        done = subprocess.run(
            (sys.executable, "-c", _LOAD, str(file)),
            capture_output=True,
            text=True,
            timeout=LOAD_S,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"no answer after {LOAD_S} s"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return done.stdout.strip() or "?" if done.returncode else None


def _cure(patient: Patient, missing: str | None) -> str:
    if missing is None:
        return f"pip install --force-reinstall {ORT_GPU}"
    if right := _jetson_wheel(patient):
        return right
    if missing.startswith("libnvinfer"):
        return "install TensorRT, or ignore this: the CUDA provider works without it"
    return f"pip install '{ORT_GPU}[cuda,cudnn]'"


def _built_for(patient: Patient) -> dict[str, str]:
    """Read what ONNX Runtime's wheel says of its build, without importing it."""
    folder = patient.folder(ORT)
    file = folder / "capi" / "build_and_package_info.py" if folder else None
    if file is None or not file.is_file():
        return {}
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))):
                found[name] = value
    return found


def _driver_cuda(run: Runner) -> str:
    """Return the newest CUDA that the driver knows: nvidia-smi has it in its heading."""
    match = re.search(r"CUDA Version:\s*([\d.]+)", run(("nvidia-smi",)) or "")
    return match[1] if match else ""


def _cudnn_for(cuda: str) -> str:
    """Return the cuDNN of ONNX Runtime's wheels: 9 since CUDA 12 (ONNX Runtime 1.18.1)."""
    return "9" if int(cuda) >= 12 else "8"


def _majors(patient: Patient, library: str) -> set[str]:
    """Find the major versions of a library, in the system's folders and in pip's."""
    found = set()
    for file in _files(patient, f"{library}.so.*"):
        if match := re.match(rf"{library}\.so\.(\d+)", file.name):
            found.add(match[1])
    return found


def _files(patient: Patient, pattern: str) -> Iterator[Path]:
    for place in LIBRARIES:
        yield from patient.sources.root.glob(f"{place}/{pattern}")
    for folder in patient.packages:
        for place in WHEELS:
            yield from folder.glob(f"{place}/{pattern}")


def _capability(patient: Patient) -> str | None:
    if patient.found.gpus and patient.found.gpus[0].compute_capability:
        return patient.found.gpus[0].compute_capability
    device = devices().get(patient.found.device or "")
    return device.compute_capability if device else None


def _identity(file: Path) -> dict[str, object] | None:
    """Read what an engine was built for."""
    try:
        found = json.loads(file.read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _matches(name: str, built: str, here: str | None) -> bool:
    """Compare a field; a GPU that nvidia-smi does not name here may have any name."""
    if name == "gpu" and here is None:
        return True
    return here is not None and (_same(built, here) if name == "tensorrt" else built == here)


def _same(version: str, other: str) -> bool:
    """Compare versions as far as both go: 10.3.0.30 and 10.3.0 are the same."""
    return all(a == b for a, b in zip(version.split("."), other.split("."), strict=False))


def _numbers(version: str) -> tuple[int, int]:
    parts = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (parts[0], parts[1] if len(parts) > 1 else 0) if parts else (0, 0)


CHECKS: Mapping[str, Check] = {
    "engines": check_engines,
    "wheel": check_wheel,
    "providers": check_providers,
    "cuda": check_cuda,
    "cache": check_cached_engines,
    "proof": check_proof,
}
