"""The command `demo`: the main job on the built-in checkpoints.

Each command is echoed and then run as it stands, in this process.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from vlmedge.checkpoints.scenes import Scene

SCENES = (0, 1, 2, 3, 4, 5, 6, 7)  # of the held-out split
ASKED = 3  # pictures that get a question
SINGLES = 3  # pictures that are classified
LABELS = 8  # to choose from, the right ones among them
DRAWN = 4  # pictures in the terminal
CELLS = 24  # width of one of them
GAP = "  "

Run = Callable[..., None]  # echoes a command, given by its words, and runs it


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write everything into.")
    ] = Path("vlmedge-demo"),
) -> None:
    """Export, quantize and check built-in checkpoints; then caption, ask and classify."""
    start = time.perf_counter()
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}: give another --out") from None
    run = _runner(context)
    scenes, files = _draw_scenes(out)
    objects = _draw_objects(out)
    blip2 = out / "tiny-blip2-int8"
    _caption_and_ask(run, blip2, scenes, files)
    _classify(run, out / "tiny-clip-int8", objects)
    _finish(out, blip2, scenes, files)
    _say(f"Done in {time.perf_counter() - start:.0f} s.")


def _runner(context: typer.Context) -> Run:
    """Make what runs a command of the same command line."""
    import shlex

    commands = context.find_root().command

    def run(*words: str | Path) -> None:
        arguments = [str(word) for word in words]
        print(f"$ {shlex.join(['vlmedge', *arguments])}", flush=True)
        code = commands.main(arguments, prog_name="vlmedge", standalone_mode=False)
        if code:
            raise typer.Exit(code)
        print(flush=True)

    return run


def _draw_scenes(out: Path) -> tuple[list[Scene], list[Path]]:
    """Draw scenes that no checkpoint was trained on, and write their pictures."""
    from PIL import Image

    from vlmedge.checkpoints.scenes import draw_scene

    scenes = [draw_scene(i, "heldout") for i in SCENES]
    files = [out / "pictures" / f"scene-{i}.png" for i in SCENES]
    for scene, file in zip(scenes, files, strict=True):
        output.save(Image.fromarray(scene.image), file)
    return scenes, files


def _draw_objects(out: Path) -> list[Path]:
    """Write pictures of single objects, to be classified."""
    from PIL import Image

    from vlmedge.checkpoints.scenes import draw_labelled

    files = [out / "pictures" / f"object-{i}.png" for i in range(SINGLES)]
    for i, file in enumerate(files):
        output.save(Image.fromarray(draw_labelled(i, "heldout")[0]), file)
    return files


def _caption_and_ask(run: Run, blip2: Path, scenes: Sequence[Scene], files: Sequence[Path]) -> None:
    _say("A BLIP-2: exported, quantized to INT8, compared with PyTorch on pictures it never saw.")
    run("export", "tiny-blip2", "--int8", "--overwrite", "--out", blip2)
    _say("Captions, without torch.")
    run("caption", blip2, *files)
    _say("Questions.")
    for scene, file in list(zip(scenes, files, strict=True))[:ASKED]:
        run("ask", blip2, file, scene.questions[0][0])


def _classify(run: Run, clip: Path, files: Sequence[Path]) -> None:
    from vlmedge.checkpoints.scenes import CLASSES, draw_labelled

    _say("A CLIP, the same way: which label fits?")
    run("export", "tiny-clip", "--int8", "--overwrite", "--out", clip)
    labels = dict.fromkeys(CLASSES[draw_labelled(i, "heldout")[1]] for i in range(LABELS))
    run("classify", clip, *files, "--labels", ",".join(labels), "--top", "3")


def _finish(out: Path, blip2: Path, scenes: list[Scene], files: list[Path]) -> None:
    """Draw the pictures with what the model says about them, and keep score."""
    from vlmedge.cli.contact_sheet import contact_sheet
    from vlmedge.run.model import load

    model = load(blip2)
    captions = model.caption([str(file) for file in files])
    answers = [
        model.ask(str(file), scene.questions[0][0])
        for scene, file in zip(scenes, files, strict=True)
    ]
    texts = [
        f"{caption}\n\n{scene.questions[0][0]}\n{answer}"
        for caption, scene, answer in zip(captions, scenes, answers, strict=True)
    ]
    sheet = out / "contact-sheet.png"
    contact_sheet([(s.image, text) for s, text in zip(scenes, texts, strict=True)], sheet)
    right = sum(text == s.caption for text, s in zip(captions, scenes, strict=True))
    answered = sum(text == s.questions[0][1] for text, s in zip(answers, scenes, strict=True))
    if sys.stdout.isatty():
        _draw(scenes, captions)
    _say(
        f"{right} of {len(scenes)} captions and {answered} of {len(scenes)} answers are exactly "
        f"right. Pictures with captions: {sheet}"
    )


def _draw(scenes: list[Scene], captions: list[str]) -> None:
    """Draw some pictures side by side, as many as fit, with their captions under them."""
    from vlmedge.cli.contact_sheet import terminal_picture

    room = shutil.get_terminal_size().columns
    count = max(1, min(DRAWN, (room + len(GAP)) // (CELLS + len(GAP))))
    drawn = [terminal_picture(scene.image, CELLS).split("\n") for scene in scenes[:count]]
    print()
    for cells in zip(*drawn, strict=True):
        print(GAP.join(cells))
    for i, caption in enumerate(captions[:count]):
        print(f"{i + 1}. {caption}")


def _say(text: str) -> None:
    print(text, flush=True)
