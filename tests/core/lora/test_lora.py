"""LoRA adapters, trained (that is: drawn) by PEFT: merged at export, or swapped in slots."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from kit.bundles import bundle_of, checkpoint_of, kept
from kit.tiny import KINDS, tiny
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

import vlmedge as library
from vlmedge.bundle import Bundle
from vlmedge.bundle.weights import SafeWeights
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import AdapterError, CheckpointError, InputError
from vlmedge.lora.adapter import Weighted, open_adapter, parse
from vlmedge.lora.merge import Merged
from vlmedge.make.check import check
from vlmedge.make.export import export
from vlmedge.make.quantize import quantize
from vlmedge.shelves.contracts import Stats
from vlmedge.shelves.registry import ENGINES, FAMILIES, SCHEMES, SLOTTERS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CLASSES = {"clip": transformers.CLIPModel, "blip2": transformers.Blip2ForConditionalGeneration}
RANK = 8  # of the slots
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random CLIP and BLIP-2."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in CLASSES:
        checkpoint_of(kind, root / kind)
    return root


def draw(model: Any, seed: int) -> None:
    """Draw all that PEFT would train."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def train(base: Any, folder: Path, seed: int = 0, **options: Any) -> Any:
    """Wrap a model by PEFT, draw an adapter, save it; return the wrapped model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        draw(model, seed)
        model.save_pretrained(folder)
    return model


def merged(model: Any) -> dict[str, NDArray[np.float32]]:
    """What PEFT's merge_and_unload leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.merge_and_unload()
    return {name: p.detach().numpy() for name, p in result.named_parameters()}


def load(checkpoints: Path, kind: str) -> Any:
    return CLASSES[kind].from_pretrained(checkpoints / kind)


