"""Print the structure of a checkout: `python tests/arrows/report.py [ROOT]`.

Rooms are packages, and files that lie in none. A floor stands above all that it imports. An arrow
that does not lead down is one between the rooms of a circle.
"""

from __future__ import annotations

import sys
from pathlib import Path

from house import SHELVES, House, circles, floors

LONG_LINES = 300


def report(root: Path) -> str:
    """Return the structure of the checkout at `root` as text."""
    house = House(root)
    said = []
    for tree in ("vlmedge", *SHELVES):
        arrows = house.room_arrows(tree)
        floor = floors(arrows)
        level = sum(floor[a] <= floor[b] for a, targets in arrows.items() for b in targets)
        said.append(
            f"{tree}: {len(arrows)} rooms, {max(floor.values())} floors, "
            f"{sum(map(len, arrows.values()))} arrows, {level} not down, "
            f"{len(circles(arrows))} circles"
        )
    said += [f"  circle of rooms: {', '.join(group)}" for group in circles(house.room_arrows())]
    said.append(f"circles of files: {len(circles(house.file_arrows()))}")
    said += [f"  {', '.join(group)}" for group in circles(house.file_arrows())]
    said.append(f"private names across packages: {len(house.private_names())}")
    said += [f"  {i.file} takes {i.name} out of {i.module}" for i in house.private_names()]
    long = sorted(house.lines.items(), key=lambda item: -item[1])
    above = sum(lines > LONG_LINES for _, lines in long)
    said.append(f"files: {len(long)}, {above} above {LONG_LINES} lines; the longest:")
    said += [f"  {lines:4} {file}" for file, lines in long[:5]]
    arrows = house.room_arrows()
    floor = floors(arrows)
    for height in range(max(floor.values()), 0, -1):
        said.append(f"floor {height}: " + ", ".join(r for r in sorted(floor) if floor[r] == height))
    return "\n".join(said)


if __name__ == "__main__":
    given = sys.argv[1:]
    print(report(Path(given[0]) if given else Path(__file__).resolve().parents[2]))
