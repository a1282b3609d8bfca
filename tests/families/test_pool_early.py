"""What pooling leaves out is not computed, and what comes out is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from kit.shelf import module
from torch import Tensor, nn

from vlmedge.shelves.registry import FAMILIES
from vlmedge.spec import Component, TensorSpec

graph_of, pooled = module("export", "_trace.clean"), module("export", "_trace.pool_early")
traced = module("export", "_trace.trace")

WIDTH, HEADS = 8, 2
Pool = Callable[[Tensor], Any]


class Encoder(nn.Module):
    """One layer of a transformer, and a choice of what goes on."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        """Map float [batch, tokens, WIDTH] to what is chosen of it."""
        y = self.before(x)
        q, k, v = (
            part(y).unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        shares = torch.softmax(q @ k.transpose(2, 3) * 0.5, dim=-1)
        x = x + self.o((shares @ v).transpose(1, 2).flatten(2))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.after(x))))
        return self.pool(x)


def last_token(x: Tensor) -> Tensor:
    """Choose the token with the greatest first value, another in every row."""
    return x[torch.arange(x.shape[0]), x[:, :, 0].argmax(-1)]


def export(pool: Pool, tokens: int | str, outputs: int = 1) -> tuple[ir.Model, int]:
    """Trace an encoder with weights; return it and the number of products that were moved."""
    torch.manual_seed(0)
    module = Encoder(pool).eval()
    component = Component(
        "encoder",
        inputs=(TensorSpec("x", "float32", ("batch", tokens, WIDTH)),),
        outputs=tuple(TensorSpec(f"y{i}", "float32", ("batch", WIDTH)) for i in range(outputs)),
    )
    model, buffers = traced.trace(component, lambda: Encoder(pool))
    transposed = graph_of.clean(model)
    moved = pooled.read_one_token(model)
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    graph_of.bind(
        model,
        weights.__getitem__,
        lambda name: lambda start, stop: weights[name][start:stop],
        buffers,
        transposed,
    )
    model.meta["module"] = module
    return model, moved


def agree(model: ir.Model, tokens: int) -> None:
    """Compare a graph with PyTorch, at two batches."""
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, tokens, WIDTH), np.float32)
        with torch.inference_mode():
            expected = model.meta["module"](torch.from_numpy(x))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, true in zip(session.run(None, {"x": x}), expected, strict=True):
            assert found.shape == tuple(true.shape)
            np.testing.assert_allclose(found, true.numpy(), rtol=1e-5, atol=1e-5)


def rows(model: ir.Model, weight: str) -> Any:
    """Return how many tokens a Linear reads."""
    node = next(n for n in model.graph if any(weight in str(v.name) for v in n.inputs if v))
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    return x.shape[1]


@pytest.mark.parametrize("pool", [lambda x: x[:, 0], lambda x: x[:, -1], lambda x: x[:, 2].tanh()])
def test_one_token_is_chosen_before_queries_attention_and_mlp(pool: Pool) -> None:
    model, moved = export(pool, 5)
    assert moved == 6  # q, scores, mix, o, up, down
    assert [rows(model, name) for name in ("q.w", "k.w", "v.w", "o.w", "up.w", "down.w")] == [
        1, 5, 5, 1, 1, 1,
    ]  # fmt: skip
    agree(model, 5)


def test_number_of_tokens_may_vary() -> None:
    model, moved = export(lambda x: x[:, 0], "tokens")
    assert moved == 6
    agree(model, 4)
    agree(model, 7)


def test_each_row_may_choose_for_itself() -> None:
    model, moved = export(last_token, "tokens")
    # the token is known only by what the layer makes, so nothing can be left out
    assert moved == 0
    agree(model, 6)


def test_what_all_tokens_go_out_of_is_left_alone() -> None:
    model, moved = export(lambda x: (x[:, 0], x.mean(1)), 5, outputs=2)
    assert moved == 0
    agree(model, 5)


def test_two_choices_of_one_value_are_left_alone() -> None:
    model, moved = export(lambda x: (x[:, 0], x[:, 1]), 5, outputs=2)
    assert moved == 0
    agree(model, 5)


@pytest.mark.parametrize(
    ("kind", "component", "choice"),
    [("clip", "text_encoder", "GatherND"), ("clip", "vision_encoder", "Gather")],
)
def test_families_that_pool_read_one_token(
    kind: str, component: str, choice: str, tmp_path: Any
) -> None:
    FAMILIES[kind].tiny(kind, tmp_path)
    model = FAMILIES[kind].open(tmp_path).trace(component)
    kinds = {n.op_type for n in model.graph if str(n.name).endswith(".read")}
    assert kinds == {choice}
