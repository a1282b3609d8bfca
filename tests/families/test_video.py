"""What every family writes about videos, against transformers' own generate."""

from __future__ import annotations

import numpy as np
import pytest
from kit.reference import NEW, QUESTIONS, Case, seen
from numpy.typing import NDArray

import vlmedge
from vlmedge.spec import GenerateTask


@pytest.mark.parametrize("beams", [1, 3])
def test_text_about_videos_is_transformers(
    case: Case, clips: list[NDArray[np.uint8]], beams: int
) -> None:
    spec = case.model.bundle.spec
    if spec.video is None:
        pytest.skip("takes no videos")
    videos = [vlmedge.Video(clip) for clip in clips]
    tasks = [task for task in spec.tasks.values() if isinstance(task, GenerateTask)]
    for task in [task for task in tasks if task.source == "video"]:
        if "{question}" in task.prompt:
            ours = case.model.ask(videos, QUESTIONS[1], max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{question}", QUESTIONS[1])
        else:
            ours = case.model.caption(videos, "a", max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{prompt}", "a")
        assert ours == [seen(case, clip, task, text, beams) for clip in clips]
    assert len({case.model.ask(video, QUESTIONS[1], max_tokens=NEW) for video in videos}) > 1
