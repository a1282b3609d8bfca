"""Embed labels: python make_label_vectors.py BUNDLE OUT.npy LABEL..."""

from __future__ import annotations

import sys

import numpy as np

import vlmedge


def main(bundle: str, out: str, *labels: str) -> None:
    """Write float32 [labels, width], each of length 1."""
    np.save(out, vlmedge.load(bundle).embed_text([f"a photo of {label}" for label in labels]))


if __name__ == "__main__":
    main(*sys.argv[1:])
