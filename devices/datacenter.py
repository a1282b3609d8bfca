"""NVIDIA data-centre and workstation cards: float32 sums cost nothing here.

T4, A10, A100 and H100 figures are those of Lightning's throughput table and of torch's
device_info, whose data sheets they name; the rest is computed like GeForce's, or recalled from
NVIDIA's data sheets (memory, bandwidth, fp32, B200, all of FP4). torch's table has 3350 GB/s for
L4, which is wrong: it is 300.
"""

from __future__ import annotations

from vlmedge.shelves.contracts import Device, Rates

_TURING = ("fp32", "fp16", "int8", "int4")
_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "fp4")


def _card(
    title: str,
    capability: str,
    memory_gib: float,
    bandwidth_gb_s: float,
    precisions: tuple[str, ...],
    rates: Rates,
    *marks: str,
) -> Device:
    return Device(
        title,
        "gpu",
        ("tensorrt", "ort"),
        precisions,
        rates,
        bandwidth_gb_s,
        memory_gib,
        capability,
        marks,
    )


DEVICES = {
    "t4": _card("T4", "7.5", 16, 320, _TURING, Rates(8.1, 65, 130), "Tesla T4", "NVIDIA T4"),
    "a2": _card("A2", "8.6", 16, 200, _AMPERE, Rates(4.5, 18.1, 36.2), "NVIDIA A2"),
    "a10": _card("A10", "8.6", 24, 600, _AMPERE, Rates(31.2, 125, 250), "NVIDIA A10"),
    "a100-40gb": _card(
        "A100 40 GB",
        "8.0",
        40,
        1555,
        _AMPERE,
        Rates(19.5, 312, 624),
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
    ),
    "a100-80gb": _card(
        "A100 80 GB",
        "8.0",
        80,
        2039,  # SXM; PCIe 1935
        _AMPERE,
        Rates(19.5, 312, 624),
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
    ),
    "l4": _card("L4", "8.9", 24, 300, _ADA, Rates(30.3, 121, 242, 242), "NVIDIA L4"),
    "l40s": _card("L40S", "8.9", 48, 864, _ADA, Rates(91.6, 362, 733, 733), "NVIDIA L40S"),
    "h100": _card(
        "H100 SXM",
        "9.0",
        80,
        3350,
        _ADA,
        Rates(66.9, 989, 1979, 1979),
        "NVIDIA H100 80GB HBM3",
    ),
    "h100-pcie": _card(
        "H100 PCIe", "9.0", 80, 2000, _ADA, Rates(51.2, 756, 1513, 1513), "NVIDIA H100 PCIe"
    ),
    "h200": _card("H200", "9.0", 141, 4800, _ADA, Rates(66.9, 989, 1979, 1979), "NVIDIA H200"),
    "b200": _card(
        "B200", "10.0", 180, 8000, _BLACKWELL, Rates(75, 2250, 4500, 4500, 9000), "NVIDIA B200"
    ),
    "rtx-pro-6000": _card(
        "RTX PRO 6000 Blackwell",
        "12.0",
        96,
        1792,  # Server Edition 1597
        _BLACKWELL,
        Rates(125, 504, 1007, 1007, 2015),
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    ),
}
