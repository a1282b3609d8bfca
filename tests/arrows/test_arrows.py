"""The import rules of the house: who may stand on whom, computed from every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from arrows.house import SHELVES, House, circles, room_of

ROOT = Path(__file__).resolve().parents[2]
HOUSE = House(ROOT)
CORE = [file for file in HOUSE.files if file.startswith("vlmedge/")]

GROUND = {"arrays", "errors", "files", "json_schema", "progress", "units", "version"}
ORDER: list[set[str]] = [  # a room imports only from sets before its own
    GROUND,
    {"spec"},
    {"bundle"},
    {"graphs", "lora"},
    {"shelves"},
    {"host", "checkpoints", "run/inputs", "run/decode"},
    {"run/tasks", "plan", "doctor"},
    {"run"},
    {"compositions", "parity"},
    {"make", "bench", "vlmedge"},
    {"cli"},
]
MAY_USE = {  # what a shelf takes of the core, beside the ground
    "devices": {"shelves"},
    "quantize": {"spec", "graphs", "shelves"},
    "export": {"spec", "bundle", "graphs", "lora", "shelves", "plan/shape"},
    "runtimes": {"spec", "bundle", "graphs", "shelves", "host", "parity"},
}
TORCH = {"torch", "transformers", "timm"}


def test_no_file_is_in_a_circle() -> None:
    assert circles(HOUSE.file_arrows()) == []


@pytest.mark.parametrize("tree", ["vlmedge", *SHELVES])
def test_no_room_is_in_a_circle(tree: str) -> None:
    assert circles(HOUSE.room_arrows(tree)) == []


def test_every_arrow_of_the_core_leads_down() -> None:
    rank = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    arrows = HOUSE.room_arrows()
    assert set(arrows) == set(rank), "a new room needs its place in ORDER"
    up = {(a, b) for a, targets in arrows.items() for b in targets if rank[b] >= rank[a]}
    assert up == set()


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_takes_of_the_core_what_it_may(shelf: str) -> None:
    found = {
        (file, target)
        for file, targets in HOUSE.file_arrows().items()
        if file.startswith(f"{shelf}/")
        for target in targets
        if target.startswith("vlmedge/")
        if room_of(target) not in MAY_USE[shelf] | GROUND
        if target.removeprefix("vlmedge/").removesuffix(".py") not in MAY_USE[shelf]
    }
    assert found == set()


def test_no_shelf_is_imported_from_outside_it() -> None:
    """The registry is the one door to a shelf; a shelf's own files import each other relatively."""
    found = set()
    for file in HOUSE.files:
        for each in HOUSE.imports(file):
            parts = each.module.split(".")
            into = parts[1] if parts[0] == "vlmedge" and len(parts) > 1 else parts[0]
            if into in SHELVES and (parts[0] in SHELVES or into != file.split("/")[0]):
                found.add((file, each.module))
    assert found == set()


def test_torch_stays_in_export() -> None:
    outside = [
        f for f in HOUSE.files if not f.startswith("export/") or f.startswith("export/shapes/")
    ]
    found = {(f, i.module) for f in outside for i in HOUSE.imports(f)}
    assert {(f, module) for f, module in found if module.split(".")[0] in TORCH} == set()


def test_core_imports_onnx_ir_where_it_needs_it() -> None:
    """At the head of a file it stands for types alone: the runtime works without the package."""
    found = set()
    for file in CORE:
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.split(".")[0] for name in names} & {"onnx_ir", "onnx", "onnxruntime"}:
                found.add(file)
    assert found == set()


def test_no_private_name_crosses_a_package() -> None:
    assert HOUSE.private_names() == []


def test_a_circle_a_private_name_and_a_relative_import_are_seen(tmp_path: Path) -> None:
    """The computation itself, on a house with one fault of each kind."""
    files = {
        "vlmedge/spec/__init__.py": "",
        "vlmedge/spec/a.py": "def f():\n    from vlmedge.bundle import b\n",
        "vlmedge/bundle/__init__.py": "",
        "vlmedge/bundle/b.py": "if TYPE_CHECKING:\n    from vlmedge.spec.a import _hidden\n",
        "export/_parts/__init__.py": "",
        "export/_parts/c.py": "from ..vit import FAMILY\n",
        "export/vit.py": "from ._parts import c\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    house = House(tmp_path)
    assert circles(house.file_arrows()) == [
        ["export/_parts/c.py", "export/vit.py"],
        ["vlmedge/bundle/b.py", "vlmedge/spec/a.py"],
    ]
    assert circles(house.room_arrows()) == [["bundle", "spec"]]
    assert [found.name for found in house.private_names()] == ["_hidden"]


def test_every_folder_is_packaged() -> None:
    """A folder that pyproject.toml forgets would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for file in [f for f in HOUSE.files if f.endswith("/__init__.py")]:
        name = file.removesuffix("/__init__.py").replace("/", ".")
        assert f'"{name if name.startswith("vlmedge") else "vlmedge." + name}"' in text


def test_core_needs_no_torch_and_no_engine() -> None:
    """Every file of the core imports with torch, transformers, onnx and engines unimportable."""
    names = [file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in CORE]
    banned = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "huggingface_hub")
    code = f"import sys\nfor n in {banned}: sys.modules[n] = None\n"
    code += "import importlib\n" + "".join(f"importlib.import_module({n!r})\n" for n in names)
    subprocess.run([sys.executable, "-c", code], check=True)
