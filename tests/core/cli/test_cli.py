"""The command line: what every command prints, and how it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmedge.cli import output, watch
from vlmedge.progress import SILENT, passing

COMMAND = [sys.executable, "-m", "vlmedge.cli"]
COMMANDS = ("export", "quantize", "check", "caption", "ask", "classify", "embed", "bench", "info")


def refused(ran, *words: str) -> None:
    """Hold a command to the rules of bad input: exit 1, one line, what and what to do."""
    assert ran.code == 1, ran
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("vlmedge: ")
    for word in words:
        assert word in ran.err


# ---- what commands print


def test_help_names_every_command(vlmedge) -> None:
    ran = vlmedge("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in (*COMMANDS, "list", "demo"))


def test_version_is_the_package_s(vlmedge) -> None:
    import vlmedge as package

    assert vlmedge("--version").out == f"vlmedge {package.__version__}\n"


def test_list_names_all_shelves(vlmedge) -> None:
    ran = vlmedge("list")
    for word in ("tiny-clip", "tiny-blip2", "openai/clip-vit-base-patch16", "CLIPModel", "int8"):
        assert word in ran.out
    found = json.loads(vlmedge("list", "--json").out)
    assert found["families"]["clip"] == ["CLIPModel"]
    assert "ort" in found["engines"]
    assert found["experimental"] == ["ort_tensorrt", "ort_tensorrt_rtx"]
    (line,) = [line for line in ran.out.splitlines() if line.startswith("engines")]
    marked = [
        name + " (experimental)" * (name in found["experimental"]) for name in found["engines"]
    ]
    assert line.split(maxsplit=1)[1] == ", ".join(marked)


def test_info_tells_what_a_bundle_holds(vlmedge, clip_int8: Path) -> None:
    ran = vlmedge("info", clip_int8)
    for word in ("verified", "tiny-clip", "vision_encoder", "pixel_values", "kept in float"):
        assert word in ran.out
    assert ran.err == ""
    assert json.loads(vlmedge("info", clip_int8, "--json").out)["scheme"] == "int8"


@pytest.mark.parametrize("name", ["clip_bundle", "clip_int8", "blip2_int8"])
def test_built_in_bundle_is_verified(name: str, vlmedge, request: pytest.FixtureRequest) -> None:
    ran = vlmedge("info", request.getfixturevalue(name), "--json")
    assert json.loads(ran.out)["parity"]["passed"]


def test_caption_prints_one_line_a_picture(vlmedge, blip2_int8: Path, pictures) -> None:
    ran = vlmedge("caption", blip2_int8, *pictures)
    assert ran.code == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(p) for p in pictures]
    alone = vlmedge("caption", blip2_int8, pictures[0])
    assert lines[0] == f"{pictures[0]}: {alone.out.strip()}"
    found = json.loads(vlmedge("caption", blip2_int8, *pictures, "--json").out)
    assert [f"{f['image']}: {f['caption']}" for f in found] == lines


def test_caption_streams_on_a_terminal(
    vlmedge, blip2_int8: Path, pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = vlmedge("caption", blip2_int8, pictures[0]).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert vlmedge("caption", blip2_int8, pictures[0]).out == plain


def test_caption_takes_options(vlmedge, blip2_int8: Path, pictures) -> None:
    short = vlmedge("caption", blip2_int8, pictures[0], "--max-tokens", 2).out
    assert 0 < len(short) < len(vlmedge("caption", blip2_int8, pictures[0]).out)
    assert vlmedge("caption", blip2_int8, pictures[0], "--num-beams", 3).code == 0
    options = ("--temperature", 2.0, "--top-k", 50, "--top-p", 0.9, "--seed", 7)
    drawn = vlmedge("caption", blip2_int8, pictures[0], *options).out
    assert vlmedge("caption", blip2_int8, pictures[0], *options).out == drawn
    assert vlmedge("caption", blip2_int8, pictures[0], "--repetition-penalty", 1.5).code == 0
    assert vlmedge("caption", blip2_int8, pictures[0], "--prompt", "a small").code == 0


def test_trimmed_pieces_are_the_stripped_text() -> None:
    pieces = ["  ", " a", " red ", "", "\n", "circle", " \n "]
    assert "".join(output.trimmed(pieces)) == "a red  circle"


def test_ask_answers(vlmedge, blip2_int8: Path, pictures) -> None:
    ran = vlmedge("ask", blip2_int8, pictures[0], "how many objects are there?")
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    found = json.loads(vlmedge("ask", blip2_int8, pictures[0], "how many?", "--json").out)
    assert found.keys() == {"image", "question", "answer"}


def test_classify_prints_the_best_labels(vlmedge, clip_int8: Path, pictures) -> None:
    ran = vlmedge("classify", clip_int8, *pictures, "--labels", "red circle, blue star,moon")
    assert len(ran.out.splitlines()) == 3 and ran.out.count("%") == 9
    ran = vlmedge("classify", clip_int8, *pictures, "--labels", "a,b,c", "--top", 2, "--json")
    found = json.loads(ran.out)
    assert [len(picture["labels"]) for picture in found] == [2, 2, 2]
    first, second = found[0]["labels"]
    assert first["probability"] >= second["probability"]


def test_embed_saves_unit_vectors(vlmedge, clip_int8: Path, pictures, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    inputs = (pictures[0], "--text", "red circle", "--text", "blue star")
    ran = vlmedge("embed", clip_int8, *inputs, "--out", out)
    vectors = np.load(out)
    assert ran.code == 0 and vectors.dtype == np.float32 and len(vectors) == 3
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    found = json.loads(vlmedge("embed", clip_int8, *inputs, "--json").out)
    assert np.allclose([row["vector"] for row in found], vectors, atol=1e-6)
    assert len(vlmedge("embed", clip_int8, *inputs).out.splitlines()) == 3


def test_check_prints_the_table_and_writes_it(vlmedge, clip_int8: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    ran = vlmedge("check", bundle, "--against", "tiny-clip")
    assert ran.code == 0
    for word in ("vision_encoder", "classify, 80 labels", "ours / PyTorch", ": verified (int8"):
        assert word in ran.out
    assert "checking vision_encoder ..." in ran.err  # no terminal: a line for each step
    assert (bundle / "reports" / "parity.json").is_file()


def test_check_without_a_checkpoint_holds_the_engine_against_the_graphs(
    vlmedge, clip_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level 4: what ONNX Runtime is given on this processor is no longer the portable graph."""
    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    ran = vlmedge("check", bundle, "--json")
    found = json.loads(ran.out)
    assert ran.code == 0 and [one["component"] for one in found] == [
        "vision_encoder",
        "text_encoder",
    ]
    for one in found:
        assert one["engine"].startswith("ONNX Runtime 1.") and one["device"]
        assert one["verdict"]["against"].startswith("its graph on ONNX Runtime 1.")
        assert one["verdict"]["parity"]["passed"] and one["verdict"]["latency_ms"] > 0
    report = json.loads((bundle / "reports" / "parity.json").read_bytes())
    assert report["level4"] == found and report["passed"]
    assert "passed, cosine" in vlmedge("info", bundle).out
    # the gate writes the report anew, and leaves what devices gave
    assert vlmedge("check", bundle, "--against", "tiny-clip", "--quiet").code == 0
    assert json.loads((bundle / "reports" / "parity.json").read_bytes())["level4"] == found
    from vlmedge.shelves.registry import ENGINES

    graph = import_module(type(ENGINES["ort"]).__module__).OrtGraph
    ran_as_it_is = graph.run

    def off(self, feeds):
        return {name: array[:, ::-1] for name, array in ran_as_it_is(self, feeds).items()}

    monkeypatch.setattr(graph, "run", off)
    ran = vlmedge("check", bundle, "--quiet")
    assert ran.code == 1 and "FAILED, cosine" in ran.out
    assert "is not what its portable graph gives: build it with" in ran.err
    report = json.loads((bundle / "reports" / "parity.json").read_bytes())
    assert not report["level4"][0]["verdict"]["parity"]["passed"] and report["passed"]


