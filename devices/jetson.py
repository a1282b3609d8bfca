"""NVIDIA Jetson: processor and GPU share one memory.

Dense figures are of the GPU alone, computed as SMs x FMA per clock and SM x 2 x GHz: float16 on
tensor cores 512 (sm_72), 1024 (sm_87), 4096 (sm_110), int8 twice that, float32 lanes 128 (sm_72:
64). They give the published totals, which are sparse and count the DLA: AGX Orin 64 GB 2 x 85.3 +
105 = 275. Clocks, SMs, bandwidth and power are recalled from NVIDIA's data sheets, except where a
line says otherwise; Orin Nano Super and Thor's float16 are published elsewhere too. Module ids are
those of jetson_stats' tables.
"""

from __future__ import annotations

from vlmedge.shelves.contracts import Device, Rates

_JP4 = ("4.6",)
_JP5 = ("5.1",)
_ORIN = ("5.1", "6", "7.2")
_SUPER = ("6.2", "7.2")
_THOR = ("7",)
_TRT = ("tensorrt", "ort")
_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")  # int4 weights: TensorRT 10.3, JetPack 6.1
_VOLTA = ("fp32", "fp16", "int8")  # JetPack 5 has TensorRT 8.5: no int4
_BLACKWELL = (*_AMPERE, "fp8", "fp4")


def _orin(
    title: str,
    sms: int,
    ghz: float,
    memory_gib: float,
    bandwidth_gb_s: float,
    modes: str,
    marks: tuple[str, ...],
    dla: tuple[int, float] = (0, 0.0),
    jetpacks: tuple[str, ...] = _ORIN,
) -> Device:
    """Work out an Orin's rates from its SMs and its clock."""
    fp16 = round(sms * 1024 * 2 * ghz / 1000, 1)
    rates = Rates(fp32=round(fp16 / 8, 2), fp16=fp16, int8=2 * fp16)
    return Device(
        title,
        "jetson",
        _TRT,
        _AMPERE,
        rates,
        bandwidth_gb_s,
        memory_gib,
        "8.7",
        marks,
        *dla,
        jetpacks=jetpacks,
        power_modes=tuple(modes.split()),
    )


