"""Token ids and texts equal to transformers' tokenizers, built here, and every refusal."""

import json
import re

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from vlmedge.errors import BundleError, InputError
from vlmedge.run.inputs.text import Tokenizer
from vlmedge.spec import TextFrontEnd

CORPUS = [
    "a photo of a cat. a photo of two dogs, isn't it? it's raining!",
    "Question: what colour is the car? Answer: the car is red.",
    "a man 's hat and a woman ' s hat, they 've been there",
    "naïve café über 猫と犬 🐈🐕 Ωμέγα",
]
TEXTS = [
    "a photo of a cat",
    "A Photo  of\ta CAT .",
    "",
    " ",
    "  leading and trailing  ",
    "they 've said 'no' , isn 't it ? it ' s !",
    "🐈‍⬛ and 👩‍👩‍👧 with 🇪🇺",
    "猫と犬は友達です",
    "עברית العربية हिन्दी",
    "e\u0301 and é, ﬁ, \u200b, \x00, \x7f",
    "line\nbreak\r\n\ttab",
    "special </s> <|endoftext|> [SEP] </w>",
    "x" * 300,
    "\ufffd stands \ufffd\ufffd",
]


def front(**changes):
    fields = {"max_tokens": 2048, "pad_id": 1, "padding_side": "right"} | changes
    return TextFrontEnd(tokenizer="assets/tokenizer.json", **fields)


def opt():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def clip():
    backend = Backend(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = [*map(str.lower, CORPUS), *(chr(code) for code in range(33, 127))]
    backend.train_from_iterator(words, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    for letter in alphabet:
        vocab.setdefault(letter + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])


def bert():
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    backend.train_from_iterator(map(str.lower, CORPUS), trainer)
    return BertTokenizer(vocab=backend.get_vocab())


BUILDERS = {"opt": opt, "clip": clip, "bert": bert}


@pytest.fixture(scope="module", params=BUILDERS)
def pair(request, tmp_path_factory):
    """A tokenizer of transformers, and ours from the file that it saved."""
    theirs = BUILDERS[request.param]()
    theirs.save_pretrained(folder := tmp_path_factory.mktemp(request.param))
    return theirs, Tokenizer(folder / "tokenizer.json", front(pad_id=theirs.pad_token_id))


@pytest.fixture(scope="module")
def opt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("opt") / "tokenizer.json"
    opt().backend_tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(pair, text):
    theirs, ours = pair
    assert ours.ids(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_equals_transformers(pair, text):
    theirs, ours = pair
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.batch_decode([ids], skip_special_tokens=True)[0]
    assert ours.decode(np.array(ids)) == ours.decode(iter(ids))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole(pair, text):
    _, ours = pair
    pieces = list(ours.pieces(iter(ours.ids(text))))
    assert "".join(pieces) == ours.decode(ours.ids(text))
    assert all(pieces)


def test_pieces_join_for_random_ids(pair):
    theirs, ours = pair
    rng = np.random.default_rng(0)
    for length in rng.integers(0, 40, 200):
        ids = rng.integers(0, len(theirs), length)
        expected = theirs.batch_decode([ids.tolist()], skip_special_tokens=True)[0]
        assert ours.decode(ids) == expected
        assert "".join(ours.pieces(ids)) == expected


def test_pieces_hold_back_a_broken_character(opt_file):
    tokenizer = Tokenizer(opt_file, front())
    ids = tokenizer.ids("a 🦒 giraffe")
    pieces = list(tokenizer.pieces(ids))
    assert "".join(pieces) == "a 🦒 giraffe"
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert list(tokenizer.pieces(ids[:4])) == ["a", " ", "\ufffd"]  # the stream ends inside it


def test_pieces_come_while_ids_come(opt_file):
    tokenizer = Tokenizer(opt_file, front())
    seen = []

    def ids():
        for i in tokenizer.ids("the car is red"):
            seen.append(i)
            yield i

    next(tokenizer.pieces(ids()))
    assert len(seen) == 2  # bos and the first one


@pytest.mark.parametrize("clean_up", [False, True])
def test_pieces_join_where_a_decoder_cleans_up(tmp_path, clean_up):
    """An exporter can put transformers' clean_up_tokenization into tokenizer.json."""
    theirs = bert()
    theirs.clean_up_tokenization_spaces = clean_up
    if clean_up:
        swaps = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
        swaps += [(f" {tail}", tail) for tail in ("n't", "'m", "'s", "'ve", "'re")]
        theirs.backend_tokenizer.decoder = decoders.Sequence(
            [decoders.WordPiece(), decoders.Fuse(), *(decoders.Replace(*swap) for swap in swaps)]
        )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path / "tokenizer.json", front())
    ids = theirs("it ' s a cat ' s hat , isn't it ? ' ' they 've")["input_ids"]
    text = ours.decode(ids)
    assert text == theirs.batch_decode([ids], skip_special_tokens=True)[0]
    assert text.startswith("it's" if clean_up else "it ' s")
    assert "".join(ours.pieces(ids)) == text


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad_to", [None, 40])
def test_encode_pads_like_transformers(pair, tmp_path, padding_side, pad_to):
    theirs, _ = pair
    theirs.backend_tokenizer.save(str(tmp_path / "t.json"))
    fields = {"padding_side": padding_side, "pad_to": pad_to, "pad_id": theirs.pad_token_id}
    ours = Tokenizer(tmp_path / "t.json", front(**fields))
    texts = [text for text in TEXTS if len(text) < 15]
    expected = theirs(
        texts,
        padding="max_length" if pad_to else True,
        max_length=pad_to,
        padding_side=padding_side,
        return_tensors="np",
    )
    input_ids, attention_mask = ours.encode(texts)
    assert input_ids.dtype == attention_mask.dtype == np.int64
    np.testing.assert_array_equal(input_ids, expected["input_ids"])
    np.testing.assert_array_equal(attention_mask, expected["attention_mask"])


def test_tokenizer_ignores_the_files_own_padding_and_truncation(opt_file, tmp_path):
    backend = Backend.from_file(str(opt_file))
    backend.enable_padding(length=64)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "t.json"))
    text = "a photo of a cat"
    ids = Tokenizer(tmp_path / "t.json", front()).ids(text)
    assert ids == Tokenizer(opt_file, front()).ids(text)


