"""A model on disk: the folder, its weights and its token embedding table; numpy alone reads it."""

from vlmedge.bundle.folder import (
    ENGINES,
    MANIFEST,
    REPORT,
    STAMP,
    Bundle,
    encode,
    graph_path,
    read_manifest,
    readers,
    weights_path,
)

__all__ = [
    "ENGINES",
    "MANIFEST",
    "REPORT",
    "STAMP",
    "Bundle",
    "encode",
    "graph_path",
    "read_manifest",
    "readers",
    "weights_path",
]
