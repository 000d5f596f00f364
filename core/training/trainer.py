"""The training loop: a function of (seed, step) alone, so that a resumed run is the run that was interrupted.

One optimizer step: every process sees its slice of the step's positions (see stream.py) in `accumulate` parts, the
mean of the parts' losses is differentiated, the gradient clipped, AdamW applied at the rate of the schedule, the
average updated. All generators are seeded from (seed, step, rank) before each step and each evaluation; so neither a
validation in between nor a resume can change what follows, and no generator state needs to be kept.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossflow.core import distributed
from crossflow.core.batch import Batch
from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.files import remove_temporaries
from crossflow.core.noise import key
from crossflow.core.progress import Silent, TrainingProgress
from crossflow.core.settings import flat
from crossflow.core.training import checkpoint as state
from crossflow.core.training.ema import EMA
from crossflow.core.training.meter import Flags, Meter
from crossflow.core.training.optim import build_optimizer, learning_rate
from crossflow.core.training.prepare import (
    build_accelerator,
    check_sizes,
    checkpoint_activations,
    compile_blocks,
    seed_everything,
)
from crossflow.core.training.signals import StopRequest
from crossflow.core.training.stream import MicroBatch, MicroBatches, Positions, TrainingData, loader
from crossflow.core.training.tracking import MetricsFile, check_trackers

logger = logging.getLogger(__name__)

WEIGHTS = ("model", "ema", "objective")
# So many steps in a row whose fp16 gradients overflow, the scale halved each time, are not a matter of scale any more.
_MAX_SKIPPED = 50


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    step: int
    """Completed optimizer steps."""
    reason: str
    """Why it stopped: SIGTERM, SIGINT, max_minutes; empty when finished."""
    checkpoint: Path
    """The checkpoint written at the end."""
    losses: dict[str, float] = field(default_factory=dict)
    """The numbers of the last training line of metrics.jsonl."""
    scores: dict[str, float] = field(default_factory=dict)
    """Those of the last validation."""
    seconds: float = 0.0


@dataclass(frozen=True)
class DryRun:
    """What a run will take."""

    parameters: dict[str, int]
    """Numbers of parameters of the model's parts (backbone, source_encoder, ...) and of the `objective`."""
    memory: dict[str, int]
    """Bytes on each device of weights, gradients, optimizer, ema; activations come on top."""
    peak_memory: int | None
    """Bytes at the peak of the measured steps, activations included (GPU only)."""
    seconds_per_step: float
    remaining_steps: int
    checkpoint_bytes: int
    keep: int

    @property
    def remaining_seconds(self) -> float:
        return self.seconds_per_step * self.remaining_steps

    @property
    def disk_bytes(self) -> int:
        """Bytes of the kept checkpoints and of the one being written."""
        return self.checkpoint_bytes * (self.keep + 1)


