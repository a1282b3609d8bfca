"""Whether a bundle can be built for a device of the catalogue: refused before any work, or not.

A build follows the catalogue (what the device computes in), the JetPack table (which TensorRT it
has) and the plan (memory). It runs on that device alone; `--check-only` needs none.
"""

from __future__ import annotations

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.host.identify import detect
from vlmedge.host.jetpack import DLA_VERSIONS, OLDEST, has_dla, number, tensorrt_of
from vlmedge.plan import plan as planning
from vlmedge.progress import Progress
from vlmedge.shelves import registry


def tensorrt_versions(device: str) -> tuple[str, ...]:
    """Return the TensorRT versions of a board's JetPack releases, major.minor, the oldest first.

    Empty for what has no JetPack: a desktop takes any.
    """
    found = tensorrt_of(registry.device(device).jetpacks)
    return tuple(dict.fromkeys(_short(version) for version in found))


def refuse_unfit(
    bundle: Bundle, device: str, precision: str, tensorrt: str | None, progress: Progress
) -> tuple[str, ...]:
    """Refuse what a device cannot do.

    Args:
        bundle: The bundle to build.
        device: A name of the catalogue.
        precision: Number format that float layers are to compute in.
        tensorrt: The version that is asked for, or none.
        progress: Watches.

    Returns:
        The TensorRT versions to check for: the one that is asked for, or all that the device has.

    Raises:
        InputError: The device has no TensorRT, or not that version, lacks the arithmetic, or the
            memory.
    """
    found = registry.device(device)
    if "tensorrt" not in found.engines:
        raise InputError(f"{device} has no TensorRT: use --engine ort there, which needs no build")
    versions = tensorrt_versions(device)
    usable = tuple(v for v in versions if number(v) >= OLDEST)
    if versions and not usable:
        raise InputError(
            f"{device} has TensorRT {', '.join(versions)}: engines are built with "
            f"{OLDEST[0]}.{OLDEST[1]} and newer: use --engine ort there"
        )
    if tensorrt is not None and usable and _short(tensorrt) not in usable:
        raise InputError(
            f"{device} has no TensorRT {tensorrt}: its JetPack has {', '.join(usable)}"
        )
    scheme = bundle.manifest.scheme
    half = scheme == "float32" and precision == "float16"
    _refuse_memory(bundle, device, "fp16" if half else scheme, half, progress)
    return (tensorrt,) if tensorrt is not None else usable


def refuse_without_dla(device: str, versions: tuple[str, ...]) -> None:
    """Refuse to build for a deep-learning accelerator that a device, or its TensorRT, lacks."""
    if not registry.device(device).dla_cores:
        having = ", ".join(name for name, one in registry.devices().items() if one.dla_cores)
        raise InputError(f"{device} has no DLA: leave --dla out; these have one: {having}")
    if not any(map(has_dla, versions)):
        raise InputError(
            f"TensorRT {', '.join(versions)} has no DLA ({DLA_VERSIONS} have): leave --dla out"
        )


def refuse_elsewhere(device: str) -> None:
    """Refuse to build anywhere but on the device: plans run only where they were made."""
    here = detect()
    if here.device != device:
        name = here.device or here.model or (here.gpus[0].name if here.gpus else "no known device")
        raise InputError(
            f"this is {name}, not {device}, and TensorRT's engines run only "
            "where they were built: build there, or give --check-only"
        )


def _refuse_memory(
    bundle: Bundle, device: str, scheme: str, half: bool, progress: Progress
) -> None:
    """Refuse what does not fit, or has no arithmetic there, as `vlmedge plan` does."""
    name = str(bundle.path)
    shape, stored = planning.look_up(name, progress)
    # float32 weights are halved when the engine is built: what is on disk does not count
    plan = planning.make_plan(
        name, shape, planning.PlanRequest(device, "tensorrt"), stored=None if half else stored
    )
    if (refused := planning.refusal(plan, shape, scheme)) is not None:
        raise InputError(refused)


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])