def test_failed_gate_says_so_and_exits_1(
    vlmedge, clip_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmedge.parity import tolerances as parity

    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    strict = parity.Tolerance(max_rel=None, cosine=1.1, agreement=1.0, drop=0.0)
    monkeypatch.setitem(parity.TOLERANCES, "int8", strict)
    ran = vlmedge("check", bundle, "--against", "tiny-clip", "--quiet")
    refused(ran, "NOT verified")
    ran = vlmedge("check", bundle, "--against", "tiny-clip", "--json")
    assert ran.code == 1 and not json.loads(ran.out)["verified"]


def test_check_takes_a_folder_of_pictures(vlmedge, clip_int8: Path, pictures, tmp_path) -> None:
    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    folder = pictures[0].parent
    ran = vlmedge("check", bundle, "--against", "tiny-clip", "--images", folder, "--json")
    assert json.loads(ran.out)["parity"]["tasks"][0]["samples"] == len(pictures)


def test_quantize_makes_a_smaller_bundle(vlmedge, blip2_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    ran = vlmedge("quantize", blip2_bundle, "--int8", "--out", out, "--no-check", "--json")
    found = json.loads(ran.out)
    assert found["scheme"] == "int8" and not found["verified"]
    before = json.loads(vlmedge("info", blip2_bundle, "--json").out)["files"]
    assert found["bytes"] < sum(file["bytes"] for file in before)


def test_unverified_bundle_is_named_and_still_runs(vlmedge, blip2_bundle: Path, pictures) -> None:
    for command in (("caption", blip2_bundle, pictures[0]), ("info", blip2_bundle)):
        ran = vlmedge(*command)
        assert ran.code == 0
        assert ran.err == (
            f"vlmedge: warning: {blip2_bundle} is unverified: "
            f"run vlmedge check {blip2_bundle} --against tiny-blip2\n"
        )


def test_demo_s_end_draws_the_sheet(
    blip2_int8: Path, tmp_path: Path, pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmedge.checkpoints.scenes import draw_scene
    from vlmedge.cli import demo

    scenes = [draw_scene(i, "heldout") for i in range(len(pictures))]
    demo._finish(tmp_path, blip2_int8, scenes, pictures)
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.format == "PNG"
    demo._draw(scenes, ["one", "two", "three"])
    assert str(tmp_path / "contact-sheet.png") in capsys.readouterr().out


@pytest.mark.slow
def test_demo_runs_what_it_echoes(vlmedge, tmp_path: Path) -> None:
    ran = vlmedge("demo", "--out", tmp_path / "demo")
    assert ran.code == 0
    assert ran.out.count("$ vlmedge ") == 7
    assert (tmp_path / "demo" / "contact-sheet.png").is_file()


# ---- bad usage: typer's own, exit 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["capton"],
        ["caption"],
        ["caption", "bundle", "a.png", "--max-tokens", "many"],
        ["classify", "bundle", "a.png", "--labels", "a", "--top", "0"],
        ["embed", "bundle"],
        ["quantize", "bundle"],
        ["export", "tiny-clip", "--int8", "--scheme", "int4"],
        ["check", "bundle", "--images", "folder"],
        ["check", "bundle", "--against", "tiny-clip", "--engine", "ort"],
    ],
)
def test_bad_usage_exits_2(vlmedge, arguments: list[str]) -> None:
    ran = vlmedge(*arguments)
    assert ran.code == 2 and "Traceback" not in ran.err and ran.out == ""


# ---- bad input: pictures


def not_an_image(file: Path) -> None:
    file.write_text("this is no picture")


def truncated(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, format="PNG")
    file.write_bytes(file.read_bytes()[:2000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def bomb(file: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(file, format="PNG")


def folder(file: Path) -> None:
    file.mkdir()


def absent(file: Path) -> None:
    """Leave nothing there."""


@pytest.mark.parametrize("make", [not_an_image, truncated, empty, bomb, folder, absent])
def test_bad_picture_is_refused(
    make: Callable[[Path], None], vlmedge, blip2_int8: Path, clip_int8: Path, pictures, tmp_path
) -> None:
    file = tmp_path / "bad.png"
    make(file)
    refused(vlmedge("caption", blip2_int8, file), "bad.png", ": ")
    refused(vlmedge("ask", blip2_int8, file, "what is it?"), "bad.png")
    refused(vlmedge("classify", clip_int8, file, "--labels", "a,b"), "bad.png")
    refused(vlmedge("embed", clip_int8, file), "bad.png")


def test_bad_picture_among_good_ones_takes_no_caption_from_them(
    vlmedge, blip2_int8: Path, pictures, tmp_path
) -> None:
    truncated(tmp_path / "bad.png")
    ran = vlmedge("caption", blip2_int8, pictures[0], tmp_path / "bad.png", pictures[1])
    assert ran.code == 1
    named, summed = ran.err.splitlines()
    assert "bad.png is damaged or cut short" in named
    assert summed == "vlmedge: 1 of 3 pictures have no caption: see above"
    assert [line.split(": ")[0] for line in ran.out.splitlines()] == [*map(str, pictures[:2])]


@pytest.mark.parametrize("size", [(1, 1), (30_000, 10)])
def test_extreme_picture_is_read_or_refused(
    size: tuple[int, int], vlmedge, blip2_int8: Path, clip_int8: Path, tmp_path: Path
) -> None:
    file = tmp_path / "extreme.png"
    Image.new("RGB", size, "red").save(file)
    for ran in (
        vlmedge("caption", blip2_int8, file),
        vlmedge("classify", clip_int8, file, "--labels", "a,b"),
    ):
        if ran.code:
            refused(ran, str(size[0]))
        else:
            assert len(ran.out.splitlines()) == 1


# ---- bad input: words and options


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("", "no labels"),
        ("  ", "no labels"),
        ("a,,b", "label 2 is empty"),
        ("a,b,", "label 3 is empty"),
        ("a,b, a", "'a' is given twice"),
    ],
)
def test_bad_labels_are_refused(labels: str, words: str, vlmedge, clip_int8, pictures) -> None:
    refused(vlmedge("classify", clip_int8, pictures[0], "--labels", labels), words)


def test_template_without_a_place_is_refused(vlmedge, clip_int8: Path, pictures) -> None:
    options = ("--labels", "a,b", "--template", "a photo")
    refused(vlmedge("classify", clip_int8, pictures[0], *options), "{}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--num-beams", 0), "--num-beams is 0"),
        (("--temperature", 0), "--temperature is 0"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-p", 1.5), "--top-p is 1.5"),
        (("--top-k", -1), "--top-k is -1"),
        (("--repetition-penalty", 0), "--repetition-penalty is 0"),
        (("--temperature", 1, "--num-beams", 2), "--num-beams is 2"),
        (("--temperature", 1, "--seed", -1), "--seed is -1"),
        (("--prompt", "red circle " * 500), "the model has room for"),
    ],
)
def test_bad_option_is_refused(options, words: str, vlmedge, blip2_int8: Path, pictures) -> None:
    refused(vlmedge("caption", blip2_int8, pictures[0], *options), words)


