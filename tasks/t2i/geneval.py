"""GenEval (Ghosh et al., NeurIPS 2023): does a picture show the objects, counts, colours and places it was asked for?

A prompt's metadata lists what must be there (`include`: class, count, perhaps a colour, perhaps a place relative to
another entry) and what must not (`exclude`). A detector finds objects, a colour namer names their colours. Boxes are
(left, top, right, bottom) in pixels.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.intervals import mean_share_interval, wilson_interval
from crossflow.core.metrics import Row, TaskMetric, mean_metric
from crossflow.data.annotations import json_lines

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MIN_SCORE, MIN_SCORE_TO_COUNT = 0.3, 0.9
MOST_OF_A_CLASS = 16
APART = 0.1  # of the sum of two boxes' sizes: nearer centres stand in no relation


@dataclass(frozen=True)
class DetectedObject:
    """A detected object: class name, score in [0, 1], box, and where it is, boolean (H, W) or None for all the box."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


Detect = Callable[[Sequence[np.ndarray]], list[list[DetectedObject]]]
"""Pictures uint8 (H, W, 3) -> the objects in each."""
NameColours = Callable[[np.ndarray, Sequence[DetectedObject]], list[str]]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """GenEval's evaluation_metadata.jsonl: one {"tag", "include", "exclude", "prompt"} in each line.

    Raises UserError that says what to put where, or names the line that is wrong.
    """
    if not path.is_file():
        raise UserError(
            f"There is no file {path}. Give --data with GenEval's evaluation_metadata.jsonl, which lies in the folder "
            "`prompts` of its repository (553 lines)."
        )
    prompts = []
    for number, line in json_lines(path):
        problem = line if isinstance(line, str) else _problem(line)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}.")
        assert isinstance(line, dict)
        prompts.append(line)
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def _problem(line: Mapping[str, Any]) -> str:
    if not isinstance(line.get("prompt"), str) or line.get("tag") not in TAGS:
        return f"a line needs a text `prompt` and a `tag` among {', '.join(TAGS)}"
    include = line.get("include")
    if not isinstance(include, list) or not include:
        return "`include` must list at least one object"
    for number, required in enumerate([*include, *line.get("exclude", [])]):
        if not isinstance(required, dict) or not isinstance(required.get("class"), str):
            return "each object needs a `class`"
        if not isinstance(required.get("count"), int) or required["count"] < 1:
            return f"the count of {required['class']} must be a whole number from 1"
        place = required.get("position")
        if place is not None and not (
            isinstance(place, list) and len(place) == 2 and isinstance(place[1], int) and 0 <= place[1] < number
        ):
            return f"the position of {required['class']} must be [relation, number of an earlier object]"
    return ""


def judge(
    prompt: Mapping[str, Any],
    objects: Sequence[DetectedObject],
    name_colours: Callable[[Sequence[DetectedObject]], list[str]],
) -> tuple[bool, str]:
    """(whether the picture is right, the first reason why not)."""
    threshold = MIN_SCORE_TO_COUNT if prompt["tag"] == "counting" else MIN_SCORE
    kept = sorted((item for item in objects if item.score > threshold), key=lambda item: -item.score)
    of_class = {
        name: [item for item in kept if item.name == name][:MOST_OF_A_CLASS] for name in {item.name for item in kept}
    }
    groups: list[list[DetectedObject] | None] = []
    reasons = []
    for required in prompt["include"]:
        name, count = required["class"], required["count"]
        group, reason = of_class.get(name, [])[:count], ""
        if len(group) < count:
            reason = f"{len(group)} of {count} {name}"
        if not reason and "color" in required:
            right = name_colours(group).count(required["color"])
            if right < count:
                reason = f"{right} of {count} {required['color']} {name}"
        if not reason and required.get("position") is not None:
            reason = _misplaced(required, group, groups)
        groups.append(None if reason else group)
        reasons += [reason] if reason else []
    for excluded in prompt.get("exclude", []):
        there = len(of_class.get(excluded["class"], []))
        if there >= excluded["count"]:
            reasons.append(f"{there} {excluded['class']}, which is {excluded['count']} or more")
    return not reasons, reasons[0] if reasons else ""


