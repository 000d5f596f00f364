"""Training a run: builds task, model, objective and trainer, runs them, and leaves a complete run directory."""

import copy
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core import distributed
from crossflow.core.batch import Batch, Record
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.lock import FolderLock
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Order, keyed_generator
from crossflow.core.objective import Objective
from crossflow.core.precision import autocast
from crossflow.core.progress import Silent, TrainingProgress
from crossflow.core.settings import dump, flat
from crossflow.core.solvers import SOLVERS
from crossflow.core.training.dry_run import DryRun
from crossflow.core.training.trained import adapt
from crossflow.core.training.trainer import Callbacks, Trainer, TrainResult
from crossflow.core.weights import shapes_only
from crossflow.data.cases import Case, Tile
from crossflow.data.dataset import Examples
from crossflow.data.images import save_png
from crossflow.data.readers import resolve_spec
from crossflow.engine.folder import RunFolder, Snapshot
from crossflow.engine.provenance import changed, expect_same, manifest, open_data
from crossflow.engine.sample import Pipeline
from crossflow.engine.score import Scores, arrange, held_out_loss, overlap_with_training, score, show
from crossflow.engine.start_from import start_from
from crossflow.engine.teacher import inherited_task, teacher_of
from crossflow.networks.hub import run_folder
from crossflow.networks.run_weights import weights_of
from crossflow.tasks import load_config, task_class
from crossflow.tasks.base import Example, Scoring, Task

NUM_SAMPLES = 16
"""Cases of a sample grid."""


FREE_TO_CHANGE = {
    f"train.{name}"
    for name in (
        "steps",
        "save_every",
        "keep",
        "eval_every",
        "eval_scores",
        "sample_every",
        "log_every",
        "num_workers",
        "compile",
        "trackers",
        "max_minutes",
        "max_bad_steps",
        "grace_seconds",
        "timeout_minutes",
        "auto_micro_batch",
        "sharding",
        "background_saves",
        "offload",
    )
} | {"data.train", "data.val", "interval.teacher", "finetune.base", "train.parts_from"}
"""Settings that may change when a run is resumed: its length, its outputs, how fast it is, and the places of its
teacher, its base and its data, of which the content is compared instead.
"""


@dataclass(frozen=True)
class Outcome:
    """The result of `train`: how the run ended, and its final scores beside those of the trivial baseline.

    already_finished: the run was complete before, and nothing was trained or scored again.
    """

    folder: Path
    result: TrainResult
    scores: Scores | None = None
    baseline: dict[str, float] = field(default_factory=dict)
    already_finished: bool = False


class TrainingSet:
    """Examples of a task with the task's collation: what the trainer reads."""

    def __init__(self, examples: Examples, task: Task) -> None:
        self.examples, self.task = examples, task

    def __getstate__(self) -> dict[str, Any]:
        """What a loader worker that is started anew gets: weights, which it never needs, keep their shapes alone."""
        weights = [weight for network in self.task.networks for weight in _weights(network)]
        bare = {id(weight): weight.detach().to("meta") for weight in weights}
        return self.__dict__ | {"task": copy.deepcopy(self.task, bare)}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: tuple[int, int]) -> Example:
        return self.examples[place]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Example]:
        return self.examples.__getitems__(places)

    def order(self, seed: int, epoch: int) -> Order:
        """The order of the examples in an epoch."""
        return self.examples.order(seed, epoch)

    def collate(self, examples: Sequence[Example]) -> Record:
        """The record of some examples; see `Task.collate`."""
        return self.task.collate(examples)

    def batch(self, record: Record) -> Batch:
        """The training batch of a record, its frozen networks on a GPU in the run's precision; see `Task.prepare`."""
        precision = self.task.config.train.precision
        on_cpu = self.task.device.type == "cpu"  # where results keep their bits, and decoding takes the time
        with autocast(self.task.device, "float32" if on_cpu or precision == "no" else precision):
            return self.task.prepare(record)

    @property
    def in_workers(self) -> bool:
        """Whether loader workers speed up loading: not where one call makes many items, which are kept in memory."""
        return self.examples.reader.batch_hint == 1

    @property
    def ahead(self) -> bool:
        """Whether batches may be made ahead of the step."""
        return not self.task.reads_trained_weights


