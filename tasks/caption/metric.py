"""How near captions are to what people wrote: BLEU, ROUGE-L and CIDEr by pycocoevalcap, METEOR and SPICE where Java is.

The scorers are pycocoevalcap's own, on words from `ptb.tokenize`, so numbers compare with published ones; those are
usually printed times 100. BLEU is counted over the whole corpus, CIDEr weighs words by how rare they are among the
references of the items scored: both depend on the set, not on single items.

References: Papineni et al. 2002 (BLEU); Lin 2004 (ROUGE); Vedantam et al. 2015 (CIDEr, here CIDEr-D);
Denkowski and Lavie 2014 (METEOR 1.5); Anderson et al. 2016 (SPICE).
"""

import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.intervals import percentile_interval, resamples
from crossflow.core.metrics import Row, TaskMetric, mean_metric, run_metric
from crossflow.data.item import Item
from crossflow.data.scenes import object_f1, objects_of, parse_objects
from crossflow.tasks.caption.ptb import tokenize

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
JAVA_METRICS = ("METEOR", "SPICE")
JAVA_SECONDS = 900.0  # for 5,000 captions METEOR needs about two minutes, SPICE ten


class CaptionMetric(TaskMetric):
    """BLEU-1..4, ROUGE-L, CIDEr, where possible METEOR and SPICE, and object_f1 where the truth is a scene.

    A truth is the tuple of an item's reference captions, or anything with `captions` and perhaps a `scene` (a reader's
    item). Rows keep the texts. "CIDEr", "METEOR" and "SPICE" of a row are there after `compute`, as they need the
    whole set; the corpus values of BLEU and METEOR are not means of the rows.

    A caption without a word scores 0. A metric that cannot be computed is left out and `notes` says why.

    Args:
        java: which of METEOR and SPICE to try; none by default, because they start Java with 2 to 8 GB of memory and
            take from half a minute up. For a final evaluation: `JAVA_METRICS`.
        java_seconds: limit for each of them; past it Java is ended and the metric left out.
    """

    names = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE", "object_f1")

    def __init__(self, java: Sequence[str] = (), java_seconds: float = JAVA_SECONDS) -> None:
        super().__init__()
        for name in java:
            if name not in JAVA_METRICS:
                raise unknown_name("Java caption metric", name, JAVA_METRICS)
        self.java = tuple(java)
        self.java_seconds = java_seconds
        self._bleu_counts: np.ndarray | None = None  # (items, 10), for the bootstrap

    def score(self, output: str, truth: Sequence[str] | Item) -> Row:
        """The row of one caption: its text, the references, ROUGE-L, and object_f1 for a scene."""
        references = truth.captions if isinstance(truth, Item) else truth
        if isinstance(references, str) or not references:
            raise ValueError(f"the truth must hold at least one reference caption, got {references!r}")
        if not isinstance(output, str) or not all(isinstance(reference, str) for reference in references):
            raise ValueError("captions must be text")
        caption, references = _storable(output), [_storable(reference) for reference in references]
        words, reference_words = tokenize(caption), [tokenize(reference) for reference in references]
        row: Row = {"caption": caption, "references": references}
        counts = _bleu_counts([words], [reference_words])
        row |= dict(zip(BLEU, _bleu(counts[0]), strict=True))
        row["ROUGE-L"] = _rouge([words], [reference_words])[0]
        scene = getattr(truth, "scene", None)
        if scene is not None:
            row["object_f1"] = object_f1(parse_objects(caption), objects_of(scene))["f1"]
        return row

    def compute(self) -> dict[str, float]:
        """The scores of all captions; see the class. Raises UserError without any."""
        self._require_rows()
        self.notes = []
        captions = [tokenize(row["caption"]) for row in self.rows]
        references = [[tokenize(reference) for reference in row["references"]] for row in self.rows]
        result = _corpus_metric(captions, references)
        per_item = {"CIDEr": result.pop("CIDEr per item")}
        self._bleu_counts = _bleu_counts(captions, references)
        if len(self.rows) == 1:
            self.notes.append("CIDEr of a single item is 0 by its definition: no word is rarer than another")
        for name in self.java:
            try:
                run = meteor if name == "METEOR" else spice
                result[name], per_item[name] = run(captions, references, self.java_seconds)
            except JavaUnavailable as reason:
                self.notes.append(f"{name} is left out: {reason}")
        for name, values in per_item.items():
            for row, value in zip(self.rows, values, strict=True):
                row[name] = value
        with_objects = [row.get("object_f1") for row in self.rows]
        if any(value is not None for value in with_objects):
            result |= mean_metric({"object_f1": with_objects})
        return {name: result[name] for name in self.names if name in result} | {"num_items": float(len(self.rows))}

    def intervals(
        self, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals after `compute`: BLEU counted anew on what is drawn, CIDEr with its word weights kept.

        METEOR has none: its corpus value is not a function of the rows.
        """
        intervals = super().intervals(level=level, num_resamples=num_resamples, seed=seed)
        intervals.pop("METEOR", None)
        counts = self._bleu_counts
        if counts is None or len(counts) != len(self.rows) or len(counts) < 2:
            return {name: bounds for name, bounds in intervals.items() if name not in BLEU}
        chosen = (row for rows in resamples(len(counts), num_resamples, seed) for row in rows)
        drawn = [_bleu(counts[row].sum(axis=0)) for row in chosen]
        bleu = {n: percentile_interval([v[k] for v in drawn], level) for k, n in enumerate(BLEU)}
        return bleu | {name: bounds for name, bounds in intervals.items() if name not in BLEU}


def best_single_caption(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """The candidate with the highest mean CIDEr when every item gets it: what a model that ignores pictures can reach.

    Args:
        candidates: captions to choose from.
        references: the reference captions of each item, from the training split.
    """
    if not candidates or not references:
        raise UserError("A single best caption needs at least one candidate and one item with captions.")
    scorer = _CiderWeights([[tokenize(text) for text in texts] for texts in references])
    return max(candidates, key=lambda text: scorer.mean(tokenize(text)))


# ------------------------------------------------------------------------------------------- pycocoevalcap scorers


def _corpus_metric(captions: list[str], references: list[list[str]]) -> dict[str, Any]:
    """Corpus BLEU, ROUGE-L and CIDEr, and CIDEr of each item, by an `evaluate.Metric`; texts are words with spaces."""
    import datasets
    import evaluate

    class CaptionScores(evaluate.Metric):
        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="BLEU, ROUGE-L and CIDEr of captions.",
                citation="",
                inputs_description="Captions and lists of reference captions, as words with one space between them.",
                features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            )

        def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
            captions, texts = list(predictions), [list(group) for group in references]
            cider = _cider(captions, texts)
            rouge = _rouge(captions, texts)
            return {
                **dict(zip(BLEU, _bleu(_bleu_counts(captions, texts).sum(axis=0)), strict=True)),
                "ROUGE-L": math.fsum(rouge) / len(rouge),
                "CIDEr": math.fsum(cider) / len(cider),
                "CIDEr per item": cider,
            }

    return run_metric(CaptionScores, predictions=captions, references=references)


def _bleu_counts(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """What BLEU adds up, (items, 10): matches of 1..4 words, runs of 1..4 words, length, nearest reference length."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, texts in zip(captions, references, strict=True):
        scorer += (caption, texts)
    rows = []
    for item in scorer.ctest:
        nearest = scorer._single_reflen(item["reflen"], "closest", item["testlen"])
        rows.append([*item["correct"], *item["guess"], item["testlen"], nearest])
    return np.asarray(rows, dtype=np.float64)


def _bleu(counts: np.ndarray) -> list[float]:
    """BLEU-1..4 of summed counts (10,), with the small constants by which pycocoevalcap avoids dividing by zero."""
    correct, guess, (length, nearest) = counts[:4], counts[4:8], counts[8:]
    precision = np.cumprod((correct + 1e-15) / (guess + 1e-9)) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return [float(value) for value in precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)]


