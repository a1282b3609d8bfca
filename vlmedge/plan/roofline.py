"""What one component costs on a device: bytes, and milliseconds by the roofline.

A run takes as long as its arithmetic or as its bytes, whichever is longer; neither reaches the
figures on the data sheet, so each is multiplied by a share that has been reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmedge.plan.shape import Part
from vlmedge.shelves.contracts import Device
from vlmedge.units import GIB

KERNEL_BYTES = 4  # logits and sums are float32 everywhere

# While TensorRT builds, the host has the network's weights and the plan, the GPU the weights and
# what kernels are timed with. An estimate that no board has confirmed yet.
BUILD_HOST_COPIES = 2
BUILD_SCRATCH = GIB // 2
BATCH = 8  # tiles or frames that run at once, as vlmedge.run.tasks has it
CACHE_ROWS_MIN = 64  # of a cache that grows by doubling


@dataclass(frozen=True, slots=True)
class SchemeBytes:
    """How a scheme stores and computes.

    Attributes:
        precision: The precision that the device must support.
        linear_bytes: Bytes of a weight in an encoder's matrix products.
        decoder_bytes: Bytes of a weight in a decoder's matrix products.
        vocabulary_bytes: Bytes of a weight in the projection to logits.
        float_bytes: Bytes of a weight that the scheme leaves alone, of an activation and of a
            number in the cache.
        compute: The rate of an encoder's matrix products.
        decoder_compute: The rate of a decoder's.
        widened: How much larger weights are in memory than on disk.
        sums_bytes: Bytes that kernels keep beside each weight of a decoder's products.
    """

    precision: str
    linear_bytes: float
    decoder_bytes: float
    vocabulary_bytes: float
    float_bytes: float
    compute: str
    decoder_compute: str
    widened: float = 1
    sums_bytes: float = 0


# On a CPU activations are float32, and integer kernels quantize them on the way, in decoders too.
# float16 is widened when a graph is opened; beside 128 weights of 4 bits stand their scale and,
# once they are packed, their sum.
_CPU = {
    "float32": SchemeBytes("fp32", 4, 4, 4, 4, "fp32", "fp32"),
    "fp16": SchemeBytes("fp16", 4, 4, 4, 4, "fp32", "fp32", widened=2),
    "fp8": SchemeBytes("fp8", 1, 1, 1, 4, "fp32", "fp32"),
    "int8": SchemeBytes("int8", 1, 1, 1, 4, "int8", "int8"),
    "int4": SchemeBytes("int4", 1, 0.5 + 4 / 128, 1, 4, "int8", "int8", sums_bytes=4 / 128),
}
# On a GPU what is not quantized is float16, and a decoder's weights are unpacked to it.
_GPU = {
    "float32": SchemeBytes("fp32", 4, 4, 4, 4, "fp32", "fp32"),
    "fp16": SchemeBytes("fp16", 2, 2, 2, 2, "fp16", "fp16"),
    "fp8": SchemeBytes("fp8", 1, 1, 1, 2, "fp8", "fp8"),
    "int8": SchemeBytes("int8", 1, 1, 1, 2, "int8", "fp16"),
    "int4": SchemeBytes("int4", 1, 0.5 + 2 / 128, 1, 2, "int8", "fp16"),
}
SCHEMES = tuple(_GPU)  # the most bits first


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """Memory and time that an engine takes on a kind of device, beyond the arithmetic.

    Attributes:
        process_mib: Memory of an engine that has no model yet.
        component_mib: Memory of each component's graph and plan, without its weights.
        cache_copies: How many caches there are while a token is added.
        doubles_cache: Whether a cache that is full grows to twice its size.
        maps: Whether weights are mapped: a table of which few rows are read stays on disk, and the
            weight that is being packed is there in both forms.
        compiles: Whether it builds engines first, which takes memory of its own.
        compute_share: Share of a rate that is reached, by precision.
        bandwidth_share: Share of the bandwidth that is reached.
        layer_us: Time of a layer beyond its arithmetic: starting kernels.
    """

    process_mib: float
    component_mib: float
    cache_copies: int
    doubles_cache: bool
    maps: bool
    compiles: bool
    compute_share: dict[str, float]
    bandwidth_share: float
    layer_us: float


# Measured with ONNX Runtime 1.32 on two cores of an AMD EPYC with AVX512-VNNI: memory on tiny-clip,
# tiny-blip2 and CLIP ViT-B/16; time on ViT-B/16 (98 ms float32, 66 ms int8, one image) and BLIP-2
# OPT-2.7b int8 (12.0 tokens a second); a step of tiny-blip2's four layers takes 0.27 ms.
_ORT_CPU = EngineOverhead(78, 2, 1, True, True, False, {"fp32": 0.9, "int8": 0.4}, 0.62, 60)
# Assumed until a board has been measured: a CUDA process with its libraries takes 0.5 GiB of a
# card, and 0.9 GiB of a board where the host's part is in the same memory. TensorRT-Edge-LLM's
# claim for Orin Nano (Qwen3-VL-2B in int4: 36.9 tokens a second) is half of its bandwidth. A layer
# is about ten kernels.
_CARD_SHARE = dict.fromkeys(("fp32", "fp16", "int8", "fp8"), 0.5)
_HABITS = {
    ("ort", "cpu"): _ORT_CPU,
    ("ort", "gpu"): EngineOverhead(500, 8, 2, False, False, False, _CARD_SHARE, 0.7, 20),
    ("ort", "jetson"): EngineOverhead(900, 8, 2, False, False, False, _CARD_SHARE, 0.5, 50),
    ("tensorrt", "gpu"): EngineOverhead(500, 16, 2, False, False, True, _CARD_SHARE, 0.7, 20),
    ("tensorrt", "jetson"): EngineOverhead(900, 16, 2, False, False, True, _CARD_SHARE, 0.5, 50),
}


@dataclass(frozen=True, slots=True)
class Work:
    """Size of a run: rows of the prompt, and of the cache when the text is at its end."""

    prompt_rows: int
    total_rows: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Memory and time of one component.

    Attributes:
        component: Its name.
        parameters: Its weights, in numbers.
        weights_bytes: In memory.
        activations_bytes: Tensors between nodes, at their most.
        cache_bytes: Keys and values of the whole text, copies included.
        workspace_bytes: Scratch memory in which kernels add up.
        opening_bytes: The most beside the weights while its graph is opened.
        build_bytes: The most while its engine is built; 0 where nothing is compiled.
        build_host_bytes: The part of `build_bytes` that a swap file can take.
        run_ms: One run; of a decoder, reading the prompt.
        step_ms: Decoders only: one more token; else none.
    """

    component: str
    parameters: int
    weights_bytes: float
    activations_bytes: float
    cache_bytes: float
    workspace_bytes: float
    opening_bytes: float
    build_bytes: float
    build_host_bytes: float
    run_ms: float
    step_ms: float | None

    @property
    def total_bytes(self) -> float:
        """Return what it takes while it runs."""
        return self.weights_bytes + self.activations_bytes + self.cache_bytes + self.workspace_bytes


