"""Image in, text out: captions and answers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np
from msgspec import structs

from vlmedge.arrays import Array
from vlmedge.errors import InputError
from vlmedge.run.decode import loop
from vlmedge.run.decode import prompt as prompts
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.decode.sampling import options as merge
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.image_files import ImageSource, load_image
from vlmedge.run.inputs.video import Video
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.encode import Soft, flat, instructed, rows, seen, settled
from vlmedge.run.tasks.prompt import fill, make_prompt, read, sources
from vlmedge.run.tasks.trial import Column, Facts, Pool, Run, Samples, Shown, Whole, Writer
from vlmedge.spec import MASK_CODE_KINDS, Component, GenerateTask, Generation, VideoFrontEnd
from vlmedge.spec.wiring import held, pictured, wanted

BEAMS = 5  # as BLIP-2's paper captions


def caption_task(context: TaskContext, prompt: str, name: str = "caption") -> GenerateTask:
    """Return the wiring of a caption that begins with `prompt`."""
    task = context.task(name, GenerateTask)
    check_text("prompt", prompt)
    if "{question}" in task.prompt or task.answer != "text":
        raise InputError(f"task {name!r} describes no picture: use ask or detect")
    if prompt and "{prompt}" not in task.prompt:
        raise InputError("this model begins its captions by itself: leave the prompt out")
    return task


def check_text(name: str, text: object) -> None:
    """Refuse what is no text, such as one for each picture."""
    if not isinstance(text, str):
        raise InputError(f"{name} of type {type(text).__name__}: give one str, for all pictures")


def ask_task(
    context: TaskContext, question: str, first_token: str | None = None, name: str = "ask"
) -> GenerateTask:
    """Return the wiring of an answer to `question`, which may begin with another token."""
    task = context.task(name, GenerateTask)
    check_text("question", question)
    if not question.strip():
        raise InputError("the question is empty: ask something")
    if first_token is None:
        return task
    if "input_ids" not in wanted(context.bundle.spec, task):
        raise InputError("first_token: this model has no encoder for questions: leave it out")
    ids = context.tokenizer.ids(first_token, whole=False)
    if len(ids) != 1:
        raise InputError(f"first_token {first_token!r} is {len(ids)} tokens: give one")
    return structs.replace(task, first_id=ids[0])


def write(
    context: TaskContext,
    task: GenerateTask,
    soft: Sequence[Soft],
    texts: Sequence[str],
    options: Generation,
    seed: int | None = None,
    held: Mapping[str, Array] | None = None,
    places: Sequence[int] | None = None,
) -> list[list[int]]:
    """Write on after a soft prompt and a text, for each row.

    Args:
        context: The model.
        task: Its wiring.
        soft: The soft prompt of each row: from `encode`, by `rows`.
        texts: The full prompt of each row, from `fill`.
        options: Options of the decode loop.
        seed: Random seed for sampling.
        held: The constant inputs that `read` computed, if they are known.
        places: Index of each row among all that are drawn with this seed; default: 0, 1, ...

    Returns:
        New token ids of each row, without the end token.
    """
    prompt = make_prompt(context, task, soft, texts, options, held)
    return loop.generate(context.graphs[task.decoder], context.embed, prompt, options, seed, places)


def check_draws(count: int, options: Generation) -> None:
    """Refuse several texts that would all be the same."""
    if not isinstance(count, int):
        raise InputError(f"count is {count!r}: it must be a whole number")
    if count < 1:
        raise InputError(f"count is {count}: it must be at least 1")
    if count > 1 and not options.do_sample:
        raise InputError(
            f"count is {count}, and without sampling all would be the same: "
            "give a temperature, top_k or top_p, or count 1"
        )


def draws(
    context: TaskContext,
    task: GenerateTask,
    soft: Soft,
    text: str,
    count: int,
    options: Generation,
    seed: int | None = None,
) -> list[list[int]]:
    """Write several times after one soft prompt and text, some at a time; see `write`.

    Text n is drawn as row n of `write`, however many are written at a time.
    """
    soft = instructed(context, task, [soft], [text])[0]
    task = settled(task)
    once = read(context, task, [soft], [text]) if task.read else None
    found: list[list[int]] = []
    for start in range(0, count, IMAGES_PER_BATCH):
        some = min(IMAGES_PER_BATCH, count - start)
        held = once and {name: np.repeat(array, some, axis=0) for name, array in once.items()}
        these = range(start, start + some)
        found += write(context, task, [soft] * some, [text] * some, options, seed, held, these)
    return found


def stream(
    context: TaskContext,
    task: GenerateTask,
    soft: Sequence[Soft],
    text: str,
    options: Generation,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Yield the text of one row in pieces, as it comes; see `write`."""
    prompt = make_prompt(context, task, soft, [text], options)
    ids = loop.stream(context.graphs[task.decoder], context.embed, prompt, options, seed)
    return context.tokenizer.pieces(ids)


