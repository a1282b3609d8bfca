"""What a command says: results on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.files import replace_file
from vlmedge.progress import SILENT, Advance, Progress
from vlmedge.run.inputs.video import Video, is_video
from vlmedge.run.model import Model
from vlmedge.run.tasks.boxes import Box

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmedge.compositions.run import Composed

FIRST_FIGURES = 4  # of a vector, printed


class _Drawn:
    """Bars on a terminal; nothing of them stays."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show one bar while the block runs."""
        self._open += 1
        self._bars.start()
        task = self._bars.add_task(title, total=total)
        try:
            yield lambda amount: self._bars.advance(task, amount)
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    def passing(self, title: str) -> AbstractContextManager[Any]:
        """Show a bar without an end; none of the steps leaves anything here."""
        return self.step(title)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)


class _Printed:
    """One line a step, for logs: its title when it begins, its time when it ends."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Print a line around the block."""
        print(f"{title} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield lambda amount: None
        except BaseException:
            print(" stopped", file=sys.stderr, flush=True)
            raise
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


def progress(quiet: bool) -> Progress:
    """Choose who watches: bars on a terminal, lines elsewhere, nobody when quiet."""
    if quiet:
        return SILENT
    return _Drawn() if sys.stderr.isatty() else _Printed()


def load(path: Path) -> Bundle:
    """Load a bundle; warn when it has not passed the gate."""
    bundle = Bundle.load(path)
    warn(bundle)
    return bundle


def open_model(
    path: Path, engine: str, low_memory: bool = False, allow_fallback: bool = False
) -> Model:
    """Load a bundle to run it; warn when it has not passed the gate."""
    return Model(load(path), engine, low_memory=low_memory, allow_fallback=allow_fallback)


def warn(bundle: Bundle) -> None:
    """Say that a bundle has not passed the gate, if so."""
    if not bundle.verified:
        cure = f"run vlmedge check {bundle.path} --against {bundle.manifest.checkpoint.id}"
        print(f"vlmedge: warning: {bundle.path} is unverified: {cure}", file=sys.stderr)


def emit(value: Any) -> None:
    """Print a struct, a dataclass, a list or a dict as JSON; nan becomes null, a path its text."""
    print(json.dumps(json.loads(msgspec.json.encode(value, enc_hook=str)), indent=2))


def write(
    model: Model,
    images: Sequence[str],
    prompt: str,
    question: str | None,
    as_json: bool,
    frames: int | None,
    task: str = "caption",
    **options: Any,
) -> None:
    """Print captions, or answers to `question`; as they come for one picture on a terminal."""
    sources = [Video(image, frames) if is_video(image) else image for image in images]
    pictures = not any(isinstance(source, Video) for source in sources)
    if frames is not None and pictures:
        raise InputError("--frames is for videos: leave it out, or give a video or a folder")
    defaults = model.bundle.spec.generation
    beams = options["num_beams"] or (1 if defaults is None else defaults.num_beams)
    if len(images) == 1 and beams == 1 and not as_json and sys.stdout.isatty():
        for piece in trimmed(
            model.stream(sources[0], prompt, question=question, task=task, **options)
        ):
            print(piece, end="", flush=True)
        print()
        return
    if question is None and len(images) > 1 and pictures:
        _caption_each(model, images, prompt, as_json, {"task": task, **options})
        return
    if question is None:
        texts = model.caption(sources, prompt, task=task, **options)
    else:
        texts = model.ask(sources, question, **options)
    if as_json:
        found = [
            {
                "video" if isinstance(source, Video) else "image": _name(image),
                **(
                    {"caption": text}
                    if question is None
                    else {"question": question, "answer": text}
                ),
            }
            for source, image, text in zip(sources, images, texts, strict=True)
        ]
        emit(found if question is None else found[0])
        return
    for image, text in zip(images, texts, strict=True):
        print(_line(text) if len(images) == 1 else f"{image}: {_line(text)}")


class _Broken:
    """Pictures that cannot be used: they do not stop the others, and the command fails at last."""

    def __init__(self, images: Sequence[str], lack: str) -> None:
        self._images, self._lack = images, lack
        self.errors: list[str] = []

    def note(self, image: object, error: InputError) -> None:
        """Say which one it is."""
        self.errors.append(str(error))
        print(f"vlmedge: {error}", file=sys.stderr)

    def conclude(self) -> None:
        """Fail if there are any."""
        if self.errors:
            count = f"{len(self.errors)} of {len(self._images)}"
            raise InputError(f"{count} pictures have no {self._lack}: see above")


def _caption_each(
    model: Model, images: Sequence[str], prompt: str, as_json: bool, options: dict[str, Any]
) -> None:
    """Print captions as they come."""
    broken = _Broken(images, "caption")
    rows: list[dict[str, str]] = []
    texts = model.caption(iter(images), prompt, on_error=broken.note, **options)
    for image, text in zip(images, texts, strict=True):
        if as_json:
            found = {"error": broken.errors[-1]} if text is None else {"caption": text}
            rows.append({"image": _name(image)} | found)
        elif text is not None:
            print(f"{image}: {_line(text)}", flush=True)
    if as_json:
        emit(rows)
    broken.conclude()


def compose(composed: Composed, images: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Print the texts of each picture as they come, a line each, with their scores."""
    broken = _Broken(images, "texts")
    rows: list[dict[str, Any]] = []
    answers = (
        composed.run(iter(images), on_error=broken.note)
        if len(images) > 1
        else iter([composed.run(images[0])])
    )
    for image, texts in zip(images, answers, strict=True):
        if as_json:
            found: dict[str, Any] = (
                {"error": broken.errors[-1]}
                if texts is None
                else {"texts": [{"text": text, "score": score} for text, score in texts]}
            )
            rows.append({"image": _name(image)} | found)
            continue
        for text, score in texts or ():
            line = _line(text) if score is None else f"{score:.3f} {_line(text)}"
            print(line if len(images) == 1 else f"{image}: {line}", flush=True)
        if texts == [] and not quiet:
            print(f"vlmedge: {image}: no text is left", file=sys.stderr)
    if as_json:
        emit(rows)
    broken.conclude()


def _line(text: str) -> str:
    """Put a text into one line."""
    return " ".join(text.split("\n"))


def classify(
    model: Model,
    images: Sequence[str],
    labels: str | None,
    template: Sequence[str] | None,
    top: int,
    as_json: bool,
) -> None:
    """Print the best labels of each picture as they come, a line each."""
    names = None
    if labels is not None:
        names = [label.strip() for label in labels.split(",")] if labels.strip() else []
    chosen = template[0] if template and len(template) == 1 else template or None
    broken = _Broken(images, "labels")
    rankings = (
        model.classify(iter(images), names, chosen, on_error=broken.note)
        if len(images) > 1
        else iter(model.classify([*images], names, chosen))
    )
    rows: list[dict[str, Any]] = []
    for image, ranking in zip(images, rankings, strict=True):
        if as_json:
            found: dict[str, Any] = (
                {"error": broken.errors[-1]}
                if ranking is None
                else {"labels": [{"label": label, "probability": p} for label, p in ranking[:top]]}
            )
            rows.append({"image": _name(image)} | found)
        elif ranking is not None:
            line = ", ".join(f"{label} {p:.1%}" for label, p in ranking[:top])
            print(line if len(images) == 1 else f"{image}: {line}", flush=True)
    if as_json:
        emit(rows)
    broken.conclude()


def embed(
    model: Model,
    images: Sequence[str],
    texts: Sequence[str],
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print or save unit vectors: pictures first, then texts."""
    found = [model.embed_image(list(images))] if images else []
    found += [model.embed_text(list(texts))] if texts else []
    vectors = [vector for rows in found for vector in rows]
    names = [*map(_name, images), *texts]
    if out is not None:
        if len({vector.shape for vector in vectors}) > 1:
            raise InputError(
                f"{out}: a picture has {len(vectors[0])} vectors here and a text has one: "
                "save pictures and texts in files of their own"
            )
        _save(np.stack(vectors), out)
    if as_json:
        rows = [vector.tolist() for vector in vectors]
        kinds = ["image"] * len(images) + ["text"] * len(texts)
        table = [
            {kind: name} | ({"vector": row} if out is None else {"row": i})
            for i, (kind, name, row) in enumerate(zip(kinds, names, rows, strict=True))
        ]
        emit(table if out is None else {"file": _name(str(out)), "rows": table})
    elif out is None:
        for name, row in zip(names, vectors, strict=True):
            figures = " ".join(f"{x:+.4f}" for x in row.ravel()[:FIRST_FIGURES])
            print(f"{name}: {list(row.shape)} {figures} ...")
    elif not quiet:
        print(f"{out}: float32 {[len(vectors), *vectors[0].shape]}")


def match(model: Model, image: str, texts: Sequence[str], as_json: bool) -> None:
    """Print the probability of each text, a line each, in the order given."""
    shares = model.match(image, list(texts))
    if as_json:
        rows = [{"text": text, "probability": p} for text, p in zip(texts, shares, strict=True)]
        emit({"image": _name(image), "texts": rows})
        return
    for text, p in zip(texts, shares, strict=True):
        print(f"{p:.1%} {text}")


def infill(model: Model, image: str, text: str, top: int, as_json: bool) -> None:
    """Print the best words of each gap, a line each."""
    gaps = model.infill(image, text, top)
    if as_json:
        rows = [[{"word": word, "probability": p} for word, p in gap] for gap in gaps]
        emit({"image": _name(image), "text": text, "gaps": rows})
        return
    for gap in gaps:
        print(", ".join(f"{word} {p:.1%}" for word, p in gap))


def detect(
    image: str,
    size: tuple[int, int],
    boxes: Sequence[Box],
    masks: Mapping[int, Path],
    drawing: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print boxes of a picture of this size, a line each: left, top, right, bottom in pixels.

    Args:
        image: The picture's name.
        size: Its width and height, pixels.
        boxes: What was found.
        masks: Files of masks, by the box's place.
        drawing: What it was drawn on, or none.
        as_json: With codes, polygons and masks.
        quiet: Say nothing of the drawing.
    """
    if as_json:
        rows = [
            {"label": box.label, "box": box.pixels(*size)}
            | ({"codes": box.codes} if box.codes else {})
            | ({"polygons": box.outlines(*size)} if box.polygons else {})
            | ({"mask": _name(str(masks[i]))} if i in masks else {})
            for i, box in enumerate(boxes)
        ]
        table = {"image": _name(image), "width": size[0], "height": size[1], "boxes": rows}
        emit(table | ({} if drawing is None else {"drawing": _name(str(drawing))}))
        return
    for box in boxes:
        print(",".join(f"{side:.0f}" for side in box.pixels(*size)), _line(box.label))
    if drawing is not None and not quiet:
        print(drawing)


def index(model: Model, folder: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Write the index of a folder of pictures."""
    notes: list[str] = []
    made = model.index(folder, notes.append)
    made.save(out)
    for line in notes:
        print(f"vlmedge: {line}", file=sys.stderr)
    if as_json:
        emit({"file": _name(str(out)), "pictures": len(made.paths), "left_out": notes})
    elif not quiet:
        print(f"{out}: {len(made.paths)} pictures of {folder}")


def search(
    model: Model, file: Path, text: str | None, image: str | None, top: int, as_json: bool
) -> None:
    """Print the best pictures of an index, a line each."""
    from vlmedge.run.tasks.retrieve import load_index

    found = load_index(file)
    hits = model.search(found, text, image=image, top=top)
    if as_json:
        rows = [{"image": _name(path), "cosine": cosine} for path, cosine in hits]
        emit({"folder": _name(found.folder), "images": rows})
        return
    for path, cosine in hits:
        print(f"{cosine:+.3f} {path}")


def _save(vectors: Any, out: Path) -> None:
    """Write a .npy file whole or not at all."""
    data = io.BytesIO()
    np.save(data, vectors)
    _replace(out, data)


def save(picture: Image, out: Path) -> None:
    """Write a PNG whole or not at all."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    _replace(out, data)


def save_masks(boxes: Sequence[Box], size: tuple[int, int], folder: Path) -> dict[int, Path]:
    """Write a PNG for each box that tells an outline, and say which; the folder is made.

    Args:
        boxes: What was found.
        size: Width and height of the picture, pixels.
        folder: Where to; the files are called after the boxes' places.
    """
    import PIL.Image

    folder.mkdir(exist_ok=True)
    saved = {}
    for i, box in enumerate(boxes):
        inside = box.mask(*size)
        if inside is not None:
            saved[i] = folder / f"{i}.png"
            save(PIL.Image.fromarray(np.where(inside, np.uint8(255), np.uint8(0))), saved[i])
    return saved


def _replace(out: Path, data: io.BytesIO) -> None:
    try:
        replace_file(out, data.getvalue())
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Strip a text that comes in pieces, and keep it on one line."""
    started, held = False, ""
    for piece in pieces:
        text = held + piece.replace("\n", " ")
        text = text if started else text.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            started = True
            yield kept


def _name(path: str) -> str:
    """A file's name as valid Unicode, for JSON."""
    return path.encode(errors="replace").decode()