def habits(device: Device, engine: str) -> EngineOverhead:
    """Return what an engine does on a device."""
    return _HABITS[engine, device.kind]


def engines() -> set[str]:
    """Name the engines whose habits are known."""
    return {engine for engine, _ in _HABITS}


def numbers(device: Device, scheme: str) -> SchemeBytes:
    """Return how a scheme stores and computes on a device."""
    return (_CPU if device.kind == "cpu" else _GPU)[scheme]


def cost(
    part: Part,
    device: Device,
    engine: str,
    scheme: str,
    work: Work,
    *,
    cores: int = 1,
    weights_bytes: float | None = None,
) -> Cost:
    """Work out what a component takes in memory and time.

    Args:
        part: The component.
        device: Where it runs.
        engine: The engine that runs it.
        scheme: How its weights are stored.
        work: How long texts are.
        cores: CPUs only: how many cores work.
        weights_bytes: Its weights as they are on disk, or none: by the scheme.
    """
    how, does = numbers(device, scheme), habits(device, engine)
    if weights_bytes is None:
        weights_bytes = stored_bytes(part, how, resident=does.maps)
    else:
        weights_bytes *= how.widened
    weights_bytes += part.writes * part.linear * how.sums_bytes
    opening = _packing_bytes(part, how) if does.maps else 0.0
    rows = work.prompt_rows if part.rows is None else part.rows
    keys = rows if part.keys is None else part.keys
    cache_token = part.cache_width * how.float_bytes
    cache_rows = work.total_rows
    if does.doubles_cache:
        cache_rows = max(CACHE_ROWS_MIN, 1 << (cache_rows - 1).bit_length())
    cache = cache_token * cache_rows * does.cache_copies + part.held * how.float_bytes
    batch = min(part.runs, BATCH)
    activations = batch * _activations(part, rows, keys, how.float_bytes)
    workspace = batch * KERNEL_BYTES * rows * max(part.inner, part.width)
    compute_ms = part.runs * _compute_ms(part, device, how, does, rows, keys, cores)
    bandwidth = device.bandwidth_gb_s * 1e6 * does.bandwidth_share  # bytes a millisecond
    start_ms = max(1, part.layers) * does.layer_us / 1000
    step_ms = None
    if part.writes:
        step_bytes = weights_bytes + cache_token * work.total_rows + part.held * how.float_bytes
        step = _compute_ms(part, device, how, does, 1, work.total_rows, cores)
        step_ms = max(step, step_bytes / bandwidth) + start_ms
    build_host = build = 0.0
    if does.compiles:
        build_host = BUILD_HOST_COPIES * weights_bytes
        build = weights_bytes + activations + workspace + BUILD_SCRATCH
        build += build_host if device.shared_memory else 0
    return Cost(
        part.name,
        part.parameters,
        weights_bytes,
        activations,
        cache,
        workspace,
        opening,
        build,
        build_host if device.shared_memory else 0.0,
        max(compute_ms, weights_bytes / bandwidth) + start_ms,
        step_ms,
    )


