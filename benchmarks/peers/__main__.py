"""The command line: `python -m benchmarks.peers`, from the root of a checkout."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from . import figure, report
from .cases import CASES
from .environments import PEERS
from .errors import PeersError, last_line
from .kit import WORKERS, Kit
from .turns import prepare, run

MEASURE = "measure_machine.py"
DEFAULT_CACHE = Path("~/.cache/vlmedge-peers")


def at_least(low: int, what: str):
    """Make a reader of whole numbers that are not too small."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}: give a number from {low} on")
        return int(text)

    return read


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Compare vlmedge with its peers: the same work, in turns, in one run.",
    )
    parser.add_argument(
        "--case", action="append", choices=CASES, metavar="CASE",
        help=f"default: all of {', '.join(CASES)}",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", choices=PEERS, metavar="PEER",
        help=f"of {', '.join(PEERS)}; vlmedge always runs; default: all",
    )  # fmt: skip
    names = sorted({side.name for case in CASES.values() for side in case.sides})
    parser.add_argument(
        "--side",
        action="append",
        choices=names,
        metavar="NAME",
        help="run these alone, where memory is short: their names as the table has them",
    )
    parser.add_argument("--rounds", type=at_least(1, "number of rounds"), default=10)
    parser.add_argument(
        "--starts",
        type=at_least(1, "number of starts"),
        default=1,
        help="open every side anew so many times, for as many rounds each",
    )
    parser.add_argument(
        "--depth", type=at_least(2, "depth"), help="cut every model to so many layers, to try it"
    )
    parser.add_argument("--images", type=at_least(1, "number of images"), default=1000)
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help=f"default: {DEFAULT_CACHE}"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="build, export and convert; measure nothing"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="export vlmedge's bundles again, for it has changed"
    )
    parser.add_argument("--json", type=Path, default=Path("peers.json"), metavar="FILE")
    parser.add_argument("--figure", type=Path, default=Path("peers.png"), metavar="FILE")
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="draw a saved report again; run nothing"
    )
    return parser.parse_args(given)


def measured(kit: Kit) -> dict[str, float]:
    """Measure what bounds everyone here."""
    command = [sys.executable, str(WORKERS / MEASURE), str(kit.threads)]
    log = kit.cache / "logs" / "machine.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    if done.returncode:
        raise PeersError(f"the machine cannot be measured: {last_line(log)} ({log})")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(given: argparse.Namespace) -> None:
    """Run the cases, one after the other; each is saved and drawn once it is done."""
    kit = Kit(given.cache.expanduser(), given.depth, given.images, given.fresh)
    machine: dict[str, float] = {}
    for name in given.case or CASES:
        case = CASES[name]
        print(f"{case.title}", flush=True)
        rows = prepare(case, kit, given.peer or PEERS, given.side or ())
        if given.prepare:
            continue
        machine = machine or measured(kit)
        run(case, kit, rows, given.rounds, given.starts)
        work = case.work(kit)
        found = report.case_report(
            name,
            case,
            [row.report(work, machine) for row in rows],
            depth=given.depth,
            rounds=given.rounds,
            starts=given.starts,
            images=given.images if name == "clip-classify" else None,
            threads=kit.threads,
            measured=machine,
        )
        whole = report.add(given.json, found, CASES)
        print(f"\n{report.table(found)}\n", flush=True)
        figure.draw(whole, given.figure)


def main() -> None:
    """Do what the command line says."""
    given = arguments()
    try:
        for file in (given.json, given.figure):
            if not file.absolute().parent.is_dir():
                raise PeersError(f"{file.parent} is no folder: make it first")
        if given.json.is_file():
            report.read(given.json)  # refused before hours of work, not after
        if given.redraw is not None:
            figure.draw(report.read(given.redraw), given.figure)
        else:
            compare(given)
    except PeersError as error:
        print(f"peers: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
