"""A tokenizer made from the captions themselves that encodes every string; its files are in transformers' format.

Text is composed (NFC), lower-cased, split at white space and punctuation. Known words are one token each, or the
pieces of a byte-pair encoding when there are more words than the vocabulary holds; everything else is spelled in UTF-8
bytes, so that no text is out of vocabulary. A sequence is `text <eos>`, padded with `<pad>`; `<bos>` and `<unk>`
exist but are never produced. B batch, N tokens.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.networks.frozen import load_public

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"  # marks the space before a word, so that decoding restores it
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + 1

# Tokenizers that have cut a text already: only the first cut is a warning.
_warned: "WeakSet[object]" = WeakSet()


class CaptionTokenizer:
    """Texts <-> ids by a `tokenizers.Tokenizer`, without the seconds that transformers takes to import.

        tokenizer = build_tokenizer(captions)
        tokenizer.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)  # the same ids, and so has load_tokenizer(folder)

    max_length: tokens per text where no other number is asked for.
    """

    def __init__(self, backend: "Tokenizer", max_length: int) -> None:
        self.backend, self.max_length = backend, max_length
        backend.encode_special_tokens = True  # "<eos>" in a prompt is text, not the end
        self.pad_token_id, self.bos_token_id, self.eos_token_id, self.unk_token_id = map(self._id, SPECIAL_TOKENS)

    def _id(self, token: str) -> int:
        number: int | None = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"The tokenizer has no token {token}, so it was not made by crossflow. Build it again.")
        return number

    def __reduce__(self) -> tuple[Callable[[str, int], "CaptionTokenizer"], tuple[str, int]]:
        return _from_json, (self.backend.to_str(), self.max_length)  # pickled, the backend would forget a setting

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        vocabulary: dict[str, int] = self.backend.get_vocab()
        return vocabulary

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.no_truncation()
        self.backend.no_padding()
        pad, bos, eos, unk = SPECIAL_TOKENS
        config = {
            "backend": "tokenizers",
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": self.max_length,
            "pad_token": pad,
            "padding_side": "right",
            "split_special_tokens": True,
            "tokenizer_class": "TokenizersBackend",
            "unk_token": unk,
        }
        write_atomically(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))
        write_atomically(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def build_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 4096,
    max_length: int = 77,
    kind: Literal["auto", "word", "bpe"] = "auto",
) -> CaptionTokenizer:
    """A tokenizer for these captions; the same captions give the same tokenizer.

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
    counts = _count_words(captions)
    room = vocab_size - SMALLEST_VOCABULARY
    if kind == "word" or (kind == "auto" and len(counts) <= room):
        words = sorted(counts, key=lambda word: (-counts[word], word))[:room]
        return _assemble(words, [], max_length)
    return _assemble(*_learn_pieces(counts, room), max_length)


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word of the normalised captions occurs, with the mark of the space before it."""
    normalizer, splitter = _normalizer(), _splitter()
    # No step of the normalisation looks across a space, so each piece between spaces is normalised once.
    pieces = Counter(piece for caption in captions for piece in caption.split(" "))
    counts: Counter[str] = Counter()
    for piece, number in pieces.items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(encodable(piece))):
            counts[word] += number
    counts.pop(SPACE, None)
    return counts


def load_tokenizer(folder: str | Path) -> CaptionTokenizer:
    """The tokenizer saved in `folder`. Raises UserError when its files are missing or damaged."""
    return load_public(_read, str(Path(folder).resolve()), files="tokenizer.json and tokenizer_config.json")


def _read(folder: str) -> CaptionTokenizer:
    content, config = (Path(folder, name).read_text("utf-8") for name in ("tokenizer.json", "tokenizer_config.json"))
    return _from_json(content, int(json.loads(config)["model_max_length"]))


def _from_json(content: str, max_length: int) -> CaptionTokenizer:
    from tokenizers import Tokenizer

    return CaptionTokenizer(Tokenizer.from_str(content), max_length)


def tokenize(tokenizer: CaptionTokenizer, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts -> ids (B, N) int64 and mask (B, N) bool, True = token; N = max_length (default: the tokenizer's own).

    A longer text loses its end, which is logged. Every string is accepted, including the empty one.
    """
    length = max_length or tokenizer.max_length
    tokenizer.backend.enable_truncation(length)
    tokenizer.backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=SPECIAL_TOKENS[0])
    rows = tokenizer.backend.encode_batch([encodable(text) for text in texts])
    report_cut(tokenizer, sum(bool(row.overflowing) for row in rows), len(texts), length)
    ids = torch.tensor([row.ids for row in rows], dtype=torch.int64).reshape(len(texts), length)
    return ids, torch.tensor([row.attention_mask for row in rows], dtype=torch.bool).reshape(len(texts), length)


def report_cut(tokenizer: object, num_cut: int, num_texts: int, length: int) -> None:
    """Logs that a tokenizer has cut texts at `length` tokens: as a warning the first time."""
    if num_cut:
        level = logging.INFO if tokenizer in _warned else logging.WARNING
        logger.log(
            level, "%d of %d texts are longer than %d tokens; their ends are cut off.", num_cut, num_texts, length
        )
        _warned.add(tokenizer)


def unknown_words(tokenizer: CaptionTokenizer, text: str) -> list[str]:
    """The words of a text that the tokenizer spells in bytes because its captions never had them, in order.

    >>> unknown_words(build_tokenizer(["a red cube"]), "a red zebra")
    ['zebra']
    """
    words = _splitter().pre_tokenize_str(_normalizer().normalize_str(encodable(text)))
    tokens = (tokenizer.backend.encode(word, add_special_tokens=False).tokens for word, _ in words)
    spelled = [
        word for (word, _), parts in zip(words, tokens, strict=True) if any(part in BYTE_TOKENS for part in parts)
    ]
    return list(dict.fromkeys(word.strip(SPACE) for word in spelled if word.strip(SPACE)))


def detokenize(tokenizer: CaptionTokenizer, ids: Tensor) -> list[str]:
    """Ids (B, N) -> texts up to the first `<eos>`, without special tokens and bytes that are not valid UTF-8."""
    texts = []
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.backend.decode(row[:end], skip_special_tokens=True).replace("�", "")
        texts.append(" ".join(text.split()))
    return texts


def encodable(text: str) -> str:
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


def _assemble(pieces: list[str], merges: list[tuple[str, str]], max_length: int) -> CaptionTokenizer:
    from tokenizers import Tokenizer, decoders, models, processors

    _, _, eos, unk = SPECIAL_TOKENS
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
    return CaptionTokenizer(tokenizer, max_length)
