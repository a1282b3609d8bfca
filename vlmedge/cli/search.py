"""The commands `embed`, `index` and `search`: pictures and texts as vectors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Json,
    LowMemory,
    Quiet,
)
from vlmedge.errors import InputError

FIRST_VALUES = 4  # of a vector, printed


def embed(
    bundle: BundleFolder,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Image files.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="Text to embed. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy", help="Save the vectors to this file: float32, a row each."
        ),
    ] = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn pictures and texts into vectors of length 1, pictures first."""
    images, texts = images or [], text or []
    if not images and not texts:
        raise typer.BadParameter("give an IMAGE or a --text")
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    found = [model.embed_image(list(images))] if images else []
    found += [model.embed_text(list(texts))] if texts else []
    vectors = [vector for rows in found for vector in rows]
    names = [*map(output.file_name, images), *texts]
    if out is not None:
        _save(vectors, out)
    if as_json:
        kinds = ["image"] * len(images) + ["text"] * len(texts)
        output.emit(_rows(vectors, kinds, names, out))
    elif out is None:
        for name, row in zip(names, vectors, strict=True):
            values = " ".join(f"{x:+.4f}" for x in row.ravel()[:FIRST_VALUES])
            print(f"{name}: {list(row.shape)} {values} ...")
    elif not quiet:
        print(f"{out}: float32 {[len(vectors), *vectors[0].shape]}")


def index(
    bundle: BundleFolder,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of pictures.")],
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="Index file to write.")] = Path(
        "index.npz"
    ),
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Embed all pictures of a folder, so that they can be searched."""
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    notes: list[str] = []
    made = model.index(folder, notes.append)
    made.save(out)
    for line in notes:
        output.say(line)
    if as_json:
        name = output.file_name(str(out))
        output.emit({"file": name, "pictures": len(made.paths), "left_out": notes})
    elif not quiet:
        print(f"{out}: {len(made.paths)} pictures of {folder}")


def search(
    bundle: BundleFolder,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.npz", help="An index made by `vlmedge index`.")
    ],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text to search for.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Find pictures that look like this one.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of pictures to print.")] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find pictures of an index by a text or by another picture."""
    if (text is None) == (image is None):
        raise typer.BadParameter("give either a TEXT or an --image")
    from vlmedge.run.tasks.retrieve import load_index

    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    found = load_index(file)
    hits = model.search(found, text, image=image, top=top)
    if as_json:
        rows = [{"image": output.file_name(path), "cosine": cosine} for path, cosine in hits]
        output.emit({"folder": output.file_name(found.folder), "images": rows})
        return
    for path, cosine in hits:
        print(f"{cosine:+.3f} {path}")


def _rows(
    vectors: Sequence[Any], kinds: Sequence[str], names: Sequence[str], out: Path | None
) -> Any:
    """Make what JSON has: the vectors, or their rows in the file."""
    table = [
        {kind: name} | ({"vector": vector.tolist()} if out is None else {"row": i})
        for i, (kind, name, vector) in enumerate(zip(kinds, names, vectors, strict=True))
    ]
    return table if out is None else {"file": output.file_name(str(out)), "rows": table}


def _save(vectors: Sequence[Any], out: Path) -> None:
    """Write a .npy file whole or not at all."""
    import numpy as np

    if len({vector.shape for vector in vectors}) > 1:
        raise InputError(
            f"{out}: a picture has {len(vectors[0])} vectors here and a text has one: "
            "save pictures and texts in files of their own"
        )
    data = io.BytesIO()
    np.save(data, np.stack(vectors))
    output.replace(out, data)
