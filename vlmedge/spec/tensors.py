"""Components and their tensors, adapter slots and the token embedding table."""

from __future__ import annotations

from vlmedge.spec.base import Data


class TensorSpec(Data, frozen=True):
    """One input or output.

    Attributes:
        name: Hugging Face's name where it has one: pixel_values, inputs_embeds, logits, ...
        dtype: numpy's name: float32, int64, ...
        shape: Sizes of the axes; a string names a dynamic axis: batch, tokens, past, total.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class AdapterSlot(Data, frozen=True):
    """Where a LoRA adapter enters a graph: y = W x + b becomes y + (x down) up.

    Both are inputs of the graph beside the component's own, and zeros without an adapter. Their
    first axis is 1 for one adapter, or the batch size for one adapter a row.

    Attributes:
        module: The Linear's path in the checkpoint.
        down: A transposed, [adapters, in, rank].
        up: B transposed and scaled, [adapters, rank, out].
    """

    module: str
    down: TensorSpec
    up: TensorSpec


class Component(Data, frozen=True):
    """One graph: its inputs, its outputs and its state.

    Attributes:
        name: vision_encoder, text_encoder, qformer, projector, decoder, ...
        inputs: Inputs in the graph's order, state included.
        outputs: Outputs in the graph's order, state included.
        state: Pairs (output, the input that it becomes at the next call).
        slots: Inputs for LoRA adapters; in the graph they come after `inputs`.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[str, str], ...] = ()
    slots: tuple[AdapterSlot, ...] = ()

    @property
    def takes_clips(self) -> bool:
        """Whether one run takes all frames of one video, and not some rows of a batch."""
        return bool(self.inputs) and self.inputs[0].shape[:1] == ("frames",)


class EmbeddingTable(Data, frozen=True):
    """The token embedding table, the one weight that the host reads: [vocabulary, width].

    Attributes:
        file: Path inside the bundle; a graph's weight file when the tensor is tied to it.
        offset_bytes: Where the rows begin in `file`.
        dtype: numpy's name.
        shape: (vocabulary, width).
        scale_offset_bytes: Where the float32 scales of int8 rows begin, or none.
    """

    file: str
    offset_bytes: int
    dtype: str
    shape: tuple[int, int]
    scale_offset_bytes: int | None = None