DEVICES = {
    # No tensor cores: float16 on CUDA cores at twice float32's rate; no 8-bit products (DP4A).
    "jetson-nano-4gb": Device(
        "Jetson Nano 4 GB",
        "jetson",
        _TRT,
        ("fp32", "fp16"),
        Rates(fp32=0.236, fp16=0.472),  # 128 lanes x 0.92 GHz; published: 472 GFLOPS
        25.6,
        4,
        "5.3",
        ("p3448-0000", "p3448-0002"),
        jetpacks=_JP4,
        power_modes=("MAXN", "5W"),
    ),
    "jetson-tx2-8gb": Device(
        "Jetson TX2",
        "jetson",
        _TRT,
        ("fp32", "fp16"),
        Rates(fp32=0.665, fp16=1.33),  # huggingface.co/hardware lists 1.33
        59.7,
        8,
        "6.2",
        ("p3310-1000", "p3489-0888", "p3489-0000"),
        jetpacks=_JP4,
        power_modes=("MAXN", "MAXQ", "MAXP_CORE_ALL", "MAXP_CORE_ARM", "MAXP_CORE_DENVER"),
    ),
    "jetson-xavier-nx-8gb": Device(
        "Jetson Xavier NX 8 GB",
        "jetson",
        _TRT,
        _VOLTA,
        Rates(fp32=0.85, fp16=6.8, int8=13.5),
        59.7,
        8,
        "7.2",
        ("p3668-0000", "p3668-0001"),
        dla_cores=2,
        dla_int8_tops=9.0,  # about 4.5 each
        jetpacks=_JP5,
        power_modes=("10W", "15W", "20W"),
    ),
    "jetson-xavier-nx-16gb": Device(
        "Jetson Xavier NX 16 GB",
        "jetson",
        _TRT,
        _VOLTA,
        Rates(fp32=0.85, fp16=6.8, int8=13.5),
        59.7,
        16,
        "7.2",
        ("p3668-0003",),
        dla_cores=2,
        dla_int8_tops=9.0,
        jetpacks=_JP5,
        power_modes=("10W", "15W", "20W"),
    ),
    "jetson-agx-xavier-32gb": Device(
        "Jetson AGX Xavier 32 GB",
        "jetson",
        _TRT,
        _VOLTA,
        Rates(fp32=1.41, fp16=11.3, int8=22.6),
        136.5,
        32,
        "7.2",
        ("p2888-0001", "p2888-0004"),
        dla_cores=2,
        dla_int8_tops=10.0,  # about 5 each
        jetpacks=_JP5,
        power_modes=("10W", "15W", "30W", "MAXN"),
    ),
    "jetson-agx-xavier-64gb": Device(
        "Jetson AGX Xavier 64 GB",
        "jetson",
        _TRT,
        _VOLTA,
        Rates(fp32=1.41, fp16=11.3, int8=22.6),
        136.5,
        64,
        "7.2",
        ("p2888-0005",),
        dla_cores=2,
        dla_int8_tops=10.0,
        jetpacks=_JP5,
        power_modes=("10W", "15W", "30W", "MAXN"),
    ),
    "jetson-orin-nano-4gb": _orin(
        "Jetson Orin Nano 4 GB", 4, 0.625, 4, 34, "7W 10W", ("p3767-0004",)
    ),
    "jetson-orin-nano-4gb-super": _orin(
        "Jetson Orin Nano 4 GB Super",
        4,
        1.02,
        4,
        51,
        "7W 10W 25W MAXN_SUPER",
        ("p3767-0004", "super"),
        jetpacks=_SUPER,
    ),
    "jetson-orin-nano-8gb": _orin(
        "Jetson Orin Nano 8 GB", 8, 0.625, 8, 68, "7W 15W", ("p3767-0003", "p3767-0005")
    ),
    # 102 GB/s, 1.02 GHz, 67 sparse TOPS: also in brojogopalsapui.com's quotation of the data sheet
    "jetson-orin-nano-8gb-super": _orin(
        "Jetson Orin Nano 8 GB Super",
        8,
        1.02,
        8,
        102,
        "15W 25W MAXN_SUPER 7W",
        ("p3767-0003", "p3767-0005", "super"),
        jetpacks=_SUPER,
    ),
    "jetson-orin-nx-8gb": _orin(
        "Jetson Orin NX 8 GB",
        8,
        0.765,
        8,
        102.4,
        "10W 15W 20W MAXN",
        ("p3767-0001",),
        dla=(1, 10.0),
    ),
    "jetson-orin-nx-8gb-super": _orin(
        "Jetson Orin NX 8 GB Super",
        8,
        1.173,
        8,
        102.4,
        "10W 15W 20W 40W MAXN_SUPER",
        ("p3767-0001", "super"),
        dla=(1, 20.0),
        jetpacks=_SUPER,
    ),
    "jetson-orin-nx-16gb": _orin(
        "Jetson Orin NX 16 GB",
        8,
        0.918,
        16,
        102.4,
        "10W 15W 25W MAXN",
        ("p3767-0000",),
        dla=(2, 20.0),
    ),
    "jetson-orin-nx-16gb-super": _orin(
        "Jetson Orin NX 16 GB Super",
        8,
        1.173,
        16,
        102.4,
        "10W 15W 25W 40W MAXN_SUPER",
        ("p3767-0000", "super"),
        dla=(2, 40.0),
        jetpacks=_SUPER,
    ),
    "jetson-agx-orin-32gb": _orin(
        "Jetson AGX Orin 32 GB",
        14,
        0.93,
        32,
        204.8,
        "15W 30W 40W MAXN",
        ("p3701-0004",),
        dla=(2, 46.0),
    ),
    "jetson-agx-orin-64gb": _orin(
        "Jetson AGX Orin 64 GB",
        16,
        1.30,
        64,
        204.8,
        "15W 30W 50W MAXN",
        ("p3701-0005",),
        dla=(2, 52.5),
    ),
    # Thor has no DLA. Its power modes are not known for certain: the board's nvpmodel.conf is read.
    "jetson-thor-t4000": Device(
        "Jetson Thor T4000",
        "jetson",
        _TRT,
        _BLACKWELL,
        Rates(fp32=4.7, fp16=150, int8=300, fp8=300, fp4=600),  # 1200 sparse FP4 published
        273,
        64,
        "11.0",
        ("p3834-0000",),  # recalled
        jetpacks=("7.1", "7.2"),
        power_modes=("40W", "70W"),
    ),
    "jetson-thor-t5000": Device(
        "Jetson Thor T5000, AGX Thor",
        "jetson",
        _TRT,
        _BLACKWELL,
        Rates(fp32=8.1, fp16=258.5, int8=517, fp8=517, fp4=1035),  # HF lists 258.5; 20 SM, 1.575
        273,
        128,
        "11.0",
        ("p3834-0008",),
        jetpacks=_THOR,
        power_modes=("40W", "70W", "120W", "MAXN"),
    ),
}
