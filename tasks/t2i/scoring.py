"""How text-to-image is scored: prompts about embedded scenes by a recogniser, GenEval's by a detector, any text by
CLIP.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from crossflow.core.config import Section
from crossflow.core.errors import UserError
from crossflow.core.metrics import TaskMetric
from crossflow.core.noise import key
from crossflow.data.cases import Case, Cases, ListedCases, OpenData, Tile
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.tasks.base import Scoring
from crossflow.tasks.t2i.config import T2IConfig
from crossflow.tasks.t2i.detector import ColourNamer, Detector
from crossflow.tasks.t2i.geneval import GenEvalMetric, read_prompts
from crossflow.tasks.t2i.metric import ClipScorer, T2IMetric, scene_cases


class TextRules(Section):
    """What a protocol may fix for text-to-image."""

    prompts: Literal["any", "first caption", "geneval", "scenes"] = "first caption"
    """first caption: that of each item; geneval: a metadata file of GenEval; scenes: the embedded world's six kinds;
    any: scenes where the data are scenes, else first captions.
    """
    samples: int = Field(1, ge=1)
    """Pictures of each prompt."""
    clip_score: bool = False
    """Also 100 max(0, cos) between picture and prompt by the network `clip`."""


class TextToImageScoring(Scoring[T2IConfig, TextRules]):
    """Shares of right pictures by kind of prompt, and the CLIP score. The metric carries its own control, the same
    pictures judged by shuffled prompts, so there is no trivial output.
    """

    Rules = TextRules
    Metric = T2IMetric
    section = "text"
    headline = ("overall", "single_object", "colors", "two_objects")
    networks_by_role: ClassVar[Mapping[str, Callable[[str, torch.device], Any]]] = {
        "clip": ClipScorer,
        "detector": Detector,
    }

    def own_rules(self) -> TextRules:
        """Prompts about scenes where the data are scenes, else first captions."""
        return TextRules(prompts="any")

    @classmethod
    def scores(cls, rules: Section) -> tuple[str, ...]:
        """Those of GenEval, or of the recogniser and CLIP."""
        return GenEvalMetric.names if getattr(rules, "prompts", "") == "geneval" else T2IMetric.names

    @property
    def resize(self) -> str:
        """In words, what the model sees."""
        return "none: prompts"

    def open_cases(self, open_data: OpenData, spec: str | None, split: str, limit: int) -> Cases:
        """GenEval's prompts from their file; else the cases of a data set."""
        if self.rules.prompts != "geneval":
            return super().open_cases(open_data, spec, split, limit)
        assert spec is not None
        prompts = read_prompts(Path(spec.removeprefix("geneval:")).expanduser())
        objects = [entry for prompt in prompts for entry in [*prompt["include"], *prompt.get("exclude", [])]]
        self.networks["detector"].expect([entry["class"] for entry in objects])
        cases = [
            Case(f"{number:05d}/{k}", prompt["prompt"], prompt)
            for number, prompt in enumerate(prompts)
            for k in range(self.rules.samples)
        ]
        digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:32]
        return ListedCases(cases[:limit], spec, split, digest)

    def cases(self, examples: Examples, limit: int) -> Cases:
        """Of scenes: prompts of the six GenEval kinds, as many of each. Of other data: the first caption of each
        item.
        """
        reader = examples.reader
        is_scenes = "scene" in reader.fields
        if self.rules.prompts == "scenes" and not is_scenes:
            raise UserError(f"The protocol asks about embedded scenes; {reader.spec} holds none.")
        if not is_scenes or self.rules.prompts == "first caption":
            return super().cases(examples, limit)
        # The prompts of a kind are few; their order and their noise differ between splits.
        prompts = scene_cases(limit, key("prompts", reader.split, self.seed))
        cases = [Case(f"{reader.split}/{id}", prompt.text, prompt) for id, prompt in prompts]
        return ListedCases(cases, reader.spec, reader.split, reader.fingerprint(), examples)

    def case(self, item: Item) -> Case:
        """The first caption of an item."""
        return Case(item.id, item.captions[0], item.captions[0], item)

    def metric(self, *, thorough: bool = False) -> TaskMetric:
        """GenEval's metric, or the recogniser's with CLIP where it is named."""
        if self.rules.prompts == "geneval":
            return GenEvalMetric(self.networks["detector"], ColourNamer(self.networks["clip"]))
        if self.rules.prompts == "first caption":
            return T2IMetric(clip=self.networks["clip"] if self.rules.clip_score else None, seed=self.seed)
        return T2IMetric(clip=self.config.t2i.clip, seed=self.seed)

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        """The picture over its prompt, and the item's picture where there is one."""
        tiles = [Tile(output, case.input)]
        if case.item is not None and case.item.image is not None:
            tiles.append(Tile(center_crop_resize(case.item.image, self.config.data.image_size), "truth"))
        return tiles
