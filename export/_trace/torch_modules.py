"""Torch modules without weights, and with one component's weights at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

# transformers' run-time checks leave aten::_is_all_true in a trace, which ONNX does not have
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError, VlmEdgeError
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component

Build = Callable[[], torch.nn.Module]


class _EmptyOnMeta(TorchFunctionMode):
    """Send torch.empty to the meta device.

    Parameters then get no memory, while buffers, made with arange and the like, keep their values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(build: Build) -> tuple[torch.nn.Module, dict[str, Array]]:
    """Build a module whose parameters and buffers have no data.

    Returns:
        The module in eval mode, and the values of its buffers that no checkpoint holds.

    Raises:
        CheckpointError: PyTorch or transformers cannot make such a module.
    """
    with _EmptyOnMeta(), torch.device("cpu"):
        try:
            module = build()
        except VlmEdgeError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"config.json describes a model that cannot be built ({type(error).__name__}: "
                f"{line}): download it again"
            ) from error
    values = {
        name: buffer.numpy().copy()
        for name, buffer in module.named_buffers()
        if buffer.device.type != "meta"
    }
    return module.to("meta").eval().requires_grad_(False), values


class TorchGraph(CheckedGraph):
    """A component in PyTorch: the reference of the gate, behind an engine's interface."""

    def __init__(
        self,
        component: Component,
        build: Build,
        read: Callable[[str], Array],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights that the component needs, one by one.

        Args:
            component: Its spec.
            build: Makes its torch module.
            read: Reads a weight as float32 by its name in the module.
            dtype: Type to compute in.
        """
        super().__init__(component)
        self._dtype = dtype
        module, buffers = build_on_meta(build)
        weights = {name: torch.from_numpy(value) for name, value in buffers.items()}
        for name, _ in module.named_parameters():
            weights[name] = torch.from_numpy(read(name)).to(dtype)
        _assign(module, weights)
        self._module: torch.nn.Module | None = module

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run the module; float inputs in the graph's dtype, the state as tensors."""
        if self._module is None:
            raise RuntimeError(f"{self.component.name} is closed")
        state = {into for _, into in self.component.state}
        tensors = {name: self._tensor(value) for name, value in feeds.items()}
        plain = [spec.name for spec in self.component.inputs if spec.name not in state]
        single = [tensors[name] for name in plain if not is_layered(name)]
        layered = [tensors[name] for name in plain if is_layered(name)]
        past = [tensors[into] for _, into in self.component.state]
        with torch.inference_mode():
            outputs = self._module(*single, *(group for group in (layered, past) if group))
        names = [spec.name for spec in self.component.outputs]
        return {
            name: value if name in self._became else _array(value)
            for name, value in zip(names, flat(outputs), strict=True)
        }

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        state: dict[str, Any] = self._state
        index = torch.from_numpy(rows)
        self._state = {name: value.index_select(0, index) for name, value in state.items()}
        self.follow(rows)

    def close(self) -> None:
        """Free the weights."""
        super().close()
        self._module = None

    def _tensor(self, value: Array | torch.Tensor) -> torch.Tensor:
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def is_layered(name: str) -> bool:
    """Tell an input that every layer has one of: cross.0.key and the like."""
    return re.search(r"\.\d+\.", name) is not None


def _array(tensor: torch.Tensor) -> Array:
    """Return a numpy array; numpy has no bfloat16."""
    found: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return found


def flat(outputs: Any) -> list[torch.Tensor]:
    """Flatten what a component's forward returns: tensors, or tensors and a list of them."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flat(part)]


def _assign(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put tensors in place of the parameters and buffers of the same names."""
    for name, tensor in weights.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
