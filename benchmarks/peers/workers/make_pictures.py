"""Draw pictures: python make_pictures.py FOLDER COUNT."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from vlmedge.checkpoints.scenes import draw_scene

SCENES = 50  # more would all be as quick to read


def main(folder: str, count: str) -> None:
    """Write COUNT JPEG files of 640 x 480."""
    Path(folder).mkdir()
    scenes = [
        Image.fromarray(draw_scene(number, "heldout").image).resize((640, 480))
        for number in range(min(SCENES, int(count)))
    ]
    for number in range(int(count)):
        scenes[number % len(scenes)].save(f"{folder}/{number:05}.jpg", quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
