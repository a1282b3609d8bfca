"""Pictures by the thousand: `model.caption(iterable)` against the loop of one by one, in one run.

    vlmedge export tiny-blip2 --int8 && python benchmarks/stream_images.py tiny-blip2-int8 [N]

N pictures each (default 10,000), PNG files in memory, in turns of a tenth, on the same model in the
same process. Memory is what the process has after the stream's part of a tenth: it must not grow
in the second half; in the first the allocator finds its size.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene

DIFFERENT = 128  # pictures; they come again and again
TENTHS = 10
SHOWN = (1, 5, 10)  # tenths after which memory is told
GROWTH_MAX = 1.02  # of memory, in the second half


def png(number: int) -> bytes:
    """Draw a held-out scene and compress it, as files are."""
    data = io.BytesIO()
    Image.fromarray(draw_scene(number, "heldout").image).resize((640, 480)).save(data, "png")
    return data.getvalue()


def resident_mib() -> float:
    """Return what the process has in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    """Print images a second of both, and memory on the way."""
    model = vlmedge.load(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    each = max(1, count // TENTHS)
    pictures = [png(number) for number in range(DIFFERENT)]
    expected = [model.caption(picture) for picture in pictures]  # opens the sessions, too
    stream = model.caption(islice(cycle(pictures), each * TENTHS))
    single = (model.caption(picture) for picture in cycle(pictures))
    sides: dict[str, Iterator[str]] = {"stream": stream, "one by one": single}
    taken_s = dict.fromkeys(sides, 0.0)
    memory_mib = []
    for tenth in range(TENTHS):
        due = [expected[i % DIFFERENT] for i in range(tenth * each, (tenth + 1) * each)]
        for name, captions in sides.items():
            start = time.perf_counter()
            found = list(islice(captions, each))
            taken_s[name] += time.perf_counter() - start
            if found != due:
                raise SystemExit(f"{name}: captions differ from those of single pictures")
            if name == "stream":
                memory_mib.append(resident_mib())
    for name, seconds in taken_s.items():
        print(f"{name}: {each * TENTHS} pictures, {each * TENTHS / seconds:.1f} a second")
    print(f"stream is {taken_s['one by one'] / taken_s['stream']:.2f} times as fast")
    told = ", ".join(f"{10 * n} % {memory_mib[n - 1]:.1f} MiB" for n in SHOWN)
    print(f"memory: {told}")
    if memory_mib[-1] > GROWTH_MAX * memory_mib[TENTHS // 2 - 1]:
        raise SystemExit("memory has grown")


if __name__ == "__main__":
    main()
