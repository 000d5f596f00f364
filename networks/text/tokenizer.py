"""A tokenizer made from the captions themselves, in transformers format, that encodes every string.

Text is composed (NFC), lower-cased, split at white space and punctuation. Known words are one token each, or the
pieces of a byte-pair encoding when there are more words than the vocabulary holds; everything else is spelled in UTF-8
bytes, so that no text is out of vocabulary. A sequence is `text <eos>`, padded with `<pad>`; `<bos>` and `<unk>`
exist but are never produced. B batch, N tokens.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.networks.frozen import load_public

if TYPE_CHECKING:
    from tokenizers import normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"  # marks the space before a word, so that decoding restores it
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + 1

# Tokenizers that have cut a text already: only the first cut is a warning.
_warned: "WeakSet[PreTrainedTokenizerBase]" = WeakSet()


def build_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 4096,
    max_length: int = 77,
    kind: Literal["auto", "word", "bpe"] = "auto",
) -> "PreTrainedTokenizerFast":
    """A transformers `PreTrainedTokenizerFast` for these captions; the same captions give the same tokenizer.

    vocab_size: maximum number of tokens, 261 of which are bytes and special tokens; max_length: tokens per text,
    `<eos>` included; kind: one token per word (the rarest are spelled), byte-pair pieces, or `auto`: words if all fit,
    otherwise pieces. Save it with `save_pretrained(folder)`. Raises UserError for a vocabulary or length that is too
    small, and for an unknown kind.

    >>> tokenizer = build_tokenizer(["a red cube", "a blue sphere"], vocab_size=300, max_length=6)
    >>> ids, mask = tokenize(tokenizer, ["a blue cube"])
    >>> mask.tolist()
    [[True, True, True, True, False, False]]
    >>> detokenize(tokenizer, ids)
    ['a blue cube']
    """
    if vocab_size <= SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size must exceed {SMALLEST_VOCABULARY}, the number of byte and special tokens, got {vocab_size}. "
            "Use at least 300."
        )
    if kind not in ("auto", "word", "bpe"):
        raise UserError(f"The kind of a tokenizer must be auto, word or bpe, got {kind!r}.")
    if max_length < 2:
        raise UserError(f"max_length must be at least 2, for a word and <eos>, got {max_length}.")
    normalizer, splitter = _normalizer(), _splitter()
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(_encodable(caption))))
    counts.pop(SPACE, None)
    room = vocab_size - SMALLEST_VOCABULARY
    if kind == "word" or (kind == "auto" and len(counts) <= room):
        words = sorted(counts, key=lambda word: (-counts[word], word))[:room]
        return _assemble(words, [], max_length)
    return _assemble(*_learn_pieces(counts, room), max_length)


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in `folder`. Raises UserError when its files are missing or damaged."""
    from transformers import PreTrainedTokenizerFast

    files = "tokenizer.json and tokenizer_config.json"
    return load_public(PreTrainedTokenizerFast.from_pretrained, str(Path(folder).resolve()), files=files)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Texts -> ids (B, N) int64 and mask (B, N) bool, True = token; N = max_length (default: the tokenizer's own).

    A longer text loses its end, which is logged. Every string is accepted, including the empty one.
    """
    length = max_length or tokenizer.model_max_length
    rows = tokenizer(
        [_encodable(text) for text in texts],
        truncation=True,
        padding="max_length",
        max_length=length,
        return_attention_mask=True,
    )
    num_cut = sum(bool(row.overflowing) for row in rows.encodings or ())
    if num_cut:
        level = logging.INFO if tokenizer in _warned else logging.WARNING
        logger.log(
            level, "%d of %d texts are longer than %d tokens; their ends are cut off.", num_cut, len(texts), length
        )
        _warned.add(tokenizer)
    ids = torch.tensor(rows["input_ids"], dtype=torch.int64).reshape(len(texts), length)
    return ids, torch.tensor(rows["attention_mask"], dtype=torch.bool).reshape(len(texts), length)


def unknown_words(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[str]:
    """The words of a text that the tokenizer spells in bytes because its captions never had them, in order.

    >>> unknown_words(build_tokenizer(["a red cube"]), "a red zebra")
    ['zebra']
    """
    words = _splitter().pre_tokenize_str(_normalizer().normalize_str(_encodable(text)))
    spelled = [word for word, _ in words if any(token in BYTE_TOKENS for token in tokenizer.tokenize(word))]
    return list(dict.fromkeys(word.strip(SPACE) for word in spelled if word.strip(SPACE)))


def detokenize(tokenizer: "PreTrainedTokenizerBase", ids: Tensor) -> list[str]:
    """Ids (B, N) -> texts up to the first `<eos>`, without special tokens and bytes that are not valid UTF-8."""
    texts = []
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end], skip_special_tokens=True).replace("�", "")
        texts.append(" ".join(text.split()))
    return texts


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot encode, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _normalizer() -> "normalizers.Normalizer":
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def _splitter() -> "pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )


def _learn_pieces(counts: Counter[str], room: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a byte-pair encoding of the counted words, at most `room` pieces."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    # Rare characters are spelled in bytes: an alphabet of thousands of them would fill a small vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=room, limit_alphabet=max(1, min(room // 4, 512)), show_progress=False)
    words = sorted(counts)
    tokenizer.train_from_iterator((word for word in words for _ in range(counts[word])), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [piece for piece in pieces if piece != SPACE], [(left, right) for left, right in model["merges"]]


def _assemble(pieces: list[str], merges: list[tuple[str, str]], max_length: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = SPECIAL_TOKENS
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE, *pieces))}
    # With ignore_merges a word in the vocabulary is one token; merges apply to the other words.
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unk, byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B:1 {eos}:1", special_tokens=[(eos, vocabulary[eos])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=max_length,
        padding_side="right",
        split_special_tokens=True,  # "<eos>" in a prompt is text, not the end
        clean_up_tokenization_spaces=False,
    )
