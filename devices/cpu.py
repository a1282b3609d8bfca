"""Computers without a GPU, by what their cores can do in one instruction.

Rates are of one core: operations a clock x a clock of 3 GHz, both generic. Bandwidth is that of two
channels of DDR4-3200 (2 x 8 byte x 3.2 GHz), of 64 bits of LPDDR4X-4267 for Arm boards. Marks are
flags in /proc/cpuinfo that all must be there. ONNX Runtime multiplies float16 in float32 here, so
it is no precision of theirs.
"""

from __future__ import annotations

from vlmedge.shelves.contracts import Device, Rates

_PRECISIONS = ("fp32", "int8", "int4")
_GHZ = 3.0


def _cpu(
    title: str, fp32: int, int8: int, marks: tuple[str, ...], bandwidth_gb_s: float = 51.2
) -> Device:
    """Describe a kind of core by its operations a clock."""
    rates = Rates(fp32=fp32 * _GHZ / 1000, int8=int8 * _GHZ / 1000)
    return Device(title, "cpu", ("ort",), _PRECISIONS, rates, bandwidth_gb_s, marks=marks)


DEVICES = {
    # 2 FMA units x 8 float32 lanes x 2; int8 in 16-bit sums at twice that
    "cpu-x86-avx2": _cpu("x86-64 CPU with AVX2", 32, 64, ("avx2", "fma")),
    "cpu-x86-avx512": _cpu("x86-64 CPU with AVX-512", 64, 128, ("avx512f", "avx512bw")),
    # vpdpbusd: 4 multiply-adds a lane
    "cpu-x86-avx512-vnni": _cpu("x86-64 CPU with AVX512-VNNI", 64, 256, ("avx512f", "avx512_vnni")),
    # one 16 x 64 by 64 x 16 tile in 16 clocks
    "cpu-x86-amx": _cpu(
        "x86-64 CPU with AMX", 64, 2048, ("avx512_vnni", "amx_int8"), bandwidth_gb_s=307.2
    ),
    # 2 NEON units x 4 lanes x 2
    "cpu-arm64": _cpu("Arm CPU", 16, 32, ("asimd",), bandwidth_gb_s=34.1),
    "cpu-arm64-dotprod": _cpu("Arm CPU with SDOT", 16, 64, ("asimddp",), bandwidth_gb_s=34.1),
    "cpu-arm64-i8mm": _cpu("Arm CPU with I8MM", 16, 128, ("asimddp", "i8mm"), bandwidth_gb_s=34.1),
}
