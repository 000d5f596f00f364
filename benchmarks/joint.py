"""What tasks gain or lose by one backbone: a joint run beside runs of each task alone, in equal time.

Three sides take the same time. `joint` is the joint run. `separate` trains each task alone for its share of that time,
with the same network and settings, so with about as many samples of each task, but with several networks. `separate,
narrower` does so with a narrower backbone, so that all networks together have as many parameters as the joint one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.ablation.results import better
from crossflow.benchmarks.estimate import Estimate
from crossflow.benchmarks.report import page
from crossflow.core.backbones import BACKBONES
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.lock import FolderLock
from crossflow.core.output import record
from crossflow.core.progress import TrainingProgress
from crossflow.core.settings import build, merge
from crossflow.core.training.dry_run import DryRun
from crossflow.core.weights import MEMBERS
from crossflow.engine.folder import RunFolder
from crossflow.engine.joint.config import JointConfig, load_joint
from crossflow.engine.joint.run import dry_run_jointly, estimate_jointly, train_jointly
from crossflow.engine.provenance import environment
from crossflow.engine.train import dry_run, estimate, train
from crossflow.tasks import task_class

JOINT, SEPARATE, NARROWER = "joint", "separate", "separate, narrower"
SIDES = (JOINT, SEPARATE, NARROWER)
RESULTS, PLAN = "joint.json", "plan.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What the sides share."""

    minutes: float
    """Minutes of optimizer steps of each side and seed, all tasks together."""
    clock: str = "minutes"
    """minutes: by the clock; cpu minutes: of all threads, on a machine that others use too."""
    num_items: int = 240
    """Items of each score."""
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Comparison:
    """A joint recipe with its overrides, and the folder of its runs and results."""

    source: str
    overrides: tuple[str, ...]
    tasks: str | None
    budget: Budget
    folder: Path

    def config(self, *more: str, quick: bool = False) -> JointConfig:
        """The joint configuration with further overrides."""
        schedule = ("train.eval_every=0", "train.sample_every=0", f"data.num_val={self.budget.num_items}")
        return load_joint(self.source, (*self.overrides, *schedule, *more), self.tasks, quick=quick)

    def place(self, side: str, seed: int, task: str) -> Path:
        """The folder with the scores of a task."""
        name = side.replace(", ", "-")
        runs = self.folder / "runs"
        return runs / f"{name}-seed{seed}" / MEMBERS / task if side == JOINT else runs / f"{name}-{task}-seed{seed}"


def compare(comparison: Comparison, say: Say, progress: TrainingProgress | None = None) -> tuple[Path, Path]:
    """Trains all sides, continuing what the folder holds; returns the pages, which are rewritten after each seed.

    Raises UserError for invalid settings, and for a folder with another comparison.
    """
    with FolderLock(comparison.folder):
        plan = _keep_plan(comparison, say)
        for seed in comparison.budget.seeds:
            steps = plan["steps"][JOINT]
            say(f"{JOINT}, seed {seed}: {steps} steps.")
            config = comparison.config(f"train.steps={steps}", f"train.save_every={steps}", f"seed={seed}")
            root = comparison.folder / "runs" / f"{JOINT}-seed{seed}"
            train_jointly(config, root, resume="auto", progress=progress)
            for side in SIDES[1:]:
                for name, own in config.members.items():
                    steps = plan["steps"][f"{side} {name}"]
                    say(f"{side}, {name}, seed {seed}: {steps} steps.")
                    alone = _alone(own, None if side == SEPARATE else plan["width"], steps)
                    train(alone, comparison.place(side, seed, name), resume="auto", progress=progress)
            pages = write(comparison, plan)
    return pages


def _alone(config: Config, width: int | None, steps: int | None = None) -> Config:
    """A task of a joint run as a run of its own; width: of its backbone, None for the same."""
    changes: dict[str, Any] = {} if width is None else {"backbone": {"width": width}}
    if steps is not None:
        changes["train"] = {"steps": steps, "save_every": steps}
    return build(type(config), merge(config.model_dump(), changes))


def equal_width(config: JointConfig) -> int:
    """The width at which separate networks have as many parameters as the joint one: the nearest multiple of four times
    the heads.
    """
    total = sum(estimate_jointly(config).parameters.values())
    backbone = next(iter(config.members.values())).backbone
    row = BACKBONES.get(backbone.name).sizes[backbone.size]
    heads, full = backbone.heads or row.heads, backbone.width or row.width
    sizes = {
        width: sum(sum(estimate(_alone(own, width)).parameters.values()) for own in config.members.values())
        for width in range(4 * heads, full + 1, 4 * heads)
    }
    return min(sizes, key=lambda width: abs(sizes[width] - total))


