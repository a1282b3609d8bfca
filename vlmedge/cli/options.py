"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Built-in name, folder, alias or hub id.")
]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by export.")]
Frames = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of a video, how many it looks at.")
]
Images = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit weights, and activations in encoders.")]
Int4 = Annotated[bool, typer.Option("--int4", help="4-bit weights in decoders, int8 elsewhere.")]
Fp8 = Annotated[bool, typer.Option("--fp8", help="8-bit floats, for GPUs that have them.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="16-bit floats, but where they overflow.")]
SchemeName = Annotated[
    str | None,
    typer.Option("--scheme", metavar="NAME|FILE", help="One of list's, or a recipe in JSON."),
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Fit for this one of list's, or not at all."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN=float32",
        help="Leave layers in float32 or int8, by a pattern of their names. May be repeated.",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", metavar="DIR", help="Pictures to calibrate with, and captions.jsonl."
    ),
]
TargetDrop = Annotated[
    float | None,
    typer.Option(
        "--target-drop",
        metavar="POINTS",
        help="Give layers more bits until no task has lost more.",
    ),
]
BudgetMib = Annotated[
    float | None,
    typer.Option("--budget-mib", metavar="N", help="Give layers more bits while they fit."),
]
KeepSlower = Annotated[
    bool, typer.Option("--keep-slower", help="Quantize also what becomes slower here.")
]
AllowUnverified = Annotated[
    bool,
    typer.Option("--allow-unverified", help="Write the best mix also if it misses the target."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="DIR[=WEIGHT]", help="Merge a PEFT adapter in. May be repeated."
    ),
]
LoraSlots = Annotated[
    int | None,
    typer.Option(
        "--lora-slots", min=1, metavar="RANK", help="Take adapters up to this rank at run time."
    ),
]
LoraModules = Annotated[
    str | None,
    typer.Option(
        "--lora-modules",
        metavar="A,B,C",
        help="Linears that get slots, such as q_proj,v_proj.",
        show_default="all in layers",
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder to make.", show_default="NAME-SCHEME")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not compare with PyTorch; leaves it unverified.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no tables.")]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="New tokens at most.")]
NumBeams = Annotated[int | None, typer.Option(metavar="N", help="Beams; 1 is greedy.")]
Temperature = Annotated[float | None, typer.Option(metavar="X", help="Sample, at this heat.")]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the K likeliest.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Sample from this probability.")]
Penalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1: less repetition."),
]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="What runs the graphs; see list.")
]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Close each component before the next one opens.")
]
AllowFallback = Annotated[
    bool,
    typer.Option("--allow-fallback", help="Run on the CPU what a GPU's engine cannot run there."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of the draw, when sampling.")]