def _weights(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def train(
    config: Config,
    folder: Path,
    *,
    resume: str | None = None,
    data_changed: bool = False,
    progress: TrainingProgress | None = None,
) -> Outcome:
    """Trains `config` into the run directory `folder`; the arguments are those of `Run.open`.

    A finished run that is resumed is neither trained nor scored again.

        outcome = train(load_config("sr_tiny", ["train.steps=200"]), Path("runs/sr"))
        outcome.scores.values["psnr_y"]
    """
    if resume is not None and (outcome := finished(config, folder)) is not None:
        return outcome
    return Run.open(config, folder, resume=resume, data_changed=data_changed, progress=progress).train()


def finished(config: Config, folder: Path) -> Outcome | None:
    """The outcome of a run that has completed its steps and been scored; None for any other.

    Raises UserError if the run has other settings than `config`.
    """
    run = RunFolder(folder)
    step, content = run.last_step, run.read_scores()
    if step is None or step < config.train.steps or content.get("step") != step:
        return None
    _check_same(config, run)
    intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
    scores = Scores(content["scores"], intervals, rows=[], pages=[])
    result = TrainResult("finished", step, "", run.checkpoints[0])
    return Outcome(folder, result, scores, content["baseline"], already_finished=True)


def dry_run(config: Config, *, progress: TrainingProgress | None = None) -> DryRun:
    """Parameters, memory, time and disk of a run, measured in a temporary folder that is removed afterwards."""
    scratch = distributed.on_main(lambda: Path(tempfile.mkdtemp(prefix="crossflow-dry-run-")))
    try:
        return Run.open(config, scratch / "run", progress=progress).dry_run()
    finally:
        if distributed.is_main():
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Estimate:
    """The size of a training as far as its settings determine it: parameters by part, and bytes on each device.

    Learned parts of the losses, activations and frozen networks come on top.
    """

    parameters: dict[str, int]
    num_trained: int
    """Number of the parameters that are trained."""
    memory: dict[str, int]


def estimate(config: Config) -> Estimate:
    """Parameters and memory of a training, without its data and networks. Raises UserError for invalid settings."""
    model = outline(task_class(config.task).outline(config))
    size = sum(parameter.nbytes for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bytes_trained = sum(parameter.nbytes for parameter in trained)
    memory = {"weights": size, "gradients": bytes_trained, "optimizer": 2 * bytes_trained, "ema": bytes_trained}
    return Estimate(model.num_parameters(), sum(parameter.numel() for parameter in trained), memory)


def outline(task: Task) -> CrossFlow:
    """The model of a run on the meta device, with the parameters that it trains."""
    with shapes_only():
        model = task.build_model()
        if (base := task.config.finetune.base) is not None:
            shapes = {name: weight.shape for name, weight in weights_of(run_folder(base)).state.items()}
            new = {name for name, weight in model.named_parameters() if shapes.get(name) != weight.shape}
            adapt(model, task.config.finetune, new)
    return model


@dataclass
class Run:
    """A run directory with its task, model and data, ready to train: `Run.open` makes one.

        run = Run.open(load_config("depth_tiny"), Path("runs/depth"))
        run.model.num_parameters()
        outcome = run.train()

    `objective` holds the model and the learned parts of its losses.
    """

    config: Config
    folder: Path
    task: Task
    data: Examples
    objective: Objective
    progress: TrainingProgress
    resume: str | None = None
    before: Snapshot | None = None
    """What the folder held before a new run was prepared in it."""
    lock: FolderLock | None = None
    """The lock of the folder, held by the main process until `train` ends."""

    @property
    def model(self) -> CrossFlow:
        """The generator that is trained."""
        return self.objective.model

    @classmethod
    def open(
        cls,
        config: Config,
        folder: Path,
        *,
        resume: str | None = None,
        data_changed: bool = False,
        progress: TrainingProgress | None = None,
    ) -> "Run":
        """Prepares a new run in `folder`, or reads back the one to `resume`.

        The folder is locked until `train` ends. A run that fails before it has trained anything leaves the folder as it
        was.

        Args:
            resume: None for a new run; "auto" for the newest intact checkpoint of `folder`, if there is one; or the
                folder of a checkpoint.
            data_changed: accept other training data than the run began with.
            progress: receives notes and numbers on the main process.

        Raises:
            UserError: invalid settings or data, a folder that holds a run or is in use by another process, or a resumed
                run with other settings.
        """
        distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
        distributed.device()  # joins the processes of a launcher
        SOLVERS.get(config.sample.solver)  # an unknown name fails here rather than after hours of training
        run, progress = RunFolder(folder), progress if progress is not None and distributed.is_main() else Silent()
        before, lock = run.snapshot(), FolderLock(folder)
        distributed.on_main(lock.acquire)
        resumes = resume is not None and bool(run.checkpoints)
        try:
            distributed.on_main(lambda: None if resumes else refuse_earlier(run, resume))
            opened = cls.prepare(
                config, folder, progress, resume=resume if resumes else None, data_changed=data_changed
            )
        except BaseException:
            if distributed.is_main():
                before.restore()
                lock.release()
            raise
        return replace(opened, resume=resume, before=before, lock=lock)

    @classmethod
    def prepare(
        cls, config: Config, folder: Path, progress: TrainingProgress, *, resume: str | None, data_changed: bool
    ) -> "Run":
        """As `open`, in a folder that the caller has locked; resume: None for a new run, which has no checkpoints."""
        kind, resumes = task_class(config.task), resume is not None
        # Relative paths of a resumed run refer to the directory where it was started.
        data = open_data(kind, config, "train", run=folder if resumes else None)
        preparation = _Preparation(config, RunFolder(folder), kind, data, progress)
        # On the main process alone: a slower process would take the new files for an existing run.
        with distributed.waiting_for("what the first process prepares"):
            distributed.on_main(lambda: preparation.resume(data_changed) if resumes else preparation.start())
        # Read back even by the process that wrote it, so that a resumed run starts from the very same bits.
        device = distributed.device()
        task = kind.load(config, folder).to(device, offload=config.train.offload and device.type != "cpu")
        task.accept(data)
        objective = _build_objective(config, task, progress, start=not resumes)
        return cls(config, folder, task, data, objective, progress, resume)

    # -- training

    def trainer(self) -> Trainer:
        """A trainer of this run, which can be used once."""
        return Trainer(
            self.config.train,
            self.objective,
            TrainingSet(self.data, self.task),
            run_dir=self.folder,
            seed=self.config.seed,
            latent_shape=self.task.latent_shape,
            callbacks=Callbacks(self.validate, self.sample, progress=self.progress),
            settings=self.config.model_dump(mode="json"),
        )

    def dry_run(self) -> DryRun:
        """Parameters, memory, time and disk that the run takes."""
        try:
            return self.trainer().dry_run(resume=self.resume)
        finally:
            self.release()

    def release(self) -> None:
        """Unlocks the folder, as `train` and `dry_run` do at their end."""
        if self.lock is not None:
            self.lock.release()

    def train(self) -> Outcome:
        """Trains, then scores the averaged weights on the validation split beside the trivial baseline.

        Raises UserError for data that cannot be scored, losses that are not finite, or a full disk.
        """
        try:
            return self._train()
        finally:
            self.release()

    def _train(self) -> Outcome:
        """As `train`, with the folder locked."""
        try:
            self.open_validation()
            trainer = self.trainer()
            result = trainer.run(self.resume)
        except BaseException:
            if self.before is not None and distributed.is_main():
                self.before.restore()
            raise
        if result.status == "stopped":
            return Outcome(self.folder, result)
        with trainer.learner.averaged():
            return self.score(result) if distributed.is_main() else Outcome(self.folder, result)

    def open_validation(self) -> None:
        """Opens the data before training, so that data without scores fail at once rather than after hours."""
        self.validation  # noqa: B018
        if distributed.is_main():
            self.cases  # noqa: B018

    def score(self, result: TrainResult) -> Outcome:
        """Scores the model as it is, beside the trivial baseline, and writes the scores and their pictures."""
        self.progress.note("Scoring the averaged weights on the validation split.")
        seed = self.config.seed
        scores = score(self._pipeline(), self.scoring, self.cases, seed=seed, num_tiles=NUM_SAMPLES)
        scores.notes.extend(overlap_with_training(self.data, self.validation))
        self._write_sheet(scores.pages, "final.png")
        baseline = self.scoring.baseline(lambda: self.data, self.cases)
        content = {"step": result.step, "scores": scores.values, "intervals": scores.intervals, "baseline": baseline}
        RunFolder(self.folder).write_scores(content)
        return Outcome(self.folder, result, scores, baseline)

    @functools.cached_property
    def cases(self) -> list[Case]:
        """The cases scored during and after training: `data.num_val` of the validation split."""
        return self.scoring.cases(self.validation, self.config.data.num_val).all()

    @functools.cached_property
    def scoring(self) -> Scoring:
        """How the run is scored: by the task's own rules."""
        return self.task.scoring(seed=self.config.seed)

    @functools.cached_property
    def validation(self) -> Examples:
        """The first `data.num_val` items of the validation split."""
        num, run = self.config.data.num_val, self.folder if self.resume is not None else None
        examples = open_data(type(self.task), self.config, "val", run=run, limit=num, options=self.scoring.options)
        self.task.accept(examples)
        return examples

    def _pipeline(self) -> Pipeline:
        """The model as it is, in float32, so that the scores of a run do not depend on where it was trained."""
        device = str(next(self.model.parameters()).device)
        return Pipeline(self.task, self.model, folder=self.folder, weights="ema", device=device, precision="float32")

    def validate(self, step: int) -> dict[str, float]:
        """The flow loss on held-out items, with their own sources and with those of other items; with
        `train.eval_scores` also the scores of their outputs.
        """
        losses = held_out_loss(self.task, self.model, self.validation)
        if not self.config.train.eval_scores:
            return losses
        values = distributed.on_main(
            lambda: score(self._pipeline(), self.scoring, self.cases, seed=self.config.seed, num_tiles=0).values
        )
        return losses | values

    def sample(self, step: int) -> None:
        """Writes a picture of outputs for the first validation items."""
        distributed.on_main(lambda: self._show(step))

    def _show(self, step: int) -> None:
        pages = show(self._pipeline(), self.scoring, self.cases[:NUM_SAMPLES], seed=self.config.seed)
        path = self._write_sheet(pages, f"step_{step:08d}.png")
        self.progress.note(f"Samples: {path}")

    def _write_sheet(self, pages: list[list[Tile]], name: str) -> Path:
        path = RunFolder(self.folder).sample_file(name)
        return save_png(arrange(pages, cell=128), path, {"seed": self.config.seed, "task": self.config.task})


def refuse_earlier(run: RunFolder, resume: str | None) -> None:
    """Raises UserError if the folder of a new run holds a training, unless that is to be resumed."""
    if run.has_progress and resume is None:
        some = " with checkpoints" if run.checkpoints else ""
        raise UserError(
            f"{run.path} already holds a run{some}. Continue it with "
            f"`crossflow train --output {run.path} --resume auto`, or choose another --output."
        )


@dataclass(frozen=True)
class _Preparation:
    """Everything before the flow: learned once by the main process, read by all processes from the run directory."""

    config: Config
    run: RunFolder
    task: type[Task]
    data: Examples
    progress: TrainingProgress

    def start(self) -> None:
        """Prepares a new run."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        note = self.progress.note
        inherited = inherited_task(self.task, self.config, self.data, note)
        task = inherited or self.task.learn(self.config, self.data, note)
        self._check_patches(task.latent_shape)
        task.parts.save(self.run.path)
        self.run.write_manifest(manifest(self.config, self.data))
        write_atomically(self.run.config, dump(self.config))  # last: it says that the folder holds a run

    def resume(self, data_changed: bool) -> None:
        """Checks that settings and data are those of the interrupted run, and records changed places of data."""
        _check_same(self.config, self.run)
        if data_changed:
            self.run.write_manifest(changed(self.run, self.data))
        else:
            expect_same(self.run, self.data)
        write_atomically(self.run.config, dump(self._with_absolute_data(load_config(self.run.config))))

    def _check_patches(self, shape: tuple[int, ...]) -> None:
        patch = self.config.backbone.grain
        if len(shape) == 3 and (shape[1] % patch or shape[2] % patch):
            raise UserError(
                f"Latents of {shape[1]} x {shape[2]} cannot be cut into the backbone's patches of {patch}: choose "
                f"another data.image_size (now {self.config.data.image_size}), backbone.patch, or, for dimr, "
                "backbone.num_stages."
            )

    def _with_absolute_data(self, before: Config) -> Config:
        """The configuration with changed data specs made absolute, since relative paths of a run refer to the directory
        in which it was started.
        """
        old, new = before.data.model_dump(), self.config.data.model_dump()
        moved = {
            name: resolve_spec(new[name], Path.cwd(), prefer_current=False)
            for name in ("train", "val")
            if new[name] is not None and new[name] != old[name]
        }
        return self.config.model_copy(update={"data": self.config.data.model_copy(update=moved)})


def _build_objective(config: Config, task: Task, progress: TrainingProgress, *, start: bool) -> Objective:
    """The objective around a freshly initialised model; start: with the weights of `train.start_from`, if set."""
    torch.manual_seed(keyed_generator("weights", config.seed).initial_seed())
    model = task.build_model()
    objective = task.build_objective(model)
    source, base = config.train.start_from, config.finetune.base
    if source is not None and start:
        progress.note(start_from(source, objective).describe(source))
    if base is not None:  # also of a resumed run, whose checkpoints have none of its weights
        copied = start_from(base, objective, config.finetune.checksum)
        if start:
            progress.note(copied.describe(base))
        adapt(model, config.finetune, copied.new)
    if (teacher := teacher_of(task)) is not None:
        objective.teach(teacher)
    if config.source.frozen:
        if source is None:
            raise UserError(
                "source.frozen=true would keep a source encoder that has learned nothing: set train.start_from to the "
                "run whose encoder is to be used."
            )
        model.source_encoder.requires_grad_(False)
    return objective


def _check_same(config: Config, run: RunFolder) -> None:
    """Raises UserError unless the run has the settings of `config`, but for those in FREE_TO_CHANGE."""
    before, after = (flat(value.model_dump(mode="json")) for value in (load_config(run.config), config))
    different = [
        f"{name} ({before.get(name)} -> {value})"
        for name, value in after.items()
        if before.get(name) != value and name not in FREE_TO_CHANGE
    ]
    if different:
        raise UserError(
            f"The run in {run.path} was started with other settings: {', '.join(different)}. "
            "Resume with its own settings, or start a new run in another --output."
        )
