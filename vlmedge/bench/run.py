"""Speed, memory, start and energy of a bundle, beside PyTorch's of the same in the same run.

    run.py --spawns--> side.py ==pipe== worker.py --asks--> items.py
        '-- bench_start.py, energy.py                '-- times every component

Every side is a process of its own, so its peak of memory is its own. The sides take turns, round by
round, where all of them fit into memory at once; a machine that is slower for a while is then
slower for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vlmedge.bench.result import FORMAT, BenchResult, Board
from vlmedge.bench.side import Worker
from vlmedge.bench.start import measure_starts
from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import terminate_as_interrupt
from vlmedge.checkpoints.resolve import family_of, resolve
from vlmedge.errors import BundleError
from vlmedge.host.energy import find_meter
from vlmedge.host.hardware import free_bytes, this_machine
from vlmedge.host.identify import Sources, detect
from vlmedge.progress import Advance, Progress
from vlmedge.version import __version__

WARM_UPS = 2
ROUNDS_MIN, ROUNDS_MAX = 3, 25
SIDE_BUDGET_S = 8.0  # no new round after it, once ROUNDS_MIN are done
REST_S = 0.02  # the idle side's threads stop spinning
LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")


def bench(
    bundle: Bundle,
    against: str | None,
    progress: Progress,
    *,
    engine: str = "ort",
    root: Path = Path("/"),
) -> BenchResult:
    """Measure a bundle, and PyTorch in float32 and bfloat16 beside it if asked.

    Args:
        bundle: The bundle to measure.
        against: The checkpoint that it came from, or none.
        progress: Watches.
        engine: The engine that runs the bundle.
        root: The folder that stands for /, where the machine tells its board and its energy.
    """
    folder = None if against is None else resolve(against, progress).folder
    if folder is not None and family_of(folder) != bundle.spec.family:
        raise BundleError(
            f"{bundle.path} is of family {bundle.spec.family}, {against} of {family_of(folder)}: "
            "compare it with the checkpoint that it came from"
        )
    with terminate_as_interrupt():  # its children and what it copies go when it is killed
        return _measured(bundle, folder, progress, engine, root)


def _measured(
    bundle: Bundle, folder: Path | None, progress: Progress, engine: str, root: Path
) -> BenchResult:
    """Run all sides, by turns where they fit into memory at once."""
    machine = this_machine(LIBRARIES if folder is None else (*LIBRARIES, "torch"))
    meter, source = find_meter(root)
    sides = [
        Worker(f"{engine} {bundle.manifest.scheme}", bundle.path, None, engine, machine.threads)
    ]
    if folder is not None:
        for dtype in ("float32", "bfloat16"):
            sides.append(Worker(f"torch {dtype}", bundle.path, folder, dtype, machine.threads))
    together = folder is None or _fit_at_once(bundle, folder)
    for turn in [sides] if together else [[side] for side in sides]:
        with ExitStack() as stack:
            for side in turn:
                stack.enter_context(side.running())
            title = f"running {', '.join(side.name for side in turn)}"
            with progress.step(title, ROUNDS_MAX + 1) as advance:
                _take_turns(turn, advance)
            if meter is not None:
                for side in turn:
                    with progress.step(f"measuring energy of {side.name}"):
                        side.measure_energy(meter)
    reasons = []
    for side in sides:
        with progress.step(f"starting {side.name}"):
            reasons.append(measure_starts(side, bundle))
    ours = sides[0].rounds[0]
    return BenchResult(
        format=FORMAT,
        vlmedge=__version__,
        bundle=str(bundle.path),
        checkpoint=bundle.manifest.checkpoint.id,
        scheme=bundle.manifest.scheme,
        warm_ups=WARM_UPS,
        rounds=len(sides[0].rounds),
        alternated=together,
        prompt_tokens=ours["prompt_tokens"],
        new_tokens=ours["new_tokens"],
        energy_source=source,
        no_cold_start=reasons[0],
        machine=machine,
        board=_board(Sources(root)),
        sides=tuple(side.result() for side in sides),
    )


def _take_turns(sides: Sequence[Worker], advance: Advance) -> None:
    """Warm every side up, then run them round by round."""
    for side in sides:
        for _ in range(WARM_UPS):
            side.round()
    advance(1)
    start = time.perf_counter()
    for done in range(ROUNDS_MAX):
        spent_s = time.perf_counter() - start
        if done >= ROUNDS_MIN and spent_s > SIDE_BUDGET_S * len(sides):
            return
        for side in sides:
            time.sleep(REST_S)
            found = side.round()
            if found:
                side.rounds.append(found)
        advance(1)


def _board(sources: Sources) -> Board:
    found = detect(sources)
    mode = found.power.mode
    gpus = (f"{gpu.name}, driver {gpu.driver}" for gpu in found.gpus)
    return Board(
        device=found.device,
        model=found.model or None,
        jetpack=None if found.jetpack is None else found.jetpack.name,
        power_mode=None if mode is None else mode.name,
        gpus=tuple(gpus),
    )


def _fit_at_once(bundle: Bundle, checkpoint: Path) -> bool:
    """Whether float32, bfloat16 and ours fit into half of the memory that is free."""
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    files = [file for kind in kinds for file in checkpoint.rglob(kind)]  # of parts' folders too
    theirs = 3 * sum(file.stat().st_size for file in files)  # float16 on disk: 2 + 1 times
    ours = sum(stored.bytes for stored in bundle.manifest.files)
    return theirs + ours < free_bytes() / 2
