"""What turns PaliGemma's codes of a mask into one: the decoder half of a VQ-VAE on masks.

codes [batch, 16] -> rows of a codebook, 4 x 4 -> Conv, 2 residual blocks -> 4 x ConvTranspose
-> Conv -> mask [batch, 64, 64], above 0 inside

It is released apart from the checkpoints, as vae-oid.npz (gs://big_vision/paligemma), under the
names that its PyTorch training gave it; the same file has the encoder, which nobody needs here.
Source: Ning et al. 2023, arXiv 2301.02229, and the evaluator of segmentation in
github.com/google-research/big_vision, which holds the layout below.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmedge.arrays import Array
from vlmedge.bundle.weights import finite
from vlmedge.errors import CheckpointError
from vlmedge.spec import MASK_CODES, Component, TensorSpec

from ..shapes.paligemma import MASK_DECODER, MASK_FILE

NAME = "mask_decoder"
SIDE = 4  # of the square that a mask's codes make
MASK_SIDE = 64  # after 4 layers that double it

COMPONENT = Component(
    NAME,
    inputs=(TensorSpec("mask_codes", "int64", ("batch", MASK_CODES)),),
    outputs=(TensorSpec("mask_logits", "float32", ("batch", MASK_SIDE, MASK_SIDE)),),
)


class Residual(torch.nn.Module):
    """Three convolutions beside what they add to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(width, width, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [batch, width, height, width of the picture] to the same."""
        out: torch.Tensor = hidden + self.net(hidden)
        return out


class MaskDecoder(torch.nn.Module):
    """The codebook and the layers behind it, at the places where the file counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_decoder: Any = torch.nn.Module()  # so that names are the file's, behind one word
        kinds, seen = MASK_DECODER["_vq_vae._embedding"]
        book = torch.nn.Module()
        book.register_parameter("_embedding", torch.nn.Parameter(torch.empty(kinds, seen)))
        self.mask_decoder._vq_vae = book
        width = MASK_DECODER["decoder.0.bias"][0]
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(seen, width, 1), torch.nn.ReLU()]
        layers += [Residual(width), Residual(width)]
        for place in (4, 6, 8, 10):
            taken, given = MASK_DECODER[f"decoder.{place}.weight"][:2]
            up = torch.nn.ConvTranspose2d(taken, given, 4, stride=2, padding=1)
            layers += [up, torch.nn.ReLU()]
        layers.append(torch.nn.Conv2d(given, 1, 1))
        self.mask_decoder.decoder = torch.nn.Sequential(*layers)

    def forward(self, mask_codes: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, 16] to float [batch, 64, 64]."""
        rows = torch.nn.functional.embedding(mask_codes, self.mask_decoder._vq_vae._embedding)
        grid: torch.Tensor = rows.unflatten(1, (SIDE, SIDE))  # type: ignore[no-untyped-call]
        square = grid.permute(0, 3, 1, 2)
        masks: torch.Tensor = self.mask_decoder.decoder(square)[:, 0]
        return masks


class MaskWeights:
    """The decoder's tensors in vae-oid.npz, behind the component's name."""

    def __init__(self, file: Path) -> None:
        """Look into the file; it must have each tensor in the released shape.

        Raises:
            CheckpointError: It is no such file, or of another decoder.
        """
        self._file = file
        try:
            with np.load(file, allow_pickle=False) as stored:
                found = {name: stored[name].shape for name in MASK_DECODER if name in stored.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            raise CheckpointError(f"{file} cannot be read as arrays: download it again") from None
        for name, shape in MASK_DECODER.items():
            if name not in found:
                raise CheckpointError(
                    f"{file} has no {name!r}: take the released file of PaliGemma's mask decoder"
                )
            if found[name] != shape:
                raise CheckpointError(
                    f"{file}: {name!r} is {list(found[name])}, PaliGemma's is {list(shape)}: "
                    "take the released file"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {f"{NAME}.{name}": shape for name, shape in MASK_DECODER.items()}

    def dtype(self, name: str) -> str:
        """Return what it is read as; the file is small."""
        return "float32"

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        with np.load(self._file, allow_pickle=False) as stored:
            found = stored[name.removeprefix(f"{NAME}.")]
        return finite(name, found.astype(np.float32, copy=False))


def find(folder: Path) -> MaskWeights | None:
    """Open the decoder that lies in a checkpoint's folder, or nothing where there is none."""
    file = folder / MASK_FILE
    return MaskWeights(file) if file.is_file() else None


def save_tiny(folder: Path) -> None:
    """Write a random file of the released layout, its encoder's first layer included.

    It is as large as the released one, which is small; masks of it have an inside and an outside.
    """
    rng = np.random.default_rng(0)
    drawn: dict[str, Any] = {}
    for name, shape in {**MASK_DECODER, "encoder.0.weight": (64, 1, 4, 4)}.items():
        values = rng.standard_normal(shape, np.float32)
        fan = np.prod(shape[1:]) if len(shape) == 4 else 1
        drawn[name] = values if name.startswith("_") else values * np.float32((2 / fan) ** 0.5)
    np.savez(folder / MASK_FILE, **drawn)
