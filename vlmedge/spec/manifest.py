"""The words of manifest.json, beyond the model itself (that is spec.py)."""

from __future__ import annotations

from typing import Any

from vlmedge.json_schema import json_schema
from vlmedge.spec.base import Data
from vlmedge.spec.model import ModelSpec
from vlmedge.spec.tensors import EmbeddingTable

FORMAT = 2


class CheckpointId(Data, frozen=True):
    """Where the weights came from.

    Attributes:
        id: Hub id, built-in name or folder name.
        revision: Commit on the hub, or none.
        sha256: Digest of config.json and of the name, size and last MiB of each weight file.
    """

    id: str
    revision: str | None
    sha256: str


class StoredFile(Data, frozen=True):
    """One file of the bundle, by its path inside it."""

    path: str
    sha256: str
    bytes: int


class AdapterId(Data, frozen=True):
    """A LoRA adapter that was merged into the weights.

    Attributes:
        name: Name of its folder.
        sha256: Digest of the digests of its two files.
        weight: Factor that its scale was multiplied by.
    """

    name: str
    sha256: str
    weight: float


class KeptLayer(Data, frozen=True):
    """A layer that the scheme left in float, and why."""

    component: str
    layer: str
    reason: str


class ComponentParity(Data, frozen=True):
    """One component against PyTorch, same weights and inputs.

    Attributes:
        component: Its name.
        max_abs: Largest absolute difference.
        max_rel: The same over the largest absolute value of the reference.
        cosine: Cosine similarity of the flattened outputs, the worst case of all samples.
        tolerance: The limit: max_rel for float32, 1 - cosine for the rest.
        passed: Whether the difference is within it.
        kl: Decoders only: how far the distribution of the first token is from PyTorch's
            (Kullback-Leibler divergence, nats, mean over samples); else none.
    """

    component: str
    max_abs: float
    max_rel: float
    cosine: float
    tolerance: str
    passed: bool
    kl: float | None = None


class TaskParity(Data, frozen=True):
    """One task end to end against PyTorch.

    Attributes:
        task: Its name, with how it was run ("caption, 5 beams").
        samples: How many were compared.
        agreement: Share of equal answers, 0..1.
        accuracy: Share of right answers where the data has labels, else none.
        reference_accuracy: PyTorch's share of right answers, else none.
        tolerance: The limit.
        passed: Whether the result is within it.
    """

    task: str
    samples: int
    agreement: float
    accuracy: float | None
    reference_accuracy: float | None
    tolerance: str
    passed: bool


class Parity(Data, frozen=True):
    """Result of the gate."""

    passed: bool
    components: tuple[ComponentParity, ...]
    tasks: tuple[TaskParity, ...]


class Manifest(Data, frozen=True):
    """manifest.json.

    Attributes:
        format: Version of this layout.
        vlmedge: Version that wrote it.
        checkpoint: Where the weights came from.
        scheme: float32, int8, ...
        spec: The model.
        kept: Layers that the scheme left in float.
        files: Every file but this one and engines/.
        provenance: Library versions, opset, calibration data.
        embeddings: The token embedding table, or none.
        parity: Result of the gate, or none: the bundle is unverified.
        adapters: LoRA adapters merged into the checkpoint's weights, in this order.
    """

    format: int
    vlmedge: str
    checkpoint: CheckpointId
    scheme: str
    spec: ModelSpec
    kept: tuple[KeptLayer, ...]
    files: tuple[StoredFile, ...]
    provenance: dict[str, str]
    embeddings: EmbeddingTable | None = None
    parity: Parity | None = None
    adapters: tuple[AdapterId, ...] = ()


def schema() -> dict[str, Any]:
    """Make the JSON Schema that is published as vlmedge/manifest.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"vlmedge bundle manifest, format {FORMAT}",
        **json_schema(Manifest),
    }


FLOAT = "float32"
