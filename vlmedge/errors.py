"""Every error that vlmedge raises on purpose.

VlmEdgeError
├── UnknownNameError    no such family, scheme, engine, task, component ... (also KeyError)
├── MissingExtraError   an optional dependency is not installed (also ImportError)
├── InputError          an image, a prompt or an option cannot be used (also ValueError)
├── CheckpointError     a checkpoint cannot be read or exported
├── AdapterError        a LoRA adapter cannot be read or does not fit the model
├── BundleError         a bundle on disk cannot be used or written
└── ParityError         the gate has not passed

Anything else that escapes is a bug and keeps its traceback.
"""


class VlmEdgeError(Exception):
    """The base of them all; the CLI prints it as one line and exits 1."""


class UnknownNameError(VlmEdgeError, KeyError):
    """No such family, scheme, engine, task or component."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class MissingExtraError(VlmEdgeError, ImportError):
    """An optional dependency is not installed."""


class InputError(VlmEdgeError, ValueError):
    """An image, a prompt or an option cannot be used."""


class CheckpointError(VlmEdgeError):
    """A checkpoint cannot be read or exported."""


class AdapterError(VlmEdgeError):
    """A LoRA adapter cannot be read or does not fit the model."""


class BundleError(VlmEdgeError):
    """A bundle on disk cannot be used or written."""


class ParityError(VlmEdgeError):
    """The gate has not passed."""
