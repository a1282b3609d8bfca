"""What will fit on a device and how fast it will be, before any work and without any weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmedge.bundle import MANIFEST, read_manifest
from vlmedge.checkpoints.resolve import resolve
from vlmedge.errors import CheckpointError, InputError
from vlmedge.host.hardware import free_bytes, this_machine
from vlmedge.host.jetpack import OLDEST, has_dla, number, tensorrt_of
from vlmedge.plan.roofline import SCHEMES, Cost, Work, cost, engines, habits, numbers
from vlmedge.plan.shape import Fields, Shape
from vlmedge.progress import Progress
from vlmedge.shelves import registry
from vlmedge.shelves.contracts import Device
from vlmedge.shelves.registry import FAMILIES, Registry, unknown
from vlmedge.units import GIB, MIB

TOKENS = 64  # of a question, and of an answer
TIGHT = 0.9  # of the free memory; predictions have been wrong by less than the rest
SAME_SPEED = 1.1  # schemes whose times differ by less are as fast as each other

# What is not free on a board: the kernel's carve-outs (recalled: MemTotal is 7.4 of 8 GiB on an
# Orin Nano, 61.4 of 64 on an AGX Orin), then the system, with or without a desktop (recalled).
CARVE_OUT_SHARE, CARVE_OUT_GIB = 0.03, 0.4
SYSTEM_GIB, DESKTOP_GIB = 0.7, 0.8
CARD_GIB = 0.6  # driver and display, on a card of its own memory (recalled)

Verdict = Literal["fits", "tight", "too big", "cannot be built", "no arithmetic"]


@dataclass(frozen=True, slots=True)
class SchemePlan:
    """One scheme on the device.

    Attributes:
        scheme: Its name.
        verdict: Whether it fits; tight: with less than a tenth to spare. It cannot be built where
            what a swap file cannot take is more than there is.
        process_bytes: Memory of the engine without a model.
        total_bytes: The most while it opens and runs, all components open.
        build_bytes: The most while an engine is built; 0 where nothing is.
        swap_bytes: Memory that the build needs beyond what is free.
        first_token_ms: Every encoder once, and the prompt read; none without a decoder.
        tokens_per_s: Speed of the decode loop at the end of the text; none without a decoder.
        parts: By component.
    """

    scheme: str
    verdict: Verdict
    process_bytes: float
    total_bytes: float
    build_bytes: float
    swap_bytes: float
    first_token_ms: float | None
    tokens_per_s: float | None
    parts: tuple[Cost, ...]

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.verdict in ("fits", "tight")


@dataclass(frozen=True, slots=True)
class Plan:
    """Expected memory and time of a model on a device.

    Attributes:
        model: As it was asked for.
        parameters: How many it has.
        device: Its name in the catalogue.
        title: The device's common name.
        engine: The engine that runs it there.
        free_bytes: Memory for it.
        free_is: How that number is known.
        prompt_tokens: Text tokens of the prompt, beside the picture's rows.
        picture_tokens: The picture's rows in the prompt.
        new_tokens: Tokens that are written.
        cores: CPUs only: how many cores work.
        schemes: The most bits first.
        recommended: The fastest scheme that fits; of equals, the one with the most bits.
        profile: Ranges MIN:OPT:MAX of the named axes for this work.
        notes: Further remarks.
    """

    model: str
    parameters: int
    device: str
    title: str
    engine: str
    free_bytes: float
    free_is: str
    prompt_tokens: int
    picture_tokens: int
    new_tokens: int
    cores: int
    schemes: tuple[SchemePlan, ...]
    recommended: str | None
    profile: dict[str, str]
    notes: tuple[str, ...]

    def scheme(self, name: str) -> SchemePlan:
        """Return the plan of one scheme."""
        return next(s for s in self.schemes if s.scheme == name)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Device and workload to plan for.

    Attributes:
        device: A name of the catalogue.
        engine: Name of the engine; none: the device's first.
        prompt_tokens: Text tokens of the prompt; none: 64, or as many as a small model has room
            for.
        new_tokens: Tokens to be written; none: likewise.
        headless: Without a desktop.
        free_gib: Memory for the model, or none: as the device has it.
        cores: CPUs only: how many cores work; none: this machine's.
    """

    device: str
    engine: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    headless: bool = False
    free_gib: float | None = None
    cores: int | None = None


