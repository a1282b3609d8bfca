"""Every error that vlmedge raises on purpose; `except VlmEdgeError` catches them all.

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
    """Base class of all errors; the command line prints the message as one line and exits 1.

    A message names what is wrong and then what to do: `<what, by name>: <what to do>`.
    """


class UnknownNameError(VlmEdgeError, KeyError):
    """No family, scheme, engine, device, task or component has this name; also a `KeyError`.

    The message lists the names that exist.
    """

    __str__ = Exception.__str__  # KeyError would print the message's repr


class MissingExtraError(VlmEdgeError, ImportError):
    """An optional dependency is not installed; also an `ImportError`.

    The message has the `pip install` line.
    """


class InputError(VlmEdgeError, ValueError):
    """An image, a video, a text or an option cannot be used; also a `ValueError`."""


class CheckpointError(VlmEdgeError):
    """A checkpoint cannot be read, or no family exports it."""


class AdapterError(VlmEdgeError):
    """A LoRA adapter cannot be read, or does not fit the model."""


class BundleError(VlmEdgeError):
    """A bundle on disk is incomplete, altered or from another version, or cannot be written."""


class ParityError(VlmEdgeError):
    """A bundle did not pass the comparison with PyTorch (`vlmedge check`)."""
