"""The tokenizer: every string encodes and decodes, and the captions alone determine it."""

import json
import logging
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossflow.core.errors import UserError
from crossflow.networks.text.tokenizer import (
    _count_words,
    _normalizer,
    _splitter,
    build_tokenizer,
    detokenize,
    encodable,
    load_tokenizer,
    tokenize,
)

CAPTIONS = [
    "A red cube, left of the blue sphere.",
    "a small green cone is behind the metal cylinder",
    "two shiny spheres (one yellow) in front of a cube!",
    "the cube is red; the sphere isn't.",
]
STRANGE = [
    "",
    "   \n\t ",
    "🦓🦒 emoji \U0001f468‍\U0001f469‍\U0001f467",
    "مرحبا بالعالم",
    "שלום עולם",
    "红色的立方体",
    "<pad> <eos> <0x41> ▁under",
    "nul\x00 and lone \ud800 surrogate",
    "x" * 10_000,
    "a red cube " * 1000,
]


def normalized(text):
    """`text` as the tokenizer sees it: valid UTF-8, composed, in lower case, with single spaces."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    return " ".join(text.lower().replace("▁", " ").split())


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS, vocab_size=400, max_length=24)


def test_known_captions_have_one_token_per_word_and_decode_cleanly(tokenizer):
    ids, mask = tokenize(tokenizer, CAPTIONS)
    assert ids.shape == mask.shape == (4, 24)
    assert mask.sum(1)[0] == 10 + 1  # eight words, comma, full stop, <eos>
    assert detokenize(tokenizer, ids) == [caption.lower() for caption in CAPTIONS]
    assert not (ids == tokenizer.unk_token_id).any()


@pytest.fixture(scope="module", params=["word", "bpe"])
def small_tokenizer(request):
    return build_tokenizer(CAPTIONS, vocab_size=300, max_length=64, kind=request.param)


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_strange_strings_encode(small_tokenizer, text):
    ids, mask = tokenize(small_tokenizer, [text])
    assert ids.shape == mask.shape == (1, 64)
    assert not (ids == small_tokenizer.unk_token_id).any()
    assert (ids == small_tokenizer.eos_token_id).sum() == 1
    expected, decoded = normalized(text), detokenize(small_tokenizer, ids)[0]
    assert expected.startswith(decoded)
    assert len(decoded) == len(expected) if len(expected) < 30 else len(decoded) > 30


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
# U+FFFD is what decoding drops: bytes that are not valid UTF-8.
@given(text=st.text(st.characters(exclude_characters="\ufffd"), max_size=15))
def test_any_string_decodes_to_itself_in_lower_case(small_tokenizer, text):
    ids, _ = tokenize(small_tokenizer, [text])
    assert detokenize(small_tokenizer, ids) == [normalized(text)]


def test_long_texts_are_cut_and_logged(caplog):
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=400, max_length=8)
    with caplog.at_level(logging.INFO):
        ids, mask = tokenize(tokenizer, ["a red cube " * 1000, "a cube"])
        tokenize(tokenizer, ["a red cube " * 1000])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "1 of 2 texts are longer than 8 tokens" in caplog.text
    assert mask.sum(1).tolist() == [8, 3]
    assert ids[0, -1] == tokenizer.eos_token_id


def test_special_marks_in_a_prompt_are_text(tokenizer):
    ids, _ = tokenize(tokenizer, ["a <eos> <pad>"])
    assert (ids[0] == tokenizer.eos_token_id).sum() == 1
    assert detokenize(tokenizer, ids) == ["a <eos> <pad>"]


def test_save_and_load_give_the_same_tokens(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [*CAPTIONS, *STRANGE]
    ids, mask = tokenize(tokenizer, texts)
    for again in (load_tokenizer(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        for tensor, expected in zip(tokenize(again, texts), (ids, mask), strict=True):
            assert torch.equal(tensor, expected)
    public = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(public) == len(tokenizer)
    valid = [text.encode("utf-8", "replace").decode() for text in texts]
    rows = public(valid, truncation=True, padding="max_length", return_attention_mask=True)
    assert rows["input_ids"] == ids.tolist()
    assert rows["attention_mask"] == mask.int().tolist()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_files_are_those_that_transformers_writes(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenize(tokenizer, CAPTIONS)  # leaves no trace in the files
    tokenizer.save_pretrained(tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        written, expected = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "theirs"))
        # Transformers adds that it loaded the tokenizer from a local folder.
        assert written.items() <= expected.items()
        assert expected.keys() - written.keys() <= {"is_local", "local_files_only"}


def test_a_tokenizer_of_another_make_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    with pytest.raises(UserError, match="<pad>"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_the_same_captions_give_the_same_tokenizer_in_another_process():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    captions = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    script = """
import json, sys
from crossflow.networks.text.tokenizer import build_tokenizer
captions = json.load(sys.stdin)
tokenizers = (build_tokenizer(captions, vocab_size=400, kind=kind) for kind in ("word", "bpe"))
print(json.dumps([tokenizer.get_vocab() for tokenizer in tokenizers]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(captions), capture_output=True, text=True, check=True
    )
    for kind, vocabulary in zip(("word", "bpe"), json.loads(result.stdout), strict=True):
        assert build_tokenizer(captions, vocab_size=400, kind=kind).get_vocab() == vocabulary
        assert len(vocabulary) <= 400


def test_words_are_counted_as_in_whole_captions():
    captions = [*CAPTIONS, *STRANGE, "a\tred\u00a0cube  ΟΔΟΣ ΟΔΟΣ, e \u0301e ▁x▁y ▁ z"]
    counts: Counter[str] = Counter()
    for caption in captions:
        text = _normalizer().normalize_str(encodable(caption))
        counts.update(word for word, _ in _splitter().pre_tokenize_str(text))
    counts.pop("▁", None)
    assert _count_words(captions) == counts


def test_auto_takes_pieces_when_words_do_not_fit():
    captions = [f"word{number} again" for number in range(300)]
    few, many = (build_tokenizer(captions, vocab_size=size, max_length=8) for size in (300, 800))
    assert len(tokenize(many, ["word7 again"])[0][0].nonzero()) == 3
    assert detokenize(few, tokenize(few, ["word7 again"])[0]) == ["word7 again"]
    with pytest.raises(UserError, match="must exceed 261"):
        build_tokenizer(captions, vocab_size=200)
    with pytest.raises(UserError, match="auto, word or bpe"):
        build_tokenizer(captions, kind="char")
