"""What Python adds to the graphs, and what sessions and beams cost.

    python benchmarks/overhead.py BUNDLE [tokens]

Overhead is the wall time of `caption` less the time inside ONNX Runtime's own calls. A session's
second question is compared with its first, which encodes the picture; 5 beams with greedy. Medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene

ROUNDS = 9
QUESTIONS = ("what color is the star?", "what shape is on the left?")


class Clocked:
    """A session of ONNX Runtime that adds up the time inside it."""

    def __init__(self, session: Any, spent: list[float]) -> None:
        self._session, self._spent = session, spent

    def __getattr__(self, name: str) -> Any:
        """Hand everything on; what runs is clocked."""
        found = getattr(self._session, name)
        if not name.startswith("run"):
            return found

        def clocked(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*arguments, **options)
            finally:
                self._spent.append(time.perf_counter() - start)

        return clocked


def median_ms(work: Callable[[], object]) -> float:
    """Run something ROUNDS times."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print all figures."""
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    model, picture = vlmedge.load(sys.argv[1]), draw_scene(0, "heldout").image
    greedy: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens, "num_beams": 1}
    model.caption(picture, **greedy)
    one, five = (
        median_ms(lambda n=n: model.caption(picture, **{**greedy, "num_beams": n})) for n in (1, 5)
    )
    print(
        f"caption of {tokens} tokens: greedy {one:.1f} ms, 5 beams {five:.1f} ms: {five / one:.2f}x"
    )
    firsts, seconds = [], []
    asked: dict[str, Any] = {"max_tokens": 1, "min_tokens": 1}
    for _ in range(ROUNDS):
        marks = [time.perf_counter()]
        with model.session(picture) as session:
            for question in QUESTIONS:
                session.ask(question, **asked)
                marks.append(time.perf_counter())
        firsts.append(1000 * (marks[1] - marks[0]))
        seconds.append(1000 * (marks[2] - marks[1]))
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(f"session, 1 token: first {first:.1f} ms, second {second:.1f} ms: {second / first:.0%}")
    spent: list[float] = []
    for name in model.graphs:
        graph: Any = model.graphs[name]
        graph._session = Clocked(graph._session, spent)
    model.caption(picture, **greedy)
    rows = []
    for _ in range(ROUNDS):
        spent.clear()
        start = time.perf_counter()
        model.caption(picture, **greedy)
        wall_ms = 1000 * (time.perf_counter() - start)
        rows.append((wall_ms - 1000 * sum(spent), wall_ms))
    over, wall = sorted(rows)[ROUNDS // 2]
    print(
        f"overhead: {over:.2f} ms of {wall:.1f}: {over / wall:.1%}, {over / tokens:.3f} ms a token"
    )


if __name__ == "__main__":
    main()