def read_shape(path: Path) -> Shape:
    """Count a checkpoint's parts from config.json.

    Args:
        path: That file, or the folder that holds it.

    Raises:
        CheckpointError: It is not there, or lacks what is needed.
        UnknownNameError: No file of export/shapes/ counts such a checkpoint.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config: Any = json.loads(file.read_bytes())
    except FileNotFoundError:
        if path.is_dir():
            raise CheckpointError(f"{path} is no checkpoint: it has no config.json") from None
        raise CheckpointError(f"{path}: no such file or folder: give a config.json") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON: download it again") from None
    kind = SHAPES.covering(config, file, "plan for the architecture")
    return SHAPES[kind](Fields(config, str(file), file.parent))


def look_up(name: str, progress: Progress) -> tuple[Shape, tuple[str, Mapping[str, float]] | None]:
    """Find what is to be planned: a bundle's folder, a checkpoint in any form, or a config.json.

    Returns:
        Its shape; of a bundle also its scheme and the resident bytes of its components' weights.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        from vlmedge.plan.bundle_shape import bundle_shape

        manifest = read_manifest(path)
        shape, sizes = bundle_shape(path, manifest)
        return shape, (manifest.scheme, sizes)
    if path.is_file():
        return read_shape(path), None
    return read_shape(resolve(name, progress, config_only=True).folder), None


def make_plan(
    model: str,
    shape: Shape,
    wish: PlanRequest,
    *,
    stored: tuple[str, Mapping[str, float]] | None = None,
) -> Plan:
    """Plan every scheme of a model on a device.

    Args:
        model: Name of the model.
        shape: Its numbers.
        wish: Where and for what.
        stored: A bundle's scheme and the resident bytes of its components' weights; only that
            scheme is planned then.
    """
    device = registry.device(wish.device)
    engine = _engine(wish, device)
    free, free_is = _free(wish, device)
    prompt_tokens, new_tokens = _tokens(shape, wish)
    prompt_rows = shape.soft_rows + prompt_tokens
    work = Work(prompt_rows, prompt_rows + new_tokens)
    cores = wish.cores or this_machine(()).threads
    names = SCHEMES if stored is None else (_known_scheme(stored[0]),)
    sizes: Mapping[str, float] = {} if stored is None else stored[1]
    schemes = tuple(
        _scheme(shape, device, engine, name, work, free, cores, sizes) for name in names
    )
    return Plan(
        model,
        shape.parameters,
        wish.device,
        device.title,
        engine,
        free,
        free_is,
        prompt_tokens,
        shape.soft_rows,
        new_tokens,
        cores,
        schemes,
        _recommend(schemes, new_tokens),
        _profile(shape, work),
        _notes(device, engine, schemes),
    )


def refusal(plan: Plan, shape: Shape, asked: str | None) -> str | None:
    """Return what would fit instead, if the model does not.

    Args:
        plan: As made.
        shape: Numbers of its model.
        asked: A scheme, or none: any.

    Returns:
        One line, or none when it fits.
    """
    if asked is not None:
        _known_scheme(asked)
        if asked not in {s.scheme for s in plan.schemes}:
            raise InputError(
                f"{plan.model} is {plan.schemes[0].scheme}: plan its checkpoint for {asked}"
            )
        if plan.scheme(asked).fits:
            return None
    elif plan.recommended is not None:
        return None
    smallest = min(plan.schemes, key=lambda s: s.total_bytes)
    chosen = smallest if asked is None else plan.scheme(asked)
    if chosen.verdict == "no arithmetic":
        how = f"{plan.model} in {chosen.scheme}: {plan.device} cannot compute in it"
    elif chosen.verdict == "cannot be built":
        how = (
            f"{plan.model} in {chosen.scheme} needs {chosen.build_bytes / GIB:.1f} GiB to build, "
            f"{plan.device} has {plan.free_bytes / GIB:.1f} free"
        )
    else:
        how = (
            f"{plan.model} in {chosen.scheme} needs {chosen.total_bytes / GIB:.1f} GiB, "
            f"{plan.device} has {plan.free_bytes / GIB:.1f} free"
        )
    fits = [s for s in plan.schemes if s.fits]
    cures = [f"{s.scheme} fits there ({s.total_bytes / GIB:.1f} GiB)" for s in fits[:1]]
    roomy = _smallest_device(plan, shape, chosen.scheme)
    cures += [f"{chosen.scheme} fits on {roomy}"] if roomy else []
    return f"{how}: {'; '.join(cures) or 'no device of the catalogue has enough'}"


