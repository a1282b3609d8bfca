"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# What commands work on.
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="A built-in checkpoint, a folder, an alias or a hub id."
    ),
]
BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder made by `vlmedge export`.")
]
Image = Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")]
Images = Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")]

# How a bundle is made.
Int8 = Annotated[
    bool, typer.Option("--int8", help="Quantize weights to 8 bits, and activations in encoders.")
]
Int4 = Annotated[
    bool, typer.Option("--int4", help="Quantize decoders to 4-bit weights, the rest to int8.")
]
Fp8 = Annotated[
    bool, typer.Option("--fp8", help="Quantize to 8-bit floats, for GPUs that support them.")
]
Fp16 = Annotated[
    bool, typer.Option("--fp16", help="Convert to 16-bit floats, except where they overflow.")
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="NAME|FILE",
        help="Quantization scheme (names: vlmedge list), or a recipe in JSON.",
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Pick a scheme that fits this device, or fail; names: vlmedge list.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN=float32",
        help="Keep layers whose names match the pattern in float32 or int8. May be repeated.",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="DIR",
        help="Calibrate on the pictures of this folder, and on its captions.jsonl if it has one.",
    ),
]
TargetDrop = Annotated[
    float | None,
    typer.Option(
        "--target-drop",
        metavar="POINTS",
        help="Give layers more bits until no task loses more points than this.",
    ),
]
BudgetMib = Annotated[
    float | None,
    typer.Option(
        "--budget-mib",
        metavar="N",
        help="Give layers more bits as long as all graphs fit into N MiB.",
    ),
]
KeepSlower = Annotated[
    bool,
    typer.Option(
        "--keep-slower",
        help="Quantize components even if that makes them slower on this machine.",
    ),
]
AllowUnverified = Annotated[
    bool,
    typer.Option("--allow-unverified", help="Write the best mix even if it misses --target-drop."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="DIR[=WEIGHT]",
        help="Merge a PEFT adapter into the weights. May be repeated.",
    ),
]
LoraSlots = Annotated[
    int | None,
    typer.Option(
        "--lora-slots",
        min=1,
        metavar="RANK",
        help="Leave room for LoRA adapters up to this rank, to be loaded at run time.",
    ),
]
LoraModules = Annotated[
    str | None,
    typer.Option(
        "--lora-modules",
        metavar="A,B,C",
        help="Linears that those adapters may change, such as q_proj,v_proj.",
        show_default="all of the model's layers",
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder to write.", show_default="NAME-SCHEME")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")]
NoCheck = Annotated[
    bool,
    typer.Option(
        "--no-check", help="Skip the comparison with PyTorch; the bundle stays unverified."
    ),
]

# How a bundle is run.
EngineName = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME", help="Engine that runs the graphs; names: vlmedge list."
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory", help="Save memory: close each component before the next one opens."
    ),
]
AllowFallback = Annotated[
    bool,
    typer.Option(
        "--allow-fallback", help="Run nodes on the CPU that the GPU's engine does not support."
    ),
]
Frames = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of frames to take from a video.")
]

# How text is generated.
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Maximum number of new tokens.", show_default="the bundle's own"
    ),
]
NumBeams = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Number of beams; 1 turns beam search off.",
        show_default="the bundle's own",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", help="Sample with this temperature.")
]
TopK = Annotated[
    int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Sample from the most likely tokens that make up probability P."
    ),
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Make repeated tokens less likely if above 1; 1 is no penalty.",
    ),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Random seed for sampling.")]

# What is printed.
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no tables.")]

SAMPLING = (
    "seed",
    "max_tokens",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)


def sampling(context: typer.Context) -> dict[str, Any]:
    """Take the options of text generation that a command has, by their names in Python."""
    return {name: context.params[name] for name in SAMPLING if name in context.params}