def stored_bytes(part: Part, how: SchemeBytes, *, resident: bool) -> float:
    """Return the size of a component's weights; of mapped tables nothing is resident."""
    linear = how.decoder_bytes if part.writes else how.linear_bytes
    table = 0 if resident else part.table * how.float_bytes
    rest = part.vocabulary * how.vocabulary_bytes + part.other * how.float_bytes
    return part.linear * linear + rest + table


def _packing_bytes(part: Part, how: SchemeBytes) -> float:
    """Return what a component's largest weight takes beside its packed form: as it was mapped.

    What is widened is there in full before it is packed, too.
    """
    linear = how.decoder_bytes if part.writes else how.linear_bytes
    layer = min(part.linear, part.width * max(part.inner, part.width))
    largest = max(layer * linear, part.vocabulary * how.vocabulary_bytes)
    return largest * (1 / how.widened + (how.widened > 1))


def _activations(part: Part, rows: int, keys: int, size: float) -> float:
    """Return the most that lives between nodes: two residuals, and attention or the MLP.

    Attention has queries, keys, values and output, and scores before and after the softmax; the
    MLP has its inner rows before and after the activation.
    """
    attention = 4 * rows * part.width + 2 * part.heads * rows * keys
    live = 2 * rows * part.width + max(attention, 2 * rows * part.inner)
    return live * size + rows * part.logits * KERNEL_BYTES


def _compute_ms(
    part: Part,
    device: Device,
    how: SchemeBytes,
    does: EngineOverhead,
    rows: int,
    keys: int,
    cores: int,
) -> float:
    """Return the time of the arithmetic alone."""
    wanted = how.decoder_compute if part.writes else how.compute
    floats = "fp32" if how.float_bytes == KERNEL_BYTES else "fp16"
    own = part.linear - part.source_linear + part.vocabulary
    linear = 2 * (own * rows + part.source_linear * part.source_rows)
    attention = 4 * part.layers * rows * keys * part.width
    scale = 1e9 * (cores if device.kind == "cpu" else 1)  # tera a second in one a millisecond
    return linear / (_rate(device, does, wanted) * scale) + attention / (
        _rate(device, does, floats) * scale
    )


def _rate(device: Device, does: EngineOverhead, precision: str) -> float:
    """Return the rate reached at a precision, or at the next wider one that the device has."""
    order = ("fp8", "int8", "fp16", "fp32")
    for name in order[order.index(precision) :]:
        rate = getattr(device.rates, name)
        if rate is not None:
            return float(rate) * does.compute_share[name]
    raise AssertionError("every device has a rate for fp32")
