"""Every family on its smallest random checkpoints: the ladder of parity, with no file a family.

The gate compares components and answers through the project's own loop; here the other side is
transformers' processor, model and generate.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from kit.bundles import bundle_of
from kit.tiny import kinds, schemes, tiny
from numpy.typing import NDArray
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

import vlmedge
from vlmedge.bench.worker import Side
from vlmedge.bundle import Bundle
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError
from vlmedge.graphs.portable import load_graph
from vlmedge.make.check import check
from vlmedge.plan.plan import read_shape
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.paint import palette
from vlmedge.run.tasks.prompt import Example
from vlmedge.shelves.registry import FAMILIES
from vlmedge.spec import (
    GenerateTask,
    InfillTask,
    LabelTask,
    MatchTask,
    PaintTask,
    ScoreTask,
    wiring,
)

SIZES = [(32, 32), (64, 64), (101, 57), (33, 90)]
QUESTIONS = ["what?", "what color is the star, and where is it?", "é?"]
LABELS = ["a cat", "a red star", "é", "two boxes"]  # as many as SIZES: FLAVA fuses pairs
NEW = 8  # tokens
Record = Callable[[str, object], None]
OWN = ("query_tokens", "image_newline")  # parameters of the model itself
UNPLANNED = dict.fromkeys(
    ("ShikraLlamaForCausalLM", "VideoChatGPTLlamaForCausalLM"), "its tower's config is another file"
)
CLOSE = {"fp16": 0.999, "int8": 0.98, "fp8": 0.9, "int4": 0.8}  # least cosine, on random weights


@dataclass(frozen=True)
class Case:
    """One random checkpoint, as PyTorch has it and as a bundle has it."""

    folder: Path
    reference: Any
    model: vlmedge.Model


@dataclass
class Told:
    """Keeps what the gate has to say beside its verdict."""

    notes: list[str] = field(default_factory=list)

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Any]:
        """Draw nothing."""
        return nullcontext(lambda amount: None)

    def note(self, text: str) -> None:
        """Keep a line."""
        self.notes.append(text)


@pytest.fixture(scope="module", params=kinds())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Write one kind of checkpoint, and put its bundle in float32 through the gate."""
    torch.set_num_threads(1)  # tiny models gain nothing by more
    root = tmp_path_factory.mktemp(request.param)
    reference = tiny(request.param, root / "checkpoint")
    bundle = bundle_of(request.param, root / "bundle")
    told = Told()
    check(bundle, str(root / "checkpoint"), progress=told)
    assert not told.notes  # the cache's bundle is of this very checkpoint
    return Case(root / "checkpoint", reference, vlmedge.load(bundle))


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest, record_property: Record) -> None:
    """Tell docs/families.md what a result is of."""
    record_property("kind", request.node.callspec.params["case"])
    record_property("scheme", request.node.callspec.params.get("scheme"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    drawn = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(4)]
    return [image.resize(size) for image, size in zip(drawn, SIZES, strict=True)]


@pytest.fixture(scope="module")
def clips() -> list[NDArray[np.uint8]]:
    """Draw videos of more frames than any family looks at, of as many, and of fewer."""
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(3)]
    return [
        np.stack(
            [np.asarray(scene.rotate(int(rng.integers(360))).resize(size)) for _ in range(count)]
        )
        for scene, size, count in zip(scenes, SIZES[1:], (21, 8, 3), strict=True)
    ]


def test_gate_passes(case: Case, record_property: Record) -> None:
    parity = case.model.bundle.manifest.parity
    assert parity is not None
    assert parity.passed, parity
    assert {c.name for c in case.model.bundle.spec.components} == {
        c.component for c in parity.components
    }
    differences = {c.component: c.max_rel for c in parity.components}
    found = {"components": differences, "tasks": sorted(case.model.bundle.spec.tasks)}
    record_property("parity", json.dumps(found))  # for docs/families.md


