"""Read and write the portable graphs of a bundle; weights go through one tensor at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlmedge.bundle import graph_path, weights_path
from vlmedge.errors import BundleError, MissingExtraError, VlmEdgeError

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_THRESHOLD_BYTES = 1024  # smaller tensors stay readable inside the graph

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def onnx_ir() -> object:
    """Import onnx_ir, or say how to get it."""
    try:
        import onnx_ir
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"graphs are edited with the package {error.name}: pip install 'vlmedge[cpu]'"
        ) from error
    return onnx_ir


def load_graph(folder: Path, component: str) -> ir.Model:
    """Read a component's graph; its weights stay on disk until someone asks for them."""
    onnx_ir()
    import onnx_ir as ir

    file = folder / graph_path(component)
    try:
        return ir.load(file)
    except OSError:
        raise
    except Exception as error:  # protobuf's own, and whatever a broken graph makes of onnx_ir
        line = " ".join(str(error).split())[:200]
        raise BundleError(f"{file} cannot be read as ONNX ({line}): copy it again") from None


def weights_bytes(model: ir.Model) -> int:
    """Return the size of a graph's weights, reading none of them."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def save_graph(
    model: ir.Model, folder: Path, component: str, progress: Progress | None = None
) -> None:
    """Write a component's graph, and its weights into the .bin beside it."""
    import onnx_ir as ir

    file = folder / graph_path(component)
    file.parent.mkdir(exist_ok=True)
    total = weights_bytes(model)
    done = 0

    def wrote(tensor: ir.TensorProtocol, info: object) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress:
            progress(done, total)

    with promised():
        ir.save(
            model,
            file,
            external_data=Path(weights_path(component)).name,
            size_threshold_bytes=EXTERNAL_THRESHOLD_BYTES,
            callback=wrote,
        )


@contextlib.contextmanager
def promised() -> Iterator[None]:
    """Raise what a promised weight raises when it is written; ONNX's writer wraps it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (VlmEdgeError, OSError)):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None


def save_edited(model: ir.Model, folder: Path, component: str) -> None:
    """Write a loaded graph again whose big weights have not changed: they are not copied."""
    import onnx_ir as ir

    ir.save(model, folder / graph_path(component))
