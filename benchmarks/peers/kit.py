"""What the sides run on: checkpoints, bundles and every peer's own files, each made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .environments import HOST, call, python_of

WORKERS = Path(__file__).parent / "workers"
MAKE_CHECKPOINT = Path(__file__).parent.parent / "make_checkpoint.py"
SCHEMES = {
    "fp32": (),
    "int8": ("--int8",),
    "int4": ("--int4",),
    "int4-throughout": ("--scheme", str(Path(__file__).with_name("int4_throughout.json"))),
}


def cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass
class Kit:
    """A cache folder and how big things in it are.

    Attributes:
        cache: Where all lies; a thing that is there is taken as it is.
        depth: Layers that each part of a model keeps, or none: all.
        images: How many pictures are classified.
        fresh: Export the bundles again, for vlmedge has changed since.
        threads: What every side may use.
    """

    cache: Path
    depth: int | None = None
    images: int = 1000
    fresh: bool = False
    threads: int = field(default_factory=cores)
    _refreshed: set[Path] = field(default_factory=set)

    def made(self, name: str, peer: str, command: Callable[[str, str], list[str]]) -> Path:
        """Return a file or folder of the cache, making it if it is not there.

        Args:
            name: Below the cache; a layer count is put before it.
            peer: Whose interpreter makes it.
            command: (interpreter, where to write) -> what to run.

        Raises:
            Unavailable: It cannot be made.
        """
        depth = "whole" if self.depth is None else f"{self.depth}-layers"
        out = self.cache / depth / name
        stale = self.fresh and out.parent.name == "bundles" and out not in self._refreshed
        if out.exists() and not stale:
            return out
        python = python_of(peer, self.cache)
        print(f"making {depth}/{name}", flush=True)
        # in a folder of its own: ONNX files name the weights beside them
        partial = out.parent / f".partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            log = self.cache / "logs" / f"{depth}-{name.replace('/', '-')}.log"
            call(command(str(python), str(partial / out.name)), log, fresh=True)
            if out.is_dir():
                shutil.rmtree(out)
            for path in partial.iterdir():
                path.replace(out.parent / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._refreshed.add(out)
        return out

    def checkpoint(self, kind: str) -> Path:
        """Write a checkpoint of random weights in a published shape."""
        cut = [] if self.depth is None else [str(self.depth)]
        return self.made(
            f"checkpoints/{kind}",
            HOST,
            lambda python, out: [python, str(MAKE_CHECKPOINT), kind, out, *cut],
        )

    def bundle(self, kind: str, scheme: str) -> Path:
        """Export a checkpoint with vlmedge."""
        checkpoint = self.checkpoint(kind)
        options = ["--no-check", "--keep-slower", "--quiet"]
        return self.made(
            f"bundles/{kind}-{scheme}",
            HOST,
            lambda python, out: [
                *(python, "-m", "vlmedge.cli", "export", str(checkpoint), *SCHEMES[scheme]),
                *(*options, "--out", out),
            ],
        )

    def script(self, name: str, peer: str, script: str, *arguments: str) -> Path:
        """Let one of the make_ scripts write `name`; it gets the path after its first argument."""
        first, *rest = arguments
        return self.made(
            name, peer, lambda python, out: [python, str(WORKERS / script), first, out, *rest]
        )

    def gguf(self, kind: str, type_: str) -> Path:
        """Write a checkpoint as a GGUF."""
        source = str(self.checkpoint(kind))
        return self.script(f"gguf/{kind}-{type_}.gguf", "llama-cpp", "make_gguf.py", source, type_)

    def genai(self, kind: str, bits: int) -> Path:
        """Let onnxruntime-genai's builder make a model: its default blocks are of 32."""
        source = str(self.checkpoint(kind))
        extra = ["--extra_options", "hf_token=false", "int4_block_size=32"]
        return self.made(
            f"genai/{kind}-int{bits}",
            "onnxruntime-genai",
            lambda python, out: [
                *(python, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out),
                *("-p", f"int{bits}", "-e", "cpu", "-c", f"{out}-cache", *extra),
            ],
        )

    def openvino(self, kind: str, bits: int) -> Path:
        """Let optimum-intel export a decoder, its weights compressed as it recommends."""
        source = str(self.checkpoint(kind))
        how = ["--sym", "--group-size", "128", "--ratio", "1.0"] if bits == 4 else []
        return self.made(
            f"openvino/{kind}-int{bits}",
            "openvino",
            lambda python, out: [
                *(python, "-m", "optimum.commands.optimum_cli", "export", "openvino"),
                *("-m", source, "--task", "text-generation-with-past"),
                *("--weight-format", f"int{bits}", *how, out),
            ],
        )

    def pixels(self, size_px: int = 224) -> Path:
        """Draw what one picture might look like to a tower, float32 [1, 3, size, size]."""
        code = (
            "import sys, numpy as n; r = n.random.default_rng(0); "
            f"n.save(sys.argv[1], r.standard_normal((1, 3, {size_px}, {size_px}), n.float32))"
        )
        return self.made(
            f"inputs/pixels-{size_px}.npy", HOST, lambda python, out: [python, "-c", code, out]
        )

    def pictures(self) -> list[str]:
        """Draw pictures of 640 x 480 as JPEG files."""
        folder = self.made(
            f"inputs/pictures-{self.images}",
            HOST,
            lambda python, out: [
                *(python, str(WORKERS / "make_pictures.py"), out, str(self.images)),
            ],
        )
        return sorted(map(str, folder.iterdir()))

    def label_vectors(self, bundle: Path, labels: tuple[str, ...]) -> Path:
        """Embed labels once with vlmedge, for the peers that have no text tower here."""
        return self.script("inputs/labels.npy", HOST, "make_label_vectors.py", str(bundle), *labels)


def bytes_in(*paths: Path) -> int:
    """Add up the sizes of files."""
    return sum(path.stat().st_size for path in paths)