def compare(
    checkpoints: Path,
    kind: str,
    adapters: list[Weighted],
    expected: dict[str, Any],
    prefix: str = "",
) -> set[str]:
    """Assert that every weight is PEFT's; return the names of those that changed."""
    plain = FAMILIES[kind].open(checkpoints / kind)
    ours = plain.merged(adapters)
    changed = set()
    for name, wanted in expected.items():
        got = ours.read(prefix + name)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), name
        if not np.array_equal(got, plain.read(prefix + name)):
            changed.add(prefix + name)
    return changed


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("clip", {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"]}, 15),
    "rslora, all Linears": (
        "clip",
        {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
        32,
    ),
    "rank and alpha patterns, all parts": (
        "blip2",
        {
            "r": 4,
            "target_modules": ["qkv", "query", "value", "q_proj", "fc1", "language_projection"],
            "rank_pattern": {"q_proj": 2, "encoder.layers.1.self_attn.qkv": 6},
            "alpha_pattern": {"fc1": 3, ".*query": 5},
        },
        21,
    ),
    "patterns with rslora": (
        "blip2",
        {
            "target_modules": ["k_proj", "fc2"],
            "rank_pattern": {"fc2": 3},
            "alpha_pattern": {"k_proj": 7},
            "use_rslora": True,
        },
        6,
    ),
    "modules_to_save and biases": (
        "blip2",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["language_projection"],
            "bias": "lora_only",
        },
        6,
    ),
    "bias of B": ("blip2", {"r": 2, "target_modules": ["out_proj"], "lora_bias": True}, 4),
    "fan_in_fan_out on a Linear, which PEFT sets right": (
        "clip",
        {"r": 2, "target_modules": ["q_proj"], "fan_in_fan_out": True},
        5,
    ),
    "embedding table": ("blip2", {"r": 2, "target_modules": ["embed_tokens", "fc1"]}, 5),
    "layers by number": (
        "clip",
        {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1]},
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merging_is_pefts(checkpoints: Path, tmp_path: Path, case: str) -> None:
    kind, options, count = CASES[case]
    model = train(load(checkpoints, kind), tmp_path / "a", **options)
    adapter = Weighted(open_adapter(tmp_path / "a"))
    assert len(compare(checkpoints, kind, [adapter], merged(model))) == count


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_finds_the_modules_that_transformers_names(kind: str, tmp_path: Path) -> None:
    """PEFT sees the modules of a class, which are not always called as on disk."""
    base = tiny(kind, tmp_path)
    linears = [name for name, module in base.named_modules() if type(module) is torch.nn.Linear]
    inside = {n.rpartition(".")[2] for n in linears if any(p.isdigit() for p in n.split("."))}
    inside = {name for name in inside if not name.isdigit()}
    try:
        base.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        pytest.skip("PEFT asks for input embeddings, which this class does not tell")
    opened = FAMILIES[KINDS[kind]].open(tmp_path)
    shared = [name.removesuffix(".weight") for name in opened.tied]  # refused, as another test has
    options = {"target_modules": sorted(inside), "exclude_modules": shared or None}
    model = train(base, tmp_path / "a", r=2, **options)
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach()
        .numpy()
        .copy()
        for name, p in model.named_parameters()
        if name.endswith(".base_layer.weight")
    }
    expected = merged(model)
    adapter = open_adapter(tmp_path / "a")
    ours = opened.merged([Weighted(adapter)])
    assert len(adapter.modules) == len(plain)
    names = [n for n in ours.weights.shapes() if not np.array_equal(ours.read(n), opened.read(n))]
    assert len(names) == len(plain)
    found = {opened.read(name).tobytes(): ours.read(name) for name in names}
    for name, before in plain.items():  # drawn weights tell which is which
        np.testing.assert_allclose(found[before.tobytes()], expected[name], rtol=0, atol=1e-6)


def test_two_adapters_and_a_weight_are_pefts(checkpoints: Path, tmp_path: Path) -> None:
    options = [
        {"r": 4, "target_modules": ["q_proj", "fc1"]},
        {"r": 2, "target_modules": ["q_proj"]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            load(checkpoints, "clip"), peft.LoraConfig(**options[0]), adapter_name="one"
        )
        model.add_adapter("two", peft.LoraConfig(**options[1]))
        model.base_model.set_adapter(["one", "two"])
        draw(model, 0)
        model.save_pretrained(tmp_path)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(1.0)
                if "two" in layer.scaling:
                    layer.scaling["two"] *= 0.7
        result = model.merge_and_unload(adapter_names=["one", "two"])
    expected = {name: p.detach().numpy() for name, p in result.named_parameters()}
    adapters = [parse(str(tmp_path / "one")), parse(f"{tmp_path / 'two'}=0.7")]
    assert len(compare(checkpoints, "clip", adapters, expected)) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_adapters_are_read(checkpoints: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    train(load(checkpoints, "clip"), tmp_path, r=2, target_modules=["q_proj"])
    stored = {n: t.to(dtype) for n, t in load_file(tmp_path / TENSORS).items()}
    save_file(stored, tmp_path / TENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(checkpoints, "clip"), tmp_path)
    compare(checkpoints, "clip", [Weighted(open_adapter(tmp_path))], merged(model))


def test_old_names_of_tensors_are_read(checkpoints: Path, tmp_path: Path) -> None:
    """With the adapter's name inside, and with the base model's weights beside."""
    model = train(
        load(checkpoints, "blip2"),
        tmp_path,
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["language_projection"],
    )
    stored = load_file(tmp_path / TENSORS)
    kept = {
        n.replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight")
        .replace("language_projection.", "language_projection.modules_to_save.default."): t
        for n, t in stored.items()
    }
    base = load(checkpoints, "blip2")
    for name, tensor in base.state_dict().items():
        if "q_proj.weight" in name:
            kept[f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}"] = (
                tensor.clone()
            )
    original = "base_model.model.language_projection.original_module.weight"
    kept[original] = base.language_projection.weight.detach().clone()
    assert len(kept) > len(stored) + 2
    save_file(kept, tmp_path / TENSORS)
    compare(checkpoints, "blip2", [Weighted(open_adapter(tmp_path))], merged(model))


PARTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "the language model alone": ("blip2", "language_model.", lambda model: model.language_model),
    "its decoder alone": (
        "blip2",
        "language_model.model.decoder.",
        lambda model: model.language_model.model.decoder,
    ),
    "the Q-Former alone": ("blip2", "qformer.", lambda model: model.qformer),
    "a tower and its name": ("clip", "", lambda model: torch.nn.ModuleDict(
        {"vision_model": model.vision_model})),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_adapter_of_a_part_finds_its_place(checkpoints: Path, tmp_path: Path, case: str) -> None:
    kind, prefix, part = PARTS[case]
    targets = ["query", "dense"] if "qformer" in prefix else ["q_proj", "fc2"]
    model = train(part(load(checkpoints, kind)), tmp_path, r=2, target_modules=targets)
    adapter = Weighted(open_adapter(tmp_path))
    changed = compare(checkpoints, kind, [adapter], merged(model), prefix)
    assert changed
    assert all(name.startswith(prefix) for name in changed)


def test_conv1d_is_merged_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's weights lie [in, out], also the square ones, whose shape tells nothing."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=8)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj"]
    model = train(base, tmp_path / "a", r=2, target_modules=targets, fan_in_fan_out=True)
    weights = SafeWeights([tmp_path / "base" / "model.safetensors"])
    turned = [name for name in weights.shapes() if name.split(".")[-2] in targets]
    assert weights.shapes()["transformer.h.0.attn.c_proj.weight"] == (32, 32)
    ours = Merged(weights, [Weighted(open_adapter(tmp_path / "a"))], turned)
    for name, wanted in merged(model).items():
        np.testing.assert_allclose(ours.read(name), wanted, rtol=0, atol=1e-6)


# ---- merged at export


@pytest.fixture(scope="module")
def clip_adapter(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        targets = ["q_proj", "fc1", "visual_projection"]
        train(load(checkpoints, "clip"), folder, r=4, target_modules=targets)

    return kept("style", __file__, tmp_path_factory.mktemp("adapters") / "style", make)


@pytest.fixture(scope="module")
def clip_merged(checkpoints: Path, clip_adapter: Path, tmp_path_factory: Any) -> Path:
    """Merge the adapter into CLIP; the gate compares with the same."""
    lora = [f"{clip_adapter}=0.5"]

    def make(folder: Path) -> None:
        export(str(checkpoints / "clip"), folder, lora=lora, check=False)

    bundle = kept("clip", __file__, tmp_path_factory.mktemp("merged") / "clip", make)
    check(bundle, str(checkpoints / "clip"), lora=lora)
    return bundle


def test_merged_bundle_passes_its_gate_and_is_pefts_model(
    checkpoints: Path, clip_adapter: Path, clip_merged: Path
) -> None:
    model = library.load(clip_merged)
    assert model.bundle.verified
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(load(checkpoints, "clip"), clip_adapter)
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(0.5)
        reference = wrapped.merge_and_unload().eval()
    picture = Image.fromarray(draw_scene(0, "heldout").image)
    pixels = torch.from_numpy(model._context.pixels([picture]))
    with torch.no_grad():
        wanted = reference.visual_projection(reference.vision_model(pixels).pooler_output)
        plain = load(checkpoints, "clip").eval()
        before = plain.visual_projection(plain.vision_model(pixels).pooler_output)
    got = model.graphs["vision_encoder"].run({"pixel_values": pixels.numpy()})["image_embeds"]
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert np.abs(got - before.numpy()).max() > 0.1


def test_manifest_names_what_was_merged(clip_adapter: Path, clip_merged: Path) -> None:
    (found,) = library.load(clip_merged).bundle.manifest.adapters
    assert (found.name, found.weight) == ("style", 0.5)
    assert found.sha256 == open_adapter(clip_adapter).digest()


def test_merged_bundle_is_checked_with_its_adapters_only(
    checkpoints: Path, clip_adapter: Path, clip_merged: Path
) -> None:
    against = str(checkpoints / "clip")
    assert check(clip_merged, against, lora=[f"{clip_adapter}=0.5"]).passed
    for wrong in ([], [str(clip_adapter)]):
        with pytest.raises(
            AdapterError, match="was made with the adapters style=0.5, not .*--lora"
        ):
            check(clip_merged, against, lora=wrong)
    assert library.load(clip_merged).bundle.verified


def test_merged_bundle_is_quantized(
    checkpoints: Path, clip_adapter: Path, clip_merged: Path, tmp_path: Path
) -> None:
    against = str(checkpoints / "clip")
    with pytest.raises(AdapterError, match="was made with the adapters style=0.5, not none"):
        quantize(clip_merged, "int8", tmp_path / "int8", against=against)
    lora = [f"{clip_adapter}=0.5"]
    small = quantize(clip_merged, "int8", tmp_path / "int8", against=against, lora=lora)
    assert all(result.passed for result in small.manifest.parity.components)
    assert small.manifest.adapters == library.load(clip_merged).bundle.manifest.adapters


# ---- slots


@dataclass(frozen=True)
class Slotted:
    """BLIP-2 with slots, and two adapters of different options."""

    checkpoint: Path
    bundle: Path
    one: Path
    two: Path


@pytest.fixture(scope="module")
def slotted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Slotted:
    source = checkpoints / "blip2"

    def make(folder: Path) -> None:
        targets = ["qkv", "query", "dense", "q_proj", "v_proj", "fc1", "fc2"]
        options = {"r": 4, "lora_alpha": 9, "target_modules": targets}
        train(load(checkpoints, "blip2"), folder / "one", **options)
        train(
            load(checkpoints, "blip2").language_model,  # a part, smaller and with other modules
            folder / "two",
            seed=1,
            r=6,
            use_rslora=True,
            target_modules=["k_proj", "fc2"],
            rank_pattern={"fc2": RANK},
        )
        export(str(source), folder / "bundle", lora_slots=RANK, check=False)

    root = kept("slotted", __file__, tmp_path_factory.mktemp("slotted") / "it", make)
    check(root / "bundle", str(source))
    return Slotted(source, root / "bundle", root / "one", root / "two")


def merged_into(slotted: Slotted, name: str, folder: Path, weight: str = "") -> Path:
    """Take the bundle of BLIP-2 into which one of the adapters was merged at export."""

    def make(half: Path) -> None:
        lora = [f"{getattr(slotted, name)}{weight}"]
        export(str(slotted.checkpoint), half, lora=lora, check=False)

    return kept(f"blip2-{name}{weight}", __file__, folder, make)


def outputs(model: library.Model, rows: list[int]) -> dict[str, NDArray[np.float32]]:
    """Every component's outputs for some of four pictures, of the decoder with three steps.

    Before the last one the rows turn round and the first is doubled, as beams do.
    """
    pictures = [Image.fromarray(draw_scene(i, "heldout").image).resize((32, 32)) for i in range(4)]
    found = {"pixel_values": model._context.pixels(pictures)[rows]}
    for name in ("vision_encoder", "qformer", "projector"):
        graph = model.graphs[name]
        found |= graph.run({spec.name: found[spec.name] for spec in graph.component.inputs})
    del found["pixel_values"]
    soft, decoder = found["soft_prompt"], model.graphs["decoder"]
    decoder.reset()
    moved = np.arange(len(rows))[::-1]
    moved = np.append(moved, moved[-1])
    steps = [soft, soft[:, -1:], soft[moved, -1:]]
    total = 0
    for i, step in enumerate(steps):
        if i == 2:
            decoder.reorder(moved)
        total += step.shape[1]
        mask = np.ones((len(step), total), np.int64)
        feeds = {"inputs_embeds": np.ascontiguousarray(step), "attention_mask": mask}
        found[f"logits {i}"] = decoder.run(feeds)["logits"]
    back = np.argsort(moved[:-1])
    found["logits 2"], extra = found["logits 2"][:-1][back], found["logits 2"][-1]
    np.testing.assert_allclose(extra, found["logits 2"][moved[-1]], rtol=0, atol=1e-5)
    return found


def close(got: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name, array in wanted.items():
        np.testing.assert_allclose(
            got[name], array, rtol=0, atol=tolerance * np.abs(array).max(), err_msg=name
        )


def test_bundle_with_slots_passes_its_gate(slotted: Slotted) -> None:
    model = library.load(slotted.bundle)
    assert model.bundle.verified
    decoder = model.bundle.spec.component("decoder")
    modules = {slot.module.rpartition(".")[2] for slot in decoder.slots}
    assert modules == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert decoder.slots[0].down.shape == ("adapters", 32, RANK)
    assert not model.bundle.spec.component("projector").slots
    assert check(slotted.bundle, str(slotted.checkpoint)).passed


def test_empty_slots_are_the_model_without(slotted: Slotted, tmp_path: Path) -> None:
    plain = Bundle.load(bundle_of("blip2", tmp_path / "plain"))
    assert not any(component.slots for component in plain.spec.components)
    close(
        outputs(library.load(slotted.bundle), [0, 1]),
        outputs(library.load(plain.path), [0, 1]),
        1e-6,
    )


@pytest.mark.parametrize("name", ["one", "two"])
def test_adapter_in_slots_is_the_merged_model(slotted: Slotted, tmp_path: Path, name: str) -> None:
    folder = getattr(slotted, name)
    model = library.load(slotted.bundle)
    base = outputs(model, [0, 1])
    model.set_adapter(folder)
    got = outputs(model, [0, 1])
    assert np.abs(got["logits 0"] - base["logits 0"]).max() > 0.1
    whole = merged_into(slotted, name, tmp_path / "m")
    close(got, outputs(library.load(whole), [0, 1]))


def test_weight_of_an_adapter_is_pefts_scale(slotted: Slotted, tmp_path: Path) -> None:
    model = library.load(slotted.bundle)
    model.set_adapter(slotted.two, weight=0.3)
    whole = merged_into(slotted, "two", tmp_path / "m", "=0.3")
    close(outputs(model, [0]), outputs(library.load(whole), [0]))


def test_no_adapter_restores_every_bit(slotted: Slotted) -> None:
    model = library.load(slotted.bundle)
    before = outputs(model, [0, 1, 2])
    for adapter in (slotted.one, [slotted.one, slotted.two, None]):
        model.set_adapter(adapter)
        changed = outputs(model, [0, 1, 2])
        model.set_adapter(None)
        after = outputs(model, [0, 1, 2])
        for name, array in before.items():
            assert after[name].tobytes() == array.tobytes(), name
            assert name == "pixel_values" or not np.array_equal(changed[name], array)


def test_rows_of_a_batch_have_their_own_adapters(slotted: Slotted) -> None:
    model = library.load(slotted.bundle)
    folders = [slotted.one, slotted.two, None, slotted.one]
    alone = []
    for row, folder in enumerate(folders):
        model.set_adapter(folder)
        alone.append(outputs(model, [row]))
    model.set_adapter(folders)
    together = outputs(model, [0, 1, 2, 3])
    close(together, {name: np.concatenate([a[name] for a in alone]) for name in together})


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_of_a_batch_are_those_of_each_alone(slotted: Slotted, beams: int) -> None:
    model = library.load(slotted.bundle)
    pictures = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(2)]
    options = {"max_tokens": 12, "num_beams": beams}
    alone = []
    for picture, folder in zip(pictures, (slotted.one, slotted.two), strict=True):
        model.set_adapter(folder)
        alone.append(model.caption(picture, "a", **options))
    model.set_adapter(None)
    assert model.caption(pictures, "a", **options) != alone
    model.set_adapter([slotted.one, slotted.two])
    assert model.caption(pictures, "a", **options) == alone


def test_batch_that_does_not_fit_the_adapters_is_refused(slotted: Slotted) -> None:
    model = library.load(slotted.bundle)
    model.set_adapter([slotted.one, slotted.two])
    with pytest.raises(
        InputError, match="vision_encoder: 2 adapters for a batch of 3 rows: set one"
    ):
        outputs(model, [0, 1, 2])
    with pytest.raises(InputError, match="9 adapters: give 1 to 8"):
        model.set_adapter([slotted.one] * 9)
    with pytest.raises(InputError, match="0 adapters: give 1 to 8"):
        model.set_adapter([])
    outputs(model, [0, 1])  # and nothing was lost


def test_slots_can_be_few_and_in_a_last_projection(checkpoints: Path, clip_adapter: Path,
                                                   tmp_path: Path) -> None:  # fmt: skip
    """CLIP's projection reads [batch, width], and its text vectors are remembered by label."""
    modules = ["q_proj", "fc1", "visual_projection"]
    source = str(checkpoints / "clip")

    def slots(folder: Path) -> None:
        export(source, folder, lora_slots=4, lora_modules=modules, check=False)

    def whole(folder: Path) -> None:
        export(source, folder, lora=[str(clip_adapter)], check=False)

    check(kept("clip-slots", __file__, tmp_path / "s", slots), source)
    bundle = Bundle.load(tmp_path / "s")
    assert bundle.verified
    found = {s.module.rpartition(".")[2] for c in bundle.spec.components for s in c.slots}
    assert found == set(modules)
    reference_folder = kept("clip-whole", __file__, tmp_path / "m", whole)
    model, reference = library.load(bundle.path), library.load(reference_folder)
    pictures = [draw_scene(i, "heldout").image for i in range(3)]
    labels = ["a cat", "a dog"]
    before = model.classify(pictures, labels)
    model.set_adapter(clip_adapter)
    np.testing.assert_allclose(
        model.embed_image(pictures), reference.embed_image(pictures), rtol=0, atol=1e-5
    )
    wanted = [dict(ranking) for ranking in reference.classify(pictures, labels)]
    for ranking, other in zip(model.classify(pictures, labels), wanted, strict=True):
        assert dict(ranking) == pytest.approx(other, abs=1e-4)
    model.set_adapter(None)
    assert model.classify(pictures, labels) == before
    model.set_adapter([clip_adapter, None, clip_adapter])
    rows = model.embed_image(pictures)
    model.set_adapter(None)
    np.testing.assert_allclose(rows[1], model.embed_image(pictures)[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows[2], reference.embed_image(pictures)[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES.names())
def test_scheme_keeps_slots_in_float(slotted: Slotted, tmp_path: Path, scheme: str) -> None:
    """Whatever the scheme does to the weights, an adapter moves the outputs as in float."""
    plain = library.load(slotted.bundle)
    small = quantize(slotted.bundle, scheme, tmp_path / scheme, against=str(slotted.checkpoint))
    assert all(result.passed for result in small.manifest.parity.components)
    assert small.spec.components == plain.bundle.spec.components
    model = library.load(small.path)
    before = outputs(model, [0, 1])
    for adapter in (slotted.one, [slotted.two, slotted.one]):
        # drawn at full strength it leaves the range that activations were calibrated for
        model.set_adapter(adapter, weight=0.3)
        plain.set_adapter(adapter, weight=0.3)
        got, wanted = outputs(model, [0, 1]), outputs(plain, [0, 1])
        for name, array in wanted.items():
            a, b = got[name].ravel(), array.ravel()
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98, name
        assert np.abs(got["logits 0"] - before["logits 0"]).max() > 0.1
    model.set_adapter(None)
    after = outputs(model, [0, 1])
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())


def test_smoothing_is_undone_on_the_way_into_a_slot(checkpoints: Path, tmp_path: Path) -> None:
    """Outliers that move from x into W would move into the adapter's share too."""
    import onnx_ir as ir
    import onnxruntime as ort

    opened = FAMILIES["clip"].open(checkpoints / "clip")
    component = opened.spec.component("vision_encoder")
    model = opened.trace("vision_encoder")
    slots = SLOTTERS["lora"].add(component, model, 4, ["v_proj", "fc1"])
    rng = np.random.default_rng(0)
    feeds = {"pixel_values": rng.standard_normal((2, 3, 32, 32), np.float32)}
    for slot in slots:
        for spec in (slot.down, slot.up):
            feeds[spec.name] = 0.5 * rng.standard_normal((1, *spec.shape[1:]), np.float32)

    def run(graph: ir.Model) -> NDArray[np.float32]:
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
        return session.run(["image_embeds"], feeds)[0]

    before = run(model.clone())
    rows = rng.standard_normal((64, 32)).astype(np.float16)
    rows[:, 3] *= 60  # one channel far above the rest
    channels = np.abs(rows).max(axis=0).astype(np.float32)
    seen = Stats(float(channels.max()), float(np.sqrt(np.square(rows, dtype=float).mean())),
                 channels, rows)  # fmt: skip
    scheme = SCHEMES["int8"]
    wanted = scheme.watch(component, model)
    scheme.rewrite(component, model, dict.fromkeys(wanted.names, seen))
    moved = [node for node in model.graph if node.name.endswith(".unsmoothed")]
    assert len(moved) == len(slots)
    # the steps of the activations are made for rows that were not run: take them out
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            quantizer = node.inputs[0].producer()
            if quantizer is not None:
                node.outputs[0].replace_all_uses_with(quantizer.inputs[0])

    def error(after: NDArray[np.float32]) -> float:
        return float(np.linalg.norm(after - before) / np.linalg.norm(before))

    rounding = error(run(model))
    for node in moved:  # and were it not undone:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
    assert rounding < 0.1 < error(run(model)) / 2, (rounding, error(run(model)))


# ---- what is refused


@pytest.fixture
def adapter(checkpoints: Path, tmp_path: Path) -> Path:
    train(load(checkpoints, "clip"), tmp_path / "a", r=4, target_modules=["q_proj"])
    return tmp_path / "a"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is 'IA3', not LORA: merge it with PEFT"),
        ({"use_dora": True}, r"it is DoRA \(use_dora\), which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weights"),
        ({"trainable_token_indices": [1]}, "option 'trainable_token_indices' is not supported"),
        ({"target_parameters": ["x"]}, "option 'target_parameters' is not supported"),
        ({"kasa_config": {"a": 1}}, "option 'kasa_config' is not supported"),
        ({"r": 8}, r"q_proj.lora_A.weight' is \[4, 32\], adapter_config.json says rank 8"),
        ({"r": 0}, "r of '.*q_proj' is 0: it must be above 0"),
        ({"lora_alpha": "x"}, "lora_alpha of '.*q_proj' is 'x': it must be above 0"),
        ({"rank_pattern": ["q"]}, "rank_pattern is no table"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern '\(' is not a regular expression"),
    ],
)
def test_config_is_refused_by_the_option(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    edit(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        open_adapter(adapter)


FIRST = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), r"layers.0.self_attn.q_proj' has no A: save it again"),
        (lambda t: t.update({FIRST: torch.zeros(4, 32, 1, 1)}), "a convolution's"),
        (
            lambda t: t.update({FIRST.replace("lora_A", "lora_magnitude_vector"): torch.ones(2)}),
            "lora_magnitude_vector.weight' belongs to a kind of LoRA that is not supported",
        ),
        (
            lambda t: t.update({FIRST.replace("lora_A", "lora_A.other"): torch.ones(4, 32)}),
            "are both A of .*: save one adapter to a folder",
        ),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "module '' is not in the model"),
    ],
)
def test_tensors_are_refused_by_name(
    checkpoints: Path, adapter: Path, change: Callable[[Any], None], message: str
) -> None:
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=message):
        FAMILIES["clip"].open(checkpoints / "clip").merged([Weighted(open_adapter(adapter))])