def test_empty_question_is_refused(vlmedge, blip2_int8: Path, pictures) -> None:
    refused(vlmedge("ask", blip2_int8, pictures[0], " "), "the question is empty")


def test_task_that_a_bundle_lacks_is_refused(vlmedge, clip_int8: Path, pictures) -> None:
    refused(vlmedge("caption", clip_int8, pictures[0]), "no task 'caption'", "classify")


def test_vectors_into_no_folder_are_refused(vlmedge, clip_int8: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "v.npy"
    refused(vlmedge("embed", clip_int8, "--text", "a", "--out", out), "cannot be written")


# ---- bad input: bundles


@pytest.mark.parametrize("command", ["info", "bench", "embed", "quantize", "check"])
def test_unknown_bundle_is_refused(command: str, vlmedge, tmp_path: Path) -> None:
    options = {
        "embed": ["--text", "a"],
        "quantize": ["--int8"],
        "check": ["--against", "tiny-clip"],
    }
    given = options.get(command, [])
    refused(vlmedge(command, tmp_path / "none", *given), "none: no such folder")
    refused(vlmedge(command, tmp_path, *given), "is no bundle")


def edit_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def missing_file(bundle: Path) -> None:
    (bundle / "graphs" / "vision_encoder.bin").unlink()


def altered_file(bundle: Path) -> None:
    file = bundle / "graphs" / "vision_encoder.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def added_file(bundle: Path) -> None:
    (bundle / "graphs" / "extra.bin").write_bytes(b"x")


def escaping_file(bundle: Path) -> None:
    stored = {"path": "../secret", "sha256": "0" * 64, "bytes": 1}
    edit_manifest(bundle, lambda manifest: manifest["files"].append(stored))


def newer_format(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(format=99))


def broken_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_file, "vision_encoder.bin is missing"),
        (altered_file, "vision_encoder.bin is not the file"),
        (added_file, "extra.bin is not in the manifest"),
        (escaping_file, "../secret"),
        (newer_format, "format 99"),
        (broken_manifest, "cannot be read"),
    ],
)
def test_spoilt_bundle_is_refused(
    spoil: Callable[[Path], None], words: str, vlmedge, clip_int8: Path, pictures, tmp_path: Path
) -> None:
    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    spoil(bundle)
    refused(vlmedge("classify", bundle, pictures[0], "--labels", "a,b"), words)
    refused(vlmedge("info", bundle), words)


