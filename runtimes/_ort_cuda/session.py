"""Sessions of ONNX Runtime on a GPU: which providers, and which node ran away to the CPU.

ONNX Runtime puts on the CPU what a provider has no kernel for, and says nothing: a model that is
ten times slower is all that one sees. Here such a node is an error that names it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlmedge.errors import BundleError, MissingExtraError

# What the CUDA provider is linked against, in the order in which they need each other.
_LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")


_PLUGGED: dict[str, str] = {}  # packages whose library is registered, and their provider's name


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a session runs.

    Attributes:
        name: ONNX Runtime's.
        device: ONNX Runtime's name for its memory.
        options: The provider's own.
        behind: Providers that take what this one does not, the CPU's excepted.
        captures: Whether it records steps of one shape and plays them again (CUDA graphs).
        needs: How to install it, where it is missing.
        plugin: The package that brings it, where ONNX Runtime itself does not.
        rounds: Whether it multiplies quantized tensors as they are (explicit Q/DQ).
    """

    name: str
    device: str
    options: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[tuple[str, Mapping[str, str]], ...] = ()
    captures: bool = False
    needs: str = ""
    plugin: str = ""
    rounds: bool = False


CUDA = Provider(
    "CUDAExecutionProvider",
    "cuda",
    {
        "cudnn_conv_algo_search": "HEURISTIC",  # trying all of them takes seconds at the first run
        "use_tf32": "0",  # what is float32 in a bundle is meant so
        "arena_extend_strategy": "kSameAsRequested",
    },
    captures=True,
    needs="pip install onnxruntime-gpu in place of onnxruntime",
)


def require(provider: Provider) -> None:
    """Refuse a machine that lacks a provider, and say how to get it."""
    _load_libraries()
    if provider.plugin:
        _plugged(provider)
    elif provider.name not in ort.get_available_providers():
        raise MissingExtraError(
            f"this onnxruntime {ort.__version__} has no {provider.name} (it has "
            f"{', '.join(ort.get_available_providers())}): {provider.needs}"
        )


def open_session(
    graph: bytes, where: str, provider: Provider, root: Path, *, capture: bool = False
) -> ort.InferenceSession:
    """Open a graph on a provider.

    Args:
        graph: The graph; its weight files are named from `root`.
        where: Name of the graph, for errors.
        provider: Where it runs.
        root: A folder.
        capture: Whether runs may be recorded; the session cannot be opened where they cannot.

    Raises:
        BundleError: It cannot be opened, or nodes of it fell back to the CPU.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: they are raised anyhow, warnings are for developers
    entries = {
        "session.model_external_initializers_file_folder_path": str(root.resolve()),
        "session.record_ep_graph_assignment_info": "1",
    }
    if not provider.rounds:  # then weights are dequantized once, when the graph is opened
        entries["session.disable_quant_qdq"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    own = {**provider.options, **({"enable_cuda_graph": "1"} if capture else {})}
    providers = [(provider.name, own), *((name, dict(more)) for name, more in provider.behind)]
    try:
        if provider.plugin:
            options.add_provider_for_devices(_plugged(provider), own)
            session = ort.InferenceSession(graph, options)
        else:
            session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime has a dozen exceptions without a common base
        line = " ".join(str(error).split())[:300]
        raise BundleError(f"{where} cannot be opened on {provider.name}: {line}") from None
    if not provider.plugin and provider.name not in session.get_providers():
        raise BundleError(
            f"{where}: {provider.name} did not load, so it would run on "
            f"{session.get_providers()[0]}: run `vlmedge doctor` to see why"
        )
    return session


def _plugged(provider: Provider) -> list[Any]:
    """Load the plugin that brings a provider, once; return the devices that it has here.

    Source: onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html.
    """
    try:
        plugin = importlib.import_module(provider.plugin)
        if provider.plugin not in _PLUGGED:
            name, library = plugin.get_ep_name(), plugin.get_library_path()
            ort.register_execution_provider_library(name, str(library))
            _PLUGGED[provider.plugin] = name
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"this onnxruntime {ort.__version__} has no {provider.name}: {provider.needs}"
        ) from None
    except Exception as error:  # ONNX Runtime's own have no common base
        line = " ".join(str(error).split())[:300]
        raise MissingExtraError(
            f"{provider.name} cannot be loaded: {line}: {provider.needs}"
        ) from None
    found = [one for one in ort.get_ep_devices() if one.ep_name == _PLUGGED[provider.plugin]]
    if not found:
        raise MissingExtraError(
            f"{provider.name} finds no GPU that it runs on (GeForce RTX 30 and later): "
            "use another --engine"
        )
    return found


def strays(session: ort.InferenceSession, shapes: frozenset[str]) -> list[tuple[str, str]]:
    """List the nodes that run on the CPU though they compute more than shapes.

    Args:
        session: Opened by `open_session`.
        shapes: Names of the nodes that compute shapes: ONNX Runtime keeps those on the host, where
            they are needed.

    Returns:
        (name, operator) of each.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BundleError(
            f"onnxruntime {ort.__version__} does not report where nodes run: update it to 1.24, or "
            "give --allow-fallback"
        )
    return [
        (str(node.name), str(node.op_type))
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.name not in shapes
    ]


def refuse_strays(
    session: ort.InferenceSession, where: str, provider: Provider, shapes: frozenset[str]
) -> None:
    """Refuse a session of which a node runs on the CPU."""
    found = strays(session, shapes)
    if found:
        name, kind = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BundleError(
            f"{where}: {provider.name} left {kind} {name!r}{more} to the CPU: give "
            "--allow-fallback to run it there, or use another engine"
        )


@functools.cache
def _load_libraries() -> None:
    """Load the CUDA libraries that pip has installed; where they are the system's, nothing.

    `onnxruntime.preload_dlls` looks beside onnxruntime alone.
    """
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for name in _LIBRARIES:
            for file in sorted(Path(folder).glob(f"*/lib/lib{name}.so.*")):
                _load(file)


def _load(file: Path) -> Any:
    try:
        return ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError:  # one for another CUDA: the provider's own error is clearer
        return None
