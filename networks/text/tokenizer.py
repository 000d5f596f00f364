"""A tokenizer made from the captions themselves, in transformers format, that encodes every string.

Text is composed (NFC), lower-cased, split at white space and punctuation. Known words are one token each, or the
pieces of a byte-pair encoding when there are more words than the vocabulary holds; what is left is spelled in UTF-8
bytes, so that no text is out of vocabulary. A sequence is `text <eos>`, padded with `<pad>`; `<bos>` and `<unk>`
exist but are not produced. B batch, N tokens.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.networks.frozen import load_public

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"  # stands for the space before a word, so that decoding puts spaces where they were
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + 1

_cut_before: WeakSet[Any] = (
    WeakSet()
)  # tokenizers that have cut a text already, so that only the first cut is a warning


def build_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 4096,
    max_length: int = 77,
    kind: Literal["auto", "word", "bpe"] = "auto",
) -> Any:
    """A transformers `PreTrainedTokenizerFast` for these captions; the same captions give the same tokenizer.

    vocab_size: at most so many tokens, 261 of which are bytes and marks; max_length: tokens per text, `<eos>` included;
    kind: one token per word (the rarest are spelled), byte-pair pieces, or `auto`: words if all fit, else pieces.
    Save it with `save_pretrained(folder)`. Raises UserError on a vocabulary too small or unknown kind.
    """
    if vocab_size <= SMALLEST_VOCABULARY:
        raise UserError(
            f"A vocabulary of {vocab_size} tokens has no room for words: bytes and marks take {SMALLEST_VOCABULARY}. "
            "Give at least 300."
        )
    if kind not in ("auto", "word", "bpe"):
        raise UserError(f"The tokenizer kind {kind!r} is unknown; there are auto, word and bpe.")
    if max_length < 2:
        raise UserError(f"max_length = {max_length} leaves no room for a word and <eos>; give at least 2.")
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


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in `folder`; raises UserError when there is none."""
    from transformers import PreTrainedTokenizerFast

    files = "tokenizer.json and tokenizer_config.json"
    return load_public(PreTrainedTokenizerFast.from_pretrained, str(Path(folder).resolve()), files=files)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts -> ids (B, N) int64 and mask (B, N) bool, True = token; N = max_length (default: the tokenizer's own).

    A longer text is cut at its end, and a note is logged. Every string is accepted, also the empty one.
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
        level = logging.INFO if tokenizer in _cut_before else logging.WARNING
        logger.log(
            level, "%d of %d texts are longer than %d tokens; their ends are cut off.", num_cut, len(texts), length
        )
        _cut_before.add(tokenizer)
    ids = torch.tensor(rows["input_ids"], dtype=torch.int64).reshape(len(texts), length)
    return ids, torch.tensor(rows["attention_mask"], dtype=torch.bool).reshape(len(texts), length)


def detokenize(tokenizer: Any, ids: Tensor) -> list[str]:
    """Ids (B, N) -> texts up to the first `<eos>`, without marks; bytes that are no UTF-8 are left out."""
    texts = []
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end], skip_special_tokens=True).replace("�", "")
        texts.append(" ".join(text.split()))
    return texts


def _encodable(text: str) -> str:
    """`text` with lone surrogates (which no UTF-8 encoder takes) replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _normalizer() -> Any:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def _splitter() -> Any:
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
    # Rare characters are left to the bytes: an alphabet of thousands of them would fill a small vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=room, limit_alphabet=max(1, min(room // 4, 512)), show_progress=False)
    words = sorted(counts)
    tokenizer.train_from_iterator((word for word in words for _ in range(counts[word])), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [piece for piece in pieces if piece != SPACE], [(left, right) for left, right in model["merges"]]


def _assemble(pieces: list[str], merges: list[tuple[str, str]], max_length: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = SPECIAL_TOKENS
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE, *pieces))}
    # With ignore_merges a word that is in the vocabulary is one token; merges serve those that are not.
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
        split_special_tokens=True,  # a prompt that contains "<eos>" is text, not the end
        clean_up_tokenization_spaces=False,
    )
