"""What the tests share: tiny checkpoints and bundles, machines of files, stand-ins of engines."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the checkout
