"""The decode loop against `GenerationMixin.generate` on a tiny random OPT."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.cache_utils import DynamicCache

from vlmedge.arrays import Array
from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.run.decode.loop import generate, stream
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.decode.sampling import options
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component, Generation, TensorSpec

WIDTH, HEADS, LAYERS, VOCABULARY, IMAGE_ID, PAD_ID = 32, 4, 2, 200, 3, 1
# tokens that this model writes now and then, so that texts end at many lengths
EOS_IDS = (125, 176, 60)
# its name before and from transformers 5.24 on
NAMES = inspect.signature(OPTForCausalLM.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"
DEFAULTS = Generation(eos_ids=EOS_IDS[:1], pad_id=PAD_ID, max_tokens=14)


class Opt(CheckedGraph):
    """The decoder component in torch; it counts its runs and the rows that it saw."""

    def __init__(self, model: OPTForCausalLM, positions: bool = False) -> None:
        cache = ("batch", HEADS, "past", WIDTH // HEADS)
        pasts = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
        inputs = [
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            *[TensorSpec(f"past_key_values.{name}", "float32", cache) for name in pasts],
        ]
        if positions:
            inputs.append(TensorSpec("position_ids", "int64", ("batch", "tokens")))
        logits = TensorSpec("logits", "float32", ("batch", "tokens", VOCABULARY))
        presents = [TensorSpec(f"present.{name}", "float32", cache) for name in pasts]
        state = tuple((f"present.{name}", f"past_key_values.{name}") for name in pasts)
        super().__init__(Component("decoder", tuple(inputs), (logits, *presents), state))
        self._model = model
        self.rows: list[int] = []

    def embed(self, ids: Array) -> Array:
        """Look up the embeddings of token ids."""
        return self._model.get_input_embeddings().weight[torch.from_numpy(ids)].detach().numpy()

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the model on the cache that `feeds` holds."""
        assert all(array.flags.c_contiguous for array in feeds.values())
        self.rows.append(len(feeds["inputs_embeds"]))
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        past = [tensors.pop(name) for name in self._became.values()]
        pairs = list(zip(past[::2], past[1::2], strict=True))
        with torch.no_grad():
            named = {CACHE: DynamicCache(pairs)}
            out = self._model(**tensors, **named, use_cache=True)
        layers = out.past_key_values.layers
        presents = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        values = [out.logits, *presents]
        names = [spec.name for spec in self.component.outputs]
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}


@pytest.fixture(scope="module")
def model() -> Iterator[OPTForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads only slow down a model of this size
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=64,
        dropout=0.0,
    )
    made = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.5 if "embed" in name else 0.3))
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompt(model: OPTForCausalLM) -> Prompt:
    """Four rows of soft prompt and text, three of them with padding on the left."""
    generator = np.random.default_rng(0)
    tokens, soft = 11, 4
    mask = np.ones((4, tokens), np.int64)
    history = generator.integers(5, VOCABULARY, (4, tokens))
    embeds = Opt(model).embed(history)
    for row, padding in enumerate((0, 3, 5, 1)):
        mask[row, :padding] = 0
        history[row, :padding] = 19  # a token that the model likes: the penalty must not see it
        history[row, padding : padding + soft] = IMAGE_ID
        embeds[row, padding : padding + soft] = generator.normal(size=(soft, WIDTH))
        embeds[row, :padding] = generator.normal(size=(padding, WIDTH))  # must not matter
    return Prompt(embeds, mask, history)


def rows_of(prompt: Prompt, rows: slice) -> Prompt:
    return Prompt(prompt.embeds[rows], prompt.attention_mask[rows], prompt.history[rows])


