"""A plan is right about memory, fast, and says what would fit instead."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT
from kit.shapes import LLAVA, benchmark_models

from vlmedge.errors import InputError, UnknownNameError
from vlmedge.plan.plan import Plan, PlanRequest, follow, make_plan, read_shape, refusal
from vlmedge.plan.roofline import SCHEMES, engines
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import device, devices
from vlmedge.units import GIB, MIB

# Peaks of ONNX Runtime must be within this of the prediction: below it a plan would promise too
# much, above it refuse too much. Measured: 0.90 to 0.99 at CLIP B/16 and both tiny models.
TOLERANCE = 0.15

RUN = """
import json, sys
import numpy as np
import vlmedge
from vlmedge.bench.worker import peak_memory_mib
from vlmedge.checkpoints.scenes import draw_scene
model = vlmedge.load(sys.argv[1])
image = np.asarray(draw_scene(0, "heldout").image)
for _ in range(2):
    if "classify" in model.bundle.spec.tasks:
        model.classify(image, ["red circle"])
    else:
        model.caption(image, max_tokens=20, min_tokens=20)
print(peak_memory_mib())
"""


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(LLAVA))
    return file


def planned(path: Path, name: str, **wishes: object) -> Plan:
    wish = PlanRequest(name, cores=2, **wishes)  # type: ignore[arg-type]
    return make_plan(str(path), read_shape(path), wish)


def peak_mib(bundle: Path) -> float:
    """Run a bundle twice, in processes of their own: the first may still build engines."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(bundle)], capture_output=True, text=True, check=True
        )
    return float(done.stdout)


@pytest.mark.parametrize("name", ["clip_bundle", "clip_int8", "blip2_bundle", "blip2_int8"])
def test_predicted_peak_is_the_measured_one(
    name: str, vlmedge, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(name)
    measured = peak_mib(bundle)
    sizes = ("--prompt-tokens", 4, "--max-tokens", 20)
    where = ("--device", "cpu-x86-avx512-vnni", "--json")
    ours = json.loads(vlmedge("plan", bundle, *where, *sizes).out)
    (scheme,) = ours["schemes"]
    assert measured == pytest.approx(scheme["total_bytes"] / MIB, rel=TOLERANCE)
    checkpoint = json.loads(vlmedge("plan", _checkpoint(name), *where, *sizes).out)
    same = next(s for s in checkpoint["schemes"] if s["scheme"] == scheme["scheme"])
    assert measured == pytest.approx(same["total_bytes"] / MIB, rel=TOLERANCE)


def _checkpoint(name: str) -> str:
    return f"tiny-{name.split('_')[0]}"


@pytest.mark.parametrize("name", ["clip_bundle", "clip_int8", "blip2_bundle", "blip2_int8"])
def test_bundle_and_config_agree(name: str, vlmedge, request: pytest.FixtureRequest) -> None:
    """What is read from files and graphs is what is counted from config.json."""
    bundle = request.getfixturevalue(name)
    where = ("--device", "rtx-4090", "--engine", "ort", "--json")
    ours = json.loads(vlmedge("plan", bundle, *where).out)
    theirs = json.loads(vlmedge("plan", _checkpoint(name), *where).out)
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.05)
    assert ours["picture_tokens"] == theirs["picture_tokens"]
    (scheme,) = ours["schemes"]
    same = next(s for s in theirs["schemes"] if s["scheme"] == scheme["scheme"])
    for mine, counted in zip(scheme["parts"], same["parts"], strict=True):
        assert mine["component"] == counted["component"]
        assert mine["cache_bytes"] == counted["cache_bytes"]
        assert mine["activations_bytes"] == pytest.approx(counted["activations_bytes"], rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_predicted_peak_is_the_measured_one_at_full_size(scheme: str, tmp_path: Path) -> None:
    """CLIP ViT-B/16 with random weights: 0.6 GB in float32."""
    from vlmedge.make import export as exporting

    maker = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "clip-vit-b-16"]
    subprocess.run([*maker, str(tmp_path / "clip")], check=True, capture_output=True)
    chosen = None if scheme == "float32" else scheme
    bundle = exporting.export(str(tmp_path / "clip"), tmp_path / "bundle", chosen, check=False)
    plan = planned(tmp_path / "clip", "cpu-x86-avx512-vnni", free_gib=8.0)
    predicted = plan.scheme(scheme).total_bytes / MIB
    assert peak_mib(bundle.path) == pytest.approx(predicted, rel=TOLERANCE)


