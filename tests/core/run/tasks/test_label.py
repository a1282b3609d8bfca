"""Closed heads: their labels on disk and on the command line; and ensembles of templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kit.bundles import bundle_of, checkpoint_of

import vlmedge as package
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, CheckpointError, InputError
from vlmedge.make.export import export
from vlmedge.run.tasks.imagenet_templates import IMAGENET
from vlmedge.run.tasks.label import read_labels
from vlmedge.spec import LabelTask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "checkpoint"
    return checkpoint_of("vit", folder)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return bundle_of("vit", checkpoint.parent / "bundle")


def test_label_without_a_name_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "3": "c"}
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label names 3 labels, the head has 3: each"):
        export(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b'["a", 1]', "is not a list of names"),
        (None, "cannot be"),
    ],
)
def test_broken_label_file_is_refused(
    bundle: Path, tmp_path: Path, data: bytes | None, message: str
) -> None:
    task = LabelTask(("vision_encoder",), "logits", "labels.json")
    if data is not None:
        (tmp_path / "labels.json").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        read_labels(Bundle(tmp_path, Bundle.load(bundle).manifest), task)


def test_classify_prints_the_heads_own_labels(
    bundle: Path, pictures: list[Path], vlmedge: Callable[..., object]
) -> None:
    ran = vlmedge("classify", bundle, pictures[0], "--top", 2, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)[0]["labels"]
    ours = package.load(bundle).classify(pictures[0])[:2]
    assert [(entry["label"], pytest.approx(entry["probability"])) for entry in found] == ours


def test_labels_are_asked_for_where_there_is_no_head(
    clip_bundle: Path, pictures: list[Path], vlmedge: Callable[..., object]
) -> None:
    ran = vlmedge("classify", clip_bundle, pictures[0])
    assert (ran.code, "has no labels of its own: give labels" in ran.err) == (1, True)


def test_ensemble_is_the_mean_of_unit_vectors(clip_bundle: Path, pictures: list[Path]) -> None:
    model = package.load(clip_bundle)
    templates, labels = ["a photo of a {}", "a {} on the table"], ["red circle", "blue star"]
    vectors = [model.embed_text([t.format(label) for label in labels]) for t in templates]
    mean = np.mean(vectors, axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    scale = model.bundle.spec.tasks["classify"].logit_scale
    logits = scale * model.embed_image(pictures[0]) @ mean.T
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    ours = dict(model.classify(pictures[0], labels, template=templates))
    assert [ours[label] for label in labels] == pytest.approx(shares.tolist(), abs=1e-5)
    one = dict(model.classify(pictures[0], labels, template=templates[0]))
    assert [one[label] for label in labels] != pytest.approx(shares.tolist(), abs=1e-3)


def test_imagenet_ensemble_has_eighty_sentences(clip_bundle: Path, pictures: list[Path]) -> None:
    assert len(set(IMAGENET)) == 80
    model = package.load(clip_bundle)
    labels = ["red circle", "blue star"]
    named = model.classify(pictures[0], labels, template="imagenet")
    assert named == model.classify(pictures[0], labels, template=IMAGENET)


def test_empty_ensemble_is_refused(clip_bundle: Path, pictures: list[Path]) -> None:
    with pytest.raises(InputError, match="no templates: give at least one"):
        package.load(clip_bundle).classify(pictures[0], ["a"], template=())
