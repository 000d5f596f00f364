"""What an ablation consists of: a group of variants (one file of configs/ablations), and its jobs at a budget.

Each job is one command of crossflow: trainings (shared by variants that name the same one), then evaluations, for every
seed. A job is done when the file it writes last is there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.core.config import Section
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import RECIPES, build, flat, merge, parse_overrides, read, shipped
from crossflow.tasks.base import load_config

FOLDER = RECIPES / "ablations"


class Part(Section):
    """Settings and sampling that are laid on those of a group or variant."""

    settings: dict[str, Any] = Field({})
    """Of the training, as in a recipe."""
    sample: dict[str, Any] = Field({})
    """Of the evaluation: fields of `sample`."""


class Stage(Section):
    """A training beside a variant's own; variants with the same label share it."""

    label: str
    share: float = Field(gt=0, le=1)
    """Of the steps of a run."""
    settings: dict[str, Any] = Field({})
    """Laid on those of the group (`first`) or of the variant (`weak`)."""


class Variant(Part):
    about: str = ""
    paper: str | None = None
    """The row of the group's table in paper.yaml."""
    train: str | None = None
    """Label of its training; variants with the same label share one. None: its own name."""
    by_task: dict[str, Part] = Field({})
    first: Stage | None = None
    """Trained before, whose weights it starts from."""
    weak: Stage | None = None
    """Trained less, by which its sampling is guided."""
    against: str | None = None
    """The variant it is compared with; None: the group's reference."""
    optional: bool = False
    """Needs weights that may not be at hand; without them it is skipped."""


class Group(Part):
    name: str
    title: str
    about: str
    table: str | None = None
    """Of paper.yaml; None: no paper has such a table."""
    tasks: tuple[str, ...] = ("t2i", "caption", "depth", "sr")
    train: str | None = None
    """Label of the training that all variants share, when they differ in their sampling alone."""
    by_task: dict[str, Part] = Field({})
    reference: str
    variants: dict[str, Variant]

    @model_validator(mode="after")
    def _agrees(self) -> "Group":
        for name in (self.reference, *(variant.against for variant in self.variants.values())):
            if name is not None and name not in self.variants:
                raise ValueError(f"{self.name} compares with {name!r}, which is no variant of it")
        return self


def groups() -> dict[str, Path]:
    """The shipped groups by name, with their files."""
    return shipped(FOLDER)


def load_group(source: str) -> Group:
    """A shipped group, or one in a file of the user's. Raises UserError."""
    return build(Group, {"name": Path(source).stem, **read(source, FOLDER, "ablation")})


@dataclass(frozen=True)
class Budget:
    """What one group is run at."""

    task: str
    recipe: str
    data: str | None = None
    steps: int | None = None
    """Of each run; None: those of the recipe."""
    seeds: tuple[int, ...] = (0, 1, 2)
    num_items: int | None = 240
    """Items of an evaluation; None: all that the protocol says."""
    split: str | None = "test"
    """Of the evaluation; None: the protocol's."""
    protocol: str | None = None
    """By which runs are evaluated; None: the task's own rules."""
    eval_data: str | None = None
    """What they are evaluated on; None: the recipe's data, or those embedded for the protocol."""
    only: tuple[str, ...] = ()
    """Variants; none: all."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE for all runs, VARIANT:KEY=VALUE for those of one variant."""


@dataclass(frozen=True)
class Job:
    """One command. It is done when `mark` is there."""

    kind: Literal["train", "evaluate"]
    name: str
    variants: tuple[str, ...]
    """Those that need it."""
    seed: int
    command: tuple[str, ...]
    """Arguments of crossflow."""
    mark: Path
    overrides: tuple[str, ...] = ()
    """The key=value among them."""
    after: tuple[str, ...] = ()
    """Names of the jobs whose results it needs."""

    @property
    def done(self) -> bool:
        return self.mark.is_file()


