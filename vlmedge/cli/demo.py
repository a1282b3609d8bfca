"""The main job on the built-in checkpoints, each command echoed and then run as it stands."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

import typer
from PIL import Image

from vlmedge.checkpoints.scenes import CLASSES, Scene, draw_labelled, draw_scene
from vlmedge.cli import output as console
from vlmedge.cli.contact_sheet import contact_sheet, terminal_picture
from vlmedge.errors import InputError
from vlmedge.run.model import load

SCENES = (0, 1, 2, 3, 4, 5, 6, 7)  # of the held-out split
ASKED = 3  # pictures that get a question
SINGLES = 3  # pictures that are classified
LABELS = 8  # to choose from, the right ones among them
DRAWN = 4  # pictures in the terminal
CELLS = 24  # width of one of them
GAP = "  "


def demo(out: Path) -> None:
    """Export, quantize, check, caption, ask and classify into the folder `out`."""
    start = time.perf_counter()
    pictures = out / "pictures"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}: give another --out") from None
    scenes = [draw_scene(i, "heldout") for i in SCENES]
    files = [pictures / f"scene-{i}.png" for i in SCENES]
    for scene, file in zip(scenes, files, strict=True):
        console.save(Image.fromarray(scene.image), file)
    singles = [pictures / f"object-{i}.png" for i in range(SINGLES)]
    for i, file in enumerate(singles):
        console.save(Image.fromarray(draw_labelled(i, "heldout")[0]), file)
    blip2, clip = out / "tiny-blip2-int8", out / "tiny-clip-int8"

    _say("A BLIP-2: exported, quantized to INT8, compared with PyTorch on pictures it never saw.")
    _run("export", "tiny-blip2", "--int8", "--overwrite", "--out", blip2)
    _say("Captions, without torch.")
    _run("caption", blip2, *files)
    _say("Questions.")
    for scene, file in list(zip(scenes, files, strict=True))[:ASKED]:
        _run("ask", blip2, file, scene.questions[0][0])
    _say("A CLIP, the same way: which label fits?")
    _run("export", "tiny-clip", "--int8", "--overwrite", "--out", clip)
    labels = dict.fromkeys(CLASSES[draw_labelled(i, "heldout")[1]] for i in range(LABELS))
    _run("classify", clip, *singles, "--labels", ",".join(labels), "--top", "3")
    _finish(out, blip2, scenes, files)
    _say(f"Done in {time.perf_counter() - start:.0f} s.")


def _finish(out: Path, blip2: Path, scenes: list[Scene], files: list[Path]) -> None:
    """Draw the pictures with what the model says about them, and keep score."""
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
    room = shutil.get_terminal_size().columns
    count = max(1, min(DRAWN, (room + len(GAP)) // (CELLS + len(GAP))))
    drawn = [terminal_picture(scene.image, CELLS).split("\n") for scene in scenes[:count]]
    print()
    for cells in zip(*drawn, strict=True):
        print(GAP.join(cells))
    for i, caption in enumerate(captions[:count]):
        print(f"{i + 1}. {caption}")


def _run(*words: str | Path) -> None:
    """Echo a command of ours and run it, in this process."""
    from vlmedge.cli.app import app

    arguments = [str(word) for word in words]
    print(f"$ {shlex.join(['vlmedge', *arguments])}", flush=True)
    code = app(arguments, prog_name="vlmedge", standalone_mode=False)
    if code:
        raise typer.Exit(code)
    print(flush=True)


def _say(text: str) -> None:
    print(text, flush=True)
