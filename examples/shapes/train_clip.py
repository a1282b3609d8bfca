"""Train tiny-clip: CLIP (Radford et al. 2021, arXiv 2103.00020) on drawn pictures.

Each step's texts are of one kind: class names in a template, full descriptions of one object, or
captions of scenes. Within a batch, equal texts count as one (otherwise a right pair would be
pushed apart as if it were wrong).
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
import training
from corpus import IMAGE_MEAN, IMAGE_STD, plans, render
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from words import CLIP_CONTEXT, clip_tokenizer

from vlmedge.checkpoints.scenes import CLASSES, IMAGE_SIZE_PX, TEMPLATE, Plan

TEMPLATES = (TEMPLATE, "a picture of a {}", "a {}", "a drawing of a {}", "there is a {}", "{}")


def build(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPModel:
    """An untrained model: vision width x layers, a text tower of two layers."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vocab_size = -(-len(tokenizer) // 32) * 32  # whole blocks of 32 quantize well
    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": vocab_size,
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": CLIP_CONTEXT,
                "hidden_act": "gelu",
                "projection_dim": 128,
                **ids,
            },
            vision_config={
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": width // 32,
                "image_size": IMAGE_SIZE_PX,
                "hidden_act": "gelu",
                "patch_size": 8,
                "projection_dim": 128,
            },
            projection_dim=128,
        )
    )


def texts_of(kind: str, batch: list[Plan], rng: random.Random) -> tuple[list[str], list[str]]:
    """One text per plan, all of one kind and template, and more texts to tell them from."""
    if kind == "scene":
        return [plan.caption for plan in batch], []
    template = rng.choice(TEMPLATES)
    if kind == "class":
        # All classes take part, also those that a small batch happens to miss.
        texts = [template.format(plan.things[0].name) for plan in batch]
        return texts, [template.format(name) for name in CLASSES]
    texts = [
        template.format(f"{plan.things[0].size} {plan.things[0].name} on {plan.background}")
        for plan in batch
    ]
    return texts, []


def contrastive_loss(model: CLIPModel, pixels: Tensor, encoded: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of pictures over texts and of texts over pictures.

    Args:
        model: the CLIP model.
        pixels: float32 (images, 3, 64, 64).
        encoded: `input_ids` and `attention_mask` of the unique texts, and `target`, int64
            (images,), each picture's text.
    """
    target = encoded.pop("target")
    logits = model(pixel_values=pixels, **encoded).logits_per_image.float()
    by_image = functional.cross_entropy(logits, target)
    # A text has as many right pictures as the batch holds: its target is spread evenly on them.
    present = torch.unique(target)
    positive = (target == present[:, None]).float()
    by_text = functional.cross_entropy(logits.T[present], positive / positive.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def main() -> None:
    """Train, save fp16, say how long it took."""
    parser = training.parser("train tiny-clip", steps=7000, lr=7e-4, pictures=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    started = time.perf_counter()
    training.setup(options)
    rng = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    device = torch.device(options.device)

    data, streams = {}, {}
    for kind in ("labelled", "scene"):
        images = torch.from_numpy(render(kind, options.pictures))
        data[kind] = (plans(kind, options.pictures), images)
        streams[kind] = training.batches(options.pictures, options.batch, generator)
    everything = [plan.caption for plan in data["scene"][0][:4000]]
    everything += [text.format("red circle") for text in TEMPLATES] * 200
    tokenizer = clip_tokenizer(everything)
    model = build(tokenizer, options.width, options.layers).to(device).train()
    print(f"tiny-clip: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    trainer = training.Trainer(
        model,
        label="clip",
        lr=options.lr,
        steps=options.steps,
        minutes=options.minutes,
    )
    for number in trainer.numbers():
        kind = rng.choices(("class", "detail", "scene"), (8, 1, 1))[0]
        source = "scene" if kind == "scene" else "labelled"
        picked = next(streams[source])
        all_plans, images = data[source]
        texts, others = texts_of(kind, [all_plans[i] for i in picked.tolist()], rng)
        unique = sorted({*texts, *others})
        encoded = dict(tokenizer(unique, padding=True, return_tensors="pt").to(device))
        encoded["target"] = torch.from_numpy(np.searchsorted(unique, texts)).to(device)
        pixels = training.normalize(images[picked].to(device))
        with training.autocast(options):
            loss = contrastive_loss(model, pixels, encoded)
        trainer.step(number, {kind: loss})
        with torch.no_grad():  # CLIP's own cap: a scale of 100
            model.logit_scale.clamp_(max=float(np.log(100.0)))

    options.out.mkdir(parents=True, exist_ok=True)
    model.cpu().half().save_pretrained(options.out)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE_PX},
        crop_size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(options.out)
    training.write_record(options.out, options, started, {"loss": trainer.history})
    print(f"tiny-clip: saved in {options.out}", flush=True)


if __name__ == "__main__":
    main()