def _rouge(captions: list[str], references: list[list[str]]) -> list[float]:
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    # to the scorer two empty texts are equal
    return [float(scorer.calc_score([c], texts)) if c else 0.0 for c, texts in zip(captions, references, strict=True)]


def _cider(captions: list[str], references: list[list[str]]) -> list[float]:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not any(text for texts in references for text in texts):
        return [0.0] * len(captions)  # references without a single word match nothing
    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, texts in zip(captions, references, strict=True):
        scorer += (caption, texts)
    _, scores = scorer.compute_score()
    return [float(score) for score in scores]


class _CiderWeights:
    """CIDEr-D of many candidates against the same references, whose vectors are made once."""

    def __init__(self, references: list[list[str]]) -> None:
        from pycocoevalcap.cider.cider_scorer import cook_refs

        cooked = [cook_refs(texts) for texts in references]
        self.frequency: dict[tuple[str, ...], int] = {}
        for texts in cooked:
            for ngram in {ngram for text in texts for ngram in text}:
                self.frequency[ngram] = self.frequency.get(ngram, 0) + 1
        self.log_items = math.log(len(references))
        # ngram -> [(which reference, weight over its norm)], so that a candidate meets only references it shares with
        self.postings: dict[tuple[str, ...], list[tuple[int, float]]] = {}
        lengths: list[int] = []
        share: list[float] = []
        for texts in cooked:
            for text in texts:
                vector, norms = self._vector(text)
                for ngram, weight in vector.items():
                    self.postings.setdefault(ngram, []).append((len(lengths), weight / (norms[len(ngram) - 1] or 1.0)))
                lengths.append(_num_pairs(text))
                share.append(1 / (len(texts) * len(references)))
        self.norms = [self._vector(text)[1] for texts in cooked for text in texts]
        self.lengths, self.share = np.asarray(lengths, dtype=np.float64), np.asarray(share)

    def _vector(self, counts: dict[tuple[str, ...], int]) -> tuple[dict[tuple[str, ...], float], list[float]]:
        vector = {
            ngram: count * (self.log_items - math.log(max(1, self.frequency.get(ngram, 0))))
            for ngram, count in counts.items()
        }
        squares = [0.0] * 4
        for ngram, weight in vector.items():
            squares[len(ngram) - 1] += weight**2
        return vector, [math.sqrt(square) for square in squares]

    def mean(self, caption: str) -> float:
        """Mean over items of CIDEr-D when every item gets this caption."""
        from pycocoevalcap.cider.cider_scorer import precook

        counts = precook(caption)
        vector, norms = self._vector(counts)
        similarity = np.zeros(len(self.lengths))
        for ngram, weight in vector.items():
            order = len(ngram) - 1
            if norms[order] == 0:
                continue
            for reference, normed in self.postings.get(ngram, ()):
                clipped = min(weight, normed * (self.norms[reference][order] or 1.0))
                similarity[reference] += clipped * normed / norms[order]
        penalty = np.exp(-((_num_pairs(counts) - self.lengths) ** 2) / (2 * 6.0**2))
        return float(10 / 4 * (similarity * penalty * self.share).sum())


