"""Each peer's environment: a venv of its own, built from PyPI once."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import PeersError, Unavailable, last_line

HOST = "host"  # the interpreter that runs this: vlmedge, PyTorch, plain ONNX Runtime
BUILT = "built"  # in a venv that is whole; holds what it was built from


@dataclass(frozen=True)
class Environment:
    """What a peer's venv holds.

    Attributes:
        steps: What pip is asked for, one call after the other.
        variables: What the build of an extension reads.
        borrows: Whether it sees the packages of the interpreter that runs this, behind its own:
            whoever converts a checkpoint wants torch, and one of it is enough.
    """

    steps: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    borrows: bool = False


ENVIRONMENTS = {
    "llama-cpp": Environment(
        (("llama-cpp-python", "gguf"),),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},  # this machine's own instructions
    ),
    "openvino": Environment(
        (
            ("openvino", "openvino-genai", "openvino-tokenizers", "nncf", "onnx", "pillow"),
            # without its dependencies: they name torchvision, whose wheels bring CUDA
            ("--no-deps", "optimum", "optimum-intel"),
            ("transformers<5.6", "huggingface-hub<1.22", "requests", "setuptools"),
        ),
        borrows=True,
    ),
    "onnxruntime-genai": Environment((("onnxruntime-genai",),), borrows=True),
}
PEERS = (HOST, *ENVIRONMENTS)


def python_of(peer: str, cache: Path) -> Path:
    """Return a peer's interpreter, building its environment if it is not there.

    Raises:
        Unavailable: It cannot be built; the log beside it has all of what pip said.
    """
    if peer == HOST:
        return Path(sys.executable)
    wanted = ENVIRONMENTS[peer]
    folder = cache / "venvs" / peer
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = folder / BUILT
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == repr(wanted):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    log = cache / "logs" / f"{peer}.log"
    print(f"building {peer}'s environment, see {log}", flush=True)
    call([sys.executable, "-m", "venv", str(folder)], log, fresh=True)
    for step in wanted.steps:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *step]
        call(pip, log, wanted.variables)
    if wanted.borrows:  # after pip, which must not think that all is there already
        packages = Path(
            sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        )
        (packages / "borrowed.pth").write_text("\n".join(_own_packages()) + "\n", "utf-8")
    stamp.write_text(repr(wanted), encoding="utf-8")
    return python


def call(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
) -> None:
    """Run a command, its words in a log; Unavailable with the last of them when it fails."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("w" if fresh else "a", encoding="utf-8")
    except OSError as error:
        raise PeersError(f"{log} cannot be written: {error.strerror}: give --cache") from None
    with stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        environment = {**os.environ, **(variables or {})}
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
            )
        except OSError as error:
            raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Unavailable(f"{last_line(log)} ({log})")


def _own_packages() -> list[str]:
    """Return the folders that this interpreter's packages lie in."""
    known = set(site.getsitepackages()) | {site.getusersitepackages()}
    found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([*found, *(path for path in known if path in sys.path)]))