def _misplaced(
    required: Mapping[str, Any], group: Sequence[DetectedObject], groups: Sequence[list[DetectedObject] | None]
) -> str:
    """Why not every one of the group stands so to every one of the other; nothing when they do."""
    relation, number = required["position"]
    other = groups[number]
    if other is None:
        return f"nothing that {required['class']} could be {relation}"
    for item in group:
        for target in other:
            if relation not in relations(item.box, target.box):
                return f"{required['class']} is not {relation} {target.name}"
    return ""


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How `box` stands to `other`: among "left of", "right of", "above", "below"; none when they nearly coincide.

    A relation holds when the distance of the centres along its axis, less the slack, is more than half of the whole
    distance of the centres.
    """
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (box[low] + box[high] - other[low] - other[high]) / 2
        slack = APART * (box[high] - box[low] + other[high] - other[low])
        offset.append(distance)
        beyond.append(math.copysign(max(abs(distance) - slack, 0.0), distance))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    words = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {word for word, is_so in words.items() if is_so}


class GenEvalMetric(TaskMetric[np.ndarray, Mapping[str, Any]]):
    """The share of right pictures of each kind, and "overall", their mean, for prompts as `read_prompts` gives them.

    Rows keep the verdict, its reason and what was found, so that each can be read and judged again.

    Args:
        detect: pictures uint8 (H, W, 3) -> the objects in each.
        name_colours: (picture, objects) -> a colour of COLOURS for each.
    """

    names = (*TAGS, "overall")

    def __init__(self, detect: Detect, name_colours: NameColours) -> None:
        super().__init__()
        self.detect, self.name_colours = detect, name_colours

    def score(self, output: np.ndarray, truth: Mapping[str, Any]) -> Row:
        """The row of one picture uint8 (H, W, 3): the verdict, its reason, and the objects."""
        (row,) = self.score_all([output], [truth])
        return row

    def score_all(self, outputs: Sequence[np.ndarray], truths: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        """The rows of pictures, in which the detector looks for objects together."""
        for output in outputs:
            if output.ndim != 3 or output.shape[2] != 3 or output.dtype != np.uint8:
                raise ValueError(f"a picture must be uint8 (H, W, 3), got {output.dtype} {output.shape}")
        for output, truth, objects in zip(outputs, truths, self.detect(outputs), strict=True):
            correct, reason = judge(truth, objects, functools.partial(self.name_colours, output))
            kept = (item for item in objects if item.score > MIN_SCORE)
            yield {
                "prompt": truth["prompt"],
                "tag": truth["tag"],
                "correct": int(correct),
                "reason": reason,
                "found": [[item.name, round(item.score, 4), [round(side, 1) for side in item.box]] for item in kept],
            }

    def compute(self) -> dict[str, float]:
        """The share of right pictures of each kind, and their mean. Raises UserError without any."""
        self._require_rows()
        self.notes = []
        tags = [tag for tag in TAGS if any(row["tag"] == tag for row in self.rows)]
        values = mean_metric(
            {tag: [row["correct"] if row["tag"] == tag else None for row in self.rows] for tag in tags}
        )
        values["overall"] = math.fsum(values[tag] for tag in tags) / len(tags)
        if len(tags) < len(TAGS):
            self.notes.append(f"overall is the mean without {', '.join(tag for tag in TAGS if tag not in tags)}")
        empty = sum(not row["found"] for row in self.rows)
        if empty > len(self.rows) / 2:
            self.notes.append(f"the detector found nothing at all in {empty} of {len(self.rows)} pictures")
        return {**values, "num_items": float(len(self.rows))}

    def intervals(
        self, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Wilson's interval of every kind and, from these, of "overall"."""
        groups = {tag: [row["correct"] for row in self.rows if row["tag"] == tag] for tag in TAGS}
        groups = {tag: verdicts for tag, verdicts in groups.items() if verdicts}
        bounds = {tag: wilson_interval(sum(verdicts), len(verdicts), level) for tag, verdicts in groups.items()}
        return bounds | ({"overall": mean_share_interval(list(groups.values()), level)} if groups else {})
