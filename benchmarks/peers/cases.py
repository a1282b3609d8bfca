"""What is compared: for each case its sides, and how each gets its work."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .environments import HOST
from .kit import Kit, bytes_in
from .limits import Work, decoder_weights, tower_gop

PROMPT_TOKENS, NEW_TOKENS = 128, 48
CAPTION_TOKENS = 23  # after the first
THINGS = ("cat", "dog", "car", "boat", "tree", "bird", "chair", "bottle", "horse", "train")
LABELS = tuple(f"a {thing}" for thing in THINGS)

Task = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a case.

    Attributes:
        name: In the samples.
        title: For people, with the unit.
        lower: Whether less is better.
    """

    name: str
    title: str
    lower: bool = False


@dataclass(frozen=True)
class Side:
    """One peer with one way to do a case's work.

    Attributes:
        name: What people read.
        peer: Its environment.
        worker: A file in workers/.
        unit: What its matrices are multiplied in, for the roofline: fp32, bf16 or int8.
        task: Makes what it needs, and says what its worker is told.
    """

    name: str
    peer: str
    worker: str
    unit: str
    task: Callable[[Kit], Task]

    @property
    def ours(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.worker == "with_vlmedge.py"


@dataclass(frozen=True)
class Case:
    """The same work for several sides.

    Attributes:
        title: For people.
        metrics: What is measured.
        sides: In the order of the figure.
        work: Counts the operations, once the checkpoint is there.
        runs_per_turn: How often a side works before it is the next one's turn.
        cold: Every run is a process of its own, timed from its start to its first answer.
    """

    title: str
    metrics: tuple[Metric, ...]
    sides: tuple[Side, ...]
    work: Callable[[Kit], Work] = lambda kit: Work()
    runs_per_turn: int = 1
    cold: bool = False


IMAGE_MS = Metric("image_ms", "ms an image", lower=True)
PREFILL = Metric("prefill_tok_s", "prompt, tokens/s")
DECODE = Metric("decode_tok_s", "new tokens/s")
FIRST = Metric("first_token_ms", "first token, ms", lower=True)
IMAGES = Metric("images_per_s", "images/s")
START = Metric("start_s", "start to first answer, s", lower=True)


def graph(kit: Kit, kind: str, scheme: str) -> Path:
    """Return vlmedge's portable graph of an image tower."""
    return kit.bundle(kind, scheme) / "graphs" / "vision_encoder.onnx"


def plain_graph(kit: Kit, kind: str) -> Path:
    """Export an image tower as those do who have no vlmedge."""
    source = str(kit.checkpoint(kind))
    return kit.script(f"onnx/{kind}.onnx", HOST, "make_onnx.py", source)


def config(kit: Kit, kind: str) -> dict[str, Any]:
    """Read a checkpoint's config.json."""
    file = kit.checkpoint(kind) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def openvino_tower(kit: Kit, kind: str, scheme: str) -> Task:
    """Name the graph that OpenVINO runs, and the precision of what is not quantized.

    fp32 is told to stay so; int8 may do the rest in bfloat16, as OpenVINO does by default.
    """
    plain = str(plain_graph(kit, kind))
    if scheme == "fp32":
        return {"graph": plain, "precision": "f32"}
    if scheme == "default":
        return {"graph": plain}
    if scheme == "ours":
        return {"graph": str(graph(kit, kind, "int8"))}
    name = f"openvino/{kind}-int8.xml"
    return {"graph": str(kit.script(name, "openvino", "make_openvino_int8.py", plain))}


def ort_int8(kit: Kit, kind: str) -> Path:
    """Quantize a float32 tower with ONNX Runtime's own tool."""
    source = str(plain_graph(kit, kind))
    return kit.script(f"onnxruntime/{kind}-int8.onnx", HOST, "make_ort_int8.py", source)


def image_sides(kind: str, work: str, common: Callable[[Kit], Task]) -> tuple[Side, ...]:
    """List all who can run a ViT.

    Args:
        kind: Of the checkpoint.
        work: "tower" or "classify".
        common: What every worker is told.
    """

    def side(name: str, peer: str, worker: str, unit: str, own: Callable[[Kit], Task]) -> Side:
        return Side(name, peer, worker, unit, lambda kit: {"kind": work, **common(kit), **own(kit)})

    def vlmedge(scheme: str) -> Side:
        def bundle(kit: Kit) -> Task:
            return {"bundle": str(kit.bundle(kind, scheme))}

        unit = "int8" if scheme == "int8" else "fp32"
        return side(f"vlmedge {scheme}", HOST, "with_vlmedge.py", unit, bundle)

    def torch(dtype: str, unit: str) -> Side:
        def task(kit: Kit) -> Task:
            return {"checkpoint": str(kit.checkpoint(kind)), "dtype": dtype}

        return side(f"PyTorch {unit}", HOST, "with_torch.py", unit, task)

    def openvino(title: str, scheme: str, unit: str) -> Side:
        def task(kit: Kit) -> Task:
            return openvino_tower(kit, kind, scheme)

        return side(f"OpenVINO {title}", "openvino", "with_openvino.py", unit, task)

    def ort(title: str, unit: str, file: Callable[[Kit], Path]) -> Side:
        def task(kit: Kit) -> Task:
            return {"graph": str(file(kit))}

        return side(f"ONNX Runtime {title}", HOST, "with_onnxruntime.py", unit, task)

    return (
        vlmedge("int8"),
        openvino("int8", "int8", "int8"),
        openvino("int8, on vlmedge's graph", "ours", "int8"),
        ort("quantize_dynamic", "int8", lambda kit: ort_int8(kit, kind)),
        torch("bfloat16", "bf16"),
        openvino("bf16 (default)", "default", "bf16"),
        vlmedge("fp32"),
        openvino("fp32", "fp32", "fp32"),
        ort("fp32", "fp32", lambda kit: plain_graph(kit, kind)),
        torch("float32", "fp32"),
    )


def tower(title: str, kind: str) -> Case:
    """Compare image towers, one picture at a time."""
    return Case(
        title,
        (IMAGE_MS,),
        image_sides(kind, "tower", lambda kit: {"pixels": str(kit.pixels())}),
        lambda kit: Work(image_gop=tower_gop(vision(kit, kind))),
        runs_per_turn=3,
    )


def vision(kit: Kit, kind: str) -> dict[str, Any]:
    """Return the numbers of a tower; transformers leaves out what is its default."""
    found = config(kit, kind)["vision_config"]
    return {"image_size": 224, "patch_size": 14, **found}


def classify(title: str, kind: str) -> Case:
    """Compare zero-shot classification from files to the best label."""

    def common(kit: Kit) -> Task:
        vectors = kit.label_vectors(kit.bundle(kind, "fp32"), LABELS)
        return {"images": kit.pictures(), "labels": LABELS, "label_vectors": str(vectors)}

    sides = image_sides(kind, "classify", common)
    return Case(title, (IMAGES,), sides, lambda kit: Work(image_gop=tower_gop(vision(kit, kind))))


def vlmedge_decoder(kit: Kit, kind: str, scheme: str) -> Task:
    """Name a bundle, and the bytes that its decoder reads for a token."""
    bundle = kit.bundle(kind, scheme)
    files = [bundle / "graphs" / f"decoder.{end}" for end in ("onnx", "bin")]
    return {"bundle": str(bundle), "weights_bytes": bytes_in(*files)}


def decoder(title: str, ours: str, alone: str, bits: int) -> Case:
    """Compare decoders: a prompt, then greedy tokens.

    Args:
        title: For people.
        ours: Kind of the checkpoint whose decoder vlmedge runs.
        alone: Kind of the same decoder by itself, for all others.
        bits: Of the weights.
    """

    def vocabulary(kit: Kit) -> dict[str, Any]:
        return config(kit, alone)

    def common(kit: Kit) -> Task:
        words = random.Random(0).choices(range(100, 400), k=PROMPT_TOKENS)
        return {"kind": "decoder", "prompt": words, "new_tokens": NEW_TOKENS}

    def embeddings(kit: Kit, bytes_each: int) -> int:
        text = vocabulary(kit)
        return int(text["vocab_size"] * text["hidden_size"] * bytes_each)

    def vlmedge(scheme: str) -> Side:
        task = partial(vlmedge_decoder, kind=ours, scheme=scheme)
        return side(f"vlmedge {scheme}", HOST, "with_vlmedge.py", task)

    def llama_cpp(kit: Kit) -> Task:
        file = kit.gguf(alone, quant)
        table = {"Q4_0": 18 / 32, "Q8_0": 34 / 32}[quant]  # bytes a weight
        words = vocabulary(kit)["vocab_size"] * vocabulary(kit)["hidden_size"]
        return {"model": str(file), "weights_bytes": int(bytes_in(file) - words * table)}

    def genai(kit: Kit) -> Task:
        folder = kit.genai(alone, bits)
        read = bytes_in(folder / "model.onnx.data") - embeddings(kit, 4)
        return {"model": str(folder), "weights_bytes": read}

    def openvino(kit: Kit) -> Task:
        folder = kit.openvino(alone, bits)
        read = bytes_in(folder / "openvino_model.bin") - embeddings(kit, 1)
        return {"model": str(folder), "weights_bytes": read}

    def torch(kit: Kit) -> Task:
        read = 2 * decoder_weights(vocabulary(kit))
        checkpoint = str(kit.checkpoint(alone))
        return {"checkpoint": checkpoint, "dtype": "bfloat16", "weights_bytes": read}

    def side(name: str, peer: str, worker: str, own: Callable[[Kit], Task]) -> Side:
        unit = "bf16" if worker == "with_torch.py" else "int8"
        return Side(name, peer, worker, unit, lambda kit: {**common(kit), **own(kit)})

    quant = "Q4_0" if bits == 4 else "Q8_0"
    shape = " (as a GPT-2)" if alone.startswith("opt") else ""
    return Case(
        title,
        (DECODE, PREFILL),
        (
            vlmedge(f"int{bits}"),
            *([vlmedge("int4-throughout")] if bits == 4 else []),  # its vocabulary too
            side(f"llama.cpp {quant}{shape}", "llama-cpp", "with_llama_cpp.py", llama_cpp),
            side(f"onnxruntime-genai int{bits}", "onnxruntime-genai", "with_genai.py", genai),
            side(f"OpenVINO int{bits}", "openvino", "with_openvino.py", openvino),
            side("PyTorch bf16", HOST, "with_torch.py", torch),
        ),
        lambda kit: Work(token_gop=2 * decoder_weights(vocabulary(kit)) / 1e9),
    )


def caption(title: str, kind: str) -> Case:
    """Compare captions, from a picture's file to the last token: nobody else has BLIP-2."""

    def common(kit: Kit) -> Task:
        return {"kind": "caption", "image": kit.pictures()[0], "new_tokens": CAPTION_TOKENS}

    def vlmedge(scheme: str) -> Side:
        def task(kit: Kit) -> Task:
            return {**common(kit), **vlmedge_decoder(kit, kind, scheme)}

        return Side(f"vlmedge {scheme}", HOST, "with_vlmedge.py", "int8", task)

    def torch(kit: Kit) -> Task:
        text = config(kit, kind)["text_config"]
        read = 2 * decoder_weights(text)
        checkpoint = str(kit.checkpoint(kind))
        return {**common(kit), "checkpoint": checkpoint, "dtype": "bfloat16", "weights_bytes": read}

    return Case(
        title,
        (FIRST, DECODE),
        (
            vlmedge("int4"),
            vlmedge("int8"),
            Side("PyTorch bf16", HOST, "with_torch.py", "bf16", torch),
        ),
    )


def cold(case: Case, title: str, leave_out: tuple[str, ...] = ()) -> Case:
    """Make of a case one that starts anew each time; a decoder writes one token."""

    def short(side: Side) -> Side:
        def task(kit: Kit) -> Task:
            return {**side.task(kit), "new_tokens": 0}

        return Side(side.name, side.peer, side.worker, side.unit, task)

    sides = tuple(short(side) for side in case.sides if side.name not in leave_out)
    return Case(title, (START,), sides, cold=True)


VIT_B = tower("ViT-B/16 image tower", "clip-vit-b-16")
LLAMA_INT4 = decoder("LLaMA 1.1B, 4 bits", "llava-1.1b", "llama-1.1b", 4)
CASES = {
    "vit-b-16": VIT_B,
    "vit-l-14": tower("ViT-L/14 image tower", "clip-vit-l-14"),
    "vit-g": tower("BLIP-2's ViT-g image tower", "blip2-vit-g"),
    "llama-1.1b-int4": LLAMA_INT4,
    "llama-1.1b-int8": decoder("LLaMA 1.1B, 8 bits", "llava-1.1b", "llama-1.1b", 8),
    "opt-2.7b-int4": decoder("OPT 2.7B, 4 bits", "blip2-opt-2.7b", "opt-2.7b", 4),
    "opt-2.7b-int8": decoder("OPT 2.7B, 8 bits", "blip2-opt-2.7b", "opt-2.7b", 8),
    "blip2-caption": caption("BLIP-2 OPT-2.7b, a caption", "blip2-opt-2.7b"),
    "clip-classify": classify("CLIP ViT-B/16, pictures to labels", "clip-vit-b-16"),
    "cold-vit-b-16": cold(VIT_B, "ViT-B/16, process start to first answer"),
    "cold-llama-1.1b": cold(
        LLAMA_INT4, "LLaMA 1.1B, process start to first token", ("vlmedge int4-throughout",)
    ),
}
