"""CLIP's 80 sentences around an ImageNet label, whose mean vector stands for the label.

Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4, and the notebook "Prompt Engineering
for ImageNet" of github.com/openai/CLIP. Nearly all come twice, with "a" and with "the", so they
are written as what they are made of; a mean does not mind their order.
"""

from __future__ import annotations

_ARTICLES = ("a", "the")
_KINDS = (
    "a photo", "a bad photo", "a good photo", "a bright photo", "a dark photo", "a blurry photo",
    "a cropped photo", "a close-up photo", "a pixelated photo", "a jpeg corrupted photo",
    "a low resolution photo", "a black and white photo", "itap", "art", "graffiti", "a doodle",
    "a drawing", "a painting", "a rendering", "a rendition", "a sculpture", "a sketch", "a tattoo",
)  # fmt: skip
_STATES = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MATERIALS = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")

IMAGENET: tuple[str, ...] = (
    *(f"{kind} of {article} {{}}." for kind in _KINDS for article in _ARTICLES),
    *(f"a photo of {article} {state} {{}}." for state in _STATES for article in _ARTICLES),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in _ARTICLES),
    *(f"{article} {{}} in a video game." for article in _ARTICLES),
    "itap of my {}.",  # itap: "I took a picture", of Reddit
    "a photo of my {}.",
    "a photo of one {}.",
    "a photo of many {}.",
)