def test_missing_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match="no such folder: give the folder that holds adapter_con"
    ):
        open_adapter(tmp_path / "nothing")
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"safetensors is missing: adapter_model.bin can run code"
    ):
        open_adapter(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors is missing: copy the whole"):
        open_adapter(adapter)
    (adapter / TENSORS).write_bytes(b"<html>404</html>" * 9)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        open_adapter(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="adapter_config.json is not a JSON object"):
        open_adapter(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"is no adapter: it has no adapter_config\.json"):
        open_adapter(adapter)


def test_adapter_of_another_model_is_refused_by_the_module(
    checkpoints: Path, adapter: Path, slotted: Slotted, tmp_path: Path
) -> None:
    clip = FAMILIES["clip"].open(checkpoints / "clip")
    with pytest.raises(
        AdapterError,
        match=r"module 'qformer.*' is not in the model, the nearest is .*base model that it was",
    ):
        other = open_adapter(slotted.one)
        modules = {n: f for n, f in other.modules.items() if n.startswith("qformer")}
        clip.merged([Weighted(type(other)(other.folder, modules, {}, frozenset(), other.tensors))])
    wide = FIRST.replace("lora_A", "lora_B")
    edit_tensors(adapter, lambda t: t.update({wide: torch.zeros(48, 4)}))
    with pytest.raises(
        AdapterError,
        match=r"q_proj' is \[48, 32\], the model's 'text_model.*q_proj.weight' is \[32, 32\]",
    ):
        clip.merged([Weighted(open_adapter(adapter))])


def test_adapter_that_may_be_of_two_parts_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    base = load(checkpoints, "clip").text_model.encoder
    train(base, tmp_path / "a", r=2, target_modules=["q_proj"])
    with pytest.raises(
        AdapterError,
        match=r"module 'layers.0.self_attn.q_proj' could be 'text_model.* and 'vision_model",
    ):
        FAMILIES["clip"].open(checkpoints / "clip").merged([Weighted(open_adapter(tmp_path / "a"))])


def test_whole_weights_have_no_weight_and_one_source(checkpoints: Path, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["visual_projection"]}
    train(load(checkpoints, "clip"), tmp_path / "a", **options)
    opened, found = FAMILIES["clip"].open(checkpoints / "clip"), open_adapter(tmp_path / "a")
    with pytest.raises(
        AdapterError, match="'visual_projection.weight' as a whole, so its weight must"
    ):
        opened.merged([Weighted(found, 0.5)])
    with pytest.raises(AdapterError, match="both replace 'visual_projection.weight': merge one"):
        opened.merged([Weighted(found), Weighted(found)])


def test_tied_weights_are_told_apart_or_refused(checkpoints: Path, tmp_path: Path) -> None:
    """The head is the table unless the file has its own; a delta of one must not reach both."""
    folder = shutil.copytree(checkpoints / "blip2", tmp_path / "tied")
    weights = load_file(folder / "model.safetensors")
    head = "language_model.lm_head.weight"
    table = "language_model.model.decoder.embed_tokens.weight"
    weights.pop(head, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    opened = FAMILIES["blip2"].open(folder)
    adapter_folder = tmp_path / "a"
    train(load(checkpoints, "blip2"), adapter_folder, r=2, target_modules=["q_proj"])

    def with_tensors(change: Callable[[Any], None]) -> list[Weighted]:
        edit_tensors(adapter_folder, change)
        return [Weighted(open_adapter(adapter_folder))]

    replaced = torch.randn(weights[table].shape)
    ours = opened.merged(with_tensors(lambda t: t.update({f"base_model.model.{head}": replaced})))
    np.testing.assert_array_equal(ours.read(head), replaced.numpy())
    np.testing.assert_array_equal(ours.read(table), weights[table].numpy())
    rename = {f"base_model.model.{head}": f"base_model.model.{table}"}
    with pytest.raises(AdapterError, match=f"it replaces '{table}', which '{head}' shares"):
        opened.merged(
            with_tensors(lambda t: [t.update({new: t.pop(old)}) for old, new in rename.items()])
        )
    pair = {"A": torch.zeros(2, 32), "B": torch.zeros(len(replaced), 2)}
    stem = f"base_model.model.{head.removesuffix('.weight')}"
    with pytest.raises(AdapterError, match=r"lm_head' shares its weight with .*embed_tokens"):
        opened.merged(
            with_tensors(
                lambda t: (
                    t.pop(f"base_model.model.{table}"),
                    t.update({f"{stem}.lora_{k}.weight": v for k, v in pair.items()}),
                )
            )
        )


@pytest.mark.parametrize("weight", ["x", "nan", "inf", ""])
def test_weight_that_is_no_number_is_refused(adapter: Path, weight: str) -> None:
    with pytest.raises(AdapterError, match="is no weight: give DIR or DIR=0.7"):
        parse(f"{adapter}={weight}")


def test_slots_refuse_what_does_not_fit(
    checkpoints: Path, slotted: Slotted, adapter: Path, tmp_path: Path
) -> None:
    model = library.load(slotted.bundle)
    model.set_adapter(slotted.one)
    before = outputs(model, [0])
    base = {"r": 2, "target_modules": ["q_proj"]}
    refused = {
        "rank": ({"r": 9, "target_modules": ["q_proj"]}, "has rank 9, the slots have 8: .*slots 9"),
        "saved": ({**base, "modules_to_save": ["language_projection"]}, "as a whole: merge"),
        "bias": ({**base, "lora_bias": True}, "it changes a bias"),
        "table": ({"r": 2, "target_modules": ["embed_tokens"]}, "it changes an embedding table"),
        "module": (
            {"r": 2, "target_modules": ["language_projection"]},
            "'language_projection' is not in .*only modules with a slot can be adapted: merge",
        ),
    }
    for name, (options, message) in refused.items():
        train(load(checkpoints, "blip2"), tmp_path / name, **options)
        with pytest.raises(AdapterError, match=message):
            model.set_adapter(tmp_path / name)
    with pytest.raises(AdapterError, match="'text_model.* is not in the model"):
        model.set_adapter([slotted.one, adapter])
    shutil.copytree(slotted.two, tmp_path / "shape")
    wide = "base_model.model.model.decoder.layers.0.fc2.lora_B.weight"
    edit_tensors(tmp_path / "shape", lambda t: t.update({wide: torch.zeros(48, RANK)}))
    with pytest.raises(AdapterError, match=r"fc2' is \[48, 64\], .*fc2' is \[32, 64\]"):
        model.set_adapter(tmp_path / "shape")
    after = outputs(model, [0])
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())


def test_bundle_without_slots_says_so(clip_merged: Path, adapter: Path) -> None:
    with pytest.raises(
        AdapterError, match="has no slots for adapters: export it with --lora-slots"
    ):
        library.load(clip_merged).set_adapter(adapter)


def test_unknown_modules_for_slots_are_refused_before_anything_is_written(
    checkpoints: Path, tmp_path: Path
) -> None:
    source = str(checkpoints / "clip")
    with pytest.raises(InputError, match="lora_modules: the model has no Linear 'q_prj'"):
        export(source, tmp_path / "out", lora_slots=4, lora_modules=["v_proj", "q_prj"])
    with pytest.raises(InputError, match="lora_slots is 0: it must be at least 1"):
        export(source, tmp_path / "out", lora_slots=0)
    with pytest.raises(InputError, match="lora_modules needs lora_slots: give their rank too"):
        export(source, tmp_path / "out", lora_modules=["q_proj"])
    assert not list(tmp_path.iterdir())


def test_slots_are_given_once(checkpoints: Path) -> None:
    opened = FAMILIES["clip"].open(checkpoints / "clip")
    component, model = opened.spec.component("text_encoder"), opened.trace("text_encoder")
    slots = SLOTTERS["lora"].add(component, model, 4)
    again = msgspec.structs.replace(component, slots=slots)
    with pytest.raises(InputError, match="text_encoder has slots already"):
        SLOTTERS["lora"].add(again, model, 4)


def test_graph_refuses_factors_that_are_no_slots(slotted: Slotted) -> None:
    bundle = library.load(slotted.bundle).bundle
    graph: Any = ENGINES["ort"].open(bundle, "qformer")
    slots = graph.component.slots
    factors = {
        s.name: np.zeros((1, *s.shape[1:]), np.float32) for x in slots for s in (x.down, x.up)
    }
    first = slots[0].down.name
    with pytest.raises(InputError, match=rf"qformer: '{first}' is float32\[1, 3, 8\]: it must be"):
        graph.adapt({**factors, first: np.zeros((1, 3, RANK), np.float32)})


def test_command_line_merges_and_refuses(
    checkpoints: Path, adapter: Path, tmp_path: Path, vlmedge: Any
) -> None:
    source, out = checkpoints / "clip", tmp_path / "out"
    ran = vlmedge("export", source, "--lora", adapter, "--out", out, "--no-check", "--json")
    assert ran.code == 0, ran.err
    assert library.load(out).bundle.manifest.adapters[0].name == "a"
    ran = vlmedge("check", out, "--against", source)
    assert ran.code == 1
    assert "was made with the adapters a=1, not none" in ran.err
    edit(adapter, use_dora=True)
    ran = vlmedge("export", source, "--lora", adapter, "--out", tmp_path / "other")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_schemes_are_only_what_quantizes() -> None:
    assert "lora" not in SCHEMES.names()
    assert SLOTTERS.names() == ["lora"]
