"""The training loop's common parts: options, optimizer, schedule, precision, progress line."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import IMAGE_MEAN, IMAGE_STD
from torch import Tensor, nn


def parser(description: str, *, steps: int, lr: float, pictures: int) -> argparse.ArgumentParser:
    """The options that both training scripts share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--out", type=Path, required=True, help="folder to write")
    options.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    options.add_argument(
        "--minutes", type=float, default=math.inf, help="end by then: fewer steps, same schedule"
    )
    options.add_argument("--pictures", type=int, default=pictures, help="training pictures to draw")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    return options


def setup(options: argparse.Namespace) -> None:
    """Seed torch and set its threads."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)


def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products where --bf16 is given (slower on most CPUs: measure)."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16)


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 (batch, 64, 64, 3) into the float32 (batch, 3, 64, 64) that the models take."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
    return ((images.permute(0, 3, 1, 2).float() / 255.0 - mean) / std).contiguous()


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of shuffled epochs without end, `batch` at a time."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


class Trainer:
    """Muon and AdamW with warm-up, decay to zero, gradient clipping and a progress line.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) takes the matrices of the
    Linear layers: OPT learns to look things up in an eighth of the steps that AdamW needs.
    """

    def __init__(
        self,
        *parts: nn.Module | nn.Parameter,
        label: str,
        lr: float,
        steps: int,
        minutes: float = math.inf,
    ) -> None:
        modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
        tables = {m.weight for m in modules if isinstance(m, nn.Embedding)}
        linear = dict.fromkeys(m.weight for m in modules if isinstance(m, nn.Linear))
        matrices = [p for p in linear if p.requires_grad and p not in tables]
        owned = itertools.chain.from_iterable(
            [part] if isinstance(part, nn.Parameter) else part.parameters() for part in parts
        )
        trained = [p for p in dict.fromkeys(owned) if p.requires_grad]
        others = [p for p in trained if p not in set(matrices)]
        self.parameters = trained
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.steps, self.minutes, self.lr, self.label = steps, minutes, lr, label
        self.start = time.perf_counter()
        self.history: dict[str, float] = {}

    @property
    def elapsed_minutes(self) -> float:
        """Since this trainer was made."""
        return (time.perf_counter() - self.start) / 60

    def numbers(self) -> Iterator[int]:
        """Step numbers until the steps or the minutes are spent."""
        for number in range(self.steps):
            if self.elapsed_minutes >= self.minutes:
                return
            yield number

    def step(self, number: int, losses: dict[str, Tensor]) -> None:
        """Take one step down the sum of `losses`."""
        warmup = max(1, min(200, self.steps // 10))
        rate = min(1.0, (number + 1) / warmup)
        progress = max(number / self.steps, min(1.0, self.elapsed_minutes / self.minutes))
        rate *= min(1.0, 2.0 * (1.0 - progress) + 0.02)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if number % 50 == 0 or number == self.steps - 1:
            self.history = {name: loss.item() for name, loss in losses.items()}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.history.items())
            done = f"{number + 1}/{self.steps}  {self.elapsed_minutes:.1f} min"
            print(f"{self.label} {done}  {shown}", flush=True)


def write_record(
    out: Path, options: argparse.Namespace, started: float, extra: dict[str, Any]
) -> None:
    """Write training.json: the options, the times and the machine of a run."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    record = {
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "wall_minutes": round((time.perf_counter() - started) / 60, 1),
        "cpu_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} threads, {options.device}",
        **extra,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
