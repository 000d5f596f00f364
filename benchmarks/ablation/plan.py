"""The jobs of an ablation: a group of variants at a budget, as commands of crossflow.

For every seed there are trainings, which variants with the same label share, and then evaluations. A job is done when
the last file that it writes exists.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crossflow.benchmarks.ablation.group import Group, Stage, Variant
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import flat, merge, parse_overrides
from crossflow.tasks import load_config


@dataclass(frozen=True)
class Budget:
    """What all runs of an ablation share, and which of its variants and seeds are run."""

    task: str
    recipe: str
    data: str | None = None
    """Training data; None: those of the recipe."""
    steps: int | None = None
    """Optimizer steps of each run; None: those of the recipe."""
    seeds: tuple[int, ...] = (0, 1, 2)
    num_items: int | None = 240
    """Items of each evaluation; None: all that the protocol has."""
    split: str | None = "test"
    """Split of the evaluations; None: the protocol's."""
    protocol: str | None = None
    """Protocol of the evaluations; None: the task's own rules."""
    eval_data: str | None = None
    """Data of the evaluations; None: those of the recipe, or those embedded for the protocol."""
    only: tuple[str, ...] = ()
    """Variants to run; empty: all."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE for all runs, VARIANT:KEY=VALUE for those of one variant."""


@dataclass(frozen=True)
class Job:
    """One command, done when the file `mark` exists."""

    kind: Literal["train", "evaluate"]
    name: str
    variants: tuple[str, ...]
    """The variants that need it."""
    seed: int
    command: tuple[str, ...]
    """Arguments of crossflow."""
    mark: Path
    overrides: tuple[str, ...] = ()
    """The key=value arguments of the command."""
    after: tuple[str, ...] = ()
    """Names of the jobs whose results it needs."""

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return self.mark.is_file()


