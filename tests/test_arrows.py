"""The import rules of the house: shelves stand on the core, and torch stays in export/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELVES = ("export", "quantize", "runtimes", "devices")
FILES = [f for d in ("vlmedge", *SHELVES) for f in sorted((ROOT / d).rglob("*.py"))]
TORCH = {"torch", "transformers", "timm"}


def imports(file: Path) -> set[str]:
    """Name every module that `file` imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_keep_to_the_rules(file: Path) -> None:
    """No file reaches into a shelf by import; only export/ may know torch."""
    names = imports(file)
    assert not {n for n in names if n.split(".")[:2] in [["vlmedge", s] for s in SHELVES]}
    assert not names & set(SHELVES)
    if file.relative_to(ROOT).parts[0] != "export":
        assert not {n.split(".")[0] for n in names} & TORCH


def test_every_folder_is_packaged() -> None:
    """A folder that pyproject.toml forgets would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    for init in [f for f in FILES if f.name == "__init__.py"]:
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name if name.startswith("vlmedge") else "vlmedge." + name}"' in text


def test_core_needs_no_torch_and_no_engine() -> None:
    """Every file of the core imports with torch, transformers, onnx and engines unimportable."""
    core = [
        f for f in FILES if f.relative_to(ROOT).parts[0] not in SHELVES and f.name != "__init__.py"
    ]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in core]
    banned = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "huggingface_hub")
    code = f"import sys\nfor n in {banned}: sys.modules[n] = None\n"
    code += "import importlib\n" + "".join(f"importlib.import_module({n!r})\n" for n in names)
    subprocess.run([sys.executable, "-c", code], check=True)
