"""The configuration of a joint run: one training, and a configuration of each task.

In a recipe `task` lists the tasks; `train`, `seed` and `weights` belong to the run; an entry of `tasks` extends a
recipe of its task (without an entry: TASK_tiny); and any other section goes to every task that has such a section. In
the run directory each task has its complete configuration in tasks/NAME.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from crossflow.core.config import Config, Section, TrainConfig
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import build, merge, parse_overrides, read
from crossflow.core.weights import MEMBERS
from crossflow.tasks import add_recipes_of_packages, task_class, tasks_of

OF_THE_RUN = ("task", "seed", "train", "weights", "directions", "backwards", "tasks")
"""Sections of a joint recipe that are not those of its tasks."""
OWN_BACKBONE = {"patch", "positions"}
"""Settings of the backbone in which tasks may differ: those of its first and last layer."""


class JointConfig(Section):
    """The configuration of a joint run; `members` are those of the tasks that are trained, in the order of a batch."""

    task: str
    """The tasks, separated by commas."""
    seed: int = Field(0, ge=0)
    train: TrainConfig = TrainConfig()
    """Of the whole run; a batch holds equally many samples of each task."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a task's loss in the mean over the tasks; 1 where none is set."""
    directions: dict[str, str] = Field(default_factory=dict)
    """Task -> the task whose flow it runs backwards, instead of having one of its own: caption: t2i."""
    backwards: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The complete settings of these tasks, which learn what they need when the flow is trained."""
    members: dict[str, Any] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="after")
    def _trains_together(self) -> Self:
        names, train = tuple(self.members), self.train
        if unknown := [name for name in self.weights if name not in names]:
            raise ValueError(f"weights.{unknown[0]} names none of the tasks {', '.join(names)}.")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights must be positive; leave a task out of --task to train without it.")
        if train.batch_size % (len(names) * train.accumulate):
            raise ValueError(
                f"train.batch_size = {train.batch_size} is divided evenly among {len(names)} task(s) and "
                f"train.accumulate = {train.accumulate} part(s): give a multiple of {len(names) * train.accumulate}."
            )
        refused = {
            "train.start_from": train.start_from is not None,
            "train.sharding=fsdp": train.sharding != "none",
            "train.auto_micro_batch": train.auto_micro_batch,
        }
        if wrong := [name for name, is_set in refused.items() if is_set]:
            raise ValueError(f"{wrong[0]} is for runs of one task, and this run has {', '.join(names)}.")
        return self

    @model_validator(mode="after")
    def _shares_a_backbone(self) -> Self:
        first, *others = self.members.items()
        for name, config in self.members.items():
            if config.interval.target != "none":
                raise ValueError(f"Flow maps are distilled one task at a time: unset tasks.{name}.interval.target.")
        for name, config in others:
            this, other = (each.backbone.model_dump(exclude=OWN_BACKBONE) for each in (config, first[1]))
            if different := [key for key, value in this.items() if value != other[key]]:
                key = different[0]
                raise ValueError(
                    f"Tasks share the blocks of one backbone, but backbone.{key} is {other[key]} for {first[0]} and "
                    f"{this[key]} for {name}. Set backbone.{key}=... for all; only "
                    f"{' and '.join(sorted(OWN_BACKBONE))} may differ."
                )
        return self


def is_joint(source: str | Path) -> bool:
    """Whether a recipe, file or run directory is of several tasks. Raises UserError for an unknown one."""
    add_recipes_of_packages()
    return len(tasks_of(read(source).get("task", ""))) > 1


def load_joint(
    source: str | Path, overrides: Sequence[str] = (), tasks: str | None = None, *, quick: bool = False
) -> JointConfig:
    """The configuration of a joint recipe or run directory with key=value overrides.

    `SECTION.NAME=VALUE` holds for every task with this section, `tasks.TASK.SECTION.NAME=VALUE` for one. tasks: those
    to train, separated by commas; None: all of the recipe. quick: shorten what comes before the flow, for runs that are
    only measured. Raises UserError for unknown or invalid settings, and for tasks that cannot share a backbone.
    """
    add_recipes_of_packages()
    content, overridden = read(source), parse_overrides(overrides)
    names = _names(source, content, tasks)
    folder = Path(source) / MEMBERS
    entries = content.get("tasks", {}) | content.get("backwards", {})
    entries |= {name: read(folder / name) for name in names if (folder / name / "config.yaml").is_file()}
    _refuse_unknown(content, (*tasks_of(content.get("task", "")), *names))
    _refuse_unknown(overridden, names)
    run = merge(content, overridden)
    directions = {name: other for name, other in run.get("directions", {}).items() if name in names}
    trained = [name for name in names if name not in directions]
    train = build(TrainConfig, run.get("train", {}))
    seed, size = run.get("seed", 0), max(1, train.batch_size // max(1, len(trained)))
    own = {"seed": seed, "train": train.model_dump() | {"batch_size": size}}
    members: dict[str, Config] = {}
    backwards: dict[str, dict[str, Any]] = {}
    for name in (*trained, *directions):
        kind = task_class(name)
        settings = _member(name, kind.Config, entries.get(name), content, overridden)
        settings = {**merge(settings, parse_overrides(kind.quick) if quick else {}), "task": name, **own}
        try:
            if name in directions:
                settings = kind.backwards(
                    settings, _reversed(name, directions, members), f"{MEMBERS}/{directions[name]}"
                )
                backwards[name] = build(kind.Config, settings).model_dump(mode="json")
            else:
                members[name] = build(kind.Config, settings)
        except UserError as error:
            raise UserError(f"Task {name}: {error}") from error
    recipe = {name: weight for name, weight in content.get("weights", {}).items() if name in names}
    weights = {**recipe, **overridden.get("weights", {})}
    return build(
        JointConfig,
        {"task": ",".join(names), "seed": seed, "train": train, "weights": weights, "directions": directions,
         "backwards": backwards, "members": members},
    )  # fmt: skip


def _reversed(name: str, directions: Mapping[str, str], members: Mapping[str, Config]) -> Config:
    """The configuration of the task whose flow `name` runs backwards. Raises UserError unless it is trained."""
    if directions[name] not in members:
        raise UserError(
            f"directions.{name} = {directions[name]} names none of the tasks that this run trains: "
            f"{', '.join(members)}."
        )
    return members[directions[name]]


def _names(source: str | Path, content: Mapping[str, Any], tasks: str | None) -> tuple[str, ...]:
    own = tasks_of(content.get("task", ""))
    if len(own) < 2 and "tasks" not in content and not (Path(source) / MEMBERS).is_dir():
        raise UserError(
            f"The configuration {source} belongs to the task {', '.join(own)}. Several tasks are trained from a joint "
            "recipe, such as joint_tiny; tasks.TASK.extends=RECIPE names the recipe of a task."
        )
    names = own if tasks is None else tasks_of(tasks)
    if len(set(names)) < len(names):
        raise UserError(f"A task is named twice: {', '.join(names)}.")
    if (Path(source) / MEMBERS).is_dir() and names != own:
        raise UserError(f"The run in {source} has the tasks {', '.join(own)}, not {', '.join(names)}.")
    return names


def _refuse_unknown(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises UserError for a section that is neither of the run nor of any task, and for an entry of another task."""
    known = {*OF_THE_RUN, *(field for name in names for field in task_class(name).Config.model_fields)}
    for section in settings:
        if section not in known:
            raise unknown_name("setting", section, sorted(known))
    for name in settings.get("tasks", {}):
        if name not in names:
            raise unknown_name("task of this run", name, names)


def _member(
    name: str,
    kind: type[Config],
    entry: Mapping[str, Any] | None,
    content: Mapping[str, Any],
    overridden: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings of a task: its recipe, the sections of the joint recipe, its entry there, and the overrides."""
    own = overridden.get("tasks", {}).get(name, {})
    entry = {"extends": f"{name}_tiny"} if entry is None else entry
    base = own.get("extends", entry.get("extends"))
    settings = {} if base is None else read(base)
    if base is not None and settings.get("task") != name:
        raise UserError(f"tasks.{name}.extends = {base} is a recipe of {settings.get('task')}, not of {name}.")
    for layer in (_sections(content, kind), entry, _sections(overridden, kind), own):
        settings = merge(settings, layer)
    return {key: value for key, value in settings.items() if key != "extends"}


def _sections(settings: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """The sections for a task's configuration among those of a joint recipe."""
    return {key: value for key, value in settings.items() if key in kind.model_fields and key not in OF_THE_RUN}