class GenerateTrial(Writer[GenerateTask], of=GenerateTask):
    """A task that writes, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """Those of the wiring, and what decodes masks."""
        task, masks = self.task, self._masks
        between = *task.encode, *task.instruct, *task.read
        return (*between, task.decoder, *([] if masks is None else [masks]))

    @property
    def decoder(self) -> str:
        """The component of the decode loop."""
        return self.task.decoder

    @property
    def asks(self) -> bool:
        """Whether the template has a place for a question."""
        return "{question}" in self.task.prompt

    @property
    def _masks(self) -> str | None:
        return None if self.task.masks is None else self.task.masks.decode

    def inputs(self, component: Component, samples: Samples) -> dict[str, Column]:
        """Make questions for components that read text, and codes for those that decode masks."""
        takes = prompts.input_names(component)
        if component.name in self.task.instruct and "qformer_input_ids" in takes:
            texts = [self._text(samples, i) for i in range(len(samples.images))]
            ids, mask = self.context.instruction_tokenizer.encode(texts)
            return {"qformer_input_ids": Whole(ids), "qformer_attention_mask": Whole(mask)}
        if component.name in self.task.read and "input_ids" in takes and self.asks:
            texts = [self.task.prompt.replace("{question}", asked) for asked in samples.questions]
            ids, mask = self.context.tokenizer.encode(texts)
            return {"input_ids": Whole(ids), "attention_mask": Whole(mask)}
        if component.name == self._masks:
            return {name: Whole(codes) for name, codes in self._codes(len(samples.images)).items()}
        return {}

    def mixed(self, component: Component, pool: Pool) -> dict[str, Column]:
        """Splice pictures into texts for what reads both."""
        embeds = "inputs_embeds" in prompts.input_names(component)
        if component.name not in self.task.read or not embeds or self.task.soft_prompt not in pool:
            return {}
        count = range(len(pool.samples.images))
        soft = [self._soft(pool, self.task.soft_prompt, i) for i in count]
        texts = [self._text(pool.samples, i, pool.grid(i)) for i in count]
        made = sources(self.context, self.task, soft, texts)
        return {name: Whole(array) for name, array in made.items()}

    def runs(self, samples: Samples, beam_samples: int) -> Iterator[Run]:
        """Answer greedily; caption greedily, and some with beams."""
        if self.asks:
            yield Run(f"{self.name}, greedy", 1, None, samples.answers)
            return
        right = samples.captions
        yield Run(f"{self.name}, greedy", 1, None, right)
        few = min(len(samples.images), beam_samples)
        yield Run(f"{self.name}, {BEAMS} beams", BEAMS, few, right[:few] if right else None)

    def shown(self, pool: Pool) -> Shown:
        """Make the soft prompts, each text having its say in its own, and run `read`."""
        context, task, count = self.context, self.task, range(len(pool.samples.images))
        texts = [self._text(pool.samples, i, pool.grid(i)) for i in count]
        encoded = pictured(context.bundle.spec, task)
        soft = instructed(context, task, [self._soft(pool, encoded, i) for i in count], texts)
        return Shown(soft, texts, read(context, task, soft, texts) if task.read else None)

    def known(self, pool: Pool, i: int) -> Shown | None:
        """Take the soft prompt, and what `read` gave."""
        task = self.task
        held_names = held(self.context.bundle.spec.component(task.decoder)) if task.read else []
        # a reader's mask is the decoder's encoder_attention_mask
        from_pool = {
            name: "attention_mask" if name == "encoder_attention_mask" else name
            for name in held_names
        }
        if any(name not in pool for name in (task.soft_prompt, *from_pool.values())):
            return None
        fed = {name: pool.at(source, i) for name, source in from_pool.items()}
        texts = [self._text(pool.samples, i, pool.grid(i))]
        return Shown([self._soft(pool, task.soft_prompt, i)], texts, fed if task.read else None)

    def prompt(self, shown: Shown, options: Generation) -> Prompt:
        """Put the soft prompts among the texts, as far as nothing else has read them."""
        task = settled(self.task)
        return make_prompt(self.context, task, shown.soft, shown.texts, options, shown.held)

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Write a text of fixed length, greedy, so that every side takes the same steps.

        Where texts may have codes of masks, one mask is decoded.
        """
        context, task, spec = self.context, self.task, self.context.bundle.spec
        assert spec.generation is not None
        count = min(tokens, max(2, spec.generation.max_tokens))
        chosen = merge(
            spec.generation, max_tokens=count, min_tokens=count, num_beams=1, do_sample=False
        )
        start = time.perf_counter()
        picture = samples.images[0]
        video = spec.video if task.source == "video" else None
        opened = context.open(picture if video is None else _still(picture, video))
        soft, grids = seen(context, task, [opened])
        prompt = make_prompt(context, task, soft, [self._text(samples, 0, *grids)], chosen)
        ids = loop.stream(context.graphs[task.decoder], context.embed, prompt, chosen)
        written = [next(ids)]
        first = time.perf_counter()
        written.extend(ids)
        rest_s = time.perf_counter() - first
        context.tokenizer.decode(written)
        if self._masks is not None:
            context.graphs[self._masks].run(self._codes(1))
        return {
            "first_token_ms": 1000 * (first - start),
            "tokens_per_s": (len(written) - 1) / rest_s,
            "prompt_tokens": prompt.embeds.shape[1],
            "new_tokens": len(written),
        }

    def _text(self, samples: Samples, i: int, grid: Grid | None = None) -> str:
        """Fill the template for sample i: with its question or its text."""
        if self.asks:
            text = samples.questions[i % len(samples.questions)]
        else:
            text = samples.said[i] if i < len(samples.said) else ""
        shown = Grid() if grid is None or self.task.source == "video" else grid
        return fill(self.task, text, [shown])

    def _soft(self, pool: Pool, name: str, i: int) -> Soft:
        """Take what the picture of sample i became, or the video that begins with it."""
        if self.task.source == "image":
            return rows(pool.at(name, i), [pool.grid(i)])[0]
        encode = map(self.context.bundle.spec.component, self.task.encode)
        whole = any(component.takes_clips for component in encode)
        return flat(pool.at(name, i) if whole else pool.clip(name, i))

    def _codes(self, count: int) -> dict[str, Array]:
        """Draw what decodes masks is fed: int64 [count, codes], by its name.

        Any codes are some mask, and few texts of a model that nobody has asked well hold any.
        """
        assert self._masks is not None
        (codes,) = self.context.bundle.spec.component(self._masks).inputs
        shape = count, int(codes.shape[1])
        return {codes.name: np.random.default_rng(0).integers(0, MASK_CODE_KINDS, shape)}


def _still(picture: ImageSource, front: VideoFrontEnd) -> Video:
    """Show one picture for as many frames as a model is used to."""
    count = min(front.frames, front.limit or front.frames)
    return Video(np.stack([np.asarray(load_image(picture))] * count), count)
