"""Videos: which frames a model looks at, where they come from, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from kit.bundles import bundle_of
from kit.command import Run
from msgspec import structs
from numpy.typing import NDArray
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

import vlmedge as package
from vlmedge.errors import InputError, MissingExtraError
from vlmedge.run.inputs.image import preprocess
from vlmedge.run.inputs.video import Video, chosen, is_video, read_frames
from vlmedge.spec import ImageFrontEnd, VideoFrontEnd

FRAME = ImageFrontEnd("exact", (32, 32), "bicubic", None, 1 / 255, (0, 0, 0), (1, 1, 1))
EIGHT = VideoFrontEnd(FRAME, 8)


def drawn(count: int, width: int = 48, height: int = 32) -> NDArray[np.uint8]:
    """Draw a bright bar that wanders over noise, so that no two frames are alike."""
    found = np.random.default_rng(0).integers(0, 60, (count, height, width, 3), dtype=np.uint8)
    for i, frame in enumerate(found):
        frame[:, (3 * i) % width : (3 * i) % width + 6] = (250, 10 * i % 250, 40)
    return found


def encoded(file: Path, frames: NDArray[np.uint8], codec: str = "mpeg4") -> Path:
    """Write a video of 10 frames a second."""
    with av.open(file, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def arrays(frames: Sequence[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.mark.parametrize("total", [8, 9, 21, 100, 1017])
@pytest.mark.parametrize("fps", [None, 0.5, 2.0])
def test_frames_are_those_of_transformers(total: int, fps: float | None) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=24.0)
    theirs = default_sample_indices_fn(metadata, num_frames=None if fps else 8, fps=fps)
    front = VideoFrontEnd(FRAME, 8 if fps is None else 1000, fps=fps)
    assert chosen(total, 24.0, front) == theirs.tolist()


def test_frames_of_the_other_rules() -> None:
    ends, middle = (VideoFrontEnd(FRAME, 4, rule) for rule in ("ends", "middle"))
    assert chosen(10, None, ends) == [0, 3, 6, 9]
    assert chosen(10, None, ends, 1) == [0]
    assert chosen(10, None, middle) == [1, 3, 5, 8]  # of 0-2, 2-4, 4-7 and 7-9, as numpy rounds
    for front in (EIGHT, ends, middle):
        assert len(chosen(3, None, front)) == 3
    assert chosen(3, None, EIGHT) == chosen(3, None, ends) == [0, 1, 2]
    assert chosen(100, 10.0, VideoFrontEnd(FRAME, 8, fps=2.0)) == chosen(100, None, EIGHT)
    assert chosen(100, None, VideoFrontEnd(FRAME, 8, fps=2.0), 2) == [0, 50]
    with pytest.raises(InputError, match="2 frames a second, and the video has no frame rate"):
        chosen(100, None, VideoFrontEnd(FRAME, 8, fps=2.0))


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".mkv"])  # the last has no count of frames
def test_file_gives_what_transformers_reads(tmp_path: Path, ending: str) -> None:
    whole = drawn(21)
    file = encoded(tmp_path / f"clip{ending}", whole)
    got = arrays(read_frames(Video(file), EIGHT))
    at = default_sample_indices_fn(VideoMetadata(total_num_frames=21), num_frames=8)
    theirs, _ = load_video(str(file), sample_indices_fn=lambda **_: at)
    np.testing.assert_array_equal(got, theirs)
    np.testing.assert_array_equal(got, arrays(read_frames(Video(file.read_bytes()), EIGHT)))
    assert np.abs(got.astype(int) - whole[at]).mean() < 40  # the codec loses some, no frame is off
    assert len(read_frames(Video(file, frames=3), EIGHT)) == 3


def test_header_that_counts_too_many_frames_is_not_believed(tmp_path: Path) -> None:
    """Of AVI, whose header has the count at a known place."""
    file = encoded(tmp_path / "clip.avi", drawn(12))
    data = bytearray(file.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
        place = data.index(tag) + offset
        assert int.from_bytes(data[place : place + 4], "little") == 12
        data[place : place + 4] = (50).to_bytes(4, "little")
    got = arrays(read_frames(Video(bytes(data)), EIGHT))
    np.testing.assert_array_equal(got, arrays(read_frames(Video(file), EIGHT)))


def test_folder_and_array_are_videos_too(tmp_path: Path) -> None:
    whole = drawn(12)
    for i, frame in enumerate(whole):
        Image.fromarray(frame).save(tmp_path / f"frame-{i}.png")  # 10 comes after 9, not after 1
    wanted = whole[[i * 12 // 8 for i in range(8)]]
    np.testing.assert_array_equal(arrays(read_frames(Video(tmp_path), EIGHT)), wanted)
    np.testing.assert_array_equal(arrays(read_frames(Video(whole), EIGHT)), wanted)


def test_video_is_told_from_image_by_its_path(tmp_path: Path) -> None:
    assert is_video("a/b.MP4") and is_video(str(tmp_path))
    assert not is_video("a/b.png") and not is_video("clip")


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "video array without frames: give at least one"),
        (np.zeros((4, 4, 3), np.uint8), r"uint8 \[4, 4, 3\]: give uint8 \[frames, height, width"),
        (np.zeros((2, 4, 4, 3), np.float32), "video array of float32"),
        ("https://example.org/a.mp4", "https:.*a.mp4 is a web address: download the video"),
        ("gone.mp4", "no file gone.mp4: give the path of a video"),
        (b"no video at all", "video of 15 bytes is not a video that FFmpeg reads"),
        (7, "video of type int: give a path"),
    ],
)
def test_what_is_no_video_is_refused(source: object, refusal: str) -> None:
    with pytest.raises(InputError, match=refusal):
        read_frames(Video(source), EIGHT)  # type: ignore[arg-type]


def test_files_without_frames_are_refused(tmp_path: Path) -> None:
    silent = tmp_path / "sound.mp4"
    with av.open(silent, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="sound.mp4 has only sound"):
        read_frames(Video(silent), EIGHT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no pictures"):
        read_frames(Video(tmp_path / "empty"), EIGHT)
    whole = encoded(tmp_path / "clip.mp4", drawn(12)).read_bytes()
    with pytest.raises(InputError, match="is not a video that FFmpeg reads, or is cut short"):
        read_frames(Video(whole[: len(whole) // 2]), EIGHT)
    with pytest.raises(InputError, match="frames is 0: it must be at least 1"):
        read_frames(Video(whole, frames=0), EIGHT)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(tmp_path / "clip.mp4", drawn(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        MissingExtraError, match=r"pip install 'vlmedge\[video\]', or give a folder"
    ):
        read_frames(Video(file), EIGHT)
    assert len(read_frames(Video(drawn(2)), EIGHT)) == 2


@pytest.mark.parametrize("size", [(32, 32), (101, 57), (33, 90), (7, 640), (320, 240)])
def test_frames_are_shrunk_as_video_chatgpt_does(size: tuple[int, int]) -> None:
    """Its load_video: torch.nn.functional.interpolate on floats; of 2 frames the first, twice."""
    front = VideoFrontEnd(structs.replace(FRAME, resample="floor"), 100, "middle", limit=100)
    clip = drawn(2, *size)
    planes = torch.from_numpy(clip[[0, 0]]).permute(0, 3, 1, 2).float()
    theirs = torch.nn.functional.interpolate(planes, size=(32, 32)).numpy()
    ours = preprocess(read_frames(Video(clip), front), front.frame)
    np.testing.assert_allclose(ours, theirs / 255, atol=1e-6)
    with pytest.raises(InputError, match="frames is 101: this model takes 100 at most"):
        read_frames(Video(clip, frames=101), front)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("llava-next-video", tmp_path_factory.mktemp("videos") / "bundle")


def test_commands_take_videos(vlmedge: Run, bundle: Path, tmp_path: Path) -> None:
    file = encoded(tmp_path / "clip.mp4", drawn(12))
    model, quick = package.load(bundle), ("--max-tokens", 6)
    answer = model.ask(Video(file), "what moves?", max_tokens=6)
    ran = vlmedge("ask", bundle, file, "what moves?", *quick, "--json")
    assert json.loads(ran.out) == {
        "video": str(file),
        "question": "what moves?",
        "answer": answer,
    }
    fewer = model.caption(Video(file, frames=2), max_tokens=6)
    assert vlmedge("caption", bundle, file, "--frames", 2, *quick).out.strip() == fewer
    assert (
        "".join(model.stream(Video(file), question="what moves?", max_tokens=6)).strip() == answer
    )
    ran = vlmedge("caption", bundle, file, "--frames", 0)
    assert ran.code == 2


def test_commands_refuse_what_does_not_fit(
    vlmedge: Run, bundle: Path, blip2_bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    file = encoded(tmp_path / "clip.mp4", drawn(3))
    for arguments, refusal in (
        (("ask", bundle, pictures[0], "what?", "--frames", 4), "--frames is for videos"),
        (("caption", bundle, pictures[0], file), "images and videos in one call"),
        (("ask", blip2_bundle, file, "what?"), "takes images, no videos"),
        (("caption", bundle, tmp_path / "gone.mp4"), "no file .*gone.mp4"),
    ):
        ran = vlmedge(*arguments)
        assert (ran.code, ran.out) == (1, "")
        assert refusal.split(" .*")[0] in ran.err and len(ran.err.strip().splitlines()) <= 2
