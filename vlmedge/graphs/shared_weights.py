"""Weights that graphs of a bundle have in common are stored once.

    graphs/text_encoder.onnx ---> text_encoder.bin <--- graphs/fusion.onnx ---> fusion.bin

The first graph in the spec's order keeps the bytes, later ones point to them: ONNX names a file,
an offset and a length for each tensor, and all files lie in one folder, as it asks. So no reader
needs to know. Neither names nor configs are trusted: bytes are compared. Sameness within one graph
counts too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmedge.bundle import weights_path
from vlmedge.errors import BundleError
from vlmedge.graphs.edit import external
from vlmedge.graphs.portable import load_graph, save_edited

if TYPE_CHECKING:
    import onnx_ir as ir

HEAD_BYTES = 64  # what tells most tensors of one size apart
CHUNK_BYTES = 1 << 20
ALIGNMENT_BYTES = 64  # of what is written again: weights are read where they are mapped


@dataclass(slots=True)
class _Piece:
    """Bytes of a weight file; the offset changes when the file is written again."""

    file: Path
    offset_bytes: int
    length_bytes: int


_Known = dict[tuple[int, bytes], list[_Piece]]  # by length and first bytes


def store_once(folder: Path, components: Iterable[str]) -> int:
    """Let graphs of a bundle that is being written share what is the same in their weights.

    Args:
        folder: The bundle's.
        components: Names of its graphs, all written; the first of two keeps the bytes.

    Returns:
        How many bytes less there are now.
    """
    known: _Known = {}
    return sum(_share(folder, component, known) for component in components)


def stored_bytes(model: ir.Model) -> int:
    """Return the size of a graph's weights in files, another graph's file too."""
    places = {(tensor.location, *_place(tensor)) for _, tensor in _external(model)}
    return sum(length for _, _, length in places)


def borrows(folder: Path, component: str) -> bool:
    """Return whether a graph points to another one's weights: it is broken when those change."""
    own = Path(weights_path(component)).name
    tensors = (tensor for _, tensor in _external(load_graph(folder, component)))
    return any(tensor.location != own for tensor in tensors)


def common(folder: Path, components: Iterable[str]) -> dict[str, set[str]]:
    """Name the weights of each graph whose bytes are another graph's too."""
    places: dict[tuple[str, int, int], dict[str, set[str]]] = {}
    found: dict[str, set[str]] = {}
    for component in components:
        found[component] = set()
        for value, tensor in _external(load_graph(folder, component)):
            readers = places.setdefault((str(tensor.location), *_place(tensor)), {})
            readers.setdefault(component, set()).add(str(value.name))
    for readers in places.values():
        for component, names in readers.items() if len(readers) > 1 else ():
            found[component] |= names
    return found


def _share(folder: Path, component: str, known: _Known) -> int:
    """Point one graph to pieces that are known, and add those of its own."""
    import onnx_ir as ir

    model, file = load_graph(folder, component), folder / weights_path(component)
    own = [(v, t, _place(t)) for v, t in _external(model) if t.location == file.name]
    pieces: dict[tuple[int, int], _Piece] = {}  # of this file, by offset and length
    kept: list[_Piece] = []
    saved = 0
    for place in dict.fromkeys(place for _, _, place in own):
        piece = _Piece(file, *place)
        alike = known.setdefault((piece.length_bytes, _head(piece)), [])
        found = next((other for other in alike if _equal(other, piece)), None)
        if found is None:
            alike.append(piece)
            kept.append(piece)
        else:
            saved += piece.length_bytes
        pieces[place] = found or piece
    if not saved:
        return 0
    _keep(file, kept)
    for value, tensor, place in own:
        piece = pieces[place]
        value.const_value = ir.ExternalTensor(
            piece.file.name,
            piece.offset_bytes,
            piece.length_bytes,
            tensor.dtype,
            shape=tensor.shape,
            name=str(value.name),
            base_dir=file.parent,
        )
    save_edited(model, folder, component)
    return saved


def _external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    """Yield the weights that lie in files, those of subgraphs too."""
    import onnx_ir as ir

    for value in external(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value, value.const_value


def _place(tensor: ir.ExternalTensor) -> tuple[int, int]:
    """Return offset and length."""
    return tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length


def _keep(file: Path, kept: list[_Piece]) -> None:
    """Write a weight file again with these pieces alone, and tell them where they are now."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        for piece in kept:
            stream.seek(-stream.tell() % ALIGNMENT_BYTES, 1)
            start = stream.tell()
            for chunk in _chunks(piece):
                stream.write(chunk)
            piece.offset_bytes = start
    if kept:
        partial.replace(file)
    else:
        partial.unlink()
        file.unlink()


def _equal(a: _Piece, b: _Piece) -> bool:
    """Compare two pieces of one length."""
    return all(x == y for x, y in zip(_chunks(a), _chunks(b), strict=True))


def _head(piece: _Piece) -> bytes:
    with piece.file.open("rb") as stream:
        stream.seek(piece.offset_bytes)
        return stream.read(min(HEAD_BYTES, piece.length_bytes))


def _chunks(piece: _Piece) -> Iterator[bytes]:
    """Read a piece by position, so that a large one takes no memory."""
    left = piece.length_bytes
    with piece.file.open("rb", buffering=0) as stream:
        stream.seek(piece.offset_bytes)
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise BundleError(f"{piece.file} ends too early: export the model again")
            left -= len(chunk)
            yield chunk