class Plan:
    """A group at a budget, as jobs in `folder`.

    >>> from crossflow.benchmarks.ablation.group import load_group
    >>> budget = Budget(task="t2i", recipe="t2i_tiny", steps=500)
    >>> plan = Plan(load_group("encoder"), budget, Path("ablations/encoder"))
    >>> plan.jobs[0].name, plan.steps
    ('train deterministic-seed0', 500)
    """

    def __init__(self, group: Group, budget: Budget, folder: Path) -> None:
        """Raises UserError for a task, variant, protocol or setting that the group does not allow."""
        if group.tasks and budget.task not in group.tasks:
            raise UserError(f"The ablation {group.name} is for {', '.join(group.tasks)}, not for {budget.task}.")
        if unknown := [name for name in budget.only if name not in group.variants]:
            raise unknown_name(f"variant of {group.name}", unknown[0], group.variants)
        if budget.protocol is not None:
            load_protocol(budget.protocol)  # a wrong name is better reported before the trainings than after
        if not budget.seeds:
            raise UserError("An ablation needs at least one seed.")
        self.group, self.budget, self.folder = group, budget, folder.absolute()
        self.steps = budget.steps or load_config(budget.recipe, task=budget.task).train.steps
        self.variants = [name for name in group.variants if not budget.only or name in budget.only]
        """The variants that are run, in the group's order."""
        self._jobs: dict[str, Job] = {}
        for seed in budget.seeds:
            for name in self.variants:
                self._add(name, seed)
        self.jobs = list(self._jobs.values())

    def settings(self, name: str) -> dict[str, Any]:
        """A variant's settings on top of the recipe's, without seed and steps."""
        parts = [part.settings for part in self.group.parts(name, self.budget.task)]
        return _merged([*parts, parse_overrides(self._overrides(name))])

    def sample(self, name: str) -> dict[str, Any]:
        """The sampling settings of a variant's evaluation, where they differ from the recipe's."""
        overrides = parse_overrides(self._overrides(name)).get("sample") or {}
        parts = self.group.parts(name, self.budget.task)
        return {key: value for part in parts for key, value in part.sample.items()} | overrides

    def label(self, name: str) -> str:
        """The label of a variant's training."""
        return self.group.variants[name].train or self.group.train or name

    def run_folder(self, label: str, seed: int) -> Path:
        """The run directory of a training."""
        return self.folder / "runs" / f"{label}-seed{seed}"

    def evaluation(self, name: str, seed: int) -> Path:
        """The folder of a variant's evaluation."""
        return self.folder / "evaluations" / f"{name}-seed{seed}"

    def _overrides(self, name: str) -> list[str]:
        """The overrides that apply to a variant."""
        overrides = []
        for override in self.budget.overrides:
            variant, colon, _ = override.partition("=")[0].partition(":")
            if not colon:
                overrides.append(override)
            elif variant not in self.group.variants:
                raise unknown_name(f"variant of {self.group.name}", variant, self.group.variants)
            elif variant == name:
                overrides.append(override.partition(":")[2])
        return overrides

    def _add(self, name: str, seed: int) -> None:
        """Adds the trainings and the evaluation of a variant."""
        variant, settings = self.group.variants[name], self.settings(name)
        before: tuple[str, ...] = ()
        if variant.first is not None:
            before = (self._add_first_stage(name, variant.first, seed),)
            start = str(self.run_folder(variant.first.label, seed))
            settings = merge(settings, {"train": {"start_from": start}})
        needs = [self._add_training(Stage(label=self.label(name), share=1), settings, name, seed, before)]
        if variant.weak is not None:
            needs.append(self._add_training(variant.weak, merge(settings, variant.weak.settings), name, seed))
        job, target = f"evaluate {name}-seed{seed}", self.evaluation(name, seed)
        command = (*self._evaluate_command(name, variant, seed), "--output", str(target), *written(self.sample(name)))
        self._jobs[job] = Job("evaluate", job, (name,), seed, command, target / "metrics.json", after=tuple(needs))

    def _add_first_stage(self, name: str, stage: Stage, seed: int) -> str:
        common = [part.settings for part in self.group.common(self.budget.task)]
        settings = _merged([*common, parse_overrides(self._overrides(name)), stage.settings])
        return self._add_training(stage, settings, name, seed)

    def _add_training(
        self, stage: Stage, settings: Mapping[str, Any], variant: str, seed: int, after: tuple[str, ...] = ()
    ) -> str:
        """Adds a training, unless another variant has added it; returns the job's name."""
        folder, name = self.run_folder(stage.label, seed), f"train {stage.label}-seed{seed}"
        steps = max(1, round(stage.share * self.steps))
        command = ["train", "--config", self.budget.recipe, "--output", str(folder), "--resume", "auto"]
        command += ["--data", self.budget.data] if self.budget.data is not None else []
        overrides = written(_merged([self._schedule(steps), settings, {"seed": seed, "train": {"steps": steps}}]))
        command += overrides
        known = self._jobs.get(name)
        if known is not None and known.command != tuple(command):
            raise UserError(
                f"The variants {known.variants[0]} and {variant} of {self.group.name} share the training "
                f"{stage.label!r}, but have different settings for it."
            )
        users = (*(known.variants if known is not None else ()), variant)
        mark = folder / "scores.json"
        self._jobs[name] = Job("train", name, users, seed, tuple(command), mark, tuple(overrides), after)
        return name

    def _evaluate_command(self, name: str, variant: Variant, seed: int) -> list[str]:
        budget = self.budget
        command = ["evaluate", "--checkpoint", str(self.run_folder(self.label(name), seed))]
        if variant.weak is not None:
            command += ["--guide-with", str(self.run_folder(variant.weak.label, seed))]
        options = {"--protocol": budget.protocol, "--data": budget.eval_data, "--split": budget.split}
        options |= {"--num": None if budget.num_items is None else str(budget.num_items)}
        return [*command, *(word for option, value in options.items() if value is not None for word in (option, value))]

    def _schedule(self, steps: int) -> dict[str, Any]:
        """Settings that depend on the number of steps: checkpoints for resuming, and no scores on the way."""
        recipe = load_config(self.budget.recipe, task=self.budget.task)
        train: dict[str, Any] = {"warmup_steps": min(recipe.train.warmup_steps, steps // 10)}
        train |= {"save_every": max(1, steps // 4), "log_every": max(1, steps // 20), "keep": 1}
        return {
            "train": train | {"eval_every": 0, "sample_every": 0},
            "data": {"num_val": min(60, recipe.data.num_val)},
        }


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in parts:
        settings = merge(settings, part)
    return settings


def written(settings: Mapping[str, Any]) -> list[str]:
    """Nested settings as key=value arguments, which `parse_overrides` reads back."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat(settings).items()]
