"""Training several tasks as one run.

Each task is a `Run` of its own in RUN/tasks/NAME, as far as its data, parts, validation and scores go; their models
come to share a body, and one trainer in RUN trains all of them.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crossflow.core import distributed
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.joint import JointModel, JointObjective
from crossflow.core.lock import FolderLock
from crossflow.core.progress import Silent, TrainingProgress
from crossflow.core.settings import build, dump, flat, read
from crossflow.core.training.dry_run import DryRun
from crossflow.core.training.joint import JointData
from crossflow.core.training.trainer import Callbacks, Trainer, TrainResult
from crossflow.core.weights import BACKWARDS, MEMBERS, shapes_only
from crossflow.engine.folder import RunFolder, Snapshot
from crossflow.engine.joint.config import JointConfig
from crossflow.engine.train import FREE_TO_CHANGE, Estimate, Outcome, Run, TrainingSet, finished, refuse_earlier
from crossflow.tasks import task_class


@dataclass(frozen=True)
class JointOutcome:
    """How a joint run ended, and the scores of its tasks; none for a run that was stopped."""

    folder: Path
    result: TrainResult
    tasks: Mapping[str, Outcome]
    already_finished: bool = False


def train_jointly(
    config: JointConfig,
    folder: Path,
    *,
    resume: str | None = None,
    data_changed: bool = False,
    progress: TrainingProgress | None = None,
) -> JointOutcome:
    """Trains `config` into the run directory `folder`; the arguments are those of `JointRun.open`.

    outcome = train_jointly(load_joint("joint_tiny", tasks="t2i,depth"), Path("runs/joint"))
    outcome.tasks["depth"].scores.values["abs_rel"]
    """
    if resume is not None and (outcome := finished_jointly(config, folder)) is not None:
        return outcome
    return JointRun.open(config, folder, resume=resume, data_changed=data_changed, progress=progress).train()


def finished_jointly(config: JointConfig, folder: Path) -> JointOutcome | None:
    """The outcome of a joint run that has completed its steps and been scored on every task; None for any other.

    Raises UserError if the run has other settings than `config`.
    """
    outcomes = {name: finished(own, folder / MEMBERS / name) for name, own in config.members.items()}
    complete = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
    is_read = all(RunFolder(folder / BACKWARDS / name).read_scores() for name in config.backwards)
    if len(complete) < len(outcomes) or not is_read:
        return None
    _check_same(config, RunFolder(folder))
    result = next(iter(complete.values())).result
    return JointOutcome(folder, result, complete, already_finished=True)


def dry_run_jointly(config: JointConfig, *, progress: TrainingProgress | None = None) -> DryRun:
    """Parameters, memory, time and disk of a joint run, measured in a temporary folder that is removed afterwards."""
    scratch = distributed.on_main(lambda: Path(tempfile.mkdtemp(prefix="crossflow-dry-run-")))
    try:
        return JointRun.open(config, scratch / "run", progress=progress).dry_run()
    finally:
        if distributed.is_main():
            shutil.rmtree(scratch, ignore_errors=True)


def estimate_jointly(config: JointConfig) -> Estimate:
    """Parameters and memory of a joint run, without data and networks. Raises UserError for invalid settings."""
    tasks = {name: task_class(name).outline(own) for name, own in config.members.items()}
    with shapes_only():
        model = JointModel({name: task.build_model() for name, task in tasks.items()})
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    num = sum(parameter.numel() for parameter in model.parameters())
    memory = {"weights": size, "gradients": size, "optimizer": 2 * size, "ema": size}
    return Estimate(model.num_parameters(), num, memory)


@dataclass
class JointRun:
    """A joint run directory with the runs of its tasks, ready to train: `JointRun.open` makes one."""

    config: JointConfig
    folder: Path
    tasks: Mapping[str, Run]
    objective: JointObjective
    progress: TrainingProgress
    resume: str | None
    before: Snapshot
    lock: FolderLock
    backwards: dict[str, Run] = field(default_factory=dict)
    """The runs of the tasks that run the flow of another backwards, which follow the training."""

    @property
    def model(self) -> JointModel:
        """The generators of all tasks."""
        return self.objective.model

    @classmethod
    def open(
        cls,
        config: JointConfig,
        folder: Path,
        *,
        resume: str | None = None,
        data_changed: bool = False,
        progress: TrainingProgress | None = None,
    ) -> "JointRun":
        """Prepares a new joint run in `folder`, or reads back the one to `resume`; as `Run.open`, for every task."""
        distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
        distributed.device()  # joins the processes of a launcher
        run, progress = RunFolder(folder), progress if progress is not None and distributed.is_main() else Silent()
        before, lock = run.snapshot(), FolderLock(folder)
        distributed.on_main(lock.acquire)
        resumes = resume is not None and bool(run.checkpoints)
        try:
            distributed.on_main(lambda: _check_same(config, run) if resumes else refuse_earlier(run, resume))
            tasks = {}
            for name, own in config.members.items():
                progress.note(f"Preparing {name}.")
                place = folder / MEMBERS / name
                tasks[name] = Run.prepare(
                    own, place, progress, resume=resume if resumes else None, data_changed=data_changed
                )
                if tasks[name].task.reads_trained_weights:
                    raise UserError(
                        f"The task {name} trains what makes its targets beside the flow, which a joint run does not "
                        f"do: set tasks.{name}.{name}.joint=false."
                    )
            objective = JointObjective({name: own.objective for name, own in tasks.items()}, config.weights)
            # Last: it says that the folder holds a run.
            distributed.on_main(lambda: write_atomically(run.config, dump(config)))
        except BaseException:
            if distributed.is_main():
                before.restore()
                lock.release()
            raise
        return cls(config, folder, tasks, objective, progress, resume, before, lock)

    def trainer(self) -> Trainer:
        """A trainer of all tasks, which can be used once."""
        parts = len(self.tasks) * distributed.world_size() * self.config.train.accumulate
        if self.config.train.batch_size % parts:
            raise UserError(
                f"train.batch_size = {self.config.train.batch_size} is divided evenly among {len(self.tasks)} tasks, "
                f"{distributed.world_size()} process(es) and {self.config.train.accumulate} accumulated part(s): give "
                f"a multiple of {parts}, such as {parts * max(1, math.ceil(self.config.train.batch_size / parts))}."
            )
        data = {name: TrainingSet(run.data, run.task) for name, run in self.tasks.items()}
        return Trainer(
            self.config.train,
            self.objective,
            JointData(data, {name: run.task.latent_shape for name, run in self.tasks.items()}),
            run_dir=self.folder,
            seed=self.config.seed,
            latent_shape=(),
            callbacks=Callbacks(self.validate, self.sample, progress=self.progress),
            settings=self.config.model_dump(mode="json"),
        )

    def validate(self, step: int) -> dict[str, float]:
        """The held-out numbers of each task by `TASK/NAME`."""
        return {
            f"{name}/{part}": value for name, run in self.tasks.items() for part, value in run.validate(step).items()
        }

    def sample(self, step: int) -> None:
        """Writes a picture of outputs for each task, into its own folder."""
        for run in self.tasks.values():
            run.sample(step)

    def dry_run(self) -> DryRun:
        """Parameters, memory, time and disk that the run takes."""
        try:
            return self.trainer().dry_run(resume=self.resume)
        finally:
            self.lock.release()

    def train(self) -> JointOutcome:
        """Trains, then scores the averaged weights on the validation split of every task.

        Raises UserError for data that cannot be scored, losses that are not finite, or a full disk.
        """
        try:
            return self._train()
        finally:
            self.lock.release()

    def _train(self) -> JointOutcome:
        try:
            for run in self.tasks.values():
                run.open_validation()
            distributed.on_main(self._forget_backwards)
            trainer = self.trainer()
            result = trainer.run(self.resume)
        except BaseException:
            if distributed.is_main():
                self.before.restore()
            raise
        outcomes = {}
        if result.status != "stopped":
            with trainer.learner.averaged():
                if distributed.is_main():
                    outcomes = {name: run.score(result) for name, run in self.tasks.items()}
            outcomes |= {name: self._learn_backwards(name) for name in self.config.backwards}
        return JointOutcome(self.folder, result, outcomes)

    def _forget_backwards(self) -> None:
        """Removes what has been learned from an earlier state of the flow."""
        shutil.rmtree(self.folder / BACKWARDS, ignore_errors=True)

    def _learn_backwards(self, name: str) -> Outcome:
        """The run of a task that needs no flow of its own, from the averaged weights of the one it runs backwards."""
        self.progress.note(f"Learning {name} from the flow of {self.config.directions[name]}.")
        kind, flow = task_class(name), self.config.directions[name]
        settings = kind.backwards(
            self.config.backwards[name], self.config.members[flow], str((self.folder / MEMBERS / flow).absolute())
        )
        run = Run.open(build(kind.Config, settings), self.folder / BACKWARDS / name, progress=self.progress)
        self.backwards[name] = run
        return run.train()


def _check_same(config: JointConfig, run: RunFolder) -> None:
    """Raises UserError unless the joint run has the settings of `config`; each task compares its own."""
    before, after = flat(read(run.path)), flat(config.model_dump(mode="json"))
    different = [
        f"{name} ({before.get(name)} -> {after.get(name)})"
        for name in sorted((before.keys() | after.keys()) - FREE_TO_CHANGE - {"weights"})  # of a run without any
        if before.get(name) != after.get(name)
    ]
    if different:
        raise UserError(
            f"The run in {run.path} was started with other settings: {', '.join(different)}. "
            "Resume with its own settings, or start a new run in another --output."
        )
