"""Caption scores are pycocoevalcap's own, odd captions do no harm, Java that is absent, broken or slow is a note."""

import json
import math
import os
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.data.item import Item
from crossflow.data.scenes import captions, make_scene
from crossflow.tasks.caption import metric as module
from crossflow.tasks.caption.metric import BLEU, CaptionMetric, best_single_caption
from crossflow.tasks.caption.ptb import tokenize

PAIRS = [
    ("a dog runs on the beach", ("A dog is running on the beach.", "A brown dog runs.", "the dog plays in the sand")),
    ("two men play soccer", ("Two men are playing soccer on a field.", "Men play football.")),
    ("a cat", ("A red car on a street.", "cars in the city", "street with a car")),
    ("a man rides a red bike down the street", ("A man rides a red bike down the street.",)),
    ("the the the the", ("The dog on the grass.", "a dog lies on the grass")),
]


def filled(pairs=PAIRS, **options):
    metric = CaptionMetric(**options)
    for index, (caption, references) in enumerate(pairs):
        metric.add(f"item{index}", caption, references)
    return metric


def official(pairs):
    """The scores as COCOEvalCap computes them, on our words."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {i: [tokenize(text) for text in references] for i, (_, references) in enumerate(pairs)}
    tokenized = {i: [tokenize(caption)] for i, (caption, _) in enumerate(pairs)}
    bleu, bleus = Bleu(4).compute_score(truth, tokenized, verbose=0)
    rouge, rouges = Rouge().compute_score(truth, tokenized)
    cider, ciders = Cider().compute_score(truth, tokenized)
    corpus = {**dict(zip(BLEU, bleu, strict=True)), "ROUGE-L": rouge, "CIDEr": cider}
    return corpus, {**dict(zip(BLEU, bleus, strict=True)), "ROUGE-L": rouges, "CIDEr": ciders}


def test_scores_are_those_of_pycocoevalcap(capfd):
    corpus, per_item = official(PAIRS)
    metric = filled()
    result = metric.compute()
    assert result == pytest.approx({**corpus, "num_items": 5}, abs=1e-12)
    for name, values in per_item.items():
        assert [row[name] for row in metric.rows] == pytest.approx(list(values), abs=1e-12), name
    assert metric.notes == []
    assert capfd.readouterr() == ("", "")


def test_known_values():
    metric = filled([("a b c d", ("a b c d",)), ("x", ("e f g h",))])
    result = metric.compute()
    assert metric.rows[0]["BLEU-4"] == pytest.approx(1)
    assert metric.rows[0]["ROUGE-L"] == pytest.approx(1)
    assert metric.rows[0]["CIDEr"] == pytest.approx(10)
    assert metric.rows[1]["CIDEr"] == 0
    assert result["BLEU-1"] == pytest.approx(4 / 5 * math.exp(1 - 8 / 5))
    assert result["CIDEr"] == pytest.approx(5)


def test_rows_gathered_from_processes_give_the_same_scores():
    first, second = filled(PAIRS[:2]), CaptionMetric()
    for index, (caption, references) in enumerate(PAIRS[2:], start=2):
        second.add(f"item{index}", caption, references)
    first.extend(json.loads(json.dumps(second.rows, allow_nan=False)))
    assert first.compute() == filled().compute()
    json.dumps(first.rows, allow_nan=False)


HARD = [
    "",
    "x " * 5000,
    "a" * 10_000,
    "😀👩‍👩‍👧",
    "مرحبا بالعالم",
    "שלום",
    "\ud800",
    "\0\n\r\x85\u2028",
    "|||",
    "EVAL ||| 1",
    "...",
]


def test_odd_captions_and_references_do_no_harm():
    pairs = [(hard, ("a dog on the beach", HARD[index - 1])) for index, hard in enumerate(HARD)]
    metric = filled([*PAIRS, *pairs])
    result = metric.compute()
    assert all(math.isfinite(value) and value >= 0 for value in result.values())
    empty = next(row for row in metric.rows if row["caption"] == "")
    assert [empty[name] for name in (*BLEU, "ROUGE-L", "CIDEr")] == [0] * 6
    json.dumps(metric.rows).encode()


def test_references_without_a_word_score_zero():
    result = filled([("a dog", ("...", "😀")), ("", ("",))]).compute()
    assert all(result[name] == pytest.approx(0, abs=1e-5) for name in ("BLEU-4", "ROUGE-L", "CIDEr"))


@pytest.mark.parametrize("truth", [(), [], "a dog", None, (1, 2)])
def test_truth_must_be_captions(truth):
    with pytest.raises((ValueError, TypeError), match=r"item 'x'|caption"):
        CaptionMetric().add("x", "a dog", truth)


def test_single_item_is_noted_because_its_cider_is_zero():
    metric = filled(PAIRS[:1])
    assert metric.compute()["CIDEr"] == 0
    assert "single item" in metric.notes[0]


def test_intervals_hold_the_value_and_bleu_is_counted_anew():
    metric = filled(PAIRS * 1)
    assert set(metric.intervals()) == {"ROUGE-L"}
    result = metric.compute()
    intervals = metric.intervals(num_resamples=300)
    assert set(intervals) == {*BLEU, "ROUGE-L", "CIDEr"}
    for name, (low, high) in intervals.items():
        assert low <= result[name] <= high
    assert intervals == metric.intervals(num_resamples=300)


def test_objects_are_scored_when_the_truth_is_a_scene():
    metric = CaptionMetric()
    for seed in range(3):
        scene = make_scene(seed)
        item = Item(f"scene{seed}", captions=captions(scene), scene=scene)
        metric.add(item.id, captions(scene)[3], item)
    metric.add("wrong", "nothing of the kind", item)
    assert [row["object_f1"] for row in metric.rows] == [1, 1, 1, 0]
    assert metric.compute()["object_f1"] == 0.75
    assert "object_f1" in metric.intervals()


def test_best_single_caption_has_the_highest_cider():
    from pycocoevalcap.cider.cider import Cider

    references = [list(texts) for _, texts in PAIRS]
    candidates = [text for texts in references for text in texts] + ["zebra", "", "a dog runs on the red street ."]
    truth = {i: [tokenize(text) for text in texts] for i, texts in enumerate(references)}
    scorer = module._CiderWeights(list(truth.values()))
    values = [Cider().compute_score(truth, {i: [tokenize(text)] for i in truth})[0] for text in candidates]
    assert [scorer.mean(tokenize(text)) for text in candidates] == pytest.approx(values, abs=1e-12)
    assert best_single_caption(candidates, references) == candidates[int(np.argmax(values))]
    with pytest.raises(UserError):
        best_single_caption([], references)


# ------------------------------------------------------------------------------------------------------------ Java


def fake_java(folder, script):
    """A `java` command that runs a shell script."""
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def spice_files(monkeypatch):
    """As if SPICE's parser had been downloaded."""
    monkeypatch.setattr(module, "_require_java", lambda part, *files: Path(module.__file__).parent)


