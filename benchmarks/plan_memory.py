"""Compare what `vlmedge plan` predicts with what ONNX Runtime takes, for bundles on this machine.

    python benchmarks/plan_memory.py BUNDLE...
    python benchmarks/plan_memory.py --page BUNDLE...

Every bundle runs in a process of its own, a caption of 20 tokens or a classification, twice: what
it takes to build its engines is not counted. With --page its line in docs/plan_memory.md is
written anew. Exits 1 when a peak is off by more than 15 %.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vlmedge.host.hardware import this_machine
from vlmedge.host.identify import detect
from vlmedge.plan.plan import PlanRequest, look_up, make_plan
from vlmedge.progress import SILENT
from vlmedge.units import MIB

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plan_memory.md"
HEAD = """# What `vlmedge plan` predicts, and what ONNX Runtime takes

Made by `python benchmarks/plan_memory.py --page BUNDLE...`; not written by hand. Each bundle has
the exact shape of a published checkpoint and random weights (`benchmarks/make_checkpoint.py`). It
is opened in a process of its own, which writes {tokens} tokens about a picture or classifies it;
measured is the peak of what that process holds of memory, libraries and Python included. What is
predicted comes from the bundle's manifest and graphs alone.

Machine: {machine}.

| bundle | scheme | predicted MiB | measured MiB | measured / predicted |
| --- | --- | --- | --- | --- |
{rows}
"""
ROW = re.compile(r"^\| (?!bundle |---)(\S+) \|.*\|$", re.MULTILINE)
TOLERANCE = 0.15
NEW_TOKENS = 20
RUN = f"""
import sys
import vlmedge
from vlmedge.bench_worker import peak_memory_mib
from vlmedge.scenes import draw_scene
model = vlmedge.load(sys.argv[1])
image = draw_scene(0, "heldout").image
if "classify" in model.bundle.spec.tasks:
    model.classify(image, ["red circle"])
else:
    model.caption(image, max_tokens={NEW_TOKENS}, min_tokens={NEW_TOKENS})
print(peak_memory_mib())
"""


def measure(bundle: Path) -> float:
    """Return the peak of a process that runs a bundle, in MiB."""
    command = (sys.executable, "-c", RUN, str(bundle))
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def write(rows: dict[str, str]) -> None:
    """Put lines into the page, in place of those of the same bundles."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    known = {match[1]: match[0] for match in ROW.finditer(text)} | rows
    here = this_machine(("onnxruntime",))
    libraries = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    machine = f"{here.cpu}, {here.cores} cores, {here.memory_gib} GiB, {here.system}, {libraries}"
    lines = "\n".join(known[name] for name in sorted(known))
    page = HEAD.format(tokens=NEW_TOKENS, machine=machine, rows=lines)
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    """Print a line a bundle."""
    names = [name for name in sys.argv[1:] if name != "--page"]
    device = detect().device
    if device is None:
        sys.exit("this machine is not in the catalogue")
    worst, rows = 0.0, {}
    print("predicted MiB, measured MiB, measured / predicted")
    for name in names:
        shape, stored = look_up(name, SILENT)
        wish = PlanRequest(device, "ort", prompt_tokens=4, new_tokens=NEW_TOKENS)
        (scheme,) = make_plan(name, shape, wish, stored=stored).schemes
        predicted, measured = scheme.total_bytes / MIB, measure(Path(name))
        worst = max(worst, abs(measured / predicted - 1))
        print(f"{predicted:9.1f} {measured:9.1f} {measured / predicted:6.3f}  {name}")
        figures = f"{predicted:.0f} | {measured:.0f} | {measured / predicted:.3f}"
        rows[Path(name).name] = f"| {Path(name).name} | {scheme.scheme} | {figures} |"
    if "--page" in sys.argv:
        write(rows)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