def test_check_against_another_family_is_refused(vlmedge, clip_int8: Path) -> None:
    refused(vlmedge("check", clip_int8, "--against", "tiny-blip2"), "of family clip")
    refused(vlmedge("bench", clip_int8, "--against", "tiny-blip2"), "of family clip")


def test_check_on_bad_pictures_is_refused(vlmedge, clip_int8: Path, tmp_path: Path) -> None:
    against = ("--against", "tiny-clip", "--images")
    refused(vlmedge("check", clip_int8, *against, tmp_path / "no"), "no such folder")
    refused(vlmedge("check", clip_int8, *against, tmp_path), "has no pictures")


def test_quantizing_twice_is_refused(vlmedge, clip_int8: Path) -> None:
    refused(vlmedge("quantize", clip_int8, "--int8"), "int8 already")


# ---- bad input: checkpoints


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("tiny-clop", "did you mean 'tiny-clip'?"),
        ("./nowhere", "no such folder"),
        (".", "has no config.json"),
    ],
)
def test_unknown_checkpoint_is_refused(
    checkpoint: str, words: str, vlmedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(vlmedge("export", checkpoint), words)
    assert not list(tmp_path.iterdir())


def test_unknown_architecture_lists_the_known(vlmedge, tmp_path: Path) -> None:
    checkpoint = tmp_path / "other"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"architectures": ["Blip3ForTalking"]}')
    refused(vlmedge("export", checkpoint, "--out", tmp_path / "out"), "CLIPModel", "Blip2For")
    assert not (tmp_path / "out").exists()