class Plan:
    """A group at a budget, as jobs in `folder`."""

    def __init__(self, group: Group, budget: Budget, folder: Path) -> None:
        """Raises UserError for a task, variant or setting that cannot be."""
        if budget.task not in group.tasks:
            raise UserError(f"The ablation {group.name} is for {', '.join(group.tasks)}, not for {budget.task}.")
        if unknown := [name for name in budget.only if name not in group.variants]:
            raise unknown_name(f"variant of {group.name}", unknown[0], group.variants)
        if budget.protocol is not None:
            load_protocol(budget.protocol)  # a wrong name is better told before the trainings than after
        if not budget.seeds:
            raise UserError("An ablation needs at least one seed.")
        self.group, self.budget, self.folder = group, budget, folder.absolute()
        self.steps = budget.steps or load_config(budget.recipe, task=budget.task).train.steps
        self._jobs: dict[str, Job] = {}
        wanted = [name for name in group.variants if not budget.only or name in budget.only]
        for seed in budget.seeds:
            for name in wanted:
                self._add(name, group.variants[name], seed)
        self.jobs = list(self._jobs.values())

    @property
    def variants(self) -> list[str]:
        """Those that are run, in the group's order."""
        return [name for name in self.group.variants if not self.budget.only or name in self.budget.only]

    def settings(self, name: str) -> dict[str, Any]:
        """A variant's settings on top of the recipe's, without seed and steps."""
        variant, task = self.group.variants[name], self.budget.task
        parts = [self.group, self.group.by_task.get(task, Part()), variant, variant.by_task.get(task, Part())]
        found: dict[str, Any] = {}
        for part in parts:
            found = merge(found, part.settings)
        return merge(found, parse_overrides(self._given(name)))

    def sample(self, name: str) -> dict[str, Any]:
        """What a variant's evaluation samples with, where it differs from the recipe."""
        variant, task = self.group.variants[name], self.budget.task
        parts = [self.group, self.group.by_task.get(task, Part()), variant, variant.by_task.get(task, Part())]
        given = parse_overrides(self._given(name)).get("sample") or {}
        return {key: value for part in parts for key, value in part.sample.items()} | given

    def label(self, name: str) -> str:
        """Of a variant's training."""
        return self.group.variants[name].train or self.group.train or name

    def run_folder(self, label: str, seed: int) -> Path:
        return self.folder / "runs" / f"{label}-seed{seed}"

    def evaluation(self, name: str, seed: int) -> Path:
        return self.folder / "evaluations" / f"{name}-seed{seed}"

    def _given(self, name: str) -> list[str]:
        """The overrides that are meant for a variant."""
        found = []
        for override in self.budget.overrides:
            key, colon, _ = override.partition("=")[0].partition(":")
            if not colon:
                found.append(override)
            elif key not in self.group.variants:
                raise unknown_name(f"variant of {self.group.name}", key, self.group.variants)
            elif key == name:
                found.append(override.partition(":")[2])
        return found

    def _add(self, name: str, variant: Variant, seed: int) -> None:
        settings = self.settings(name)
        before: tuple[str, ...] = ()
        if variant.first is not None:
            common = merge(self.group.settings, self.group.by_task.get(self.budget.task, Part()).settings)
            given = parse_overrides(self._given(name))
            first = self._train(variant.first, merge(merge(common, given), variant.first.settings), name, seed)
            start = str(self.run_folder(variant.first.label, seed))
            settings, before = merge(settings, {"train": {"start_from": start}}), (first,)
        trained = self._train(Stage(label=self.label(name), share=1), settings, name, seed, before)
        needs, guide = [trained], []
        if variant.weak is not None:
            needs.append(self._train(variant.weak, merge(settings, variant.weak.settings), name, seed))
            guide = ["--guide-with", str(self.run_folder(variant.weak.label, seed))]
        target = self.evaluation(name, seed)
        command = ["evaluate", "--checkpoint", str(self.run_folder(self.label(name), seed)), "--output", str(target)]
        budget = self.budget
        said = {"--protocol": budget.protocol, "--data": budget.eval_data, "--split": budget.split}
        said |= {"--num": None if budget.num_items is None else str(budget.num_items)}
        command += [word for option, value in said.items() if value is not None for word in (option, value)]
        command += [*guide, *written(self.sample(name))]
        mark, job = target / "metrics.json", f"evaluate {name}-seed{seed}"
        self._jobs[job] = Job("evaluate", job, (name,), seed, tuple(command), mark, after=tuple(needs))

    def _train(
        self, stage: Stage, settings: Mapping[str, Any], variant: str, seed: int, after: tuple[str, ...] = ()
    ) -> str:
        """Adds a training, unless it is there; returns its job's name."""
        folder, name = self.run_folder(stage.label, seed), f"train {stage.label}-seed{seed}"
        steps = max(1, round(stage.share * self.steps))
        command = ["train", "--config", self.budget.recipe, "--output", str(folder), "--resume", "auto"]
        command += ["--data", self.budget.data] if self.budget.data is not None else []
        overrides = written(merge(self._pace(steps), merge(settings, {"seed": seed, "train": {"steps": steps}})))
        command += overrides
        known = self._jobs.get(name)
        if known is not None and known.command != tuple(command):
            raise UserError(
                f"The variants {known.variants[0]} and {variant} of {self.group.name} share the training "
                f"{stage.label!r}, but want different settings of it."
            )
        users = (*(known.variants if known is not None else ()), variant)
        mark = folder / "scores.json"
        self._jobs[name] = Job("train", name, users, seed, tuple(command), mark, tuple(overrides), after)
        return name

    def _pace(self, steps: int) -> dict[str, Any]:
        """What follows from the number of steps: checkpoints to go on from, and no scores on the way."""
        recipe = load_config(self.budget.recipe, task=self.budget.task)
        train: dict[str, Any] = {"warmup_steps": min(recipe.train.warmup_steps, steps // 10)}
        train |= {"save_every": max(1, steps // 4), "log_every": max(1, steps // 20), "keep": 1}
        return {
            "train": train | {"eval_every": 0, "sample_every": 0},
            "data": {"num_val": min(60, recipe.data.num_val)},
        }


def written(settings: Mapping[str, Any]) -> list[str]:
    """Nested settings as key=value arguments."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat(settings).items()]