def test_encode_fills_the_room_exactly(opt_file):
    ids = Tokenizer(opt_file, front()).ids("two dogs")
    tokenizer = Tokenizer(opt_file, front(max_tokens=len(ids) + 5))
    assert tokenizer.encode(["two dogs"], reserve=5)[0].tolist() == [ids]


@pytest.mark.parametrize(
    ("fields", "reserve", "room"),
    [
        ({"max_tokens": 77}, 0, 77),
        ({"max_tokens": 77}, 32, 45),
        ({"max_tokens": 77}, 99, 0),
        ({"max_tokens": 77, "pad_to": 20}, 0, 20),
    ],
)
def test_encode_refuses_a_text_without_room(opt_file, fields, reserve, room):
    tokenizer = Tokenizer(opt_file, front(**fields))
    beside = f" beside {reserve} new ones (max_tokens)" if reserve else ""
    message = f"^prompt of 91 tokens: the model has room for {room}{re.escape(beside)}$"
    with pytest.raises(InputError, match=message):
        tokenizer.encode(["a", "z" * 90], reserve=reserve)


def test_encode_refuses_no_texts(opt_file):
    with pytest.raises(InputError, match=r"^no texts: give at least one$"):
        Tokenizer(opt_file, front()).encode([])


def test_encode_refuses_one_text(opt_file):
    with pytest.raises(InputError, match=r"^texts is a single str: give a list of str$"):
        Tokenizer(opt_file, front()).encode("a cat")


def test_ids_refuse_a_lone_surrogate(opt_file):
    with pytest.raises(InputError, match=r"^text with a lone surrogate at character 2: give"):
        Tokenizer(opt_file, front()).ids("a \ud83d cat")


def test_ids_refuse_another_type(opt_file):
    with pytest.raises(InputError, match=r"^text of type bytes: give a str$"):
        Tokenizer(opt_file, front()).ids(b"a cat")


def test_tokenizer_refuses_a_missing_file(tmp_path):
    with pytest.raises(BundleError, match=r"^no tokenizer .*t.json: export the bundle again$"):
        Tokenizer(tmp_path / "t.json", front())


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_tokenizer_refuses_a_broken_file(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(BundleError, match=r"^tokenizer .*t.json cannot be read: ") as caught:
        Tokenizer(tmp_path / "t.json", front())
    assert "\n" not in str(caught.value)
