"""NVIDIA GeForce: desktop cards.

`fp16` is with sums in float32, which GeForce does at half the rate of sums in float16 and TensorRT
normally does; int8 and fp8 are full rates, so int8 is 4 times `fp16`. Figures are computed as SMs x
FMA per clock and SM (512 for float16 with float16 sums) x 2 x boost clock; they agree with what
hmc-tech.com (RTX 4090: 661 int8) and spheron.network (RTX 5090) have. fp32 lanes are 128 an SM (64
on Turing). Memory and bandwidth are recalled from NVIDIA's pages. fp8 with float32 sums is half.
"""

from __future__ import annotations

from vlmedge.shelves.contracts import Device, Rates

_TURING = ("fp32", "fp16", "int8", "int4")
_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "fp4")
_PRECISIONS = {"7.5": _TURING, "8.6": _AMPERE, "8.9": _ADA, "12.0": _BLACKWELL}


def _rtx(
    name: str, capability: str, memory_gib: float, bandwidth_gb_s: float, int8: float
) -> Device:
    """Derive every rate from int8's, whose ratio to the others is the architecture's."""
    precisions = _PRECISIONS[capability]
    rates = Rates(
        fp32=round(int8 / (16 if capability == "7.5" else 8), 1),
        fp16=int8 / 4,
        int8=int8,
        fp8=int8 / 2 if "fp8" in precisions else None,
        fp4=2 * int8 if "fp4" in precisions else None,
    )
    return Device(
        f"GeForce {name}",
        "gpu",
        ("tensorrt", "ort"),
        precisions,
        rates,
        bandwidth_gb_s,
        memory_gib,
        capability,
        (f"NVIDIA GeForce {name}",),
    )


DEVICES = {
    # No tensor cores and float16 at 1/64 of float32: float32, or int8 by DP4A. TensorRT 8.6 is the
    # last for it.
    "gtx-1080": Device(
        "GeForce GTX 1080",
        "gpu",
        ("tensorrt", "ort"),
        ("fp32", "int8"),
        Rates(fp32=8.9, int8=35.5),
        320,
        8,
        "6.1",
        ("NVIDIA GeForce GTX 1080", "GeForce GTX 1080"),
    ),
    "rtx-2060": _rtx("RTX 2060", "7.5", 6, 336, 103),
    "rtx-2070": _rtx("RTX 2070", "7.5", 8, 448, 119),
    "rtx-2080": _rtx("RTX 2080", "7.5", 8, 448, 161),
    "rtx-2080-ti": _rtx("RTX 2080 Ti", "7.5", 11, 616, 215),
    "rtx-3050": _rtx("RTX 3050", "8.6", 8, 224, 73),
    "rtx-3060": _rtx("RTX 3060", "8.6", 12, 360, 102),
    "rtx-3070": _rtx("RTX 3070", "8.6", 8, 448, 163),
    "rtx-3080": _rtx("RTX 3080", "8.6", 10, 760, 238),
    "rtx-3090": _rtx("RTX 3090", "8.6", 24, 936, 285),
    "rtx-4060": _rtx("RTX 4060", "8.9", 8, 272, 121),
    "rtx-4070": _rtx("RTX 4070", "8.9", 12, 504, 233),
    "rtx-4080": _rtx("RTX 4080", "8.9", 16, 717, 390),
    "rtx-4090": _rtx("RTX 4090", "8.9", 24, 1008, 661),
    "rtx-5060": _rtx("RTX 5060", "12.0", 8, 448, 153),
    "rtx-5070": _rtx("RTX 5070", "12.0", 12, 672, 247),
    "rtx-5080": _rtx("RTX 5080", "12.0", 16, 960, 450),
    "rtx-5090": _rtx("RTX 5090", "12.0", 32, 1792, 838),
}
