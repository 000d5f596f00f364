"""The training loop: a function of (seed, step) alone, so that a resumed run equals an uninterrupted one.

One optimizer step: every process takes its slice of the step's positions (see stream.py) in `accumulate` parts, the
mean of the parts' losses is differentiated, the gradient clipped, the optimizer applied at the rate of the schedule,
and the average updated (see learner.py). All generators are seeded from (seed, step, rank) before each step and each
evaluation, so neither validations nor resuming change the following steps, and no generator state is kept.
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from crossflow.core import distributed
from crossflow.core.batch import Batch, Record
from crossflow.core.config import TrainConfig
from crossflow.core.distributed import Abandoned, waiting_for
from crossflow.core.errors import UserError
from crossflow.core.files import remove_temporaries
from crossflow.core.joint import JointBatch
from crossflow.core.noise import key
from crossflow.core.progress import Silent, TrainingProgress
from crossflow.core.settings import flat
from crossflow.core.training import checkpoint as state
from crossflow.core.training.bad_steps import BadSteps
from crossflow.core.training.dry_run import WARM_UP, DryRun, measure, memory
from crossflow.core.training.failures import NoMemory, explained, memory_in_words
from crossflow.core.training.joint import micro_batches
from crossflow.core.training.learner import Learner, StepResult
from crossflow.core.training.meter import Flags, Meter
from crossflow.core.training.optim import learning_rate
from crossflow.core.training.prepare import (
    build_accelerator,
    check_sharding,
    check_sizes,
    seed_everything,
)
from crossflow.core.training.saving import WEIGHTS, Saver
from crossflow.core.training.shards import consolidate
from crossflow.core.training.signals import StopRequest
from crossflow.core.training.stream import (
    Loaded,
    MicroBatch,
    Positions,
    TrainingData,
    loaded,
    num_loaders,
    on_device,
)
from crossflow.core.training.tracking import MetricsFile, check_trackers

logger = logging.getLogger(__name__)

# After this many fp16 overflows in a row, each of which halves the scale, the scale is not the cause.
_MAX_OVERFLOWS = 50


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    step: int
    """Completed optimizer steps."""
    reason: str
    """The reason of a stop: SIGTERM, SIGINT, max_minutes; empty when finished."""
    checkpoint: Path
    """The checkpoint written at the end."""
    losses: dict[str, float] = field(default_factory=dict)
    """The numbers of the last training line of metrics.jsonl."""
    scores: dict[str, float] = field(default_factory=dict)
    """The numbers of the last validation."""
    seconds: float = 0.0
    num_steps: int = 0
    """Optimizer steps of this training alone; 0 for a resumed run that had them all."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that a trainer calls. `validate` and `sample` run on every rank, with averaged weights, in evaluation
    mode and without gradients; they write files on the main process only (`distributed.is_main()`).
    """

    validate: Callable[[int], Mapping[str, float]] | None = None
    """step -> numbers, logged as kind "val"."""
    sample: Callable[[int], object] | None = None
    """Called with the step."""
    on_save: Callable[[int], object] | None = None
    """Called with the step on the main process, after each checkpoint."""
    progress: TrainingProgress | None = None
    """An observer, called on the main process."""


class Trainer:
    """Trains `objective` on `data` in a run directory by `run`; `dry_run` measures the cost beforehand.

        trainer = Trainer(config.train, objective, data, run_dir="runs/mine", seed=0, latent_shape=(4, 32, 32))
        result = trainer.run(resume="auto")

    config: the `train` section. objective: module with the generator as `.model`; `objective(batch, noise)` returns
    scalar losses by name, among them "loss", and `objective.draw(batches, noises)` prepares all parts of a step
    together; `objective.leaves_parameters_out` says whether some parameters get no gradient. data: see `TrainingData`.
    run_dir: the folder of metrics.jsonl, checkpoints/ and the weights.
    latent_shape: of a sample of z0, for the noise; `JointData` knows that of each task. settings: the configuration
    that trackers record.

    A step is the same however it is divided into accumulated parts and processes: the same noise, the same
    unconditional samples and targets, and the losses of one process with the whole batch, as far as they are means or
    sums over samples. A contrastive loss takes its negatives from one part of all processes, and a mean over the
    tokens of several texts is taken in each part. Raises UserError for invalid settings.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: nn.Module,
        data: TrainingData,
        *,
        run_dir: Path | str,
        seed: int,
        latent_shape: Sequence[int],
        callbacks: Callbacks | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_trackers(config.trackers)
        self.config, self.seed, self.settings = config, seed, dict(settings or {})
        self.run_dir = Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        # It joins the processes of a launcher.
        self.accelerator = build_accelerator(config, self.run_dir, objective.leaves_parameters_out)  # type: ignore[arg-type]
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.callbacks = callbacks or Callbacks()
        observer = self.callbacks.progress
        self.progress: TrainingProgress = observer if observer is not None and self.rank == 0 else Silent()
        check_sizes(config, len(data), self.world_size)
        check_sharding(config, reads_trained_weights=not data.ahead)
        self.data = micro_batches(data, seed, latent_shape)
        self.num_examples = len(data)
        self.learner = Learner(config, objective, self.accelerator)
        self.learner.interruptible = lambda: self._abandoning(config.grace_seconds / 2)
        self.device = self.learner.device
        self._compiling = self.learner.compiled  # until the first step, which does it
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")

        self.step = 0  # completed optimizer steps
        self._meter = Meter(self.device)
        self._flags = Flags(self.device)
        self._overflows = self._overflows_in_a_row = 0
        self._bad_steps = BadSteps(self.run_dir)
        self._halvings = 0  # of the samples in a forward pass, see config.auto_micro_batch
        # Sharded weights are whole in no process, and gathered while a step is made.
        rescues = self.rank == 0 and not self.learner.is_sharded
        self._stop = StopRequest(self._rescue if rescues else None, config.grace_seconds / 2)
        self._last: dict[str, dict[str, float]] = {}  # the last numbers of each kind
        self._evaluated: frozenset[str] = frozenset()  # evaluations already made at the step resumed from
        self._used = False
        self._saver = Saver(self.learner, self.run_dir, keep=config.keep, background=config.background_saves)
        self._checkpoint: Path | None = None

    def run(self, resume: str | Path | None = None) -> TrainResult:
        """Trains to `config.steps`, or until a signal or `max_minutes` ends it with a checkpoint.

        resume: None for a new run, "auto" for the newest intact checkpoint of the run directory (if any), or the folder
        of a checkpoint or run. Raises UserError when a requested checkpoint is missing or corrupt, losses or gradients
        are not finite, disk or memory is full, or a loader worker or another process of the training has ended.
        """
        assert not self._used, "a trainer can be used only once"
        self._used = True
        start = time.monotonic()
        self._restore(resume)
        first_step = self.step
        if self.config.trackers:
            self.accelerator.init_trackers("crossflow", config=_for_trackers(self.settings))
        self.learner.objective.train()
        reason = ""
        with self._stop, _quiet_unused_parameters(), explained(self.config, self._memory, self._kept):
            try:
                self.progress.begin(self.step, self.config.steps)
                reason = self._loop(start)
                if self._checkpoint is None or self._checkpoint.parent.resolve() != self.checkpoints.resolve():
                    self.save()  # no steps were left, so none has been written here
                if self.learner.is_sharded and not reason:
                    distributed.on_main(self._consolidate)
            finally:
                self.progress.end()
                self._saver.wait()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
                if self.world_size > 1:
                    self.learner.release()
        checkpoint = self._checkpoint
        assert checkpoint is not None
        return TrainResult(
            "stopped" if reason else "finished",
            self.step,
            reason,
            checkpoint,
            dict(self._last.get("train", {})),
            dict(self._last.get("val", {})),
            time.monotonic() - start,
            self.step - first_step,
        )

    def _loop(self, start: float) -> str:
        """Makes steps until the end, or until a reason to stop; returns the reason ("" at the end). The last is saved.

        A validation or step that is given up is repeated by the resumed run.
        """
        config = self.config
        deadline = math.inf if config.max_minutes is None else start + 60 * config.max_minutes
        try:
            self._evaluate(done=self._evaluated)
            self._meter.restart_clock()
            with closing(self._steps(self.step, config.steps)) as steps:
                return self._until(deadline, steps)
        except Abandoned as abandoned:
            reason = str(abandoned)
            self.progress.note(f"Stopping after step {self.step} ({reason}).")
            self._finish_saving()
            if self._checkpoint is None or self._checkpoint != state.step_folder(self.checkpoints, self.step):
                self.save()
            return reason

    def _until(self, deadline: float, steps: Iterator[list[MicroBatch]]) -> str:
        """As `_loop`. The order at one step is log, save, validate, sample: interrupting a slow validation loses no
        training.
        """
        config, stop = self.config, self._stop
        while self.step < config.steps:
            with self._abandoning(config.grace_seconds / 2):
                parts = next(steps)
            with waiting_for(f"the gradients of step {self.step + 1}"):
                self._train_step(parts)
                self.progress.advance(self.step)
                request = "max_minutes" if time.monotonic() > deadline else stop.received
                periods = (config.log_every, config.save_every, config.eval_every, config.sample_every)
                reason = self._check(request, now=any(map(self._is_due, periods)))
                if self._is_due(config.log_every):
                    self._log()
                if reason:
                    self._check("", now=True)
            with self._meter.paused():
                if reason:
                    self.progress.note(f"Stopping after step {self.step} ({reason}).")
                    self.save()
                    return reason
                if self._is_due(config.save_every):
                    self.save(wait=not config.background_saves or self.step == config.steps)
                self._evaluate()
        return ""

    def _is_due(self, every: int) -> bool:
        """Whether an event that occurs `every` n steps (0: only at the end) is due after the current step."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _evaluate(self, done: frozenset[str] = frozenset()) -> None:
        """Runs the callbacks that are due, except for the kinds already `done`."""
        if self.step == 0:
            return
        if self.callbacks.validate is not None and self._is_due(self.config.eval_every) and "val" not in done:
            self.progress.note(f"Validating after step {self.step}.")
            with waiting_for(f"the validation after step {self.step}"), self._evaluating(), self._abandoning_all():
                scores = self.callbacks.validate(self.step)
            self._record("val", {name: float(value) for name, value in scores.items()})
        if self.callbacks.sample is not None and self._is_due(self.config.sample_every) and "sample" not in done:
            with waiting_for(f"the samples after step {self.step}"), self._evaluating(), self._abandoning_all():
                self.callbacks.sample(self.step)
            self._record("sample", {})

    def _abandoning(self, patience: float) -> AbstractContextManager[None]:
        """Context of a part of a step; it is given up after a stop request, unless other processes take part in it."""
        return self._stop.abandoning(patience) if self.world_size == 1 else self._stop.at_rest()

    def _abandoning_all(self) -> AbstractContextManager[None]:
        """Context of an evaluation, which all processes give up together after a stop request of any."""
        if self.world_size == 1:
            return self._stop.abandoning(0)
        return distributed.own_work_within(lambda: self._stop.abandoning(0))

    def _steps(self, start: int, stop: int) -> Generator[list[MicroBatch]]:
        """This process's parts of each step from `start` up to `stop`, on its device."""
        data, accumulate = self.data.data, self.config.accumulate

        def batch(record: Record) -> Batch | JointBatch:
            with self.learner.phase("encode"):
                return data.batch(record)

        items = self._loaded(start, stop)
        micro_batches = on_device(items, batch, self.device, ahead=data.ahead)
        with closing(items), closing(micro_batches):
            while parts := list(itertools.islice(micro_batches, accumulate)):
                yield parts

    def _loaded(self, start: int, stop: int) -> Generator[Loaded]:
        """What the loader makes of this process's parts."""
        config = self.config
        positions = Positions(start, stop, config.batch_size, config.accumulate, self.rank, self.world_size)
        workers = num_loaders(config.num_workers, self.data.data, self.device)
        with closing(loaded(self.data, positions, workers, pin=self.device.type == "cuda")) as items:
            for _ in range(len(positions)):
                with self.learner.phase("data"), self._meter.waiting():
                    item = next(items)
                yield item

    def _train_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        start = time.monotonic()
        result = self._learn(micro_batches)
        if self._compiling:
            self._compiling = False
            seconds = time.monotonic() - start
            self.progress.note(f"Compiled the blocks of the model: the first step took {seconds:.0f} s.")
        self._overflows += result.overflowed
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if result.overflowed else 0
        self.step += 1
        self._meter.add(result.names, result.losses, result.norm, result.unconditional, result.is_bad.any())
        self._bad_steps.remember(self.step, result, (id for part in micro_batches for id in part.batch.ids))

    def _learn(self, parts: Sequence[MicroBatch]) -> StepResult:
        """Makes the optimizer step, with halved parts after the memory has run out."""
        rate = self.learning_rate_at(self.step)
        for _ in range(self._halvings):
            parts = [half for part in parts for half in part.halves()]
        while True:
            seed_everything(key("step", self.seed, self.step, self.rank), self.device)
            try:
                return self.learner.step(parts, rate)
            except NoMemory:
                if not self.config.auto_micro_batch or self.world_size > 1 or len(parts[0]) % 2:
                    raise
            parts = [half for part in parts for half in part.halves()]
            self._halvings += 1
            self.progress.note(
                f"Out of memory at step {self.step + 1}: continuing with {len(parts[0])} samples at a time."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step after `step` completed ones."""
        config = self.config
        return learning_rate(
            step,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            schedule=config.schedule,
            final_lr=config.final_lr,
        )

    def _check(self, request: str, now: bool) -> str:
        """Raises UserError for too many bad steps; returns the reason to stop, the same on all ranks, or "".

        now: check this step; otherwise, on a GPU, the previous one, so that the host does not wait.
        """
        reasons = ("", "SIGTERM", "SIGINT", "max_minutes")
        names = [*self._meter.names, "gradient norm"]
        for step, (reason, *flags) in self._flags.post(self.step, reasons.index(request), self._bad_steps.latest, now):
            bad = self._bad_steps.judge(step, [name for name, flag in zip(names, flags, strict=True) if flag])
            if bad is not None:
                if self._bad_steps.in_a_row >= self.config.max_bad_steps:
                    self._give_up(step, bad.describe())
                self.progress.note(f"Step {step} is left out: {bad.describe()}.")
            if reason:
                return reasons[int(reason)]
        if self._overflows_in_a_row > _MAX_OVERFLOWS:
            scales = f"not finite (NaN or infinity): gradient of the last {_MAX_OVERFLOWS} steps, at every scale"
            self._give_up(self.step, scales)
        return ""

    def _give_up(self, step: int, problem: str) -> None:
        precision = " use train.precision bf16 or no," if self.config.precision == "fp16" else ""
        in_a_row = self._bad_steps.in_a_row
        raise UserError(
            f"Training stopped at step {step}: {problem}{f' ({in_a_row} steps in a row)' if in_a_row > 1 else ''}. "
            f"{self._kept()} Try a smaller train.lr (now {self.config.lr:g}) or a longer train.warmup_steps,"
            f"{precision} a smaller train.grad_clip, and look for values that are not finite in the data. "
            f"train.max_bad_steps=N leaves out such steps, and stops at N in a row (now {self.config.max_bad_steps})."
        )

    def _kept(self) -> str:
        """What an interrupted training can continue from, a sentence."""
        good = state.checkpoints(self.checkpoints)
        if not good:
            return "No checkpoint has been written yet."
        return f"The last checkpoint is {good[0]}; --resume auto continues from there."

    def _memory(self) -> str:
        """What the memory is used for, a sentence."""
        size = self.config.batch_size // (self.world_size * self.config.accumulate) >> self._halvings
        return memory_in_words(self.device, memory(self.learner), size)

    def _log(self) -> None:
        interval = self._meter.take()
        line = {
            **interval.means,
            "lr": self.learning_rate_at(self.step - 1),
            "epoch": self.step * self.config.batch_size / self.num_examples,
            "seconds_per_step": interval.seconds / interval.num_steps,
            "cpu_seconds_per_step": interval.cpu_seconds / interval.num_steps,
            "samples_per_second": self.config.batch_size * interval.num_steps / max(interval.seconds, 1e-9),
            "data_seconds": interval.waiting / interval.num_steps,
        }
        if self.accelerator.scaler is not None or self._bad_steps.total:
            line["skipped_steps"] = self._overflows + self._bad_steps.total
        self._record("train", line)

    def _record(self, kind: str, numbers: dict[str, float]) -> None:
        self._last[kind] = numbers
        if self.rank == 0:
            line = {"kind": kind, "step": self.step, **numbers}
            self.metrics.append(line)
            self.progress.report(line)
        if self.config.trackers and numbers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=self.step)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        seed_everything(key("evaluate", self.seed, self.step, self.rank), self.device)
        with self.learner.evaluating():
            yield

    def save(self, wait: bool = True) -> None:
        """Writes the checkpoint of the current step and the run's weights. Raises UserError on a full disk.

        wait: until they are written; otherwise the end of the training, or the next save, waits.
        """
        try:
            with waiting_for(f"the checkpoint of step {self.step}"):
                content = self._content()
                self._finish_saving()
                self._saver.start(self.step, content)
                if wait:
                    self._finish_saving()
        except OSError as error:
            raise UserError(
                f"The checkpoint of step {self.step} cannot be written to {self.run_dir} ({error.strerror or error}). "
                f"Earlier ones are untouched. {self._kept()}"
            ) from error

    def _rescue(self) -> None:
        """Writes the checkpoint of the last completed step, in a thread, while all processes make the next."""
        self._saver.wait()
        folder = state.step_folder(self.checkpoints, self.step)
        if folder in state.checkpoints(self.checkpoints):
            return
        try:
            self._saver.write(self.step, self._content())
        except (OSError, UserError) as error:
            self.progress.note(f"The checkpoint of step {self.step} cannot be written: {error}")
        else:
            self.progress.note(f"Saved {folder}: step {self.step + 1} takes longer than half of train.grace_seconds.")

    def _finish_saving(self) -> None:
        """Waits for the checkpoint that is being written, if there is one."""
        path = self._saver.finish()
        if path is None:
            return
        self._checkpoint = path
        self.progress.note(f"Saved {path}.")
        on_save = self.callbacks.on_save
        if on_save is not None:
            distributed.on_main(lambda: on_save(state.step_of(path)))

    def _content(self) -> dict[str, Any]:
        """The state of a checkpoint beside its tensors."""
        return {
            **self.learner.state(),
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "num_examples": self.num_examples,
            "world_size": self.world_size,
            "skipped": [self._overflows, self._overflows_in_a_row],
            "bad_steps": self._bad_steps.state(),
            "halvings": self._halvings,
            "interval": self._meter.state(),
        }

    def _consolidate(self) -> None:
        """Writes the whole weights of the last checkpoint to the run directory."""
        assert self._checkpoint is not None
        consolidate(self._checkpoint, WEIGHTS, self.run_dir)

    def _restore(self, resume: str | Path | None) -> None:
        """Restores the state of the checkpoint to resume from, if any."""
        with waiting_for("the checkpoint to begin with"):
            path, lines = distributed.on_main(lambda: self._prepare_folder(resume))
        if path is None:
            return
        content = state.read_state(path)
        self.learner.load(path, content)
        self.step = content["step"]
        self._last = {kind: _numbers(line) for kind, line in lines.items()}
        self._evaluated = frozenset(kind for kind, line in lines.items() if line["step"] == self.step)
        self._overflows, self._overflows_in_a_row = content["skipped"]
        self._bad_steps.load_state(content.get("bad_steps", (0, 0)))
        self._halvings = content.get("halvings", 0)
        self._meter.load_state(content["interval"])
        self._checkpoint = path
        present = {"seed": self.seed, "batch_size": self.config.batch_size, "num_examples": self.num_examples}
        for name, value in present.items():
            if content[name] != value:
                logger.warning(
                    "Resumed with %s = %s instead of %s: the order of the data changes.", name, value, content[name]
                )
        self.progress.note(f"Resumed from {path}.")

    def _prepare_folder(self, resume: str | Path | None) -> tuple[Path | None, dict[str, dict[str, Any]]]:
        """Resets the run directory to the step to resume; returns its checkpoint and the last line of each kind."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {self.run_dir} cannot be created ({error.strerror}). Choose another --output."
            ) from error
        path = state.find_checkpoint(self.checkpoints, resume)
        remove_temporaries(self.checkpoints)
        remove_temporaries(self.run_dir)
        step = 0 if path is None else int(state.read_state(path)["step"])
        lines = self.metrics.truncate(step)
        self._bad_steps.file.truncate(step)
        self.metrics.path.touch()  # marks the folder as a run directory
        if path is not None and path.parent == self.checkpoints:
            state.publish(path, WEIGHTS, self.run_dir)  # the run may have been interrupted before this
        return path, lines

    def dry_run(self, num_steps: int = 3, resume: str | Path | None = None) -> DryRun:
        """Measures `num_steps` steps after two warm-up steps, writing nothing. The trainer cannot be used again."""
        path = state.find_checkpoint(self.checkpoints, resume)
        finished = 0 if path is None else int(state.read_state(path)["step"])
        steps = self.trial(WARM_UP + num_steps)
        return measure(self.learner, steps, num_steps, max(0, self.config.steps - finished))

    def trial(self, num_steps: int) -> Iterator[None]:
        """Makes the first `num_steps` steps of a run one by one, as they are iterated over, for measurements.

        Nothing is written, validated or resumed. The trainer cannot be used again.
        """
        assert not self._used, "a trainer can be used only once"
        self._used = True
        self.learner.objective.train()
        for parts in self._steps(0, num_steps):
            self._train_step(parts)
            self._check("", now=False)
            yield


@contextmanager
def _quiet_unused_parameters() -> Iterator[None]:
    """Silences torch's warning that no unused parameters were found; looking for them is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        yield


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("kind", "step")}


def _for_trackers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as `section.name` -> number or text, the types that every tracker takes."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in flat(settings).items()
    }
