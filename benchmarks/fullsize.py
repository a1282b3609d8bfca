"""Models of full size with random weights: export, first start, and speed beside PyTorch bfloat16.

    python benchmarks/fullsize.py WORK [KIND...] [--stages write,export,build,run] [--keep]

For each KIND (all of `CASES`, where none is given), in four stages:

    write   draw the checkpoint into WORK, by make_checkpoint.py
    export  make the bundle at the case's scheme, without the gate, in a process of its own
    build   start a process on it for the first time: the engine lowers its graphs
    run     start one again, and transformers' model in bfloat16; both answer in turns, or one after
            the other where both do not fit into memory at once

The figures go into docs/results/fullsize.json and from there into docs/results/fullsize.md.
Checkpoint and bundle are deleted when the last stage is done, unless --keep is given. A stage that
was done before is done again when it is asked for; `--stages page` only writes the page.

Peaks are VmHWM, the largest resident set of the whole process: its own memory and the pages of
files that it maps. Of an export, "own" is the largest that was seen of its own memory (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from vlmedge.bench.run import REST_S
from vlmedge.bench.side import Worker
from vlmedge.bench.worker import peak_memory_mib
from vlmedge.bundle import Bundle
from vlmedge.host.hardware import allowed_cores, free_bytes, this_machine

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
RESULTS, PAGE = FOLDER / "fullsize.json", FOLDER / "fullsize.md"
STAGES = ("write", "export", "build", "run")
CASES = {  # kind: its scheme
    "blip-base": "int8",
    "blip-large": "int8",
    "flava-full": "int8",
    "seggpt-vit-large": "int8",
    "llava-1.5-7b": "int4",
    "paligemma-3b": "int4",
    "blip2-flan-t5-xl": "int4",
}
THEIRS = (sys.executable, str(Path(__file__).with_name("_transformers_worker.py")))
RATE = "tokens_per_s"
ROUNDS = 3
GIB = 2**30
Row = dict[str, Any]


def written(folder: Path) -> int:
    """Return how many bytes lie in a folder, engines apart."""
    files = (f for f in folder.rglob("*") if f.is_file() and "engines" not in f.parts)
    return sum(file.stat().st_size for file in files)


def gib(count: float) -> float:
    """Return bytes as GiB."""
    return round(count / GIB, 2)


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Watch this process's own memory; what is lent holds the most that was seen, in bytes."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            (found,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            most[0] = max(most[0], found * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def export_here(checkpoint: str, out: str, scheme: str) -> Row:
    """Export in this process, and say what it took."""
    from vlmedge.make.export import export

    start = time.perf_counter()
    with own_memory() as own:
        export(checkpoint, Path(out), scheme, check=False, overwrite=True)
    peak_mib = peak_memory_mib() or 0.0
    return {
        "export_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_gib": round(peak_mib / 1024, 2),
        "own_gib": gib(own[0]),
        "cores": allowed_cores(),
    }


def export_stage(checkpoint: Path, bundle: Path, scheme: str) -> Row:
    """Export in a process of its own."""
    command = [sys.executable, __file__, "--export", str(checkpoint), str(bundle), scheme]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {**json.loads(out.splitlines()[-1]), "bundle_gib": gib(written(bundle))}


def ours(bundle: Path) -> Worker:
    """Return vlmedge's side."""
    return Worker("vlmedge", bundle, None, "ort", allowed_cores())


def build_stage(bundle: Path) -> Row:
    """Start for the first time, up to the first answer."""
    shutil.rmtree(bundle / "engines", ignore_errors=True)
    side = ours(bundle)
    start = time.perf_counter()
    with side.running():
        side.first()
        first_s = time.perf_counter() - start
        peak_mib = side.round()["peak_memory_mib"]
    return {
        "first_start_s": round(first_s, 1),
        "peak_gib": round(peak_mib / 1024, 2),
        "cores": allowed_cores(),
    }


def run_stage(checkpoint: Path, bundle: Path) -> Row:
    """Let both sides answer."""
    from _transformers_worker import main_task

    task = main_task(Bundle.load(bundle))
    threads = allowed_cores()
    theirs = Worker("PyTorch bfloat16", bundle, checkpoint, "bfloat16", threads, THEIRS)
    sides = [ours(bundle), theirs]
    # PyTorch's weights are read once more while they are converted
    in_turns = 2 * written(checkpoint) + written(bundle) < free_bytes() / 2
    starts: dict[str, float] = {}
    for turn in [sides] if in_turns else [[side] for side in sides]:
        with ExitStack() as stack:
            for side in turn:
                start = time.perf_counter()
                stack.enter_context(side.running())
                side.first()
                starts[side.name] = round(time.perf_counter() - start, 1)
            for _ in range(ROUNDS):
                for side in turn:
                    time.sleep(REST_S)
                    if found := side.round():  # none: it has died
                        side.rounds.append(found)
    lengths = {found["prompt_tokens"] for side in sides for found in side.rounds} - {None}
    if len(lengths) > 1:
        raise SystemExit(f"the prompts differ: {lengths}")
    return {
        "task": task,
        "in_turns": in_turns,
        "rounds": ROUNDS,
        "prompt_tokens": sides[0].rounds[0]["prompt_tokens"],
        "new_tokens": sides[0].rounds[0]["new_tokens"],
        "cores": threads,
        "sides": {side.name: figures(side, task, starts[side.name]) for side in sides},
    }


