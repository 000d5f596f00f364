"""How captioning is scored: against all reference captions of each picture, beside one caption given to every
picture.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crossflow.core.errors import UserError
from crossflow.core.noise import keyed_generator
from crossflow.data.cases import Case, Cases, Tile
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.tasks.base import NoRules, Scoring
from crossflow.tasks.caption import metric
from crossflow.tasks.caption.config import CaptionConfig
from crossflow.tasks.caption.metric import CaptionMetric, best_single_caption

NO_PICTURES = (
    "Captions are scored on pictures, and a cache has none: name the data themselves for validation, data.val=SPEC."
)
NUM_FOR_BASELINE, NUM_CANDIDATES = 200, 100
"""Training items whose captions the single caption is chosen from, and how many of those captions are tried."""


class CaptionScoring(Scoring[CaptionConfig, NoRules]):
    """BLEU, ROUGE-L, CIDEr, and where thorough METEOR and SPICE."""

    Metric = CaptionMetric
    headline = ("CIDEr", "BLEU-4", "ROUGE-L", "object_f1")

    def cases(self, examples: Examples, limit: int) -> Cases:
        """One case for each picture. Raises UserError for a cache, which has none."""
        if "image" not in examples.reader.fields:
            raise UserError(NO_PICTURES)
        return super().cases(examples, limit)

    def case(self, item: Item) -> Case:
        """The picture, and the item with its reference captions."""
        return Case(item.id, item.image, item, item)

    def metric(self, *, thorough: bool = False) -> CaptionMetric:
        """thorough: with METEOR and SPICE, which need Java."""
        return CaptionMetric(java=metric.JAVA_METRICS if thorough else ())

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any]:
        """The one caption that fits the training items best (by CIDEr), given to every picture."""
        items = list(open_train().items(NUM_FOR_BASELINE))
        captions = [caption for item in items for caption in item.captions]
        order = torch.randperm(len(captions), generator=keyed_generator("single caption", self.seed))
        candidates = [captions[int(i)] for i in order[:NUM_CANDIDATES]]
        best = best_single_caption(candidates, [item.captions for item in items])
        return lambda case: best

    def tiles(self, case: Case, output: str) -> list[Tile]:
        """The centre square of the picture over its caption and the first reference."""
        side = min(256, *np.shape(case.input)[:2])
        return [Tile(center_crop_resize(case.input, side), f"{output}\n(truth: {case.truth.captions[0]})")]
