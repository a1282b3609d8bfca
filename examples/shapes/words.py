"""The tokenizers of the tiny checkpoints: byte-level BPE, so any text at all encodes."""

from __future__ import annotations

import json
import string
from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

# The pattern by which CLIP splits text before BPE (Radford et al. 2021).
_CLIP_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
CLIP_CONTEXT = 32


def clip_tokenizer(texts: list[str], merges_count: int = 160) -> CLIPTokenizer:
    """Learn merges from `texts` and put them in CLIP's own tokenizer class.

    CLIP's alphabet is every byte twice, within a word and at its end: nothing is ever unknown.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=2 * len(alphabet) + merges_count,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_CONTEXT)


def opt_tokenizer(texts: list[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A tokenizer laid out as OPT's: <s> 0, <pad> 1, </s> 2 in front of every text.

    The last id is <image>, the placeholder that BLIP-2 replaces by its queries.
    """
    return _byte_tokenizer(texts, vocab_size, "</s>", 2)


def llama_tokenizer(texts: list[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A tokenizer laid out as Vicuna's: <s> in front of a text, </s> after a reply.

    The last id is <image>, the placeholder that LLaVA replaces by its patches.
    """
    return _byte_tokenizer(texts, vocab_size, "<s>", 0)


def _byte_tokenizer(
    texts: list[str], vocab_size: int, first: str, first_id: int
) -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, first_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
    )


def bert_tokenizer(texts: list[str]) -> BertTokenizer:
    """BERT's WordPiece over the words of `texts` and single characters, with BLIP's two ids.

    [DEC] starts what BLIP writes; [ENC] is there because BLIP has it.
    """
    counted = Counter(word for text in texts for word in text.replace("?", " ").lower().split())
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *string.punctuation]
    tokens += [f"##{letter}" for letter in letters]
    tokens += sorted(word for word in counted if len(word) > 1)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = BertTokenizer(vocab=vocab)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return tokenizer


__all__ = ["CLIP_CONTEXT", "bert_tokenizer", "clip_tokenizer", "llama_tokenizer", "opt_tokenizer"]