def follow(name: str, device: str, scheme: str | None, progress: Progress) -> str:
    """Choose the scheme for an export or a build for a device; refuse one that does not fit.

    Args:
        name: A checkpoint or a bundle.
        device: A name of the catalogue.
        scheme: The scheme that was asked for, or none: the recommended one.
        progress: Watches a download.

    Raises:
        InputError: It does not fit; the message says what would.
    """
    shape, stored = look_up(name, progress)
    plan = make_plan(name, shape, PlanRequest(device), stored=stored)
    if (refused := refusal(plan, shape, scheme)) is not None:
        raise InputError(refused)
    return scheme or str(plan.recommended)


def _scheme(
    shape: Shape,
    device: Device,
    engine: str,
    scheme: str,
    work: Work,
    free: float,
    cores: int,
    stored: Mapping[str, float],
) -> SchemePlan:
    """Add up the components under one scheme."""
    does = habits(device, engine)
    parts = tuple(
        cost(part, device, engine, scheme, work, cores=cores, weights_bytes=stored.get(part.name))
        for part in shape.parts
    )
    process = (does.process_mib + does.component_mib * len(parts)) * MIB
    total = process + _peak_bytes(parts)
    building = max(parts, key=lambda part: part.build_bytes)
    build = process + building.build_bytes if building.build_bytes else 0.0
    if numbers(device, scheme).precision not in device.precisions:
        verdict: Verdict = "no arithmetic"
    elif total > free:
        verdict = "too big"
    elif build - building.build_host_bytes > free:
        verdict = "cannot be built"
    else:
        verdict = "fits" if total <= TIGHT * free else "tight"
    decoder = next((part for part in parts if part.step_ms is not None), None)
    first = sum(part.run_ms for part in parts) if decoder else None
    rate = 1000 / decoder.step_ms if decoder and decoder.step_ms else None
    swap = max(0.0, build - free)
    return SchemePlan(scheme, verdict, process, total, build, swap, first, rate, parts)


def _peak_bytes(parts: tuple[Cost, ...]) -> float:
    """Return the most that components take: all of them run, or one opens after others ran."""
    peak = before = 0.0
    for part in parts:
        peak = max(peak, before + part.weights_bytes + part.opening_bytes)
        before += part.total_bytes
    return max(peak, before)


