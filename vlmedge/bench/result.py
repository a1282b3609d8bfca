"""The words of what `vlmedge bench --json` prints; vlmedge/bench.schema.json is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmedge.host.hardware import Machine
from vlmedge.json_schema import json_schema
from vlmedge.spec.base import Data

FORMAT = 1


class Latency(Data, frozen=True):
    """Times of one thing; of fewer than 100 samples, p99 is close to the longest."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Latency:
        """Sum up samples, at least one."""
        p50, p90, p99 = np.percentile(times_ms, [50, 90, 99]).tolist()
        return cls(p50, p90, p99, len(times_ms))


class Energy(Data, frozen=True):
    """Energy of the whole machine, idle power included, while one side ran alone.

    Attributes:
        task: The task that was run, again and again.
        joules_per_item: Energy of one answer.
        watts: Mean power.
        items: Number of answers.
    """

    task: str
    joules_per_item: float
    watts: float
    items: int


class Side(Data, frozen=True):
    """One engine or PyTorch.

    Attributes:
        name: "ort int8", "torch float32", ...
        components: Latencies at batch 1; a decoder has two, the prompt's run and one token's.
        end_to_end: Latencies by task, from a decoded picture (and a text) to the answer; tasks that
            run the same components are there once.
        first_token: Latency from a decoded picture to the first token, or none.
        tokens_per_s: Speed after the first token, greedy; or none.
        start_cold: Time from the start of a process to its first answer, or first token, without
            the engine's cache for the bundle; or none. Files may be in the system's memory.
        start_warm: The same, with that cache.
        peak_memory_mib: Peak memory of the whole process, or none where the system does not report
            it.
        energy: Energy, or none where the machine does not report it.
        error: Why there are no measurements, or none.
    """

    name: str
    components: dict[str, Latency]
    end_to_end: dict[str, Latency]
    first_token: Latency | None = None
    tokens_per_s: float | None = None
    start_cold: Latency | None = None
    start_warm: Latency | None = None
    peak_memory_mib: float | None = None
    energy: Energy | None = None
    error: str | None = None


class Board(Data, frozen=True):
    """Kind of machine, beyond its processor.

    Attributes:
        device: Its name in `vlmedge list`, or none.
        model: The board's name in the device tree, or none.
        jetpack: Its release, or none.
        power_mode: Power mode of a Jetson, or none.
        gpus: As nvidia-smi names them, with their driver.
    """

    device: str | None
    model: str | None
    jetpack: str | None
    power_mode: str | None
    gpus: tuple[str, ...]


class BenchResult(Data, frozen=True):
    """Result of `bench`; the bundle's own side is the first.

    Attributes:
        format: Version of this layout.
        vlmedge: Version that measured.
        bundle: Its folder.
        checkpoint: Where its weights came from.
        scheme: How they are stored.
        warm_ups: How often each side ran before it counted.
        rounds: How often after that.
        alternated: Whether the sides took turns; otherwise one ran after the other.
        prompt_tokens: Length of the decoder's prompt, soft prompt included, or none.
        new_tokens: How many it wrote in each round, or none.
        energy_source: The sensors that energy was read from, or why there are none.
        no_cold_start: Why the first side has no cold start, or none.
        machine: The machine that it ran on.
        board: The same machine, as the catalogue has it.
        sides: One for each engine.
    """

    format: int
    vlmedge: str
    bundle: str
    checkpoint: str
    scheme: str
    warm_ups: int
    rounds: int
    alternated: bool
    prompt_tokens: int | None
    new_tokens: int | None
    energy_source: str
    no_cold_start: str | None
    machine: Machine
    board: Board
    sides: tuple[Side, ...]


def schema() -> dict[str, Any]:
    """Make the JSON Schema that is published as vlmedge/bench.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"vlmedge benchmark, format {FORMAT}",
        **json_schema(BenchResult),
    }