def test_llava_on_an_orin_nano_is_int4_with_swap(llava: Path) -> None:
    plan = planned(llava, "jetson-orin-nano-8gb")
    assert plan.recommended == "int4"
    verdicts = {s.scheme: s.verdict for s in plan.schemes}
    assert verdicts.pop("fp8") == "no arithmetic" and verdicts.pop("int4") != "too big"
    assert set(verdicts.values()) == {"too big"}
    assert any("needs swap: int4" in note for note in plan.notes)
    decoder = plan.scheme("fp16").parts[-1]
    assert decoder.weights_bytes == pytest.approx(2 * 6.607e9, rel=0.001)
    # 2 x 32 layers x 4096 x 704 tokens in float16, in two buffers that take turns
    assert decoder.cache_bytes == 2 * 32 * 4096 * (576 + 64 + 64) * 2 * 2


def test_accelerator_is_mentioned_where_it_can_be_built_for(llava: Path) -> None:
    def notes(name: str, **wishes: object) -> str:
        return " ".join(planned(llava, name, **wishes).notes)

    assert "its DLA is not planned with" in notes("jetson-agx-orin-64gb")
    assert "with TensorRT 8.6.2, 10.3.0, whether" in notes("jetson-orin-nx-16gb")
    assert "DLA" not in notes("jetson-agx-orin-64gb", engine="ort")
    for name in ("jetson-orin-nano-8gb", "jetson-xavier-nx-8gb", "jetson-thor-t5000", "rtx-4090"):
        assert "DLA" not in notes(name)


def test_what_a_decoder_looks_at_is_kept_too(tmp_path: Path) -> None:
    """BLIP base: 12 layers' keys and values of 577 rows, once, beside those of the text, twice."""
    config = {"text_config": {}, "vision_config": {}, "model_type": "blip"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["BlipForConditionalGeneration"], **config}))
    decoder = planned(file, "jetson-orin-nano-8gb").scheme("fp16").parts[-1]
    assert decoder.cache_bytes == 2 * 12 * 768 * (2 * (64 + 64) + 577) * 2