def test_plan_counts_what_was_exported(case: Case) -> None:
    """From config.json alone: the components, and the numbers in each."""
    kind = json.loads((case.folder / "config.json").read_text())["architectures"][0]
    if kind in UNPLANNED:
        pytest.skip(UNPLANNED[kind])
    shape, bundle = read_shape(case.folder), case.model.bundle
    assert [part.name for part in shape.parts] == [c.name for c in bundle.spec.components]
    for part in shape.parts:
        stored = load_graph(bundle.path, part.name).graph.initializers
        # what tracing has folded, masks and the like, has a name without dots; rotary is no weight
        found = [v for name, v in stored.items() if "." in name or name in OWN]
        weights = [v.const_value for v in found if not str(v.name).endswith("inv_freq")]
        counted = sum(w.size for w in weights if w is not None and w.dtype.name == "FLOAT")
        if part.name == "projector" and 2 * counted == part.parameters:
            continue  # the first LLaVA's one Linear: its config does not tell it from two
        assert part.parameters == counted


def test_weights_are_stored_once(case: Case) -> None:
    """Of whatever two graphs of a family, or one, hold the same of."""
    bundle = case.model.bundle
    places: dict[bytes, tuple[Any, ...]] = {}
    for component in bundle.spec.components:
        for value in load_graph(bundle.path, component.name).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                place = tensor.location, tensor.offset, tensor.length
                assert places.setdefault(tensor.tobytes(), place) == place, value.name
    files = bundle.path.glob("graphs/*.bin")
    assert sum(len(data) for data in places) == sum(file.stat().st_size for file in files)


def test_embedding_table_is_the_checkpoints(case: Case) -> None:
    """Of the bundle and of the gate's other side, both of which read it some rows at a time."""
    opened: Any = FAMILIES[case.model.bundle.spec.family].open(case.folder)
    if opened.embed_tokens is None:
        assert opened.rows() is None
        pytest.skip("reads no embeddings on the host")
    whole = opened.read(opened.embed_tokens) * np.float32(opened.embed_scale)
    ids = np.array([np.arange(len(whole)), np.arange(len(whole))[::-1]])
    np.testing.assert_array_equal(opened.rows()[ids], whole[ids])
    np.testing.assert_array_equal(case.model.bundle.embeddings()[ids], whole[ids])


def test_pixels_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if case.model.bundle.spec.image is None:
        pytest.skip("no pictures")
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    context = TaskContext(case.model.bundle, {})
    for image in images:
        row = context.pixels([image])
        found = processor(image, return_tensors="np")
        theirs = found["pixel_values"][0] if hasattr(found, "keys") else np.asarray(found[0])
        theirs = theirs.reshape(-1, *theirs.shape[-3:])
        front = case.model.bundle.spec.image
        # one step of 255 before mean and std
        np.testing.assert_allclose(row, theirs, atol=1.001 / 255 / min(front.image_std))


def test_labels_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if not isinstance(case.model.bundle.spec.tasks.get("classify"), LabelTask):
        pytest.skip("no closed head")
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    with torch.no_grad():
        inputs = [processor(image, return_tensors="pt") for image in images]
        logits = torch.cat([case.reference(**each).logits for each in inputs])
    names = case.reference.config.id2label
    for ranking, theirs in zip(case.model.classify(images), logits.softmax(-1), strict=True):
        assert ranking[0][0] == names[int(theirs.argmax())]
        ours = [dict(ranking)[names[i]] for i in range(len(names))]
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="has a closed head with labels of its own: give none"):
        case.model.classify(images, ["a", "b"])


def test_vectors_are_transformers(case: Case, images: list[Image.Image]) -> None:
    """Of every model that knows pictures and texts: unit vectors, and the scores made of them."""
    task = case.model.bundle.spec.tasks.get("classify")
    if not isinstance(task, MatchTask):
        pytest.skip("embeds no texts")
    texts = [task.template.replace("{}", label) for label in LABELS]
    theirs = scored(case, images, texts)
    ours = case.model.embed_image(images), case.model.embed_text(texts)
    for mine, name in zip(ours, ("image_embeds", "text_embeds"), strict=True):
        if name in theirs:
            np.testing.assert_allclose(mine, theirs[name], atol=1e-5)
    if ours[0].ndim == 3:  # several vectors of a picture; transformers keeps no temperature
        nearest = np.einsum("ivw,tw->itv", *ours).max(-1)
        np.testing.assert_allclose(nearest, theirs.logits_per_image, atol=1e-5)
        shares = (theirs.logits_per_image * task.logit_scale).softmax(-1)
        for ranking, row in zip(case.model.classify(images, LABELS), shares, strict=True):
            shown = [dict(ranking)[label] for label in LABELS]
            np.testing.assert_allclose(shown, row.numpy(), rtol=2e-4, atol=1e-6)
        return
    if "itm_score" in theirs:
        np.testing.assert_allclose(ours[0] @ ours[1].T, theirs.itm_score, atol=1e-5)
        return  # transformers keeps no temperature for it
    kept = [name for name in theirs if name.endswith("logits_per_image")]
    logits = theirs[kept[0]]
    shares = logits.softmax(-1) if task.activation == "softmax" else logits.sigmoid()
    for ranking, row in zip(case.model.classify(images, LABELS), shares, strict=True):
        shown = [dict(ranking)[label] for label in LABELS]
        np.testing.assert_allclose(shown, row.numpy(), rtol=2e-4, atol=1e-6)


