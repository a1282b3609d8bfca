"""Which sizes an engine is built for: optimization profiles, from what the manifest says.

A component without state has one profile. A decoder has two, since TensorRT picks kernels for the
`opt` sizes: `prefill` reads a prompt into an empty cache, `decode` goes on by one token.
`total` is always past + tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmedge.building import AxisRange
from vlmedge.errors import InputError
from vlmedge.spec import Component, GenerateTask, ModelSpec, TextFrontEnd

Profile = Mapping[str, AxisRange]
Shape = tuple[int, ...]

BATCH = AxisRange(1, 1, 8)
BEAMS = 5  # rows that a prompt may become: beams are made after it was read, so prefill has none
# Activations and cache take memory for the longest text, which few captions need.
CONTEXT_LIMIT = 1024
TEXT = 16  # tokens of a usual prompt


def profiles(
    spec: ModelSpec, component: Component, overrides: Mapping[str, AxisRange]
) -> tuple[Profile, ...]:
    """Return the profiles of a component: one, or prefill and decode.

    Args:
        spec: The model.
        component: One of its graphs.
        overrides: The user's ranges; `batch` and `tokens` are the prompt's, `past` the cache's.
    """
    named = _named(component)
    if not component.state or "past" not in named:
        text = _front(spec, component)
        return ({axis: overrides.get(axis) or _default(text, axis) for axis in named},)
    batch = overrides.get("batch", BATCH)
    soft, room = _soft_prompt(spec), _context(spec)
    written = spec.generation.max_tokens if spec.generation else TEXT
    usual = min(soft + TEXT, room)
    prompt = overrides.get("tokens", AxisRange(1, usual, room))
    cache = overrides.get("past", AxisRange(1, min(usual + written // 2, room - 1), room - 1))
    empty, one = AxisRange(0, 0, 0), AxisRange(1, 1, 1)
    cache = AxisRange(max(1, cache.min), max(1, cache.opt), max(1, cache.max))
    found = []
    beams = AxisRange(batch.min, batch.opt, BEAMS * batch.max)
    for rows, tokens, past in ((batch, prompt, empty), (beams, one, cache)):
        known = {"batch": rows, "tokens": tokens, "past": past, "total": _sum(tokens, past)}
        found.append({a: known.get(a) or overrides.get(a) or _default(spec.text, a) for a in named})
    return tuple(found)


def refuse_unknown_axes(spec: ModelSpec, overrides: Mapping[str, AxisRange]) -> None:
    """Refuse a range of an axis that no component has, or that follows from others."""
    known = sorted({a for c in spec.components for a in _named(c)} - {"total"})
    for axis in overrides:
        if axis not in known:
            raise InputError(f"no axis {axis!r}: give a range of {', '.join(known)}")


def shapes(component: Component, profile: Profile) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return (min, opt, max) of every input that has a dynamic axis."""
    found = {}
    for spec in component.inputs:
        if any(isinstance(size, str) for size in spec.shape):
            found[spec.name] = (
                tuple(s if isinstance(s, int) else profile[s].min for s in spec.shape),
                tuple(s if isinstance(s, int) else profile[s].opt for s in spec.shape),
                tuple(s if isinstance(s, int) else profile[s].max for s in spec.shape),
            )
    adapters = profile.get("batch", BATCH)  # one for all rows, or one a row
    for slot in component.slots:
        for spec in (slot.down, slot.up):
            rest = tuple(int(size) for size in spec.shape[1:])
            found[spec.name] = ((1, *rest), (1, *rest), (adapters.max, *rest))
    return found


def choose(component: str, built: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Return the number of the first profile that covers the sizes of all axes.

    Raises:
        InputError: None does; it names the axis, its size and the range.
    """
    for number, profile in enumerate(built):
        if all(r.min <= sizes[axis] <= r.max for axis, r in profile.items() if axis in sizes):
            return number
    # the profile that nearly fits tells most: the one with the fewest axes outside of it
    outside = [
        [(axis, r) for axis, r in profile.items() if not r.min <= sizes.get(axis, r.min) <= r.max]
        for profile in built
    ]
    axis, allowed = min(outside, key=len)[0]
    low = min(profile[axis].min for profile in built)
    high = max(profile[axis].max for profile in built)
    if low <= sizes[axis] <= high:  # it fits one profile, and another axis the other
        low, high = allowed.min, allowed.max
    given = "past" if axis == "total" else axis
    wider = AxisRange(
        min(low, sizes[axis]), max(low, min(sizes[axis], high)), max(sizes[axis], high)
    )
    raise InputError(
        f"{component}: {axis} is {sizes[axis]}: its engine takes {low} to {high}: "
        f"run `vlmedge build BUNDLE --axis {given}={wider}`"
    )


def _named(component: Component) -> list[str]:
    axes = (size for spec in component.inputs for size in spec.shape if isinstance(size, str))
    return list(dict.fromkeys(axes))


def _front(spec: ModelSpec, component: Component) -> TextFrontEnd | None:
    """Return the front end whose texts a component reads: a Q-Former has one of its own."""
    instructed = any(tensor.name == "qformer_input_ids" for tensor in component.inputs)
    return spec.instruction if instructed else spec.text


def _default(text: TextFrontEnd | None, axis: str) -> AxisRange:
    if axis != "tokens" or text is None:
        return BATCH
    if text.pad_to is not None:
        return AxisRange(text.pad_to, text.pad_to, text.pad_to)
    return AxisRange(1, min(TEXT, text.max_tokens), text.max_tokens)


def _context(spec: ModelSpec) -> int:
    """Return how many positions prompt and text may take together."""
    longest = spec.text.max_tokens if spec.text else CONTEXT_LIMIT
    return min(longest + _soft_prompt(spec), CONTEXT_LIMIT)


def _soft_prompt(spec: ModelSpec) -> int:
    """Return how many positions a picture takes before the text."""
    names = {t.soft_prompt for t in spec.tasks.values() if isinstance(t, GenerateTask)}
    sizes = [o.shape[1] for c in spec.components for o in c.outputs if o.name in names]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def _sum(a: AxisRange, b: AxisRange) -> AxisRange:
    return AxisRange(a.min + b.min, a.opt + b.opt, a.max + b.max)
