"""Scores of text-to-image: six GenEval-like scores on prompts about scenes, and the CLIP score on any prompt.

A picture of a prompt is right (1) or wrong (0): a recogniser finds its solids; they must be what the prompt requires.
As in GenEval (Ghosh et al., NeurIPS 2023), more solids than asked for do no harm, except where the prompt counts them;
"overall" is the mean of the six kinds. As a control every picture is also judged by another prompt of its kind
("shuffled_..."): what a model scores that draws fine pictures but does not listen.
CLIP score = 100 max(0, cos(image embedding, text embedding)) (Hessel et al., EMNLP 2021, without their factor 2.5).
"""

import dataclasses
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from crossflow.core.errors import UserError
from crossflow.core.intervals import bootstrap_interval, mean_share_interval, wilson_interval
from crossflow.core.metrics import Row, TaskMetric, mean_metric
from crossflow.data.scenes import PROMPT_KINDS, Prompt, Requirement, geneval_prompts
from crossflow.tasks.t2i.recogniser import Detection, Recogniser, load_recogniser, stands

Judge = Callable[[np.ndarray], list[tuple[Detection, ...]]]


def scene_cases(count: int, seed: int) -> list[tuple[str, Prompt]]:
    """``count`` prompts with ids such as "colors/0003"; the six kinds take turns, so that there are as many of each."""
    number = len(PROMPT_KINDS)
    decks = {
        kind: geneval_prompts(kind, seed, (count + number - 1 - place) // number)
        for place, kind in enumerate(PROMPT_KINDS)
    }
    turns = ((index // number, PROMPT_KINDS[index % number]) for index in range(count))
    return [(f"{kind}/{turn:04d}", decks[kind][turn]) for turn, kind in turns]


def fulfils(prompt: Prompt, solids: Sequence[Detection]) -> bool:
    """Whether the solids seen in a picture are what the prompt requires."""
    fitting = [[solid for solid in solids if _fits(solid, required)] for required in prompt.required]
    if prompt.kind == "counting":
        return all(len(group) == required.count for group, required in zip(fitting, prompt.required, strict=True))
    if any(len(group) < required.count for group, required in zip(fitting, prompt.required, strict=True)):
        return False
    if prompt.relation is None:
        return True
    return any(stands(prompt.relation, a, b) for a in fitting[0] for b in fitting[1] if a is not b)


def _fits(solid: Detection, required: Requirement) -> bool:
    return solid.shape == required.shape and required.colour in (None, solid.colour)


class T2IMetric(TaskMetric[np.ndarray, Prompt | str]):
    """Scores pictures uint8 (H, W, 3) against a ``Prompt`` about scenes, or against any text by a CLIP model.

    Rows: "prompt"; for prompts about scenes "kind", "correct" (0 or 1), what was required and what was found, so that
    every verdict can be read and repeated; "clip_score" when there is a CLIP model.

    Args:
        clip: hub id or folder of a CLIP model of transformers, or the model opened; None: no CLIP score.
        seed: of the shuffled control.
        judge: finds the solids of pictures; None: the recogniser that ships with the package.
    """

    names = (*PROMPT_KINDS, "overall", "clip_score")

    def __init__(self, *, clip: "str | ClipScorer | None" = None, seed: int = 0, judge: Judge | None = None) -> None:
        super().__init__()
        self.seed = seed
        self._judge = judge
        self._clip = ClipScorer(clip) if isinstance(clip, str) else clip

    def score(self, output: np.ndarray, truth: Prompt | str) -> Row:
        """The row of one picture, without its id."""
        (row,) = self.score_all([output], [truth])
        return row

    def score_all(self, outputs: Sequence[np.ndarray], truths: Sequence[Prompt | str]) -> Iterator[Row]:
        """The rows of pictures, which recogniser and CLIP see in batches."""
        check_pictures(outputs)
        texts = [truth.text if isinstance(truth, Prompt) else truth for truth in truths]
        solids = self._solids([o for o, truth in zip(outputs, truths, strict=True) if isinstance(truth, Prompt)])
        scores = [] if self._clip is None else self._clip.scores(outputs, texts)
        for number, (truth, text) in enumerate(zip(truths, texts, strict=True)):
            row: Row = {"prompt": text}
            if isinstance(truth, Prompt):
                row |= _verdict(truth, next(solids))
            if scores:
                row["clip_score"] = scores[number]
            yield row

    def _solids(self, pictures: Sequence[np.ndarray]) -> Iterator[tuple[Detection, ...]]:
        """The solids of each picture; those of one shape are recognised together."""
        if pictures and self._judge is None:
            self._judge = load_recogniser()
        for _, group in itertools.groupby(pictures, key=np.shape):
            assert self._judge is not None
            yield from self._judge(np.stack(list(group)))

    def compute(self) -> dict[str, float]:
        """The share of right pictures of every kind, "overall", the same shuffled, CLIP score and the judge's accuracy.

        Numbers in [0, 1], the CLIP score in [0, 100]. Without prompts about scenes and without CLIP only "num_items".
        """
        self._require_rows()
        self.notes = []
        verdicts, shuffled = self._verdicts(), self._shuffled()
        columns: dict[str, list[float | None]] = {}
        for kind in PROMPT_KINDS:
            if verdicts[kind]:
                columns[kind] = [row.get("correct") if row.get("kind") == kind else None for row in self.rows]
            if shuffled[kind]:
                columns[f"shuffled_{kind}"] = [*shuffled[kind], *[None] * (len(self.rows) - len(shuffled[kind]))]
        if any("clip_score" in row for row in self.rows):
            columns["clip_score"] = [row.get("clip_score") for row in self.rows]
        values = mean_metric(columns) if columns else {}
        for prefix in ("", "shuffled_"):
            parts = [values[prefix + kind] for kind in PROMPT_KINDS if prefix + kind in values]
            if parts:
                values[f"{prefix}overall"] = math.fsum(parts) / len(parts)
        if self._judge is None and any("kind" in row for row in self.rows):
            self._judge = load_recogniser()  # all rows were scored before, by another process
        if isinstance(self._judge, Recogniser):
            values |= {f"judge_{name}": self._judge.report[name] for name in ("shape", "colour", "count", "relation")}
        self._take_notes(verdicts, shuffled, bool(columns))
        return {**values, "num_items": float(len(self.rows))}

    def intervals(
        self, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Wilson's interval for every kind and, from these, for the overall means; a bootstrap for the CLIP score."""
        bounds: dict[str, tuple[float, float]] = {}
        for prefix, groups in (("", self._verdicts()), ("shuffled_", self._shuffled())):
            kinds = {kind: numbers for kind, numbers in groups.items() if numbers}
            bounds |= {prefix + kind: wilson_interval(sum(ns), len(ns), level) for kind, ns in kinds.items()}
            if kinds:
                bounds[f"{prefix}overall"] = mean_share_interval(list(kinds.values()), level)
        clip = [row["clip_score"] for row in self.rows if "clip_score" in row]
        if len(clip) >= 2:
            bounds["clip_score"] = bootstrap_interval(clip, level=level, num_resamples=num_resamples, seed=seed)
        return bounds

    def _verdicts(self) -> dict[str, list[int]]:
        return {kind: [row["correct"] for row in self.rows if row.get("kind") == kind] for kind in PROMPT_KINDS}

    def _shuffled(self) -> dict[str, list[int]]:
        """Verdicts on every picture by another prompt of its kind; pictures for which there is none are left out."""
        verdicts: dict[str, list[int]] = {}
        for kind in PROMPT_KINDS:
            rows = sorted((row for row in self.rows if row.get("kind") == kind), key=lambda row: row["id"])
            partners = derangement([row["prompt"] for row in rows], f"{kind}/{self.seed}")
            verdicts[kind] = [
                int(fulfils(_prompt_of(rows[partner]), [Detection(*solid) for solid in row["found"]]))
                for row, partner in zip(rows, partners, strict=True)
                if partner is not None
            ]
        return verdicts

    def _take_notes(self, verdicts: dict[str, list[int]], shuffled: dict[str, list[int]], scored: bool) -> None:
        if not scored:
            self.notes.append("nothing was scored: these prompts are not about scenes, and no CLIP model was given")
        missing = [kind for kind in PROMPT_KINDS if not verdicts[kind]]
        if any(verdicts.values()):
            if missing:
                self.notes.append(f"overall is the mean without {', '.join(missing)}, of which there were no prompts")
            alone = sum(map(len, verdicts.values())) - sum(map(len, shuffled.values()))
            if alone:
                self.notes.append(
                    f"{alone} pictures have no other prompt of their kind and miss from the shuffled control"
                )
        if isinstance(self._judge, Recogniser):
            numbers = ", ".join(
                f"{name} {self._judge.report[name]:.3f}" for name in ("shape", "colour", "count", "relation")
            )
            self.notes.append(f"the recogniser that judges is right on held-out renders in: {numbers}")


def check_pictures(pictures: Sequence[np.ndarray]) -> None:
    """Raises ValueError for what is no picture uint8 (H, W, 3)."""
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"a picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")


def _verdict(prompt: Prompt, solids: Sequence[Detection]) -> Row:
    return {
        "kind": prompt.kind,
        "correct": int(fulfils(prompt, solids)),
        "required": [[r.count, r.shape, r.colour] for r in prompt.required],
        "relation": prompt.relation,
        "found": [list(dataclasses.astuple(solid)) for solid in solids],
    }


def _prompt_of(row: Row) -> Prompt:
    required = tuple(Requirement(*entry) for entry in row["required"])
    return Prompt(row["kind"], row["prompt"], required, row["relation"])


def derangement(texts: Sequence[str], seed: str) -> list[int | None]:
    """For every text the place of another one that differs, each used once; None where that is not possible.

    Equal texts are put side by side and all are shifted by the size of the largest group of equals.
    """
    rng = random.Random(f"derangement/{seed}")
    groups: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        groups[text].append(place)
    mixed = sorted(sorted(groups), key=lambda _: rng.random())
    order = [place for text in mixed for place in groups[text]]
    shift = max(Counter(texts).values(), default=0)
    partners: list[int | None] = [None] * len(texts)
    for position, place in enumerate(order):
        other = order[(position + shift) % len(order)]
        if texts[other] != texts[place]:
            partners[place] = other
    return partners


class ClipScorer:
    """A frozen CLIP model of transformers: `scorer.scores(pictures, texts)` are CLIP scores in [0, 100].

    Args:
        source: hub id or folder with the model, its tokenizer and its image processor.
        device: where it runs.

    Raises:
        UserError: the model is unavailable, is incomplete, or is not a CLIP model.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        from crossflow.networks.frozen import load_frozen, load_public, weights_checksum

        files = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files of a CLIP model"
        self.model = load_frozen(CLIPModel.from_pretrained, source, files=files)
        if self.model.config.model_type != "clip":
            raise UserError(f"{source!r} is a {self.model.config.model_type} model; the CLIP score needs a CLIP model.")
        self.tokenizer = load_public(AutoTokenizer.from_pretrained, source, files=files)
        self.processor = load_public(CLIPImageProcessor.from_pretrained, source, files=files)
        self.longest = self.model.config.text_config.max_position_embeddings
        self.checksum = weights_checksum(self.model)
        self.device = torch.device(device)
        self.model.to(self.device)

    @torch.no_grad()
    def scores(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """The CLIP score of each picture with the text at its place."""
        output = self.model(**self._words(texts), pixel_values=self._pixels(pictures))
        cosines = torch.nn.functional.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return [max(0.0, 100 * cosine) for cosine in cosines.tolist()]

    @torch.no_grad()
    def similarities(self, pictures: Sequence[np.ndarray], texts: Sequence[str], per: int = 1) -> np.ndarray:
        """Cosines (pictures, texts / per) with the mean direction of each `per` texts that follow each other."""
        output = self.model(**self._words(texts), pixel_values=self._pixels(pictures))
        images, words = (
            torch.nn.functional.normalize(embeds.float(), dim=-1)
            for embeds in (output.image_embeds, output.text_embeds)
        )
        means = torch.nn.functional.normalize(words.unflatten(0, (-1, per)).mean(dim=1), dim=-1)
        return (images @ means.T).cpu().numpy()

    def _words(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        words = self.tokenizer(
            list(texts), truncation=True, max_length=self.longest, padding=len(texts) > 1, return_tensors="pt"
        )
        return {name: words[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _pixels(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        inputs = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        pixels: torch.Tensor = inputs["pixel_values"].to(self.device)
        return pixels