def test_classifier_is_planned_without_tokens(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    plan = planned(file, "jetson-orin-nano-8gb")
    assert plan.recommended is not None and plan.profile == {}
    assert plan.scheme("fp16").tokens_per_s is None


def test_shared_memory_leaves_less_than_a_card_has(llava: Path) -> None:
    board, card = planned(llava, "jetson-orin-nano-8gb"), planned(llava, "rtx-4060")
    assert board.free_bytes < 6 * GIB < 7 * GIB < card.free_bytes
    headless = planned(llava, "jetson-orin-nano-8gb", headless=True)
    assert headless.free_bytes - board.free_bytes == pytest.approx(0.8 * GIB)
    assert planned(llava, "rtx-4060", free_gib=3.5).free_bytes == 3.5 * GIB


def test_speed_is_bandwidth_over_weights(llava: Path) -> None:
    """Decoding reads every weight once, so half of the bytes is twice the speed."""
    plan = planned(llava, "jetson-agx-orin-64gb")
    rates = {s.scheme: s.tokens_per_s for s in plan.schemes}
    read = (2 * 6.607e9 + 3.7e8) / (0.5 * 204.8e9)  # half of the bandwidth
    assert rates["fp16"] == pytest.approx(1 / (read + 32 * 50e-6), rel=0.01)
    assert None not in rates.values()
    assert rates["int8"] > 1.9 * rates["fp16"] and rates["int4"] > rates["int8"]  # type: ignore[operator]


def test_refusal_says_what_would_fit(llava: Path) -> None:
    shape = read_shape(llava)
    plan = planned(llava, "jetson-orin-nano-8gb")
    assert refusal(plan, shape, None) is None and refusal(plan, shape, "int4") is None
    said = refusal(plan, shape, "fp16")
    assert said is not None
    pattern = r"in fp16 needs 14.\d GiB, jetson-orin-nano-8gb has 5.9 free: int4 fits there \(.*\)"
    assert re.search(pattern, said)
    named = re.search(r"fp16 fits on (\S+)$", said)
    assert named is not None
    assert planned(llava, named[1]).scheme("fp16").verdict == "fits"
    small = planned(llava, "jetson-orin-nano-4gb")
    assert small.recommended is None
    assert re.search("in int4 needs .* int4 fits on jetson-", refusal(small, shape, None) or "")


def test_device_without_the_arithmetic_is_refused(llava: Path) -> None:
    shape = read_shape(llava)
    plan = planned(llava, "cpu-x86-avx2", free_gib=64.0)
    said = refusal(plan, shape, "fp16")
    assert said is not None and "cpu-x86-avx2 cannot compute in it: float32 fits there" in said
    assert planned(llava, "jetson-agx-xavier-64gb").scheme("int4").verdict == "no arithmetic"


def test_giant_fits_nowhere(tmp_path: Path) -> None:
    huge = {**LLAVA, "text_config": {**LLAVA["text_config"], "hidden_size": 131072}}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    shape = read_shape(tmp_path)
    said = refusal(planned(tmp_path, "h100"), shape, None)
    assert said is not None and "no device of the catalogue has enough" in said


def test_export_for_a_device_takes_its_scheme_or_is_refused(llava: Path) -> None:
    assert follow(str(llava), "jetson-orin-nano-8gb", None, SILENT) == "int4"
    assert follow(str(llava), "jetson-agx-orin-64gb", "fp16", SILENT) == "fp16"
    with pytest.raises(InputError, match="in fp16 needs .*int4 fits there"):
        follow(str(llava), "jetson-orin-nano-8gb", "fp16", SILENT)


def test_export_for_a_device_is_refused_before_any_work(vlmedge, tmp_path: Path) -> None:
    folder = ROOT / "vlmedge" / "checkpoints" / "tiny-clip"
    out = tmp_path / "out"
    ran = vlmedge("export", folder, "--fp8", "--device", "jetson-nano-4gb", "--out", out)
    assert ran.code == 1 and "jetson-nano-4gb cannot compute in it" in ran.err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")
def test_export_for_a_device_takes_the_recommended_scheme(vlmedge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wish = ("--device", "cpu-x86-avx512-vnni", "--no-check", "--quiet", "--out", out)
    assert vlmedge("export", "tiny-clip", *wish).code == 0
    assert json.loads((out / "manifest.json").read_text())["scheme"] == "int8"


def test_board_that_could_run_but_not_build_is_refused() -> None:
    """A small model's engine takes more to build than to run."""
    folder = ROOT / "vlmedge" / "checkpoints" / "tiny-clip"
    shape = read_shape(folder)
    plan = planned(folder, "jetson-orin-nano-4gb", free_gib=1.2)
    found = plan.scheme("fp16")
    assert found.verdict == "cannot be built" and found.total_bytes < plan.free_bytes
    said = refusal(plan, shape, "fp16")
    assert said is not None and re.search(r"needs 1.\d GiB to build, .* has 1.2 free", said)
    assert planned(folder, "jetson-orin-nano-4gb", engine="ort", free_gib=1.2).scheme("fp16").fits


@pytest.mark.parametrize("name", list(devices()))
def test_every_device_can_be_planned(name: str, llava: Path) -> None:
    found = device(name)
    for engine in found.engines:
        if engine in engines():
            plan = planned(llava, name, engine=engine, free_gib=256.0)
            assert len(plan.schemes) == len(SCHEMES)
            assert plan.recommended is not None
            for scheme in plan.schemes:
                assert scheme.total_bytes > 0 and scheme.first_token_ms > 0


def test_plan_refuses_what_it_cannot_mean(llava: Path) -> None:
    with pytest.raises(InputError, match=r"4840 tokens \(576 .*\): the model has 4096 positions"):
        planned(llava, "rtx-4090", prompt_tokens=4200, new_tokens=64)
    with pytest.raises(InputError, match="'tensorrt' does not run on cpu-arm64: choose from ort"):
        planned(llava, "cpu-arm64", engine="tensorrt")
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        refusal(planned(llava, "rtx-4090"), read_shape(llava), "int9")


def test_tiny_model_is_planned_for_the_text_that_it_has_room_for(vlmedge) -> None:
    found = json.loads(vlmedge("plan", "tiny-blip2", "--json", "--device", "rtx-4090").out)
    total = found["picture_tokens"] + found["prompt_tokens"] + found["new_tokens"]
    assert (total, found["prompt_tokens"]) == (128, 56)


def test_command_prints_tables_and_fails_when_it_does_not_fit(vlmedge, llava: Path) -> None:
    ran = vlmedge("plan", llava, "--device", "jetson-orin-nano-8gb")
    assert ran.code == 0 and "recommended: int4" in ran.out
    for word in ("vision_encoder", "7063.4 M", "tokens/s", "build peak", "past 0:640:703"):
        assert word in ran.out
    ran = vlmedge("plan", llava, "--device", "jetson-orin-nano-8gb", "--scheme", "int8")
    assert ran.code == 1 and "too big" in ran.out
    assert ran.err.startswith("vlmedge: ") and "int4 fits there" in ran.err
    ran = vlmedge("plan", llava, "--device", "jetson-orin-nano-4gb", "--json")
    assert ran.code == 1 and json.loads(ran.out)["recommended"] is None


def test_command_refuses_bad_input_in_one_line(
    vlmedge, tmp_path: Path, clip_int8: Path, llava: Path
) -> None:
    ran = vlmedge("plan", tmp_path / "none.json", "--device", "rtx-4090")
    assert ran.code == 1 and "no such" in ran.err
    ran = vlmedge("plan", tmp_path, "--device", "rtx-4090")
    assert ran.code == 1 and "has no config.json" in ran.err
    ran = vlmedge("plan", "tiny-clip", "--device", "rtx4090")
    assert ran.code == 1 and "did you mean 'rtx-4090'" in ran.err
    ran = vlmedge("plan", clip_int8, "--device", "rtx-4090", "--scheme", "fp16")
    assert ran.code == 1 and "is int8: plan its checkpoint for fp16" in ran.err
    assert vlmedge("plan", llava, "--free-gib", "0").code == 2


def test_blip2_speed_is_near_what_was_measured(tmp_path: Path) -> None:
    """OPT-2.7b in int8 on two cores took 1279 ms to the first token and gave 12.0 tokens/s.

    That was when the roofline was fitted; docs/measured.md has 1402 ms and 14.9 tokens/s since.
    """
    make, _ = benchmark_models()["blip2-opt-2.7b"]
    make().save_pretrained(tmp_path)
    wish = {"prompt_tokens": 1, "new_tokens": 20, "free_gib": 16.0}
    found = planned(tmp_path, "cpu-x86-avx512-vnni", **wish).scheme("int8")
    assert found.first_token_ms == pytest.approx(1279, rel=0.15)
    assert found.tokens_per_s == pytest.approx(12.0, rel=0.15)
    assert found.total_bytes / GIB == pytest.approx(4.0, rel=TOLERANCE)