def test_scores_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if not isinstance(case.model.bundle.spec.tasks.get("match"), ScoreTask):
        pytest.skip("matches nothing")
    theirs = [matched(case, images, [text] * len(images)) for text in LABELS]
    ours = case.model.match(images, LABELS)
    np.testing.assert_allclose(ours, np.transpose(theirs), atol=1e-5)
    assert case.model.match(images[0], LABELS) == pytest.approx(ours[0], abs=1e-6)
    assert case.model.match(images[0], LABELS[1]) == pytest.approx(ours[0][1], abs=1e-5)
    with pytest.raises(InputError, match="no texts: give at least one"):
        case.model.match(images[0], [])


def matched(case: Case, images: list[Image.Image], texts: list[str]) -> Any:
    """Give transformers' probability that each picture and its text match."""
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    found = forward(case, {**inputs, "use_image_text_matching_head": True})
    names = ("itm_score", "itm_logits", "logits_per_image")
    return found[next(name for name in names if name in found)].softmax(-1)[:, 1]


def test_gaps_are_filled_as_transformers_does(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("infill")
    if not isinstance(task, InfillTask):
        pytest.skip("fills no gaps")
    text = f"a {task.mask_text} of a {task.mask_text}"
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    for image in images:
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        logits = forward(case, inputs).mmm_text_logits[0]
        places = inputs["input_ids"][0] == task.mask_id
        theirs = logits[places].softmax(-1)
        ours = case.model.infill(image, text, top=3)
        assert len(ours) == 2
        for ranking, row in zip(ours, theirs, strict=True):
            best = row.topk(3)
            assert [p for _, p in ranking] == pytest.approx(best.values.tolist(), rel=1e-4)
            words = [processor.tokenizer.decode([i]).strip() for i in best.indices.tolist()]
            assert [word for word, _ in ranking] == words
    with pytest.raises(InputError, match="has no gap: write"):
        case.model.infill(images[0], "a photo of a cat")
    with pytest.raises(InputError, match="top is 0"):
        case.model.infill(images[0], text, top=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_paintings_are_transformers(case: Case, images: list[Image.Image], count: int) -> None:
    """With one example and with several: labels by palette and without, and what is painted."""
    tasks = {n: t for n, t in case.model.bundle.spec.tasks.items() if isinstance(t, PaintTask)}
    if not tasks:
        pytest.skip("paints nothing")
    rng = np.random.default_rng(count)
    numbered = [rng.integers(0, 8, size[::-1]).astype(np.uint8) for size in SIZES[:count]]
    asked, examples = images[3], list(zip(images, numbered, strict=False))
    for name, task in tasks.items():
        labelled = task.means == "labels"
        outputs, processor = painted(case, asked, examples, task, 7 if labelled else None)
        found = case.model.paint(asked, examples, task=name, labels=7 if labelled else None)
        theirs = outputs.pred_masks[0, :, outputs.pred_masks.shape[2] // 2 :]
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
        )
        whole = (theirs * std + mean) * 255
        exact = {} if task.resample == "nearest" else {"align_corners": False}
        whole = torch.nn.functional.interpolate(
            (whole if task.resample == "bicubic" else whole.clip(0, 255))[None],
            size=asked.size[::-1],
            mode=task.resample,
            **exact,
        )[0].clip(0, 255)
        difference = np.abs(found.pixels.transpose(2, 0, 1) - whole.numpy())
        assert difference.max() <= 1.01  # pixels are cut to whole numbers
        if labelled and task.resample == "nearest":
            size = [(asked.height, asked.width)] * count
            (best, *_) = processor.post_process_semantic_segmentation(outputs, size, num_labels=7)
            np.testing.assert_array_equal(found.values, best.numpy())
            assert len(np.unique(found.values)) > 2
        elif task.means == "depth":
            np.testing.assert_allclose(found.values, whole.mean(0).numpy() / 25.5, atol=1e-4)
    alone = [case.model.paint(image, examples) for image in images]
    together = case.model.paint(images, examples)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def painted(
    case: Case, image: Image.Image, examples: list[Any], task: PaintTask, labels: int | None
) -> Any:
    """What transformers paints, and its processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    shown, masks = zip(*examples, strict=True)
    inputs = processor(images=[image] * len(shown), prompt_images=shown, return_tensors="pt")
    resample = Image.Resampling[task.example_resample.upper()]
    if resample is not Image.Resampling.NEAREST:  # its own filter for masks is fixed
        masks = [
            Image.fromarray(np.array(palette(labels), np.uint8)[mask] if labels else mask)
            .convert("RGB")
            .resize(inputs["pixel_values"].shape[:1:-1], resample)
            for mask in masks
        ]
        extra = processor(
            images=None, prompt_masks=masks, do_convert_rgb=False, return_tensors="pt"
        )
    else:
        extra = processor(
            images=None, prompt_masks=list(masks), num_labels=labels, return_tensors="pt"
        )
    with torch.no_grad():
        outputs = case.reference(
            **inputs,
            **extra,
            feature_ensemble=len(shown) > 1,
            embedding_type="instance" if task.instance else "semantic",
        )
    return outputs, processor


def scored(case: Case, images: list[Image.Image], texts: list[str]) -> Any:
    """What transformers makes of every picture with every text."""
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    front = case.model.bundle.spec.text
    assert front is not None
    padding: dict[str, Any] = {"padding": True}
    if front.pad_to is not None:
        padding = {"padding": "max_length", "max_length": front.pad_to}
    inputs = processor(images=images, text=texts, return_tensors="pt", **padding)
    return forward(case, {**inputs, "use_itm_head": False})


def forward(case: Case, inputs: Mapping[str, Any]) -> Any:
    """Run the reference on what it takes of `inputs`, without a loss."""
    accepted = inspect.signature(case.reference.forward).parameters
    given = {k: v for k, v in {**inputs, "return_loss": False}.items() if k in accepted}
    with torch.no_grad():
        return case.reference(**given)


def test_cached_step_is_the_full_pass(case: Case) -> None:
    for component in case.model.bundle.spec.components:
        if not component.state:
            continue
        graph, rng = case.model.graphs[component.name], np.random.default_rng(0)
        state = {into for _, into in component.state}
        sizes = {"batch": 2, "tokens": 6, "total": 6, "states": 4}
        feeds = {
            spec.name: np.ones([sizes.get(a, 1) if isinstance(a, str) else a for a in spec.shape],
                               spec.dtype)
            if spec.dtype == "int64"
            else rng.standard_normal(
                [sizes.get(a, 4) if isinstance(a, str) else a for a in spec.shape]
            ).astype(spec.dtype)
            for spec in component.inputs
            if spec.name not in state
        }  # fmt: skip
        graph.reset()
        full = graph.run(feeds)["logits"]
        graph.reset()
        alone = graph.run(feeds, last=True)["logits"]
        assert alone.shape == (2, 1, full.shape[2])  # the head is found in every family's decoder
        np.testing.assert_allclose(alone, full[:, -1:], rtol=1e-4, atol=2e-5)
        axes = {spec.name: spec.shape for spec in component.inputs}

        def cut(name: str, value: Any, start: int, end: int, axes: Any = axes) -> Any:
            for axis, label in enumerate(axes[name]):
                if label == "tokens":
                    value = np.take(value, range(start, end), axis)
                elif label == "total":
                    value = np.take(value, range(end), axis)
            return np.ascontiguousarray(value)

        graph.reset()
        first = graph.run({n: cut(n, v, 0, 4) for n, v in feeds.items()})["logits"]
        rest = [
            graph.run({n: cut(n, v, i, i + 1) for n, v in feeds.items()})["logits"] for i in (4, 5)
        ]
        np.testing.assert_allclose(np.concatenate([first, *rest], 1), full, rtol=1e-4, atol=2e-5)


def given(processor: Any, image: Image.Image, task: GenerateTask, text: str) -> str:
    """Make of a prompt what a processor is given: less what it puts around a text by itself."""
    if task.image_text is None:
        return text
    text = text.replace("{examples}", "")
    token = str(getattr(processor, "image_token", ""))
    if token:  # it marks the picture's place
        writes_nothing_around = isinstance(processor, transformers.LlavaProcessor)
        shown = task.image_text.alone if writes_nothing_around else token
        text = text.replace("{image}", shown)
        _, layout, *_ = processor.prepare_inputs_layout(images=image, text=[f"{token}PROBE"])
        if layout[0].count(token) > 1:  # it puts the mark there by itself
            _, layout, *_ = processor.prepare_inputs_layout(images=image, text=["PROBE"])
            token = ""
        before, after = layout[0].split("PROBE")
    else:  # a picture comes before its text
        text = text.replace("{image}", task.image_text.alone)
        ids = processor(images=image, text="PROBE")["input_ids"][0]
        before, after = processor.tokenizer.decode(ids).split("PROBE")
    if text.startswith(before) and text.endswith(after):
        text = token + text[len(before) : len(text) - len(after)]
    return text


def processor_of(case: Case) -> Any:
    """Return transformers' processor of a checkpoint, or that of a family with a model of ours."""
    own = getattr(case.reference, "processor", None)
    return transformers.AutoProcessor.from_pretrained(case.folder) if own is None else own


def prompt_tokens(case: Case, task: GenerateTask, text: str, read: int) -> int:
    """Count what transformers' decoder repeats before what it writes."""
    if not task.read:
        return 1 if case.reference.config.is_encoder_decoder else read
    context = TaskContext(case.model.bundle, {})
    if wiring.reads_text(case.model.bundle.spec, task):
        return len(task.start_ids)
    return len(task.start_ids) + len(context.tokenizer.ids(text, whole=task.special_tokens))


def generated(
    case: Case, images: list[Image.Image], task: GenerateTask, text: str, beams: int
) -> list[str]:
    """What transformers writes about each picture, one at a time."""
    processor = processor_of(case)
    found = []
    for image in images:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PaliGemma's processor is older than numpy 2
            prompt = given(processor, image, task, text)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            ids = case.reference.generate(
                **inputs, max_new_tokens=NEW, num_beams=beams, do_sample=False
            )
        start = prompt_tokens(case, task, text, inputs["input_ids"].shape[1])
        found.append(processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_transformers(case: Case, images: list[Image.Image], beams: int) -> None:
    tasks = case.model.bundle.spec.tasks
    if "ask" not in tasks and "caption" not in tasks:
        pytest.skip("writes nothing")
    for name in {"ask", "caption"} & set(tasks):
        task = tasks[name]
        assert isinstance(task, GenerateTask)
        if name == "ask":
            ours = case.model.ask(images, QUESTIONS[1], max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{question}", QUESTIONS[1])
        else:
            begin = "a" if "{prompt}" in task.prompt else ""
            ours = case.model.caption(images, begin, max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{prompt}", begin)
        assert ours == generated(case, images, task, text, beams)


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


def test_answers_depend_on_picture_and_text(
    case: Case, images: list[Image.Image], clips: list[NDArray[np.uint8]]
) -> None:
    """Else the comparisons above would not see a lost picture, or a lost question."""
    tasks = case.model.bundle.spec.tasks
    written = [name for name in ("ask", "caption", "ask_video", "caption_video") if name in tasks]
    if not written:
        pytest.skip("writes nothing")
    for name in written:
        task = tasks[name]
        assert isinstance(task, GenerateTask)
        shown: list[Any] = list(images)
        if task.source == "video":
            shown = [vlmedge.Video(clip) for clip in clips]
        asks = "{question}" in task.prompt
        write = case.model.ask if asks else case.model.caption
        texts = QUESTIONS if asks else ["a", "two", "é"] if "{prompt}" in task.prompt else []
        answers = [[write(each, t, max_tokens=NEW) for each in shown] for t in texts or [""]]
        assert len(set(answers[0])) > 1, f"{name}: all pictures are answered alike"
        alike = all(answer == answers[0] for answer in answers[1:])
        assert not (texts and alike), f"{name}: all texts are answered alike"


def seen(case: Case, clip: NDArray[np.uint8], task: GenerateTask, text: str, beams: int) -> str:
    """Return what transformers writes about a video.

    Its video processors need torchvision, so each frame goes through its image processor.
    """
    front = case.model.bundle.spec.video
    assert front is not None and task.image_text is not None
    if isinstance(case.reference, transformers.PreTrainedModel):
        metadata = VideoMetadata(total_num_frames=len(clip))
        places = default_sample_indices_fn(metadata, num_frames=min(front.frames, len(clip)))
        processor = transformers.CLIPImageProcessor.from_pretrained(case.folder)
        frames = [Image.fromarray(clip[i]) for i in places]
        pixels = processor(frames, return_tensors="pt")["pixel_values"]
    else:  # not of transformers; tests/test_video.py has how its frames become pixels
        context = TaskContext(case.model.bundle, {})
        pixels = torch.from_numpy(context.frames(context.open(vlmedge.Video(clip))))
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    with torch.no_grad():
        inner = getattr(case.reference, "model", case.reference)
        rows = inner.get_video_features(pixels[None]).pooler_output
        count = rows.numel() // rows.shape[-1]
        token = task.image_text.placeholder
        text = text.replace("{image}", task.image_text.alone.replace(token, token * count))
        inputs = tokenizer(text, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = case.reference.generate(
            **inputs,
            pixel_values_videos=pixels[None],
            max_new_tokens=NEW,
            num_beams=beams,
            do_sample=False,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_question_may_begin_with_another_token(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    if not isinstance(task, GenerateTask):
        pytest.skip("answers nothing")
    if "input_ids" not in wiring.wanted(case.model.bundle.spec, task):
        with pytest.raises(InputError, match="this model has no encoder for questions"):
            case.model.ask(images[0], "what?", first_token="<s>")
        return
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    usual = case.model.ask(images, QUESTIONS[0], max_tokens=NEW)
    changed = []
    for token in ("<image>", "<e>", "</s>"):
        theirs = []
        for image in images:
            inputs = processor(images=image, text=QUESTIONS[0], return_tensors="pt")
            inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids(token)
            with torch.no_grad():
                ids = case.reference.generate(**inputs, max_new_tokens=NEW)[0]
            text = processor.tokenizer.decode(ids[len(task.start_ids) :], skip_special_tokens=True)
            theirs.append(text.strip())
        assert case.model.ask(images, QUESTIONS[0], max_tokens=NEW, first_token=token) == theirs
        changed += [a != b for a, b in zip(usual, theirs, strict=True)]
    assert any(changed)
    with pytest.raises(InputError, match=r"first_token 'two words' is \d+ tokens: give one"):
        case.model.ask(images[0], "what?", first_token="two words")


def test_instruction_has_its_say_in_what_is_seen(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    context = TaskContext(case.model.bundle, case.model.graphs)
    if not isinstance(task, GenerateTask) or not task.instruct:
        with pytest.raises(InputError, match="has no text front end for instructions"):
            assert context.instruction_tokenizer
        return
    pixels = context.pixels(images[:1])
    encoded = list(encoding.encode(context, task, pixels))
    together = encoding.instructed(context, task, [encoded] * len(QUESTIONS), QUESTIONS)
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    for [soft], question in zip(together, QUESTIONS, strict=True):
        read = processor.qformer_tokenizer(question, return_tensors="pt")
        with torch.no_grad():
            theirs = case.reference.get_image_features(
                torch.from_numpy(pixels), read["input_ids"], read["attention_mask"]
            ).pooler_output[0]
        np.testing.assert_allclose(soft, theirs.numpy(), atol=1e-5)
    assert np.abs(together[0][0] - together[1][0]).max() > 0.01
    with pytest.raises(InputError, match=r"prompt of \d+ tokens: the model has room for 64"):
        case.model.ask(images[0], "x" * 80, max_tokens=NEW)


def test_prompts_of_unequal_length_are_kept_apart(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    if not isinstance(task, GenerateTask):
        pytest.skip("answers nothing")
    context = TaskContext(case.model.bundle, case.model.graphs)
    options = case.model._options({"max_tokens": NEW})
    pictures = context.pictures(images[:3])
    texts = [
        prompting.fill(task, question, [grid])
        for question, grid in zip(QUESTIONS, pictures.grids, strict=True)
    ]
    soft = encoding.encode(context, task, pictures.pixel_values)
    encoded = encoding.rows(soft, pictures.grids)
    together = generating.write(context, task, encoded, texts, options)
    alone = [
        generating.write(context, task, encoded[i : i + 1], [text], options)[0]
        for i, text in enumerate(texts)
    ]
    assert together == alone


def test_examples_are_transformers(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("caption")
    if not isinstance(task, GenerateTask) or task.example is None:
        pytest.skip("takes no examples")
    examples = [
        Example(image, f"{word} star") for image, word in zip(images[:2], ("a", "no"), strict=True)
    ]
    ours = case.model.caption(images[2], examples=examples, max_tokens=NEW)
    processor = processor_of(case)
    assert task.image_text is not None
    layout: list[Any] = []  # what a processor of interleaved prompts takes
    for example in examples:
        layout += [
            example.image,
            task.example.replace("{image}", "").replace("{text}", example.text),
        ]
    layout += [images[2], task.prompt.split("{image}")[1].replace("{prompt}", "")]
    inputs = processor(text=[layout], return_tensors="pt")
    with torch.no_grad():
        ids = case.reference.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert ours == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert ours != case.model.caption(images[2], max_tokens=NEW)


@pytest.mark.parametrize("scheme", schemes())
def test_scheme_keeps_every_component_close(
    case: Case,
    scheme: str,
    tmp_path: Path,
    record_property: Record,
    request: pytest.FixtureRequest,
) -> None:
    """Random weights have no accuracy to lose, and amplify what trained ones damp.

    So the limits are wider than the gate's; a wrong scale or a lost layer is at 0.5 or below.
    """
    kind = request.node.callspec.params["case"]
    check(bundle_of(kind, tmp_path / "b", scheme), str(case.folder))
    parity = Bundle.load(tmp_path / "b").manifest.parity
    assert parity is not None
    record_property("cosine", json.dumps({c.component: c.cosine for c in parity.components}))
    for result in parity.components:
        assert result.cosine >= CLOSE[scheme], result


def test_caches_are_in_place(case: Case) -> None:
    """No step copies a cache, but where a prompt's tokens look ahead, which no kernel does."""
    if case.model.bundle.spec.family == "t5gemma2":
        pytest.skip("its one attention reads the cache and the encoder's states, which none does")
    for component in case.model.bundle.spec.components:
        if not component.state or any(i.name == "token_type_ids" for i in component.inputs):
            continue
        graph: Any = case.model.graphs[component.name]
        (cached,) = [one for one in graph.fusions if one["kind"] == "cached attentions"]
        assert cached["done"] == cached["total"] == len(component.state) // 2, cached["left"]


def test_benchmark_runs_every_component(case: Case) -> None:
    found = Side(case.model.bundle, None, "ort").round()
    ran = {name.split()[0] for name in found["components_ms"]}
    assert ran == {component.name for component in case.model.bundle.spec.components}
    assert found["tasks_ms"].keys() <= case.model.bundle.spec.tasks.keys()


def test_chat_is_transformers_with_its_cache_kept_or_lost(
    case: Case, images: list[Image.Image]
) -> None:
    if "chat" not in case.model.bundle.spec.tasks:
        pytest.skip("does not chat")
    turns = [(QUESTIONS[1], [images[0]]), (QUESTIONS[0], []), (QUESTIONS[2], images[1:3])]
    chat = case.model.chat(max_tokens=NEW)
    kept = [chat.ask(text, seen) for text, seen in turns]
    assert chat._prompt is not None and chat._prompt.before is not None
    disturbed = case.model.chat(max_tokens=NEW)
    lost = []
    for text, seen in turns:
        lost.append(disturbed.ask(text, seen))
        case.model.ask(images[3], QUESTIONS[0], max_tokens=2)  # takes the cache away
    assert lost == kept
    assert [reply for _, reply in chat.turns] == kept
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    # by embeddings: a random model may write the picture's token, which transformers then refuses
    read = np.stack(chat._vectors[: chat._prompt.tokens])[None]
    given = {"inputs_embeds": torch.from_numpy(read), "attention_mask": torch.ones(read.shape[:2])}
    with torch.no_grad():
        new = case.reference.generate(**given, max_new_tokens=NEW, do_sample=False)[0]
    assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == kept[-1]
