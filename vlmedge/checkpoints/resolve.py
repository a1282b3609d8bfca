"""What CHECKPOINT on the command line can be, and which family it belongs to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmedge.errors import CheckpointError, MissingExtraError
from vlmedge.progress import Progress
from vlmedge.shelves.registry import FAMILIES, unknown
from vlmedge.spec.manifest import CheckpointId
from vlmedge.units import MIB

BUILT_INS = Path(__file__).parent

# What an export reads; the rest of a hub repository (other frameworks, pictures) stays there.
# A `*` passes folders, so the parts of a composite come too.
_WANTED = (
    *("*.json", "*.jinja", "*.safetensors", "*merges.txt", "*vocab.txt", "*.model"),
    "vae-oid.npz",
)
_PICKLES = ("*.bin", "checkpoint.pt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        folder: Hugging Face layout.
        id: Built-in name, hub id or folder name.
        revision: Commit on the hub, or none.
        name: Name that output folders get.
        built_in: Whether it ships with vlmedge.
    """

    folder: Path
    id: str
    revision: str | None
    name: str
    built_in: bool

    def identity(self) -> CheckpointId:
        """Digest config.json, and path, size and the last MiB of each weight file, parts' too.

        Two trainings of one shape differ there too, and nobody waits for 15 GB.
        """
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        kinds = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.npz", "*/config.json")
        for file in sorted(file for kind in kinds for file in self.folder.rglob(kind)):
            size, name = file.stat().st_size, file.relative_to(self.folder).as_posix()
            total.update(f"\n{name} {size}\n".encode())
            with file.open("rb") as stream:
                stream.seek(max(0, size - MIB))
                total.update(stream.read())
        return CheckpointId(self.id, self.revision, total.hexdigest())


def built_ins() -> list[str]:
    """Name the checkpoints that ship with vlmedge."""
    return sorted(f.parent.name for f in BUILT_INS.glob("*/config.json"))


def aliases() -> dict[str, str]:
    """Return every short alias and the hub id that it stands for."""
    found: dict[str, str] = {}
    for family in FAMILIES.names():
        found |= FAMILIES.literal(family, "ALIASES")
    return dict(sorted(found.items()))


def resolve(
    name: str, progress: Progress, *, allow_pickle: bool = False, config_only: bool = False
) -> Checkpoint:
    """Find a checkpoint: built-in name, local folder, alias or hub id, in this order.

    Args:
        name: The name or path that the user gave.
        progress: Watches a download.
        allow_pickle: Fetch .bin weights too.
        config_only: Fetch config.json alone.

    Raises:
        CheckpointError: It is nowhere, or the hub cannot be reached.
        UnknownNameError: It is no name that is known.
    """
    if name in built_ins():
        return Checkpoint(BUILT_INS / name, name, None, name, True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
        short = folder.resolve().name
        return Checkpoint(folder, short, None, short, False)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json")
    hub_id = aliases().get(name, name)
    if _HUB_ID.fullmatch(hub_id) and not name.startswith((".", "/", "~")):
        wanted = [*_WANTED, *(_PICKLES if allow_pickle else ())]
        return _fetch(hub_id, progress, ["config.json"] if config_only else wanted)
    if "/" in name or "\\" in name:
        raise CheckpointError(f"{name}: no such folder: give a checkpoint's folder or a hub id")
    raise unknown("checkpoint", name, [*built_ins(), *aliases()])


def family_of(folder: Path) -> str:
    """Find the family of a checkpoint from `architectures` in its config.json."""
    file = folder / "config.json"
    try:
        config: Any = json.loads(file.read_bytes())
    except OSError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON: download it again") from None
    return FAMILIES.covering(config, file, "architecture")


def _fetch(hub_id: str, progress: Progress, wanted: list[str]) -> Checkpoint:
    """Download what an export reads from the hub; a broken download goes on where it stopped."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"fetching {hub_id} needs the package {error.name}: pip install 'vlmedge[export]'"
        ) from error
    progress.note(f"fetching {hub_id} from the hub")
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} cannot be fetched from the hub ({reason}): "
            "check the name and the network, or give the path of a local folder"
        ) from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{hub_id} is no checkpoint: it has no config.json")
    return Checkpoint(folder, hub_id, folder.name, hub_id.split("/")[-1], False)
