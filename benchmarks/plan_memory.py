"""Compare what `vlmedge plan` predicts with what ONNX Runtime takes, for bundles on this machine.

    python benchmarks/plan_memory.py BUNDLE...

Every bundle runs in a process of its own, a caption of 20 tokens or a classification, twice: what
it takes to build its engines is not counted. Exits 1 when a peak is off by more than 15 %.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlmedge.detect import detect
from vlmedge.planning import Wish, look_up, make_plan
from vlmedge.progress import SILENT
from vlmedge.roofline import MIB

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


def main() -> None:
    """Print a line a bundle."""
    device = detect().device
    if device is None:
        sys.exit("this machine is not in the catalogue")
    worst = 0.0
    print("predicted MiB, measured MiB, measured / predicted")
    for name in sys.argv[1:]:
        shape, stored = look_up(name, SILENT)
        wish = Wish(device, "ort", prompt_tokens=4, new_tokens=NEW_TOKENS)
        (scheme,) = make_plan(name, shape, wish, stored=stored).schemes
        predicted, measured = scheme.total_bytes / MIB, measure(Path(name))
        worst = max(worst, abs(measured / predicted - 1))
        print(f"{predicted:9.1f} {measured:9.1f} {measured / predicted:6.3f}  {name}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
