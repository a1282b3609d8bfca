"""A folder of pictures as vectors in one file, searched by a text or by another picture.

The file is a .npz of four arrays, read without pickle:

    vectors    float32 [pictures, width], each of length 1; [pictures, vectors, width] where a
               picture has several, of which the nearest counts
    paths      str [pictures], below the folder, with "/" on every system
    folder     str, where they lay
    checkpoint str, whose vectors they are: those of two models say nothing to each other
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmedge.errors import InputError
from vlmedge.files import replace_file
from vlmedge.run.inputs.image_files import IMAGE_ENDINGS

Vectors = NDArray[np.float32]
Hits = list[tuple[str, float]]


@dataclass(frozen=True)
class Index:
    """The pictures of a folder and their vectors; `Model.index` makes one.

    `save` writes it to a file, and `vlmedge.load_index` reads the file. `Model.search` searches it
    by a text or an image; `search` takes a vector.

    Attributes:
        vectors: float32 [pictures, width], or [pictures, vectors, width] where a picture has
            several, each of length 1.
        paths: Path of each picture relative to `folder`, with "/" on every system.
        folder: Absolute path of the folder when it was indexed.
        checkpoint: SHA-256 of the checkpoint whose vectors these are, as the manifest has it.
    """

    vectors: Vectors
    paths: tuple[str, ...]
    folder: str
    checkpoint: str

    def search(self, query: Vectors, top: int = 5) -> Hits:
        """Rank pictures by their cosine with a query.

        Args:
            query: float32 [width], of length 1; or [vectors, width], as a picture's are. The
                nearest pair of vectors counts.
            top: Number of pictures.

        Returns:
            (path, cosine) pairs, best first; paths are relative to `folder`.

        Raises:
            InputError: The query's shape does not fit the index, or `top` is less than 1.
        """
        if top < 1:
            raise InputError(f"top is {top}: it must be at least 1")
        width = self.vectors.shape[-1]
        if query.shape not in ((width,), self.vectors.shape[1:]):
            raise InputError(
                f"query of shape {list(query.shape)}: the index has vectors of "
                f"{width} numbers: use the model that made the index"
            )
        # of every vector of the picture with every vector of the query
        cosines = (self.vectors @ query.T).reshape(len(self.vectors), -1).max(axis=1)
        best = np.argsort(-cosines, kind="stable")[:top]
        return [(self.paths[i], float(cosines[i])) for i in best]

    def save(self, file: str | Path) -> None:
        """Write the index to a .npz file, whole or not at all.

        Args:
            file: Path of the file; one that exists is replaced.

        Raises:
            InputError: The file cannot be written.
        """
        data = io.BytesIO()
        np.savez(
            data,
            vectors=self.vectors,
            paths=np.array(self.paths, np.str_),
            folder=np.array(self.folder, np.str_),
            checkpoint=np.array(self.checkpoint, np.str_),
        )
        try:
            replace_file(Path(file), data.getvalue())
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error.strerror}") from None


def load_index(file: str | Path) -> Index:
    """Read an index that `Index.save` or `vlmedge index` wrote.

    Args:
        file: Path of the .npz file; it is read without pickle.

    Returns:
        An `Index`, for `Model.search` of a bundle of the same checkpoint.

    Raises:
        InputError: The file does not exist, cannot be read or holds no index.

    Examples:
        >>> index = vlmedge.load_index("photos.npz")
        >>> model.search(index, "a cat on a sofa", top=1)
        [('2024/cat.jpg', 0.31)]
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("vectors", "paths", "folder", "checkpoint")}
    except FileNotFoundError:
        raise InputError(f"no file {file}: `vlmedge index` makes one") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{file} is no index: make it again with `vlmedge index`") from None
    vectors, paths = arrays["vectors"], arrays["paths"]
    several = vectors.ndim in (2, 3) and paths.shape == vectors.shape[:1]
    if not several or vectors.dtype != np.float32:
        raise InputError(f"{file} is no index: make it again with `vlmedge index`")
    folder, checkpoint = str(arrays["folder"]), str(arrays["checkpoint"])
    return Index(vectors, tuple(str(path) for path in paths), folder, checkpoint)


def pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder and of those inside it, by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give one that holds pictures")
    found = [f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS and f.is_file()]
    if not found:
        raise InputError(f"{folder} has no pictures: {', '.join(IMAGE_ENDINGS)} are read")
    return sorted(found)


def build(
    folder: Path,
    embed: Callable[[Sequence[Path]], Vectors],
    checkpoint: str,
    note: Callable[[str], None] = lambda _: None,
    batch: int = 8,
) -> Index:
    """Embed every picture of a folder; those that cannot be read are named and left out.

    Args:
        folder: Folder of pictures; its subfolders count too.
        embed: Gives float32 [pictures, width] or [pictures, vectors, width] of some paths.
        checkpoint: SHA-256 of the model's checkpoint.
        note: Called with a line for each picture that was left out.
        batch: How many pictures at once.
    """
    files = pictures(folder)
    kept: list[Path] = []
    rows: list[Vectors] = []
    for start in range(0, len(files), batch):
        some = files[start : start + batch]
        try:
            rows.append(embed(some))
            kept += some
        except InputError:  # one of them; which one is known when each stands alone
            for file in some:
                try:
                    rows.append(embed([file]))
                    kept.append(file)
                except InputError as error:
                    note(f"left out: {error}")
    if not kept:
        raise InputError(
            f"{folder}: none of its {len(files)} pictures can be read: give other files"
        )
    paths = tuple(file.relative_to(folder).as_posix() for file in kept)
    return Index(np.concatenate(rows), paths, str(folder.resolve()), checkpoint)


def recall_at(scores: NDArray[np.float32], right: Sequence[int], k: int) -> float:
    """Return the share of queries whose right answer is among their k best, 0..1.

    Args:
        scores: Score of every query with every candidate, float32 [queries, candidates].
        right: The candidate that each query asks for.
        k: How many are looked at, at least 1.
    """
    if k < 1:
        raise InputError(f"k is {k}: it must be at least 1")
    if scores.ndim != 2 or len(scores) != len(right) or not len(right):
        raise InputError(
            f"{len(right)} right answers for scores of {list(scores.shape)}: give one for each row"
        )
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == np.asarray(right)[:, None]).any(axis=1).mean())
