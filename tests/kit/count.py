"""Count tests, and what they assert, by tier.

    python tests/kit/count.py [MARKS ...]

A test is a function with one set of parameters. Of a tier's functions it counts `assert`,
`pytest.raises` and `assert_...` of numpy, each once however often it runs; the last line has those
of all files, helpers too. Without MARKS the tiers are those of pyproject.toml.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TIERS = ("not slow and not gpu and not rest", "kinds", "rest", "slow", "gpu")
CALLS = ("raises", "assert_")


class Collected:
    """A plugin that keeps what pytest would run."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the items."""
        self.items = session.items


def asserted(tree: ast.AST) -> int:
    """Count what a piece of code asserts."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [func.attr for func in calls if isinstance(func, ast.Attribute)]
    plain = sum(isinstance(node, ast.Assert) for node in ast.walk(tree))
    return plain + sum(name.startswith(CALLS) for name in named)


def main(marks: list[str]) -> None:
    """Print one line a tier, and one of all files."""
    for mark in marks or TIERS:
        found = Collected()
        with redirect_stdout(StringIO()):
            pytest.main(["--collect-only", "-q", "-n0", "-m", mark, str(TESTS)], plugins=[found])
        functions = {getattr(item, "obj", None) for item in found.items}
        code = [textwrap.dedent(inspect.getsource(function)) for function in functions if function]
        total = sum(asserted(ast.parse(text)) for text in code)
        print(f"{mark}: {len(found.items)} tests of {len(code)} functions, {total} assertions")
    files = sorted(TESTS.rglob("*.py"))
    total = sum(asserted(ast.parse(file.read_text())) for file in files)
    print(f"in {len(files)} files: {total} assertions")


if __name__ == "__main__":
    main(sys.argv[1:])