def reference(
    model: OPTForCausalLM, prompt: Prompt, given: Generation, with_ids: bool = True
) -> list[list[int]]:
    """Ask transformers; drop the prompt's ids, the end token and what comes after it."""
    inputs = {
        "inputs_embeds": torch.from_numpy(prompt.embeds),
        "attention_mask": torch.from_numpy(prompt.attention_mask),
    }
    if with_ids:
        inputs["input_ids"] = torch.from_numpy(prompt.history)
    sampling = {"top_k": given.top_k, "top_p": given.top_p, "temperature": given.temperature}
    out = model.generate(
        **inputs,
        max_new_tokens=given.max_tokens,
        min_new_tokens=given.min_tokens,
        num_beams=given.num_beams,
        do_sample=given.do_sample,
        repetition_penalty=given.repetition_penalty,
        length_penalty=given.length_penalty,
        early_stopping=given.early_stopping,
        no_repeat_ngram_size=given.no_repeat_ngram_size,
        forced_eos_token_id=given.forced_eos_id,
        eos_token_id=list(given.eos_ids) or None,
        pad_token_id=given.pad_id,
        **(sampling if given.do_sample else {}),
    ).tolist()
    new = [ids[prompt.history.shape[1] :] if with_ids else ids for ids in out]
    return [list(itertools.takewhile(lambda i: i not in given.eos_ids, ids)) for ids in new]


def check(model: OPTForCausalLM, prompt: Prompt, given: Generation) -> list[list[int]]:
    decoder = Opt(model)
    got = generate(decoder, decoder.embed, prompt, given)
    assert got == reference(model, prompt, given)
    return got


@pytest.mark.parametrize(
    "eos_ids", [(), EOS_IDS[:1], EOS_IDS[1:], EOS_IDS, (19,), (19, 92, 111, 125, 129, 184, 188)]
)
@pytest.mark.parametrize(
    ("num_beams", "early_stopping"),
    [(1, False), *itertools.product([2, 3, 5], [False, True])],
)
def test_generate_equals_transformers(model, prompt, eos_ids, num_beams, early_stopping):
    given = options(DEFAULTS, eos_ids=eos_ids, num_beams=num_beams, early_stopping=early_stopping)
    check(model, prompt, given)


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_generate_length_penalty_equals_transformers(
    model, prompt, num_beams, length_penalty, early_stopping
):
    check(
        model,
        prompt,
        options(
            DEFAULTS,
            eos_ids=EOS_IDS,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        ),
    )


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("min_tokens", "max_tokens"), [(0, 1), (1, 1), (1, 2), (4, 9), (9, 9), (0, 30)]
)
def test_generate_lengths_equal_transformers(model, prompt, num_beams, min_tokens, max_tokens):
    got = check(
        model,
        prompt,
        options(
            DEFAULTS,
            eos_ids=EOS_IDS,
            num_beams=num_beams,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
        ),
    )
    assert all(min_tokens <= len(ids) <= max_tokens for ids in got)


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("penalty", [0.7, 1.1, 1.5, 3.0])
def test_generate_repetition_penalty_equals_transformers(model, prompt, num_beams, penalty):
    given = options(
        DEFAULTS, num_beams=num_beams, repetition_penalty=penalty, eos_ids=EOS_IDS, min_tokens=3
    )
    got = check(model, prompt, given)
    plain = generate(Opt(model), Opt(model).embed, prompt, options(given, repetition_penalty=1.0))
    assert got != plain


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_generate_without_repeated_runs_equals_transformers(model, prompt, num_beams, size):
    """Each row without its padding: transformers counts that among the runs."""
    given = options(
        DEFAULTS, num_beams=num_beams, no_repeat_ngram_size=size, eos_ids=EOS_IDS, min_tokens=3
    )
    got = []
    for row, mask in enumerate(prompt.attention_mask):
        part = np.s_[row : row + 1, int((mask == 0).sum()) :]
        alone = Prompt(prompt.embeds[part], prompt.attention_mask[part], prompt.history[part])
        got += check(model, alone, given)
    assert generate(Opt(model), Opt(model).embed, prompt, given) == got
    plain = generate(Opt(model), Opt(model).embed, prompt, options(given, no_repeat_ngram_size=0))
    assert got != plain or size == 3


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_generate_forced_end_equals_transformers(model, prompt, num_beams, early_stopping):
    given = options(
        DEFAULTS,
        num_beams=num_beams,
        early_stopping=early_stopping,
        forced_eos_id=EOS_IDS[0],
        eos_ids=EOS_IDS,
        max_tokens=6,
    )
    assert max(map(len, check(model, prompt, given))) == 5


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_length_counts_new_tokens_with_or_without_prompt_ids(model, prompt, num_beams):
    given = options(DEFAULTS, num_beams=num_beams, length_penalty=2.0 * (num_beams > 1))
    decoder = Opt(model)
    got = generate(decoder, decoder.embed, prompt, given)
    assert got == reference(model, prompt, given, with_ids=True)
    assert got == reference(model, prompt, given, with_ids=False)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_generate_row_does_not_hang_on_its_batch(model, prompt, num_beams):
    given = options(DEFAULTS, eos_ids=EOS_IDS, num_beams=num_beams)
    decoder = Opt(model)
    together = generate(decoder, decoder.embed, prompt, given)
    assert len({len(ids) for ids in together}) > 1
    alone = [
        generate(decoder, decoder.embed, rows_of(prompt, slice(i, i + 1)), given)[0]
        for i in range(4)
    ]
    assert together == alone


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_feeds_positions_where_declared(model, prompt, num_beams):
    given = options(DEFAULTS, eos_ids=EOS_IDS, num_beams=num_beams)
    decoder = Opt(model, positions=True)
    assert generate(decoder, decoder.embed, prompt, given) == reference(model, prompt, given)


