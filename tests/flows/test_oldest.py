"""The oldest versions that CI tries are those of pyproject.toml."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
oldest: Any = runpy.run_path(str(ROOT / ".ci" / "oldest.py"))["oldest"]


def project(*dependencies: str) -> dict[str, object]:
    extras = {name: [] for name in ("cpu", "export", "video", "report", "dev")}
    return {"name": "x", "dependencies": list(dependencies), "optional-dependencies": extras}


def test_bounds_become_versions_and_torch_is_left() -> None:
    found = oldest(project("b>=1.2,<3", "a-c>=0.1", "x[cpu]", "torch>=2.9,<2.14"))
    assert found == ["a-c==0.1", "b==1.2"]


def test_requirement_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(SystemExit, match="b<3: write it as name>=version"):
        oldest(project("b<3"))
