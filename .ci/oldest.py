"""Print the oldest version of every dependency that pyproject.toml allows, one a line.

`pip install -c` takes it. Bounds of all extras count, since one environment gets them all.
"""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("cpu", "export", "video", "report", "dev")
# The oldest torch is there for Linux with CUDA only, which is gigabytes: .ci/constraints.txt has
# the one that is taken in its place.
LATER = ("torch",)
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?")


def oldest(project: dict[str, object]) -> list[str]:
    """Turn lower bounds into versions; a requirement without one is refused.

    Args:
        project: The table of that name in pyproject.toml.
    """
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *(each for name in EXTRAS for each in extras[name])}
    found = []
    for requirement in sorted(wanted):
        if requirement.startswith(f"{project['name']}["):
            continue
        bound = BOUND.fullmatch(requirement)
        if bound is None:
            raise SystemExit(
                f"{requirement}: write it as name>=version, so that the oldest is known"
            )
        if bound[1] not in LATER:
            found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    import tomllib  # of Python 3.11, and tests run on 3.10 too

    print(*oldest(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]), sep="\n")