def figures(side: Worker, task: str, start_s: float) -> Row:
    """Sum up one side: medians of its rounds."""
    if side.error is not None:
        return {"error": side.error}
    first = [found["first_token_ms"] for found in side.rounds]
    rates = [found["tokens_per_s"] for found in side.rounds]
    writes = first[0] is not None
    return {
        "start_s": start_s,
        "answer_ms": round(median(found["tasks_ms"][task][0] for found in side.rounds), 1),
        "first_token_ms": round(median(first), 1) if writes else None,
        "tokens_per_s": round(median(rates), 2) if writes else None,
        "peak_gib": round(side.rounds[-1]["peak_memory_mib"] / 1024, 2),
    }


def export_cells(kind: str, row: Row) -> list[str]:
    """Write what an export and a first start took."""
    export, build = row["export"], row["build"]
    return [
        kind,
        CASES[kind],
        str(row["checkpoint_gib"]),
        f"{export['export_s']:.0f}" + (f" ({export['cpu_s']:.0f})" if "cpu_s" in export else ""),
        f"{export['peak_gib']} ({export['own_gib']})",
        str(export["bundle_gib"]),
        str(build["first_start_s"]),
        str(build["peak_gib"]),
    ]


def run_cells(kind: str, row: Row) -> list[str]:
    """Write what both sides took, and how many times less ours."""
    run = row["run"]
    mine, theirs = run["sides"].values()

    def beside(name: str) -> str:
        if mine[name] is None:
            return ""
        if "error" in theirs:
            return f"{mine[name]} / none"
        times = theirs[name] / mine[name]
        return f"{mine[name]} / {theirs[name]} ({1 / times if name == RATE else times:.2f})"

    writes = run["new_tokens"] is not None
    return [
        f"{kind} {CASES[kind]}",
        run["task"] + (f", {run['prompt_tokens']} + {run['new_tokens']} tokens" if writes else ""),
        beside("start_s"),
        beside("first_token_ms" if writes else "answer_ms"),
        beside(RATE),
        beside("peak_gib"),
        str(run["cores"]),
        theirs.get("error", "in turns" if run["in_turns"] else "one after the other"),
    ]


def table(head: str, rows: list[list[str]]) -> str:
    """Write a table in Markdown.

    Args:
        head: The names of the columns, with | between them.
        rows: Their cells.
    """
    names = [name.strip() for name in head.split("|")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


def page(found: dict[str, Any]) -> str:
    """Write docs/results/fullsize.md."""
    rows, machine = found["rows"], found["machine"]
    versions = (f"{name} {version}" for name, version in machine["versions"].items())
    return HEAD.format(
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        versions=", ".join(versions),
        exports=table(
            "checkpoint | scheme | GiB | export, s (on the core) | peak, GiB (own) | "
            "bundle, GiB | first start, s | its peak, GiB",
            [export_cells(kind, row) for kind, row in rows.items() if "build" in row],
        ),
        runs=table(
            "bundle | task | start, s | first token, or picture, ms | tokens/s | peak, GiB | "
            "cores | the sides ran",
            [run_cells(kind, row) for kind, row in rows.items() if "run" in row],
        ),
        left=", ".join(kind for kind in CASES if "run" not in rows.get(kind, {})) or "none",
    )


HEAD = """# Full-size models

Generated by `python benchmarks/fullsize.py WORK` from `fullsize.json`: do not edit. Random
weights in the published shapes, written by `benchmarks/make_checkpoint.py`: speed and memory do not
care. {machine}; {versions}.

Peaks are the largest resident set of the whole process, pages of mapped files included; *own* is
the largest of its own memory alone. Exports run without the gate, and like first starts, which
lower and pack the graphs, on one core, which others may use too: then an export's time is longer
than what it was on the core.

{exports}

vlmedge / transformers' own model in bfloat16 with its `generate`, both on as many cores in one run,
a process each: batch 1, medians of three rounds, in brackets how many times better vlmedge is. A
start goes from the start of the process to its first token or answer, of vlmedge after the first
one. A picture's time, and the first token's, begin with a decoded picture.

{runs}

Not run: {left}.
"""


def main() -> None:
    """Do what is asked, and write the page after every stage."""
    if sys.argv[1] == "--export":
        print(json.dumps(export_here(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    unknown = [kind for kind in given.kinds if kind not in CASES]
    if unknown:
        parser.error(f"{unknown[0]}: choose from {', '.join(CASES)}")
    stages = given.stages.split(",")
    for kind in () if stages == ["page"] else given.kinds or CASES:
        work(given.work, kind, stages, keep=given.keep)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def work(folder: Path, kind: str, stages: list[str], *, keep: bool) -> None:
    """Take one kind through its stages."""
    checkpoint, bundle = folder / kind, folder / f"{kind}-{CASES[kind]}"
    doing = {
        "export": lambda: export_stage(checkpoint, bundle, CASES[kind]),
        "build": lambda: build_stage(bundle),
        "run": lambda: run_stage(checkpoint, bundle),
    }
    for stage in STAGES:
        if stage not in stages:
            continue
        if stage == "write":
            from make_checkpoint import write

            write(kind, checkpoint)
            continue
        found = doing[stage]()
        print(kind, stage, json.dumps(found), flush=True)
        note(kind, {"checkpoint_gib": gib(written(checkpoint)), stage: found})
    if "run" in stages and not keep:
        shutil.rmtree(checkpoint)
        shutil.rmtree(bundle)


def note(kind: str, found: Row) -> None:
    """Put figures of one kind into the results, in the order of the cases."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    rows = before["rows"]
    rows[kind] = {**rows.get(kind, {}), **found}
    machine = this_machine(("onnxruntime", "torch", "transformers", "numpy"))
    kept = {name: getattr(machine, name) for name in ("cpu", "cores", "memory_gib", "versions")}
    ordered = {kind: rows[kind] for kind in CASES if kind in rows}
    RESULTS.write_text(json.dumps({"machine": kept, "rows": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