def test_unknown_scheme_is_refused(vlmedge, tmp_path: Path) -> None:
    ran = vlmedge("export", "tiny-clip", "--scheme", "int7", "--out", tmp_path / "out")
    refused(ran, "did you mean 'int8'?")


def test_folder_that_exists_is_refused(vlmedge, clip_bundle: Path, tmp_path: Path) -> None:
    refused(vlmedge("export", "tiny-clip", "--out", clip_bundle), "exists", "--overwrite")
    (tmp_path / "precious").write_text("data")
    refused(vlmedge("export", "tiny-clip", "--out", tmp_path, "--overwrite"), "is no bundle")
    assert (tmp_path / "precious").read_text() == "data"


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from vlmedge.cli.app import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); main(sys.argv[1:])"
    )
    arguments = ["export", "tiny-clip", "--no-check", "--quiet", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "disk is full" in done.stderr
    assert not list(tmp_path.iterdir())


def interrupt(command: list[str], number: int, moment: str, log: Path) -> None:
    """Send a signal when a word has been said; the command must end in order."""
    # a shell's background job, as CI may be one, ignores SIGINT, and so would its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stderr=stderr, preexec_fn=heed) as process,
    ):
        deadline = time.monotonic() + 120
        while moment not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130, log.read_text()
    said = log.read_text()
    assert said.splitlines()[-1] == "vlmedge: interrupted" and "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_leaves_nothing(number: int, clip_int8: Path, tmp_path: Path) -> None:
    """Neither a process nor the copy of the bundle that a cold start has."""
    bundle = shutil.copytree(clip_int8, tmp_path / "clip")
    command = [*COMMAND, "bench", str(bundle)]
    interrupt(command, number, "starting ort", tmp_path / "log")
    assert not [file.name for file in (bundle / "engines").iterdir() if "start" in file.name]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "tracing"), (signal.SIGTERM, "checking")]
)
def test_interrupted_export_leaves_nothing(number: int, moment: str, tmp_path: Path) -> None:
    command = [*COMMAND, "export", "tiny-clip", "--int8", "--out", str(tmp_path / "out")]
    interrupt(command, number, moment, tmp_path.with_suffix(".log"))
    assert not list(tmp_path.iterdir())


