"""How long a LoRA adapter takes to come and go, in slots: `python benchmarks/adapter_swap.py`.

tiny-blip2 is exported with slots; the decoder of BLIP-2 OPT-2.7b is stood for by its slots alone,
for a swap reads the adapter's file, turns its factors and hands them over: the base weights have
no part in it. What a step with slots costs is taken on tiny-blip2, beside one without.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from safetensors.numpy import save_file

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.lora.adapter import open_adapter
from vlmedge.lora.slots import fill
from vlmedge.make.export import export
from vlmedge.spec import AdapterSlot, Component, ModelSpec, TensorSpec

TRIALS = 7
RANKS = (8, 16, 32)
LAYERS, WIDTH, INNER = 32, 2560, 10240  # OPT-2.7b


def main() -> None:
    """Print all figures."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        _tiny(folder)
        for rank in RANKS:
            _full_size(folder / f"r{rank}", rank)


def _tiny(folder: Path) -> None:
    bundle = export("tiny-blip2", folder / "slots", lora_slots=8, check=False)
    plain = export("tiny-blip2", folder / "plain", check=False)
    slots = [slot for component in bundle.spec.components for slot in component.slots]
    adapter = _write(folder / "adapter", slots, 8)
    model = vlmedge.load(bundle.path)
    picture = draw_scene(0, "heldout").image
    model.caption(picture)
    swap_ms = _median_ms(lambda: model.set_adapter(adapter))
    back_ms = _median_ms(lambda: model.set_adapter(None))
    print(f"tiny-blip2, {len(slots)} slots of rank 8: in {swap_ms:.1f} ms, out {back_ms:.2f} ms")
    for title, opened in (("without slots", plain), ("with empty slots", bundle)):
        print(f"  caption {title}: {_caption_ms(opened):.1f} ms")


def _full_size(folder: Path, rank: int) -> None:
    """Swap on slots of OPT-2.7b's shapes."""
    sizes = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in ("q", "k", "v", "out")}
    sizes |= {"fc1": (WIDTH, INNER), "fc2": (INNER, WIDTH)}
    slots = []
    for layer in range(LAYERS):
        for leaf, (rows, columns) in sizes.items():
            module = f"language_model.model.decoder.layers.{layer}.{leaf}"
            down = TensorSpec(f"{module}.lora_A", "float32", ("adapters", rows, rank))
            up = TensorSpec(f"{module}.lora_B", "float32", ("adapters", rank, columns))
            slots.append(AdapterSlot(module, down, up))
    spec = ModelSpec("blip2", (Component("decoder", (), (), (), tuple(slots)),), {})
    adapter = _write(folder, slots, rank)

    def swap() -> None:
        made = fill(spec, [open_adapter(adapter)])
        for array in made["decoder"].values():
            ort.OrtValue.ortvalue_from_numpy(array)

    size_mib = sum(f.stat().st_size for f in adapter.iterdir()) / 2**20
    print(
        f"OPT-2.7b's shapes, {len(slots)} slots of rank {rank}, "
        f"{size_mib:.0f} MiB: in {_median_ms(swap):.0f} ms"
    )


def _write(folder: Path, slots: Iterable[AdapterSlot], rank: int) -> Path:
    """Write an adapter of random factors for all slots, float32 as PEFT saves it."""
    rng = np.random.default_rng(0)
    tensors = {}
    for slot in slots:
        name = f"base_model.model.{slot.module}"
        for kind, spec in (("A", slot.down), ("B", slot.up)):
            _, rows, columns = (s if isinstance(s, int) else 1 for s in spec.shape)
            drawn = rng.standard_normal((columns, rows), np.float32) * np.float32(0.01)
            tensors[f"{name}.lora_{kind}.weight"] = drawn
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _caption_ms(bundle: Bundle) -> float:
    model = vlmedge.load(bundle.path)
    picture = draw_scene(0, "heldout").image
    model.caption(picture)
    return _median_ms(lambda: model.caption(picture))


def _median_ms(call: Callable[[], object]) -> float:
    spans = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        call()
        spans.append(1000 * (time.perf_counter() - start))
    return sorted(spans)[TRIALS // 2]


if __name__ == "__main__":
    main()
