"""The commands `export` and `quantize`: a checkpoint or a float32 bundle in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli.check import conclude
from vlmedge.cli.options import (
    AllowUnverified,
    BudgetMib,
    BundleFolder,
    Calibrate,
    Checkpoint,
    DeviceName,
    Fp8,
    Fp16,
    Int4,
    Int8,
    Json,
    Keep,
    KeepSlower,
    Lora,
    LoraModules,
    LoraSlots,
    NoCheck,
    Out,
    Overwrite,
    Quiet,
    SchemeName,
    TargetDrop,
)
from vlmedge.cli.plan import this_device

if TYPE_CHECKING:
    from vlmedge.make.recipe import Recipe
    from vlmedge.progress import Progress

FLAGS = ("int8", "int4", "fp8", "fp16")  # the same as --scheme and their name


def export(
    context: typer.Context,
    checkpoint: Checkpoint,
    int8: Int8 = False,
    int4: Int4 = False,
    fp8: Fp8 = False,
    fp16: Fp16 = False,
    scheme: SchemeName = None,
    device: DeviceName = None,
    keep: Keep = None,
    calibrate: Calibrate = None,
    target_drop: TargetDrop = None,
    budget_mib: BudgetMib = None,
    keep_slower: KeepSlower = False,
    allow_unverified: AllowUnverified = False,
    lora: Lora = None,
    lora_slots: LoraSlots = None,
    lora_modules: LoraModules = None,
    out: Out = None,
    overwrite: Overwrite = False,
    no_check: NoCheck = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read .bin weights, which can run code when read."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a checkpoint to a bundle, and compare it with PyTorch."""
    recipe = _recipe(context)
    from vlmedge.cli.watch import progress
    from vlmedge.make.export import export as make

    watcher = progress(quiet)
    if device is not None:
        asked = recipe.scheme if scheme or any(context.params[name] for name in FLAGS) else None
        recipe = _fitting(recipe, checkpoint, device, asked, watcher)
    bundle = make(
        checkpoint,
        out,
        recipe,
        calibrate=calibrate,
        lora=lora or (),
        lora_slots=lora_slots,
        lora_modules=[] if lora_modules is None else lora_modules.split(","),
        overwrite=overwrite,
        check=not no_check,
        allow_unverified=allow_unverified,
        allow_pickle=allow_pickle,
        progress=watcher,
    )
    conclude(bundle, as_json, quiet)


def quantize(
    context: typer.Context,
    bundle: BundleFolder,
    int8: Int8 = False,
    int4: Int4 = False,
    fp8: Fp8 = False,
    fp16: Fp16 = False,
    scheme: SchemeName = None,
    keep: Keep = None,
    calibrate: Calibrate = None,
    target_drop: TargetDrop = None,
    budget_mib: BudgetMib = None,
    keep_slower: KeepSlower = False,
    allow_unverified: AllowUnverified = False,
    lora: Lora = None,
    out: Out = None,
    overwrite: Overwrite = False,
    no_check: NoCheck = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a float32 bundle, and compare the result with PyTorch."""
    recipe = _recipe(context)
    from vlmedge.cli.watch import progress
    from vlmedge.make.quantize import quantize as make

    if recipe.scheme == "float32":
        raise typer.BadParameter("give --int8, --int4, --fp8, --fp16 or --scheme NAME")
    made = make(
        bundle,
        recipe,
        out,
        calibrate=calibrate,
        lora=lora or (),
        overwrite=overwrite,
        check=not no_check,
        allow_unverified=allow_unverified,
        progress=progress(quiet),
    )
    conclude(made, as_json, quiet)


def _recipe(context: typer.Context) -> Recipe:
    """Make a recipe of a command's options; a file's own entries may be overruled."""
    from vlmedge.make.recipe import Recipe, read_recipe

    given = context.params
    named = [name for name in FLAGS if given[name]]
    named += [given["scheme"]] if given["scheme"] is not None else []
    if len(set(named)) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} are different schemes: give one of them")
    asked = named[0] if named else "float32"
    file = Path(asked)
    recipe = read_recipe(file) if file.suffix == ".json" else Recipe(asked)
    keep = dict(recipe.keep)
    for entry in given["keep"] or ():
        pattern, equals, precision = entry.partition("=")
        keep[pattern] = precision if equals else "float32"
    changes = {
        name: given[name]
        for name in ("target_drop", "budget_mib", "keep_slower")
        if given[name] is not None and given[name] is not False  # 0 is neither
    }
    return Recipe(**{**_fields(recipe), **changes, "keep": keep})


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in recipe.__struct_fields__}


def _fitting(
    recipe: Recipe, checkpoint: str, device: str, asked: str | None, progress: Progress
) -> Recipe:
    """Give a recipe the scheme that fits a device, or refuse what was asked for."""
    import msgspec

    from vlmedge.plan.plan import follow

    name = this_device() if device == "auto" else device
    scheme = follow(checkpoint, name, asked, progress)
    progress.note(f"{scheme} for {name}")
    return msgspec.structs.replace(recipe, scheme=scheme)