def test_generate_runs_the_prompt_once_an_image_and_drops_rows_that_are_done(model, prompt):
    decoder = Opt(model)
    generate(decoder, decoder.embed, prompt, options(DEFAULTS, num_beams=3, eos_ids=EOS_IDS))
    assert decoder.rows[:2] == [4, 12]
    assert decoder.rows == sorted(decoder.rows[:1]) + sorted(decoder.rows[1:], reverse=True)
    assert decoder.rows[-1] < 12
    decoder = Opt(model)
    got = generate(decoder, decoder.embed, prompt, options(DEFAULTS, eos_ids=EOS_IDS))
    assert decoder.rows[0] == 4 and decoder.rows[-1] < 4
    assert len(decoder.rows) == min(14, max(len(ids) for ids in got) + 1)


def test_generate_with_less_vocabulary_than_candidates_keeps_what_there_is():
    class Coin(CheckedGraph):
        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            logits = np.zeros((*feeds["inputs_embeds"].shape[:2], 3), np.float32)
            return {"logits": logits + np.array([0.0, 1.0, 0.5], np.float32)}

    inputs = (
        TensorSpec("inputs_embeds", "float32", ("batch", "tokens", 1)),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
    )
    logits = TensorSpec("logits", "float32", ("batch", "tokens", 3))
    coin = Coin(Component("decoder", inputs, (logits,)))
    ids = np.zeros((2, 1), np.int64)
    prompt = Prompt(np.zeros((2, 1, 1), np.float32), ids + 1, ids)
    given = options(DEFAULTS, eos_ids=(0,), num_beams=5, max_tokens=3)
    assert generate(coin, lambda ids: np.zeros((len(ids), 1), np.float32), prompt, given) == [
        [1, 1, 1],
        [1, 1, 1],
    ]


def test_generate_sampling_repeats_with_its_seed_and_varies_without(model, prompt):
    given = options(DEFAULTS, temperature=3.0, top_k=50, top_p=0.95)
    decoder = Opt(model)
    first, again, other, free, freer = (
        generate(decoder, decoder.embed, prompt, given, seed) for seed in (5, 5, 6, None, None)
    )
    assert first == again
    assert len({str(text) for text in (first, other, free, freer)}) == 4