class _Losses(nn.Module):
    """What is wrapped for data parallelism and autocast: (loss, all losses as one detached vector)."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.names: tuple[str, ...] = ()

    def forward(self, batch: Any, noise: Any) -> tuple[Tensor, Tensor]:
        losses = self.objective(batch, noise)
        names = tuple(losses)
        assert names == (self.names or names), f"the losses changed their names from {self.names} to {names}"
        self.names = names
        return losses["loss"].float(), torch.stack([loss.detach().float() for loss in losses.values()])


class Trainer:
    """Trains `objective` on `data` and keeps its run directory; `run` does it, `dry_run` says what it would take.

    config: the `train` section. objective: module with the generator as `.model`; `objective(batch, noise)` gives
    scalar losses by name, among them "loss", and `objective.draw(batches, noises)` prepares all parts of a step
    together. A step is the same however it is divided into accumulated parts and processes: the same noise, the same
    unconditional samples and targets, and the losses of one process with the whole batch, as far as they are means or
    sums over samples. A contrastive loss takes its negatives from one part of all processes, and a mean over the
    tokens of several texts is one over those of each part. data: see TrainingData. run_dir: metrics.jsonl, checkpoints/
    and the weights go there. latent_shape: of a sample of z0, for the noise.

    Callbacks run on every rank, with averaged weights, in evaluation mode, without gradients; whoever writes files in
    them does so where `distributed.is_main()`. sample(step); validate(step) -> numbers, logged with kind "val".
    on_save(step) runs on the main process after each checkpoint. progress: an observer, on the main process only.
    settings: what trackers are told about the run. Raises UserError for settings that cannot be.
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
        sample: Callable[[int], object] | None = None,
        validate: Callable[[int], Mapping[str, float]] | None = None,
        on_save: Callable[[int], object] | None = None,
        progress: TrainingProgress | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_trackers(config.trackers)
        self.config = config
        self.objective = objective
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.draw: Callable[..., list[Batch]] = objective.draw  # type: ignore[assignment]
        self.seed = seed
        self.run_dir = Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.accelerator = build_accelerator(config, self.run_dir)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.device = self.accelerator.device
        check_sizes(config, len(data), self.world_size)
        self.progress: TrainingProgress = progress if progress is not None and self.rank == 0 else Silent()
        self.validate, self.sample, self.on_save = validate, sample, on_save
        self.settings = dict(settings or {})
        self.data = MicroBatches(data, seed, latent_shape)
        self.num_examples = len(data)

        if config.checkpointing:
            checkpoint_activations(self.model)
        if config.compile:
            compile_blocks(self.model)
        objective.to(self.device)
        self.losses = _Losses(objective)
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
        self.optimizer = build_optimizer(
            objective,
            name=config.optimizer,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            scaled=self.accelerator.scaler is not None,
        )
        self.wrapped, self.stepper = self.accelerator.prepare(self.losses, self.optimizer)
        self.ema = EMA(self.model, config.ema)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")

        self.step = 0  # completed optimizer steps
        self._meter = Meter(self.device)
        self._flags = Flags(self.device)
        self._skipped = self._skipped_in_a_row = 0
        self._last: dict[str, dict[str, float]] = {}  # the newest numbers of each kind
        self._evaluated: frozenset[str] = frozenset()  # what was done at the step resumed from
        self._spent = False
        self._checkpoint: Path | None = None

    def run(self, resume: str | Path | None = None) -> TrainResult:
        """Trains to `config.steps`, or until a signal or `max_minutes` ends it with a checkpoint.

        resume: None for a new run, "auto" for the newest good checkpoint of the run directory (if there is one), or
        the folder of a checkpoint or run. Raises UserError: nothing to resume, a corrupt checkpoint asked for by
        name, a loss or gradient that is not finite, no space for a checkpoint.
        """
        assert not self._spent, "a trainer runs once, and not after a dry run"
        self._spent = True
        begun = time.monotonic()
        self._restore(resume)
        if self.config.trackers:
            self.accelerator.init_trackers("crossflow", config=_for_trackers(self.settings))
        self.objective.train()
        reason = ""
        with StopRequest() as stop, _quiet_unused_parameters():
            try:
                self.progress.begin(self.step, self.config.steps)
                reason = self._loop(stop, begun)
            finally:
                self.progress.end()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
                if self.world_size > 1:
                    # What is wrapped holds the group of processes, whose threads must be gone before the process ends.
                    self.wrapped = self.losses
                    self.accelerator.free_memory()
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.parent.resolve() != self.checkpoints.resolve():
            checkpoint = self.save()  # no steps were asked for, or none more than another run had made
        return TrainResult(
            "stopped" if reason else "finished",
            self.step,
            reason,
            checkpoint,
            dict(self._last.get("train", {})),
            dict(self._last.get("val", {})),
            time.monotonic() - begun,
        )

    def _loop(self, stop: StopRequest, begun: float) -> str:
        """Steps until the end ("") or a reason to stop, which it returns; a checkpoint of the last step is written.

        At one step the order is log, save, validate, sample: a slow validation that is cut short costs no training,
        and a resumed run begins with it.
        """
        config = self.config
        deadline = math.inf if config.max_minutes is None else begun + 60 * config.max_minutes
        self._evaluate(done=self._evaluated)
        micro_batches = self._micro_batches()
        self._meter.restart_clock()
        while self.step < config.steps:
            self._train_step([next(micro_batches) for _ in range(config.accumulate)])
            self.progress.advance(self.step)
            wanted = "max_minutes" if time.monotonic() > deadline else stop.received
            periods = (config.log_every, config.save_every, config.eval_every, config.sample_every)
            reason = self._check(wanted, now=any(map(self._is_due, periods)))
            if self._is_due(config.log_every):
                self._log()
            with self._meter.paused():
                if reason:
                    self.progress.note(f"Stopping after step {self.step} ({reason}).")
                    self._check("", now=True)
                    self.save()
                    return reason
                if self._is_due(config.save_every):
                    self.save()
                self._evaluate()
        return ""

    def _is_due(self, every: int) -> bool:
        """Whether what happens `every` so many steps (0: only at the end) happens after the present one."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _evaluate(self, done: frozenset[str] = frozenset()) -> None:
        """The callbacks that are due, but for the kinds already `done`."""
        if self.step == 0:
            return
        if self.validate is not None and self._is_due(self.config.eval_every) and "val" not in done:
            self.progress.note(f"Validating after step {self.step}.")
            with self._evaluating():
                scores = self.validate(self.step)
            self._record("val", {name: float(value) for name, value in scores.items()})
        if self.sample is not None and self._is_due(self.config.sample_every) and "sample" not in done:
            with self._evaluating():
                self.sample(self.step)
            self._record("sample", {})

    def _micro_batches(self) -> Iterator[MicroBatch]:
        config = self.config
        stop = max(config.steps, self.step + 1)
        positions = Positions(self.step, stop, config.batch_size, config.accumulate, self.rank, self.world_size)
        on_gpu = self.device.type == "cuda"
        for micro_batch in loader(self.data, positions, config.num_workers, pin=on_gpu):
            yield micro_batch.to(self.device)

    def _train_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        config = self.config
        rate = self.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed_everything(key("step", self.seed, self.step, self.rank), self.device)
        parts = torch.zeros(())
        noises = [micro_batch.noise for micro_batch in micro_batches]
        batches = self.draw([micro_batch.batch for micro_batch in micro_batches], noises)
        for number, (batch, noise) in enumerate(zip(batches, noises, strict=True), start=1):
            # Gradients are exchanged once per step, with the last part.
            last = number == config.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, values = self.wrapped(batch, noise)
                self.accelerator.backward(loss / config.accumulate)
            parts = values / config.accumulate if number == 1 else parts + values / config.accumulate
        norm = self._clip()
        self.stepper.step()
        skipped = bool(self.stepper.step_was_skipped)
        self.stepper.zero_grad(set_to_none=True)
        self._skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self.ema.update()
        self.step += 1
        self._meter.add(self.losses.names, parts, norm)

    def _clip(self) -> Tensor:
        """The norm of the gradient before it is clipped."""
        self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        return norm.detach()

    def learning_rate_at(self, step: int) -> float:
        """The rate of the optimizer step that follows `step` completed ones."""
        config = self.config
        return learning_rate(
            step,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            schedule=config.schedule,
            final_lr=config.final_lr,
        )

    def _check(self, wanted: str, now: bool) -> str:
        """Raises UserError for a loss or gradient that is not finite; returns why to stop, agreed on by all ranks.

        now: look at this step. Otherwise, on a GPU, at the one before, so that the host need not wait.
        """
        reasons = ("", "SIGTERM", "SIGINT", "max_minutes")
        scaled = self.accelerator.scaler is not None
        names = [*self._meter.names, "gradient norm"]
        values = torch.cat(
            [self._meter.latest, torch.zeros(1, device=self.device) if scaled else self._meter.norm.view(1)]
        )
        seen = self._flags.post(self.step, reasons.index(wanted), ~torch.isfinite(values), now)
        for step, (reason, *bad) in seen:
            if any(bad):
                self._not_finite(step, [name for name, is_bad in zip(names, bad, strict=True) if is_bad])
            if reason:
                return reasons[int(reason)]
        if self._skipped_in_a_row > _MAX_SKIPPED:
            self._not_finite(self.step, [f"gradient of the last {_MAX_SKIPPED} steps, whatever its scale"])
        return ""

    def _not_finite(self, step: int, names: list[str]) -> None:
        parts = [name for name in names if name not in ("loss", "gradient norm")] or names
        good = state.checkpoints(self.checkpoints)
        kept = f"The last good checkpoint is {good[0]}." if good else "No checkpoint was written before."
        precision = " use train.precision bf16 or no," if self.config.precision == "fp16" else ""
        raise UserError(
            f"Training stopped at step {step}: not finite (NaN or infinity): {', '.join(parts)}. {kept} Try a "
            f"smaller train.lr (now {self.config.lr:g}) or a longer train.warmup_steps,{precision} a smaller "
            "train.grad_clip, and look for values that are not finite in the data."
        )

    def _log(self) -> None:
        numbers, seconds, num_steps = self._meter.take()
        line = {
            **numbers,
            "lr": self.learning_rate_at(self.step - 1),
            "epoch": self.step * self.config.batch_size / self.num_examples,
            "seconds_per_step": seconds / num_steps,
            "samples_per_second": self.config.batch_size * num_steps / max(seconds, 1e-9),
        }
        if self.accelerator.scaler is not None:
            line["skipped_steps"] = self._skipped
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
        """Averaged weights, evaluation mode, no gradients; afterwards each module has the mode it had."""
        seed_everything(key("evaluate", self.seed, self.step, self.rank), self.device)
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        try:
            with self.ema.applied(self.model), torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def save(self) -> Path:
        """Writes the checkpoint of the present step and the run directory's weights. Raises UserError without space."""
        pending = self._meter.state()
        self._checkpoint = distributed.on_main(lambda: self._write(pending))
        return self._checkpoint

    def _write(self, pending: dict[str, Any]) -> Path:
        scaler = self.accelerator.scaler
        content = {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "num_examples": self.num_examples,
            "world_size": self.world_size,
            "ema_updates": self.ema.num_updates,
            "skipped": [self._skipped, self._skipped_in_a_row],
            "interval": pending,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        path = state.write_checkpoint(self.checkpoints, self.step, self._tensors(), content, self.config.keep)
        state.publish(path, WEIGHTS, self.run_dir)
        self.progress.note(f"Saved {path}.")
        if self.on_save is not None:
            self.on_save(self.step)
        return path

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        learned = {name: value for name, value in self.objective.state_dict().items() if not name.startswith("model.")}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "objective": learned,
            "optimizer": state.optimizer_tensors(self.optimizer, self.names),
        }

    def _restore(self, resume: str | Path | None) -> None:
        """Brings everything to the state of the checkpoint to resume from, or leaves it at the beginning."""

        def prepare() -> tuple[Path | None, dict[str, dict[str, Any]]]:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"{self.run_dir} cannot be made ({error.strerror}). Choose another --output."
                ) from error
            found = state.find_checkpoint(self.checkpoints, resume)
            remove_temporaries(self.checkpoints)
            remove_temporaries(self.run_dir)
            step = 0 if found is None else int(state.read_state(found)["step"])
            lines = self.metrics.truncate(step)
            self.metrics.path.touch()  # from now on the folder holds a run
            if found is not None and found.parent == self.checkpoints:
                state.publish(found, WEIGHTS, self.run_dir)  # it may have been interrupted before this
            return found, lines

        path, lines = distributed.on_main(prepare)
        if path is None:
            return
        content = state.read_state(path)
        model, learned = state.read_tensors(path, "model"), state.read_tensors(path, "objective")
        try:
            self.objective.load_state_dict({**{f"model.{name}": value for name, value in model.items()}, **learned})
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint {path} is of another model than the configuration describes: {_first_lines(error)}"
            ) from error
        self.ema.load_state_dict(state.read_tensors(path, "ema"), content["ema_updates"])
        state.load_optimizer(self.optimizer, self.names, state.read_tensors(path, "optimizer"))
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        self._last = {kind: _numbers(line) for kind, line in lines.items()}
        self._evaluated = frozenset(kind for kind, line in lines.items() if line["step"] == self.step)
        self._skipped, self._skipped_in_a_row = content["skipped"]
        self._meter.load_state(content["interval"])
        self._checkpoint = path
        present = {"seed": self.seed, "batch_size": self.config.batch_size, "num_examples": self.num_examples}
        for name, value in present.items():
            if content[name] != value:
                logger.warning(
                    "Resumed with %s = %s instead of %s: the data continues elsewhere.", name, value, content[name]
                )
        self.progress.note(f"Resumed from {path}.")

    def dry_run(self, num_steps: int = 3, resume: str | Path | None = None) -> DryRun:
        """Measures `num_steps` steps after two to warm up, and writes nothing. The trainer cannot be run afterwards."""
        found = state.find_checkpoint(self.checkpoints, resume)
        done = 0 if found is None else int(state.read_state(found)["step"])
        assert not self._spent, "a trainer runs once"
        self._spent = True
        self.objective.train()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        dataset, config = self.data, self.config
        positions = Positions(0, 2 + num_steps, config.batch_size, config.accumulate, self.rank, self.world_size)
        micro_batches = iter(loader(dataset, positions, config.num_workers, pin=on_gpu))
        for _ in range(2 + num_steps):
            begun = time.monotonic()
            self._train_step([next(micro_batches).to(self.device) for _ in range(config.accumulate)])
            if on_gpu:
                torch.cuda.synchronize(self.device)
            seconds.append(time.monotonic() - begun)
        parameters: dict[str, int] = {}
        for name, parameter in self.objective.named_parameters():
            first, _, rest = name.partition(".")
            part = rest.partition(".")[0] if first == "model" and "." in rest else first
            part = part if first == "model" else "objective"
            parameters[part] = parameters.get(part, 0) + parameter.numel()
        tensors = self._tensors()
        memory = {
            "weights": sum(parameter.numel() * parameter.element_size() for parameter in self.objective.parameters()),
            "gradients": sum(parameter.numel() * parameter.element_size() for parameter in self.parameters),
            "optimizer": state.num_bytes(tensors["optimizer"]),
            "ema": sum(shadow.numel() * shadow.element_size() for shadow in self.ema.shadows),
        }
        return DryRun(
            parameters=parameters,
            memory=memory,
            peak_memory=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            seconds_per_step=sum(seconds[2:]) / num_steps,
            remaining_steps=max(0, config.steps - done),
            checkpoint_bytes=sum(map(state.num_bytes, tensors.values())),
            keep=config.keep,
        )


@contextmanager
def _quiet_unused_parameters() -> Iterator[None]:
    """Looking for unused parameters is meant; torch advises against it whenever there are none."""
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


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
