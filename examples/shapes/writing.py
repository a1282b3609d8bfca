"""How BLIP and LLaVA are trained here: first the image tower alone, then all of the model.

1. vision: the tower learns what its patches show (patches.py).
2. text: the whole model learns to write, on scenes and on crowds of three to five things; the
   patches go on being a second loss, so that early noise from the text does not blind the tower.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from corpus import IMAGE_MEAN, IMAGE_STD, plans, render
from patches import PatchHead, patch_labels
from scoring import Writer, score
from torch import Tensor, nn
from torch.nn import functional

from vlmedge.checkpoints.scenes import IMAGE_SIZE_PX, Plan, Scene

IGNORED = -100
CARDS = Path(__file__).parent / "cards"
LIMIT = 40  # tokens of a text
IMAGES = {"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
SQUARE = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}


class Run(ABC):
    """One training run: the pictures, the two stages, and scores as it goes.

    Scores are of scenes of the split "train" that training never shows: "heldout" is for
    evaluate.py alone. The best weights so far lie in `--out`, the latest beside it in OUT-last.
    """

    def __init__(self, options: argparse.Namespace, *, caption: bool, ask: bool) -> None:
        self.options, self.caption, self.ask = options, caption, ask
        self.started = time.perf_counter()
        training.setup(options)
        self.device = torch.device(options.device)
        self.rng = random.Random(options.seed)
        self.generator = torch.Generator().manual_seed(options.seed)
        seen, unseen = options.pictures, options.score_scenes
        crowds = options.crowds if ask else 0  # they have no captions
        planned, drawn = plans("scene", seen + unseen), render("scene", seen + unseen)
        self.plans = planned[:seen]
        images = [drawn[:seen]]
        if crowds:
            self.plans += plans("crowd", crowds)
            images.append(render("crowd", crowds))
        self.unseen = [
            Scene(image, plan.caption, tuple(plan.questions[i] for i in plan.asked))
            for image, plan in zip(drawn[seen:], planned[seen:], strict=True)
        ]
        self.model = self.make(planned[:4000]).to(self.device).train()
        self.images = torch.from_numpy(np.concatenate(images)).to(self.device)
        self.labels = patch_labels(self.plans).to(self.device)
        self.head = PatchHead(self.tower.config.hidden_size).to(self.device)
        self.best = -1.0
        self.record: dict[str, Any] = {}

    @abstractmethod
    def make(self, sample: list[Plan]) -> Any:
        """A new model and its processor, or those of `--resume`.

        Args:
            sample: what a tokenizer may be learnt from.
        """

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The model's image tower, whose last_hidden_state has a class token and the patches."""

    @abstractmethod
    def loss(self, pixels: Tensor, batch: list[Plan]) -> tuple[Tensor, Tensor]:
        """Show pictures, let texts be written.

        Args:
            pixels: float32 (batch, 3, 64, 64).
            batch: what each shows.

        Returns:
            The mean loss of the texts, and the tower's states.
        """

    @abstractmethod
    def writer(self) -> Writer:
        """The model as what writes."""

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer and what prepares the pictures."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the checkpoint, and of its card."""

    def run(self) -> None:
        """Train, score, save."""
        print(f"{self.name}: {count(self.model):,} parameters", flush=True)
        spent = (time.perf_counter() - self.started) / 60
        print(f"{self.name}: {len(self.plans):,} pictures after {spent:.1f} min", flush=True)
        total = self.options.steps + self.options.vision_steps
        if self.options.vision_steps:
            self.vision(self.options.minutes * self.options.vision_steps / total)
        self.text(self.options.minutes - (time.perf_counter() - self.started) / 60 + spent)

    def vision(self, minutes: float) -> None:
        """Teach the tower what its patches show."""
        trainer = training.Trainer(
            self.tower,
            self.head,
            label="vision",
            lr=self.options.lr,
            steps=self.options.vision_steps,
            minutes=minutes,
        )
        for number, picked in self.picks(trainer):
            with training.autocast(self.options):
                states = self.tower(pixel_values=self.pixels(picked)).last_hidden_state
                loss = self.head(states, self.labels[picked.to(self.device)])
            trainer.step(number, {"patches": loss})
        self.record["vision"] = trainer.history

    def text(self, minutes: float) -> None:
        """Teach all of the model to write."""
        trainer = training.Trainer(
            self.model,
            self.head,
            label="text",
            lr=self.options.lr,
            steps=self.options.steps,
            minutes=minutes,
        )
        number = -1
        for number, picked in self.picks(trainer):
            batch = [self.plans[i] for i in picked.tolist()]
            with training.autocast(self.options):
                text, states = self.loss(self.pixels(picked), batch)
                patches = self.head(states, self.labels[picked.to(self.device)])
            trainer.step(number, {"text": text, "patches": patches})
            if (number + 1) % self.options.score_every == 0:
                self.keep(number + 1, trainer)
        if (number + 1) % self.options.score_every:
            self.keep(number + 1, trainer)

    def picks(self, trainer: training.Trainer) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, indices) of shuffled batches."""
        order = training.batches(len(self.plans), self.options.batch, self.generator)
        yield from zip(trainer.numbers(), order, strict=False)

    def pixels(self, picked: Tensor) -> Tensor:
        """What the model is shown of these pictures."""
        return training.normalize(self.images[picked.to(self.device)])

    def keep(self, steps: int, trainer: training.Trainer) -> None:
        """Score, save the latest weights, and the best ones."""
        self.model.eval()
        with torch.inference_mode():
            scores = score(self.writer(), self.unseen, caption=self.caption, ask=self.ask)
        self.model.train()
        right = [value for name, value in scores.items() if name in MAIN]
        shown = "  ".join(f"{name} {value}" for name, value in scores.items() if name in MAIN)
        print(f"{self.name} after {steps} steps, unseen: {shown}", flush=True)
        self.record |= {"text": {"steps": steps, **trainer.history}, "unseen": scores}
        out = self.options.out
        self.save(out.with_name(f"{out.name}-last"))
        if sum(right) >= self.best:
            self.best = sum(right)
            self.save(out)

    def save(self, folder: Path) -> None:
        """Write the folder, fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        copy.deepcopy(self.model).cpu().half().save_pretrained(folder)
        self.save_processor(folder)
        shutil.copyfile(CARDS / f"{self.name}.md", folder / "README.md")
        training.write_record(folder, self.options, self.started, self.record)


MAIN = ("caption_exact_percent", "questions_right_percent")


def options_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that such runs share."""
    parser = training.parser(description, steps=20_000, lr=2e-3, pictures=60_000)
    parser.add_argument("--crowds", type=int, default=40_000, help="crowds to draw")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the text model")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--score-every", type=int, default=1000, help="steps")
    parser.add_argument("--score-scenes", type=int, default=200)
    parser.add_argument("--resume", type=Path, help=f"a {name} to go on from")
    return parser


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of unequal length as one int64 (rows, longest), padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each label but the first, by the logits before it.

    Args:
        logits: float (rows, tokens, vocabulary).
        labels: int64 (rows, tokens), `IGNORED` where nothing is to be learnt.
    """
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
