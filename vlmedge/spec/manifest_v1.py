"""Manifests of format 1, in the words of format 2.

    format 1: spec.image, spec.video, spec.text, spec.instruction, each a front end or null
    format 2: spec.front_ends, by the tensor that each makes; `kind` tells its modality

Bundles of format 1 are read and never written: whatever writes a manifest writes the present one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {  # of format 1: the tensor, and the kind of front end that makes it
    "image": ("pixel_values", "image"),
    "video": ("pixel_values_videos", "video"),
    "text": ("input_ids", "text"),
    "instruction": ("qformer_input_ids", "text"),
}


def upgraded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a manifest of format 1 as one of format 2.

    Nothing is checked here: what is no front end goes into the table as it is, and whoever decodes
    the result refuses it.
    """
    spec = manifest.get("spec")
    if isinstance(spec, dict):
        spec = _upgraded_spec(spec)
    return {**manifest, "format": 2, "spec": spec}


def _upgraded_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Move the four fields into a table; a field of format 1 that is null has no entry."""
    table = {
        tensor: _tagged(spec[field], kind)
        for field, (tensor, kind) in FIELDS.items()
        if spec.get(field) is not None
    }
    rest = {name: value for name, value in spec.items() if name not in FIELDS}
    return {"front_ends": table, **rest}


def _tagged(front: Any, kind: str) -> Any:
    """Say of which kind a front end is; a video's frames have one of pictures inside."""
    if not isinstance(front, dict):
        return front
    frame = {"frame": _tagged(front["frame"], "image")} if "frame" in front else {}
    return {**front, **frame, "kind": kind}
