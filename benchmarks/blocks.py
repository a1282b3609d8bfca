"""What an int4 decoder's accuracy pays for wide blocks, and what AWQ gives back.

    python benchmarks/blocks.py [count] [file.safetensors ...]

tiny-blip2's decoder at blocks of 32, 64 and 128 rows, with AWQ (scales moved into the norms before,
errors weighed by how strong each input is) and without (the scale of the least plain error), and
at 128 with its vocabulary in int4 too, held against PyTorch float32 on `count` held-out scenes
(default 500) by the gate's own code.
Blocks of 128 are what ONNX Runtime's kernel reads fastest; see `quantize/int4.py`.

Of each safetensors file that is named, the error of its Linears' weights alone: the norm of what
rounding changes over the norm of the weights. There AWQ has nothing to go by.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from schemes import graphs_mib

from vlmedge.bundle import Bundle
from vlmedge.checkpoints.resolve import BUILT_INS, family_of
from vlmedge.make.export import export
from vlmedge.make.recipe import Recipe
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import drawn
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import FAMILIES, SCHEMES

BLOCKS = (32, 64, 128)
CHECKPOINT = "tiny-blip2"


def accuracy(count: int) -> None:
    """Print tiny-blip2's row for each block, with AWQ and without, and for int4 throughout."""
    opened = FAMILIES[family_of(BUILT_INS / CHECKPOINT)].open(BUILT_INS / CHECKPOINT)
    samples = drawn(count, "heldout", labelled=True)
    asked = [(block, awq, "int8") for block in BLOCKS for awq in (True, False)]
    print("| block | AWQ | vocabulary | decoder: KL of the first token, nats | right, % | MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for block, awq, vocabulary in (*asked, (BLOCKS[-1], True, "int4")):
            path = Path(folder) / f"{block}-{awq}-{vocabulary}"
            options = {"blocks": [block], "awq": awq, "vocabulary": vocabulary}
            recipe = Recipe("int4", options=options, keep_slower=True)
            made = export(CHECKPOINT, path, recipe, check=False)
            parity = run_gate(made, opened, samples, SILENT, min(count, 200))
            kl = next(c.kl for c in parity.components if c.kl is not None)
            right = ", ".join(f"{t.task} {100 * (t.accuracy or 0):.2f}" for t in parity.tasks)
            mib = f"{graphs_mib(Bundle.load(path)):.2f}"
            cells = (block, "yes" if awq else "no", vocabulary, f"{kl:.2g}", right, mib)
            print("|", " | ".join(map(str, cells)), "|", flush=True)


def weight_error(file: Path, most: int = 24) -> None:
    """Print the relative error of a file's matrices at each block, of `most` of them."""
    formats: Any = import_module(f"{type(SCHEMES['int4']).__module__.rpartition('.')[0]}._formats")
    square = dict.fromkeys(BLOCKS, 0.0)
    whole = 0.0
    with safe_open(file, "pt") as weights:
        names = [
            name
            for name in weights.keys()  # noqa: SIM118 - it is no mapping
            if len(size := weights.get_slice(name).get_shape()) == 2 and size[1] % 128 == 0
            if "embed" not in name and "head" not in name
        ]
        for name in names[:: max(1, len(names) // most)]:
            weight = np.ascontiguousarray(weights.get_tensor(name).float().numpy().T)
            whole += float(np.square(weight).sum())
            for block in BLOCKS:
                form = formats.Int4Blocks(block)
                scale = form.scale(weight)
                off = form.restore(form.round(weight, scale), scale) - weight
                square[block] += float(np.square(off).sum())
    errors = ", ".join(f"{block}: {100 * (square[block] / whole) ** 0.5:.2f} %" for block in BLOCKS)
    print(f"{file}: error of the weights at blocks of {errors}")


def main() -> None:
    """Run the first part, and the second of each file."""
    accuracy(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
    for file in sys.argv[2:]:
        weight_error(Path(file))


if __name__ == "__main__":
    main()