def test_generate_sampling_with_top_1_is_greedy(model, prompt):
    given = options(DEFAULTS, eos_ids=EOS_IDS, top_k=1)
    assert given.do_sample
    decoder = Opt(model)
    got = generate(decoder, decoder.embed, prompt, given, seed=1)
    assert got == reference(model, prompt, options(given, do_sample=False))


def test_generate_samples_first_token_as_often_as_transformers(model, prompt):
    given = options(DEFAULTS, eos_ids=(), top_k=6, temperature=4.0, max_tokens=1)
    one = rows_of(prompt, slice(0, 1))
    many = Prompt(
        *(np.repeat(part, 4000, 0) for part in (one.embeds, one.attention_mask, one.history))
    )
    decoder = Opt(model)
    torch.manual_seed(0)
    ours, theirs = (
        np.bincount([ids[0] for ids in texts], minlength=VOCABULARY) / 4000
        for texts in (
            generate(decoder, decoder.embed, many, given, seed=0),
            reference(model, many, given),
        )
    )
    assert np.count_nonzero(ours) == np.count_nonzero(theirs) == 6
    # the standard deviation of a difference is at most sqrt(2 * 0.25 / 4000) = 0.011
    assert np.abs(ours - theirs).max() < 0.045


@pytest.mark.parametrize("given", [{}, {"repetition_penalty": 1.3}, {"temperature": 2.0}])
def test_stream_yields_what_generate_returns(model, prompt, given):
    asked = options(DEFAULTS, eos_ids=EOS_IDS, **given)
    decoder = Opt(model)
    together = generate(decoder, decoder.embed, prompt, asked, seed=3)
    streamed = list(stream(decoder, decoder.embed, rows_of(prompt, slice(0, 1)), asked, seed=3))
    assert streamed == together[0]
    assert all(type(token) is int for token in streamed)


def test_stream_yields_before_the_end(model, prompt):
    decoder = Opt(model)
    ids = stream(decoder, decoder.embed, rows_of(prompt, slice(0, 1)), DEFAULTS)
    next(ids)
    assert len(decoder.rows) == 1


def test_stream_refuses_beams(model, prompt):
    with pytest.raises(InputError, match="num_beams is 2: it must be 1 to stream"):
        stream(Opt(model), Opt(model).embed, prompt, options(DEFAULTS, num_beams=2))


def test_stream_refuses_several_rows(model, prompt):
    with pytest.raises(InputError, match="prompt: it has 4 rows: give 1 to stream"):
        stream(Opt(model), Opt(model).embed, prompt, DEFAULTS)


def test_generate_refuses_negative_seed(model, prompt):
    with pytest.raises(InputError, match="seed is -1: it must be at least 0"):
        generate(Opt(model), Opt(model).embed, prompt, DEFAULTS, seed=-1)


def test_prompt_refuses_history_of_another_shape(prompt):
    with pytest.raises(InputError, match=r"history is \[4, 10\]: it must be .* \[4, 11\]"):
        Prompt(prompt.embeds, prompt.attention_mask, prompt.history[:, 1:])


def test_prompt_refuses_no_tokens(prompt):
    with pytest.raises(InputError, match=r"attention_mask is \[4, 0\]: .* none of them 0"):
        Prompt(prompt.embeds[:, :0], prompt.attention_mask[:, :0], prompt.history[:, :0])


def test_prompt_refuses_padding_on_the_right(prompt):
    with pytest.raises(InputError, match="row 1 ends in padding: pad on the left"):
        Prompt(prompt.embeds[:, ::-1], prompt.attention_mask[:, ::-1], prompt.history[:, ::-1])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_refuses_logits_that_are_nan(model, prompt, num_beams):
    class Broken(Opt):
        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            outputs = super().infer(feeds)
            if len(self.rows) == 3:
                outputs["logits"][-1, -1, 7] = np.nan
            return outputs

    with pytest.raises(VlmEdgeError, match="decoder: logits of new token 3 are nan or inf"):
        generate(Broken(model), Opt(model).embed, prompt, options(DEFAULTS, num_beams=num_beams))
