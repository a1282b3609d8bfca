"""Profiles: which sizes an engine is built for, and what becomes of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit.bundles import bundle_of, checkpoint_of
from kit.tensorrt import Use, build, only, profile, prompt, writes_the_same
from kit.tiny import KINDS

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.run.model import Model
from vlmedge.shelves.build_options import AxisRange, BuildOptions
from vlmedge.shelves.registry import ENGINES, FAMILIES


def test_qformer_is_built_for_the_texts_that_its_own_tokenizer_may_give(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("instructblip-flan-t5", tmp_path / "checkpoint")
    spec = FAMILIES["instructblip"].open(checkpoint).spec
    most = {
        name: profile.profiles(spec, spec.component(name), {})[0]["tokens"].max
        for name in ("qformer", "text_encoder")
    }
    rows = int(spec.component("projector").outputs[0].shape[1])  # of the picture, before the text
    assert most == {"qformer": 64, "text_encoder": rows + spec.text.max_tokens}


def test_profile_that_does_not_cover_names_axis_size_and_range(use: Use, blip2: Bundle) -> None:
    use("trt103")
    build(blip2, only("decoder", axes={"past": AxisRange(1, 8, 12), "tokens": AxisRange(1, 8, 9)}))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    with pytest.raises(
        InputError, match=r"decoder: tokens is 20: its engine takes 1 to 9: .*--axis tokens=1:9:20"
    ):
        graph.run(prompt(1, 20, 20))
    graph.run(prompt(1, 9, 9))
    for total in range(10, 14):
        graph.run(prompt(1, 1, total))
    with pytest.raises(InputError, match=r"decoder: (past|total) is 1[34]: .*--axis past="):
        graph.run(prompt(1, 1, 14))
    with pytest.raises(InputError, match=r"decoder: batch is 9: its engine takes 1 to 8: "):
        graph.reset()
        graph.run(prompt(9, 4, 4))
    graph.close()


@pytest.mark.parametrize("text", ["3:2:1", "1:2", "x", "1:2:3:4", "-1:1:2"])
def test_wrong_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="it must be MIN:OPT:MAX"):
        AxisRange.parse(text)


def test_range_of_an_unknown_axis_is_refused(use: Use, clip: Bundle) -> None:
    use("trt103")
    options = BuildOptions(axes={"bach": AxisRange(1, 1, 2)})
    with pytest.raises(InputError, match="no axis 'bach': choose from batch"):
        build(clip, options)


# What has an axis of its own: a cross cache, media that is looked at
QUICK = ("blip-vqa", "flamingo")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_every_kind_fits_its_profiles(
    case: str, use: Use, tmp_path: Path, pictures: list[Path]
) -> None:
    """Probing and writing stay in the ranges of the axes, and the texts are ONNX Runtime's."""
    bundle = Bundle.load(bundle_of(case, tmp_path / "bundle"))
    use("trt103")
    build(bundle)
    writes_the_same(bundle, pictures)


@pytest.mark.xdist_group("blip2-flan-t5")  # traced once, on one worker
def test_encoder_and_decoder_write_what_onnx_runtime_does(
    use: Use, t5: Bundle, pictures: list[Path]
) -> None:
    use("trt103")
    build(t5)
    writes_the_same(t5, pictures)


@pytest.mark.xdist_group("blip2-flan-t5")  # traced once, on one worker
def test_states_are_what_a_reader_has_read(t5: Bundle) -> None:
    """T5's encoder reads the picture's rows and the text, and the decoder looks at all of it."""
    spec = t5.spec
    assert spec.text is not None
    read = AxisRange(1, 6 + 16, 6 + spec.text.max_tokens)
    (encoder,) = profile.profiles(spec, spec.component("text_encoder"), {})
    (cross,) = profile.profiles(spec, spec.component("cross_kv"), {})
    prefill, decode = profile.profiles(spec, spec.component("decoder"), {})
    assert encoder["tokens"] == cross["states"] == prefill["states"] == decode["states"] == read
    assert prefill["tokens"] == AxisRange(1, 1, 1)  # the start id: the text is read elsewhere
    wider = {"tokens": AxisRange(1, 30, 60)}
    for part in ("cross_kv", "decoder"):
        found = profile.profiles(spec, spec.component(part), wider)
        assert [one["states"] for one in found] == [AxisRange(1, 30, 60)] * len(found)


@pytest.mark.xdist_group("blip2-flan-t5")  # traced once, on one worker
def test_states_beyond_the_profile_are_named(use: Use, t5: Bundle) -> None:
    use("trt103")
    build(t5, only("cross_kv", axes={"states": AxisRange(1, 8, 9)}))
    graph = ENGINES["tensorrt"].open(t5, "cross_kv")
    states = np.zeros((1, 10, 32), np.float32)
    with pytest.raises(
        InputError, match=r"cross_kv: states is 10: its engine takes 1 to 9: .*--axis states=1:9:10"
    ):
        graph.run({"text_states": states})
    graph.close()


@pytest.mark.xdist_group("blip2-flan-t5")  # traced once, on one worker
def test_cross_cache_goes_up_once(use: Use, t5: Bundle, pictures: list[Path]) -> None:
    gpu = use("trt103")
    build(t5)
    model = Model(t5, "tensorrt")
    sent = []
    for tokens in (2, 6):
        gpu.copied_bytes["up"] = 0
        model.caption(str(pictures[0]), max_tokens=tokens, min_tokens=tokens)
        sent.append(gpu.copied_bytes["up"])
    cross = 4 * 4 * 8 * 4 * 8  # 2 layers' keys and values, 4 heads, more than 8 states, float32
    assert 0 < sent[1] - sent[0] < cross
    model.graphs.close()
