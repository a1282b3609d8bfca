"""State and memory on the GPU: contexts, caches that stay, rows that are reordered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kit.fake_cuda import FakeCuda
from kit.tensorrt import Use, build, only, prompt, token_feeds

from vlmedge.bundle import Bundle
from vlmedge.shelves.build_options import AxisRange
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.registry import ENGINES


@pytest.fixture
def decoder(use: Use, blip2: Bundle) -> Iterator[tuple[Graph, FakeCuda, Graph]]:
    """The decoder on the stand-in of 10.3, its GPU, and the same on ONNX Runtime."""
    gpu = use("trt103")
    build(blip2, only("decoder"))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    yield graph, gpu, ENGINES["ort"].open(blip2, "decoder")
    graph.close()


@pytest.mark.parametrize("version", ["trt86", "trt103", "trt110"])
def test_each_profile_has_a_context_and_all_share_one_memory(
    version: str, use: Use, blip2: Bundle
) -> None:
    """A context that changed its profile at every text lost tens of milliseconds on a GPU."""
    gpu = use(version)
    build(blip2, only("decoder"))
    before = len(gpu.held)
    graph: Any = ENGINES["tensorrt"].open(blip2, "decoder")
    made = []
    for _ in range(2):
        graph.run(prompt(1, 9, 9))
        graph.run(prompt(1, 1, 10))
        graph.reset()
        made.append(dict(graph._contexts._made))
    assert set(made[0]) == {0, 1}
    assert made[0] == made[1]
    graph.close()
    assert len(gpu.held) == before


def test_state_stays_on_the_gpu(decoder: tuple[Graph, FakeCuda, Graph]) -> None:
    graph, gpu, other = decoder
    graph.run(prompt(2, 9, 9))
    other.run(prompt(2, 9, 9))
    gpu.copied_bytes = dict.fromkeys(gpu.copied_bytes, 0)
    feeds = prompt(2, 1, 10)
    found = graph.run(feeds)["logits"]
    np.testing.assert_allclose(found, other.run(feeds)["logits"], atol=1e-4)
    assert gpu.copied_bytes["up"] == sum(array.nbytes for array in feeds.values())
    assert gpu.copied_bytes["down"] == found.nbytes
    assert gpu.copied_bytes["inside"] == 0


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 1, 1, 0], [1]])
def test_state_is_reordered_on_the_gpu(
    decoder: tuple[Graph, FakeCuda, Graph], rows: list[int]
) -> None:
    graph, gpu, other = decoder
    for each in (graph, other):
        each.run(prompt(2, 9, 9))
        each.run(prompt(2, 1, 10))
    gpu.copied_bytes = dict.fromkeys(gpu.copied_bytes, 0)
    for each in (graph, other):
        each.reorder(np.array(rows))
    assert gpu.copied_bytes["up"] == gpu.copied_bytes["down"] == 0
    feeds = prompt(len(rows), 1, 11)
    expected = other.run(feeds)["logits"]
    np.testing.assert_allclose(graph.run(feeds)["logits"], expected, atol=1e-4)


def test_rows_that_are_not_there_are_refused(decoder: tuple[Graph, FakeCuda, Graph]) -> None:
    graph, _, _ = decoder
    graph.run(prompt(2, 9, 9))
    with pytest.raises(IndexError, match=r"rows \[0, 2\] of 2"):
        graph.reorder(np.array([0, 2]))


def test_state_is_forgotten_by_reset(decoder: tuple[Graph, FakeCuda, Graph]) -> None:
    graph, _, _ = decoder
    first = graph.run(prompt(1, 9, 9))["logits"]
    graph.reset()
    np.testing.assert_array_equal(graph.run(prompt(1, 9, 9))["logits"], first)


def test_past_can_be_fed(decoder: tuple[Graph, FakeCuda, Graph]) -> None:
    graph, _, other = decoder
    feeds = prompt(1, 1, 4)
    for name, _ in ((i.name, 0) for i in graph.component.inputs if i.name.startswith("past")):
        feeds[name] = np.random.default_rng(3).standard_normal((1, 4, 3, 32)).astype(np.float32)
    expected = other.run(feeds)["logits"]
    np.testing.assert_allclose(graph.run(feeds)["logits"], expected, atol=1e-4)


def test_buffers_are_kept_while_they_are_large_enough(
    decoder: tuple[Graph, FakeCuda, Graph],
) -> None:
    graph, gpu, _ = decoder
    graph.run(prompt(1, 30, 30))
    for total in range(31, 35):
        graph.run(prompt(1, 1, total))
    before = gpu.allocations
    for total in range(35, 45):
        graph.run(prompt(1, 1, total))
    assert gpu.allocations == before


def test_closed_graph_gives_all_memory_back(use: Use, blip2: Bundle) -> None:
    gpu = use("trt103")
    build(blip2, only("decoder"))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    graph.run(prompt(1, 9, 9))
    graph.run(prompt(1, 1, 10))
    assert gpu.held
    graph.close()
    graph.close()
    assert not gpu.held
    assert gpu.streams == 0
    with pytest.raises(RuntimeError, match="decoder is closed"):
        graph.run(prompt(1, 9, 9))


def test_longer_batch_goes_through_in_pieces(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip, only("text_encoder", axes={"batch": AxisRange(1, 2, 3)}))
    graph, feeds = ENGINES["tensorrt"].open(clip, "text_encoder"), token_feeds(clip, 8)
    feeds["input_ids"] = feeds["input_ids"] * np.arange(1, 9)[:, None]
    together = graph.run(feeds)
    for i in range(8):
        alone = graph.run({name: array[i : i + 1] for name, array in feeds.items()})
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][i : i + 1], array, atol=1e-5)
    graph.close()