def _keep_plan(comparison: Comparison, say: Say) -> dict[str, Any]:
    """The steps of each training and the narrower width, measured once and kept in the folder."""
    budget, path = comparison.budget, comparison.folder / PLAN
    fixed = {**{name: value for name, value in asdict(budget).items() if name != "seeds"},
             "recipe": comparison.source, "settings": list(comparison.overrides),
             "tasks": comparison.config().task}  # fmt: skip
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if changed := [
            f"{name} {plan.get(name)} -> {value}" for name, value in fixed.items() if plan.get(name) != value
        ]:
            raise UserError(
                f"{comparison.folder} holds a comparison with other settings: {', '.join(changed)}. Use another "
                "--output."
            )
        return plan
    config = comparison.config(quick=True)
    width, share = equal_width(config), budget.minutes / len(config.members)
    say("Measuring the time per step of each side.")
    steps = {JOINT: _steps_in(dry_run_jointly(config), budget, budget.minutes)}
    for side in SIDES[1:]:
        for name, own in config.members.items():
            cost = dry_run(_alone(own, None if side == SEPARATE else width))
            steps[f"{side} {name}"] = _steps_in(cost, budget, share)
    parameters = {JOINT: sum(estimate_jointly(config).parameters.values())}
    for side in SIDES[1:]:
        members = [_alone(own, None if side == SEPARATE else width) for own in config.members.values()]
        parameters[side] = sum(sum(estimate(own).parameters.values()) for own in members)
    plan = {**fixed, "width": width, "steps": steps, "parameters": parameters}
    write_atomically(path, json.dumps(plan, indent=1))
    return plan


def _steps_in(cost: DryRun, budget: Budget, minutes: float) -> int:
    seconds = cost.seconds_per_step if budget.clock == "minutes" else cost.cpu_seconds_per_step
    return max(1, round(60 * minutes / seconds))


def write(comparison: Comparison, plan: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes joint.md, joint.html and joint.json from the trainings so far."""
    budget, folder = comparison.budget, comparison.folder
    names = list(comparison.config().members)
    scores = {(side, name): _scores(comparison, side, name) for side in SIDES for name in names}
    rows: list[Sequence[page.Cell]] = []
    for name in names:
        for score in task_class(name).Scoring.headline:
            cells = [str(scores[side, name][score]) if score in scores[side, name] else "-" for side in SIDES]
            rows.append([name, f"{score}{' ↑' if better(score) == 'higher' else ' ↓'}", *cells])
    what = "minutes by the clock" if budget.clock == "minutes" else "minutes of processor time, all threads together"
    share = budget.minutes / len(names)
    sizes: list[Sequence[page.Cell]] = [
        [side, f"{plan['parameters'][side] / 1e6:.2f}M", _steps_in_words(plan["steps"], side, names)] for side in SIDES
    ]
    blocks: list[page.Block] = [
        page.Text(
            f"Each side was trained for {budget.minutes:g} {what}, preparations and scores not counted: {JOINT} in one "
            f"run, the others {share:.3g} for each task. Seeds {', '.join(map(str, budget.seeds))}; scores on "
            f"{budget.num_items} items of the validation split; ± is half of the 95 % interval of the mean over seeds."
        ),
        page.Grid(["side", "parameters in all", "steps"], sizes),
        page.Text(f"{NARROWER}: backbone.width={plan['width']}."),
        page.Grid(["task", "score", *SIDES], rows),
    ]
    content = {
        "plan": dict(plan),
        "seeds": budget.seeds,
        "scores": {
            side: {name: {score: asdict(value) for score, value in scores[side, name].items()} for name in names}
            for side in SIDES
        },
        **environment(),
    }
    write_atomically(folder / RESULTS, json.dumps(content, indent=1))
    pages = page.write(folder, "joint", f"{', '.join(names)}: one backbone or several, in equal time", blocks)
    record(folder, {path.name for path in (*pages, folder / RESULTS)})
    return pages


def _steps_in_words(steps: Mapping[str, int], side: str, names: Sequence[str]) -> str:
    return str(steps[JOINT]) if side == JOINT else ", ".join(f"{name} {steps[f'{side} {name}']}" for name in names)


def _scores(comparison: Comparison, side: str, task: str) -> dict[str, Estimate]:
    """The headline scores of a task over the seeds that have been trained."""
    contents = [RunFolder(comparison.place(side, seed, task)).read_scores() for seed in comparison.budget.seeds]
    measured = [content["scores"] for content in contents if content]
    names = [name for name in task_class(task).Scoring.headline if measured and measured[0].get(name) is not None]
    return {name: Estimate.of([each[name] for each in measured]) for name in names}
