"""Which sizes an engine is built for: optimization profiles, from what the manifest says.

A component without state has one profile. A decoder has two, since TensorRT picks kernels for the
`opt` sizes: `prefill` reads a prompt, into an empty cache or after what a chat has said before;
`decode` goes on by one token. `total` is always past + tokens, `states` what a reader before the
decoder has read (T5's encoder, BLIP's for questions), `media` what it knows of all pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmedge.errors import InputError
from vlmedge.shelves.build_options import AxisRange
from vlmedge.spec import INSTRUCTION_IDS, Component, ModelSpec, TextFrontEnd
from vlmedge.spec.wiring import picture_rows, piece_rows, reads_text, writing

Profile = Mapping[str, AxisRange]
Shape = tuple[int, ...]

BATCH = AxisRange(1, 1, 8)
BEAMS = 5  # rows that a prompt may become: beams are made after it was read, so prefill has none
# Activations and cache take memory for the longest text, which few captions need.
CONTEXT_LIMIT = 1024
TEXT = 16  # tokens of a usual prompt
TEXT_ROOM = 256  # tokens of text that have room beside the largest picture
PICTURES = 8  # that one text looks at, where they do not stand in it


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
        return ({axis: _range(spec, component, axis, overrides) for axis in named},)
    batch = overrides.get("batch", BATCH)
    prompt, room = _prompt(spec, component)
    prompt = overrides.get("tokens", prompt)
    written = spec.generation.max_tokens if spec.generation else TEXT
    usual = max(1, min(prompt.opt + written // 2, room - 1))
    cache = overrides.get("past", AxisRange(1, usual, max(1, room - 1)))
    cache = AxisRange(max(1, cache.min), max(1, cache.opt), max(1, cache.max))
    before, one = AxisRange(0, 0, cache.max), AxisRange(1, 1, 1)
    beams = AxisRange(batch.min, batch.opt, BEAMS * batch.max)
    found = []
    for rows, tokens, past in ((batch, prompt, before), (beams, one, cache)):
        known = {"batch": rows, "tokens": tokens, "past": past}
        longest = max(prompt.max, cache.max + 1)
        known["total"] = AxisRange(
            tokens.min + past.min,
            tokens.opt + past.opt,
            min(tokens.max + past.max, longest),
        )
        found.append({a: known.get(a) or _range(spec, component, a, overrides) for a in named})
    return tuple(found)


def refuse_unknown_axes(spec: ModelSpec, overrides: Mapping[str, AxisRange]) -> None:
    """Refuse a range of an axis that no component has, or that follows from others."""
    known = sorted({a for c in spec.components for a in _named(c)} - {"total"})
    for axis in overrides:
        if axis not in known:
            raise InputError(f"no axis {axis!r}: choose from {', '.join(known)}")


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
    """Return the number of the last profile that covers the sizes of all axes.

    One token more fits both of a decoder's, and the last is made for it.

    Raises:
        InputError: None does; it names the axis, its size and the range.
    """
    for number, profile in reversed(list(enumerate(built))):
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


def _range(
    spec: ModelSpec, component: Component, axis: str, overrides: Mapping[str, AxisRange]
) -> AxisRange:
    """Return the sizes of an axis that is no decoder's own."""
    if axis in overrides:
        return overrides[axis]
    if axis == "tokens":
        return _text(spec, component)
    if axis == "states":  # all that the reader has read
        readers = _readers(spec)
        return _range(spec, readers[0], "tokens", overrides) if readers else BATCH
    if axis == "media":
        each = max((piece_rows(spec, task) for task in writing(spec)), default=1)
        return AxisRange(each, each, PICTURES * each)
    if axis == "frames" and spec.video is not None:
        most = spec.video.limit or spec.video.frames
        return AxisRange(1, min(spec.video.frames, most), most)
    return BATCH


def _text(spec: ModelSpec, component: Component) -> AxisRange:
    """Return how long the texts of an encoder are; a reader of embeddings has the picture too."""
    text = _front(spec, component)
    if text is None:
        return BATCH
    if text.pad_to is not None:
        return AxisRange(text.pad_to, text.pad_to, text.pad_to)
    soft = 0
    if any(tensor.name == "inputs_embeds" for tensor in component.inputs):
        soft = max((piece_rows(spec, task) for task in writing(spec)), default=0)
    return AxisRange(1, soft + min(TEXT, text.max_tokens), soft + text.max_tokens)


def _front(spec: ModelSpec, component: Component) -> TextFrontEnd | None:
    """Return the front end whose texts a component reads: a Q-Former has one of its own."""
    instructed = any(tensor.name == INSTRUCTION_IDS for tensor in component.inputs)
    return spec.instruction if instructed else spec.text


def _prompt(spec: ModelSpec, decoder: Component) -> tuple[AxisRange, int]:
    """Return how long a decoder's prompt is, and how many positions it has, prompt included."""
    tasks = [task for task in writing(spec) if task.decoder == decoder.name]
    longest = spec.text.max_tokens if spec.text else CONTEXT_LIMIT
    soft, begins = 0, 0
    for task in tasks:
        if task.read:  # the picture is looked at, and the text perhaps read, by somebody else
            begins = max(begins, len(task.start_ids))
        elif task.media is None:
            soft = max(soft, picture_rows(spec, task))
    if any(task.image_text is None for task in tasks):  # its text is counted alone
        longest += soft
    soft = min(soft, longest - 1)
    room = min(longest, max(CONTEXT_LIMIT, soft + TEXT_ROOM))
    if tasks and all(task.read and reads_text(spec, task) for task in tasks):
        return AxisRange(1, max(1, begins), max(1, begins)), room
    return AxisRange(1, min(begins + soft + TEXT, room), room), room


def _readers(spec: ModelSpec) -> list[Component]:
    """Return what reads a text for a decoder to look at."""
    names = dict.fromkeys(name for task in writing(spec) for name in task.read)
    found = [spec.component(name) for name in names]
    return [c for c in found if {t.name for t in c.inputs} & {"input_ids", "inputs_embeds"}]
