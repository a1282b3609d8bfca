"""What a process of its own imports, takes and leaves: each kind of process is started once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from kit.shapes import LLAVA

from vlmedge.host.identify import detect

# Of a machine where much is missing: one line of JSON for each thing that it must do all the same
BARE = """
import io, json, sys
from contextlib import redirect_stdout
for name in ("torch", "transformers", "onnxruntime", "onnx_ir", "onnx", "tensorrt", "numpy.random"):
    sys.modules[name] = None
from vlmedge.host.identify import detect
print(json.dumps(str(detect().device)))
del sys.modules["numpy.random"]
from vlmedge.shelves.registry import ENGINES
print(json.dumps(type(ENGINES["tensorrt"]).__name__))
from vlmedge.cli.app import main
try:
    with redirect_stdout(io.StringIO()) as said:
        main(["doctor", "--json"])
except SystemExit as stopped:
    print(json.dumps([json.loads(said.getvalue()), stopped.code]))
"""


@pytest.fixture(scope="module")
def bare() -> list[str]:
    """Run what must work without torch and without any engine."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_this_machine_is_detected_without_torch(bare: list[str]) -> None:
    assert bare[0] == str(detect().device)


def test_engine_imports_without_onnx_ir_and_tensorrt(bare: list[str]) -> None:
    assert bare[1] == "TensorRt"


def test_doctor_runs_without_any_engine_or_torch(bare: list[str]) -> None:
    """It is for machines where something is missing."""
    findings, code = bare[2]
    assert findings and code in (0, 1, None)


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(LLAVA))
    return file


def test_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'PIL'}"
    code = f"import sys, vlmedge.cli.app; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_plan_takes_under_two_seconds_without_torch(llava: Path) -> None:
    code = (
        "import sys\n"
        "for n in ('torch', 'transformers', 'onnxruntime', 'onnx_ir'): sys.modules[n] = None\n"
        "from vlmedge.cli.app import main\n"
        f"main(['plan', {str(llava)!r}, '--device', 'jetson-orin-nano-4gb'])"
    )
    before = _children_s()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "fits on jetson-" in done.stderr
    assert _children_s() - before < 2  # of processor time: other programs may be busy


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_worker_of_a_bundle_needs_no_torch(clip_int8: Path) -> None:
    code = (
        "import io, json, sys; from vlmedge.bench import worker as w;"
        f"sys.argv = ['', json.dumps(dict(bundle={str(clip_int8)!r}, checkpoint=None, how='ort'))];"
        "sys.stdin = io.StringIO('round\\n'); w.main();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["components_ms"]["vision_encoder"]


def test_runtime_leaves_nothing_at_home_and_tells_nobody(clip_int8: Path, tmp_path: Path) -> None:
    """ONNX Runtime's wheels have telemetry that is on, but where they see CI or unit tests."""
    code = (
        "import sys, vlmedge, numpy;"
        "vlmedge.load(sys.argv[1]).embed_image(numpy.zeros((64, 64, 3), numpy.uint8))"
    )
    unseen = ("CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in unseen}
    command = [sys.executable, "-c", code, str(clip_int8)]
    subprocess.run(command, check=True, env=env | {"HOME": str(tmp_path)})
    assert not list(tmp_path.rglob("*"))
