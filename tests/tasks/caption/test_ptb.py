"""Captions become the words of the official COCO evaluation: as recorded from its Java tokenizer, and run beside it."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from crossflow.tasks.caption.ptb import scan, tokenize

# (caption, what PTBTokenizer 3.4.1 makes of it as pycocoevalcap calls it)
RECORDED = [
    (
        "A man's dog isn't here, can't go; won't don't cannot gonna wanna gotta lemme gimme.",
        "a man 's dog is n't here ca n't go wo n't do n't can not gon na wan na got ta lem me gim me",
    ),
    (
        "\"Hello,\" he said. 'single quoted' words' James' ``x'' “smart” ‘quotes’ isn’t it’s",
        "hello he said single quoted words james x smart quotes is n't it 's",
    ),
    (
        "(a man) [x] {y} <z> a/b and/or w/o 50/50 1/2 ½ 1½ a* b** ***",
        "-lrb- a man -rrb- -lsb- x -rsb- -lcb- y -rcb- <z> a/b and/or w/o 50/50 1/2 1/2 1 1/2 a * b ** ***",
    ),
    (
        "$5 £5 €5 50¢ 5% #1 #hash @user a@b.com http://www.foo.com/x?y=1 www.foo.com image.jpg",
        "$ 5 # 5 $ 5 50 cents 5 % # 1 #hash @user a@b.com http://www.foo.com/x?y=1 www.foo.com image.jpg",
    ),
    (
        "U.S. U.S.A. Mr. Smith Dr. Jones St. Mary's Inc. etc. No. 5 vs. the e.g. i.e. a.m. p.m. J.K. Rowling",
        "u.s. u.s.a. mr. smith dr. jones st. mary 's inc. etc. no. 5 vs. the e.g. i.e. a.m. p.m. j.k. rowling",
    ),
    (
        "5:30 10,000 3.5 -5 +5 1-2 (555) 555-1234 2011-10-12 10/12/2011 90's '90s 1990s 1 1/2 5'10\"",
        "5:30 10,000 3.5 -5 +5 1-2 -lrb-555-rrb-\xa0555-1234 2011-10-12 10/12/2011 90 's '90s 1990s 1\xa01/2 5 10",
    ),
    (
        "black-and-white t-shirt -- - --- ---- ----- ... .. .... a-b - c–d c—d 1-year-old 3.5-inch U.S.-based non-U.S.",
        "black-and-white t-shirt ----- a-b c d c d 1-year-old 3.5-inch u.s.-based non-u.s.",
    ),
    (
        "he'll they're we've I'd I'm y'all 'em 'n' rock'n'roll rock 'n' roll o'clock ma'am d'art",
        "he 'll they 're we 've i 'd i 'm y' all 'em 'n' rock 'n' roll rock 'n' roll o'clock ma'am d'art",
    ),
    (
        "!!! ?? ?! wow! what? AT&T R&B a&b &amp; &lt; c++ C# .net :) :( ;-) :D <3 = ^_^ -_- :P",
        "!!! ?? ?! wow what at&t r&b a & b & < c++ c# net :-rrb- :-lrb- ;--rrb- :d < 3 = ^_^ -_- :p",
    ),
    (
        "a_b __ foo_bar ~ ^ | \\ ` ' \" '' `` 😀 emoji ab😀cd 中文 हिन्दी مرحبا שלום café naïve © 25°C x² H₂O",
        "a_b __ foo_bar ~ ^ | \\ emoji ab cd 中文 हिन्दी مرحبا שלום café naïve © 25 ° c x ² h ₂ o",
    ),
    (
        "jack-o'-lantern four-o'clock O'Neil's qu'il 'tis 'twas 'cause 'bout dogs' boys'. the '70's somethin' goin'",
        "jack-o lantern four-o'clock o'neil 's qu'il 't is 't was 'cause bout dogs boys the 70 's somethin' goin",
    ),
    (
        "a man in a U. Miami shirt with vitamin a. The dog, p. 5, no. 7 and fig. x end.Then ok? no.Yes",
        "a man in a u. miami shirt with vitamin a the dog p. 5 no. 7 and fig x end.then ok no.yes",
    ),
    (
        'two dogs ( one brown , one white ) play ; they jump : " woof ! "',
        "two dogs -lrb- one brown one white -rrb- play they jump woof",
    ),
    (
        "a  b   c\td   e",
        "a b c d e",
    ),
    (
        "man's-best-friend's <b>bold</b> <br /> <!-- x --> &quot;hi&quot; caf&eacute; &nbsp; x",
        "man 's best-friend 's <b> bold </b> <br\xa0/> <!--\xa0x\xa0--> hi caf&eacute; x",
    ),
    (
        "t-shirt., dogs., 5., wow!a ok!! a!b hello.world 2nd 4x4 mp3 iPhone5 1e5 1.5m 5p.m. 12:30pm",
        "t-shirt. dogs. 5. wow!a ok !! a!b hello.world 2nd 4x4 mp3 iphone5 1e5 1.5 m 5p m. 12:30 pm",
    ),
]


@pytest.mark.parametrize(("caption", "expected"), RECORDED)
def test_words_are_those_of_the_official_tokenizer(caption, expected):
    assert tokenize(caption) == expected


def test_punctuation_is_dropped_but_brackets_stay():
    assert scan("A dog (brown), runs.") == ["a", "dog", "-lrb-", "brown", "-rrb-", ",", "runs", "."]
    assert tokenize("A dog (brown), runs.") == "a dog -lrb- brown -rrb- runs"


@pytest.mark.parametrize("caption", ["", " ", "\n", ".", "...", "\u200b", "😀", "\ud800", "\0", '"', "''"])
def test_captions_without_words_are_empty(caption):
    assert tokenize(caption) == ""


def test_line_breaks_and_exotic_spaces_separate():
    for space in ("\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\v", "\f", "\u200b", "😀"):
        assert tokenize(f"a red{space}cube") == "a red cube"


@pytest.mark.slow
def test_any_text_gives_words_without_spaces_inside():
    rng = random.Random(0)
    alphabet = "abzAZ059 '\"`.,;:!?-_/\\()[]{}<>&#@$%*+=~^|’“”–…é½£中ש😀\ud800\0\n\u00a0"
    for _ in range(2000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 25)))
        for token in scan(text):
            assert token
            assert " " not in token
            assert token == token.lower() or not token.isascii() or token.startswith("-")


@pytest.mark.parametrize(
    "part", ["a", "a.", "a,", "a-", "a'", "<a ", "<!", "a@", "1 ", "n't", "*.", "A&", "http://a", "(", "שלום "]
)
def test_long_captions_take_no_longer_than_their_length(part):
    import time

    start = time.perf_counter()
    tokenize(part * (10_000 // len(part)))
    assert time.perf_counter() - start < 5


def java_tokenize(lines):
    """The official tokenizer on captions without line breaks, in one process."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenized = PTBTokenizer().tokenize({index: [{"caption": line}] for index, line in enumerate(lines)})
    return [tokenized[index][0] for index in range(len(lines))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_every_flickr8k_caption_equals_java():
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    captions = [
        annotation["caption"].replace("\n", " ")
        for split in ("train", "val", "test", "rest")
        for annotation in json.loads((Path(root) / "data" / "flickr8k" / f"captions_{split}.json").read_text())[
            "annotations"
        ]
    ]
    assert len(captions) == 40455
    different = [c for c, java in zip(captions, java_tokenize(captions), strict=True) if tokenize(c) != java]
    assert different == []