def _num_pairs(counts: dict[tuple[str, ...], int]) -> int:
    """CIDEr-D measures length in pairs of words."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


# ------------------------------------------------------------------------------------------------------------ Java


class JavaUnavailable(Exception):
    """Why a metric that needs Java could not be computed."""


def meteor(captions: list[str], references: list[list[str]], seconds: float) -> tuple[float, list[float]]:
    """METEOR 1.5 of a corpus and of each item, by pycocoevalcap's jar.

    Raises:
        JavaUnavailable: no Java, no jar, Java failed, or it took longer than `seconds`.
    """
    _require_java("meteor", "meteor-1.5.jar", "data/paraphrase-en.gz")
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    late = threading.Event()

    def stop() -> None:
        late.set()
        scorer.meteor_p.kill()

    watchdog = threading.Timer(seconds, stop)
    watchdog.daemon = True
    watchdog.start()
    # one word at least: the protocol takes an empty field for no field
    texts = {index: [text or "." for text in group] for index, group in enumerate(references)}
    try:
        value, values = scorer.compute_score(texts, {index: [text or "."] for index, text in enumerate(captions)})
    except (OSError, ValueError, AssertionError, LookupError) as error:  # a dead process: a broken pipe, or no number
        reason = f"it took longer than {seconds:g} seconds" if late.is_set() else f"Java failed: {error}"
        raise JavaUnavailable(reason) from error
    finally:
        watchdog.cancel()
        scorer.meteor_p.kill()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        scorer.meteor_p.wait()
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            pipe.close()
        if scorer.lock.locked():
            scorer.lock.release()  # it is left locked after an error, and the scorer's destructor waits for it
    return float(value), [float(item) if text else 0.0 for item, text in zip(values, captions, strict=True)]


def spice(captions: list[str], references: list[list[str]], seconds: float) -> tuple[float, list[float | None]]:
    """SPICE of a corpus and of each item, by pycocoevalcap's jar; its parser is a 400 MB download, never started here.

    Raises:
        JavaUnavailable: no Java, no jar or parser, Java failed, or it took longer than `seconds`.
    """
    folder = _require_java(
        "spice", "spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"
    )
    items = [
        {"image_id": index, "test": caption, "refs": texts}
        for index, (caption, texts) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="crossflow-spice-") as temporary:
        source, target, cache = (Path(temporary) / name for name in ("in.json", "out.json", "cache"))
        source.write_text(json.dumps(items), encoding="utf-8")
        cache.mkdir()
        command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", str(source), "-cache", str(cache), "-out", str(target)]
        try:
            subprocess.run(
                [*command, "-subset", "-silent"],
                cwd=folder,
                check=True,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )
            results = json.loads(target.read_text(encoding="utf-8"))
        except subprocess.TimeoutExpired as error:
            raise JavaUnavailable(f"it took longer than {seconds:g} seconds") from error
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise JavaUnavailable(f"Java failed: {lines[0]}") from error
        except (OSError, ValueError) as error:
            raise JavaUnavailable(f"Java failed: {error}") from error
    by_item = {item["image_id"]: item["scores"]["All"]["f"] for item in results}
    values = [None if by_item[index] is None else float(by_item[index]) for index in range(len(captions))]
    defined = [value for value in values if value is not None]
    if not defined:
        raise JavaUnavailable("it is not defined for any of these captions")
    return math.fsum(defined) / len(defined), values


def _require_java(part: str, *files: str) -> Path:
    """The folder of a part of pycocoevalcap, once Java and the files below that folder are there."""
    if shutil.which("java") is None:
        raise JavaUnavailable("there is no Java on this machine (a `java` command on the PATH)")
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise JavaUnavailable("pycocoevalcap is not installed")
    folder = Path(package.submodule_search_locations[0]) / part
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise JavaUnavailable(f"{' and '.join(missing)} missing in {folder}")
    return folder


def _storable(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