def test_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [*COMMAND, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_of_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "vlmedge: output cannot be written: No space left on device\n"


def test_demo_that_cannot_write_leaves_no_half_picture(vlmedge, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "scene-1.png").mkdir(parents=True)
    ran = vlmedge("demo", "--out", tmp_path)
    assert ran.code == 1 and "scene-1.png cannot be written: Is a directory" in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == [
        "scene-0.png",
        "scene-1.png",
    ]


def test_check_of_what_cannot_be_written_is_refused_before_the_work(
    vlmedge, clip_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may = os.access  # the superuser may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    ran = vlmedge("check", clip_int8, "--against", "tiny-clip")
    assert (
        ran.code == 1 and "is read-only, and `check` writes its report into the bundle" in ran.err
    )


def test_closed_streams_are_nowhere() -> None:
    for stream in (0, 1, 2):
        line = f"exec {stream}>&-; exec {shlex.join(COMMAND)} list"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        assert (done.stdout == "") == (stream == 1)


def test_folder_of_pictures_is_told_from_a_video(vlmedge, blip2_int8: Path, pictures) -> None:
    for more in ([], [pictures[0]]):
        ran = vlmedge("caption", blip2_int8, pictures[0].parent, *more)
        assert ran.code == 1
        assert f"({pictures[0].parent} is a folder, of a video's frames: give its files)" in ran.err


def test_passing_step_is_seen_on_a_terminal_alone(capsys) -> None:
    titles: list[str] = []

    class Terminal:
        def passing(self, title: str):
            titles.append(title)
            return nullcontext()

    for watcher in (Terminal(), watch.progress(False), SILENT):
        with passing(watcher, "opening it"):  # type: ignore[arg-type]
            pass
    assert titles == ["opening it"] and capsys.readouterr().err == ""
    with passing(watch._Drawn(), "opening it"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_name_that_is_no_unicode_comes_out_as_it_is(clip_int8: Path, pictures, tmp_path) -> None:
    odd = os.fsencode(tmp_path) + b"/n\xff.png"
    shutil.copy(pictures[0], odd)
    given = [os.fsencode(word) for word in (*COMMAND, "classify", clip_int8)]
    command = [*given, odd, os.fsencode(pictures[1]), b"--labels", b"a,b"]
    for encoding, name in (("utf-8", odd), ("ascii", odd.replace(b"\xff", b"?"))):
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=env)
        assert done.returncode == 0 and done.stdout.startswith(name + b": ")


def test_classify_prints_the_others(vlmedge, clip_int8: Path, pictures, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given = ["classify", clip_int8, pictures[0], broken, pictures[1], "--labels", "a,b"]
    ran = vlmedge(*given)
    assert ran.code == 1 and "broken.png is in a format that Pillow cannot read" in ran.err
    assert ran.err.splitlines()[-1] == "vlmedge: 1 of 3 pictures have no labels: see above"
    assert [line.split(": ")[0] for line in ran.out.splitlines()] == [str(p) for p in pictures[:2]]
    rows = json.loads(vlmedge(*given, "--json").out)
    assert [sorted(row)[0] for row in rows] == ["image", "error", "image"]
    assert vlmedge("classify", clip_int8, broken, "--labels", "a,b").code == 1


@pytest.mark.parametrize("name", ["embed", "index"])
def test_folder_in_place_of_a_file_is_refused(vlmedge, clip_int8: Path, pictures, name) -> None:
    what = pictures[0] if name == "embed" else pictures[0].parent
    ran = vlmedge(name, clip_int8, what, "--out", ".")
    assert ran.code == 1 and ran.err == "vlmedge: . cannot be written: Is a directory\n"


@pytest.mark.parametrize(
    ("command", "default"),
    [("check", "drawn scenes"), ("export", "NAME-SCHEME"), ("build", "half of what's free")],
)
def test_help_shows_what_it_says_in_brackets(vlmedge, command: str, default: str) -> None:
    assert f"[default: ({default})]" in vlmedge(command, "--help").out


def test_bug_keeps_its_traceback(vlmedge, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmedge.cli import info

    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(info, "show_list", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        vlmedge("list")