def _tokens(shape: Shape, wish: PlanRequest) -> tuple[int, int]:
    """Return how many tokens are read and written; refuse more than the model has positions."""
    most = shape.max_positions
    room = 2 * TOKENS if most is None else max(2, most - shape.soft_rows)
    read = min(TOKENS, room // 2) if wish.prompt_tokens is None else wish.prompt_tokens
    written = wish.new_tokens or max(1, min(TOKENS, room - read))
    total = shape.soft_rows + read + written
    if most is not None and total > most:
        raise InputError(
            f"{total} tokens ({shape.soft_rows} of the picture, {read} of the prompt, {written} "
            f"new): the model has {most} positions, lower prompt_tokens or max_tokens"
        )
    return read, written


def _engine(wish: PlanRequest, device: Device) -> str:
    engine = wish.engine or next(e for e in device.engines if e in engines())
    if engine not in device.engines:
        raise InputError(
            f"engine {engine!r} does not run on {wish.device}: "
            f"choose from {', '.join(device.engines)}"
        )
    return engine


def _known_scheme(name: str) -> str:
    if name not in SCHEMES:
        raise unknown("plan for the scheme", name, SCHEMES)
    return name


def _free(wish: PlanRequest, device: Device) -> tuple[float, str]:
    """Return the memory that a model can have, and how that is known."""
    if wish.free_gib is not None:
        return wish.free_gib * GIB, "as given"
    if device.memory_gib is None:
        if not (here := free_bytes()):
            raise InputError("this system does not report its free memory: give --free-gib")
        return float(here), "of this machine now"
    if not device.shared_memory:
        return (device.memory_gib - CARD_GIB) * GIB, f"of {device.memory_gib:g}, its own"
    system = SYSTEM_GIB + (0 if wish.headless else DESKTOP_GIB)
    free = device.memory_gib * (1 - CARVE_OUT_SHARE) - CARVE_OUT_GIB - system
    kept = "the system" if wish.headless else "the system and its desktop"
    return free * GIB, f"of {device.memory_gib:g}, shared with {kept}"


def _recommend(schemes: tuple[SchemePlan, ...], new_tokens: int) -> str | None:
    """Choose the fastest that fits; of those as fast as it, the first has the most bits."""
    times = {s.scheme: _time_ms(s, new_tokens) for s in schemes if s.fits}
    fastest = min(times.values(), default=0.0)
    return next((name for name, ms in times.items() if ms <= SAME_SPEED * fastest), None)


def _time_ms(scheme: SchemePlan, new_tokens: int) -> float:
    """Return the time of one answer, or of one run of each encoder."""
    if scheme.first_token_ms is None or scheme.tokens_per_s is None:
        return sum(part.run_ms for part in scheme.parts)
    return scheme.first_token_ms + 1000 * (new_tokens - 1) / scheme.tokens_per_s


def _profile(shape: Shape, work: Work) -> dict[str, str]:
    """Return ranges of the named axes as `vlmedge build` takes them."""
    if shape.decoder is None:
        rows = [p.rows for p in shape.parts if p.table and p.rows]
        return {"batch": "1:1:1", "tokens": f"1:{min(16, max(rows))}:{max(rows)}"} if rows else {}
    return {
        "batch": "1:1:1",
        "tokens": f"1:{work.prompt_rows}:{work.prompt_rows}",
        "past": f"0:{work.prompt_rows}:{work.total_rows - 1}",
        "total": f"1:{work.prompt_rows + 1}:{work.total_rows}",
    }


def _notes(device: Device, engine: str, schemes: tuple[SchemePlan, ...]) -> tuple[str, ...]:
    notes = []
    if all(jetpack.startswith("4") for jetpack in device.jetpacks) and device.jetpacks:
        notes.append("its last JetPack, 4.6, has Python 3.6: vlmedge does not run there")
    usable = [v for v in tensorrt_of(device.jetpacks) if number(v) >= OLDEST and has_dla(v)]
    if engine == "tensorrt" and device.dla_cores and usable:
        notes.append(
            "its DLA is not planned with: `vlmedge build --dla faster` measures there, with "
            f"TensorRT {', '.join(usable)}, whether the vision tower is faster on it"
        )
    swapping = [s for s in schemes if s.fits and s.swap_bytes]
    if swapping:
        needs = ", ".join(f"{s.scheme} {s.swap_bytes / GIB:.1f} GiB" for s in swapping)
        notes.append(f"building engines there needs swap: {needs}")
    if engine != "ort" or device.kind != "cpu":
        notes.append("speed and build peak on GPUs are estimates that no board has confirmed yet")
    return tuple(notes)


def _smallest_device(plan: Plan, shape: Shape, scheme: str) -> str | None:
    """Name the device with the least memory, of the same kind if there is one, where it fits."""
    kind = registry.device(plan.device).kind
    found = []
    for name, device in registry.devices().items():
        if device.memory_gib is None:
            continue
        work = PlanRequest(name, None, plan.prompt_tokens, plan.new_tokens, cores=1)
        if make_plan(plan.model, shape, work).scheme(scheme).verdict == "fits":
            found.append((device.kind != kind, device.memory_gib, name))
    return min(found)[2] if found else None


SHAPES: Registry[Callable[[Fields], Shape]] = Registry(
    "export.shapes", "SHAPE", "shape", "cpu", FAMILIES
)