def test_no_java_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    metric = filled(java=("METEOR", "SPICE"))
    assert "METEOR" not in metric.compute()
    assert [note.split(":")[0] for note in metric.notes] == ["METEOR is left out", "SPICE is left out"]
    assert all("no Java" in note for note in metric.notes)


def test_missing_parser_of_spice_is_a_note_and_starts_no_download(monkeypatch, tmp_path):
    fake_java(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = Path(module.importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0]) / "spice" / "lib"
    if (folder / "stanford-corenlp-3.6.0.jar").exists():
        pytest.skip("SPICE's parser is there")
    metric = filled(java=("SPICE",))
    metric.compute()
    assert "stanford-corenlp-3.6.0.jar" in metric.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 1", "Java failed"), ("exec echo nonsense", "Java failed"), ("exec sleep 30", "longer than 1 seconds")],
)
def test_broken_or_slow_meteor_is_a_note_in_time(monkeypatch, tmp_path, capfd, script, reason):
    fake_java(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    metric = filled(java=("METEOR",), java_seconds=1)
    start = time.monotonic()
    result = metric.compute()
    assert time.monotonic() - start < 8
    assert "METEOR" not in result
    assert reason in metric.notes[0]
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no memory >&2; exit 3", "no memory"),
        ("exec sleep 30", "longer than 1 seconds"),
        ("exit 0", "Java failed"),
    ],
)
@pytest.mark.usefixtures("spice_files")
def test_broken_or_slow_spice_is_a_note_in_time(monkeypatch, tmp_path, script, reason):
    fake_java(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    metric = filled(java=("SPICE",), java_seconds=1)
    metric.compute()
    assert reason in metric.notes[0]


@pytest.mark.usefixtures("spice_files")
def test_spice_is_read_per_item_and_averaged(monkeypatch, tmp_path):
    values = [0.5, None, 0.25, 1.0, 0.25]
    output = [{"image_id": i, "scores": {"All": {"f": value}}} for i, value in enumerate(values)]
    (tmp_path / "answer.json").write_text(json.dumps(output[::-1]))
    fake_java(tmp_path, f'while [ "$1" != "-out" ]; do shift; done; cp {tmp_path}/answer.json "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    metric = filled(java=("SPICE",))
    assert metric.compute()["SPICE"] == pytest.approx(0.5)
    assert [row["SPICE"] for row in metric.rows] == values


def test_unknown_java_metric_is_a_user_error():
    with pytest.raises(UserError, match="METEOR"):
        CaptionMetric(java=("METEROR",))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_flickr8k_scores_equal_the_official_tools_from_end_to_end():
    """One human caption against the other four: with Java's words the numbers are the same."""
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    by_image = {}
    annotations = json.loads((Path(root) / "data" / "flickr8k" / "captions_val.json").read_text())["annotations"]
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
    pairs = [(texts[0], tuple(texts[1:])) for texts in list(by_image.values())[:100]]
    metric = filled(pairs, java=("METEOR",))
    result = metric.compute()
    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, (_, texts) in enumerate(pairs)})
    tokenized = tokenizer.tokenize({i: [{"caption": caption}] for i, (caption, _) in enumerate(pairs)})
    assert result["CIDEr"] == pytest.approx(Cider().compute_score(truth, tokenized)[0], abs=1e-12)
    assert 0.2 < result["METEOR"] < 0.3
    assert all(0 <= row["METEOR"] <= 1 for row in metric.rows)
    assert metric.notes == []
