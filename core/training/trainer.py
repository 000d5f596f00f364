"""The training loop: a function of (seed, step) alone, so that a resumed run is the run that was interrupted.

One optimizer step: every process sees its slice of the step's positions (see stream.py) in `accumulate` parts, the
mean of the parts' losses is differentiated, the gradient clipped, AdamW applied at the rate of the schedule, the
average updated. All generators are seeded from (seed, step, rank) before each step; so neither a validation in
between nor a resume can change what follows, and no generator state needs to be kept.
"""

import logging
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn

from crossflow.core import distributed
from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.noise import key
from crossflow.core.training import state
from crossflow.core.training.ema import EMA
from crossflow.core.training.optim import build_optimizer, learning_rate
from crossflow.core.training.signals import StopRequest
from crossflow.core.training.stream import MicroBatch, MicroBatches, Positions, TrainingData, loader
from crossflow.core.training.tracking import MetricsFile, Progress, Silent, check_trackers

logger = logging.getLogger(__name__)

WEIGHTS = ("model", "ema", "objective")
# Steps in a row whose fp16 gradients overflowed although the scale was halved each time: not a matter of scale any
# more.
_MAX_SKIPPED = 50
_SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


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
    scalar losses by name, among them "loss". Per-sample means make accumulation exact; a contrastive loss sees one
    part (of all ranks) at a time. data: see TrainingData. run_dir: metrics.jsonl, checkpoints/ and the weights go
    there. latent_shape: of a sample of z0, for the noise.

    Callbacks run on every rank, with averaged weights, in evaluation mode, without gradients; whoever writes files in
    them does so where `distributed.is_main()`. sample(step); validate(step) -> numbers, logged with kind "val".
    on_save(step) runs on the main process after each checkpoint. progress: see tracking.Progress (main process only).
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
        progress: Progress | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_trackers(config.trackers)
        self.config = config
        self.objective = objective
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.seed = seed
        self.run_dir = Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.accelerator = _accelerator(config, self.run_dir)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.device = self.accelerator.device
        _check_sizes(config, len(data), self.world_size)
        self.progress: Progress = progress if progress is not None and self.rank == 0 else Silent()
        self.validate, self.sample, self.on_save = validate, sample, on_save
        self.settings = dict(settings or {})
        self.data = MicroBatches(data, seed, latent_shape)
        self.num_examples = len(data)

        if config.checkpointing:
            _checkpoint_activations(self.model)
        if config.compile:
            compile_blocks(self.model)
        objective.to(self.device)
        self.losses = _Losses(objective)
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
        self.optimizer = build_optimizer(
            objective,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            scaled=self.accelerator.scaler is not None,
        )
        self.wrapped, self.stepper = self.accelerator.prepare(self.losses, self.optimizer)
        self.ema = EMA(self.model, config.ema)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")

        self.step = 0  # completed optimizer steps
        self._meter = _Meter(self.device)
        self._flags = _Flags(self.device)
        self._skipped = self._skipped_in_a_row = 0
        self._last: dict[str, dict[str, float]] = {"train": {}, "val": {}}
        self._checkpoint: Path | None = None

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self, resume: str | Path | None = None) -> TrainResult:
        """Trains to `config.steps`, or until a signal or `max_minutes` ends it with a checkpoint.

        resume: None for a new run, "auto" for the newest good checkpoint of the run directory (if there is one), or
        the folder of a checkpoint or run. Raises UserError: nothing to resume, a corrupt checkpoint asked for by
        name, a loss or gradient that is not finite, no space for a checkpoint.
        """
        begun = time.monotonic()
        self._restore(resume)
        if self.config.trackers:
            self.accelerator.init_trackers("crossflow", config=_flat(self.settings))
        self.objective.train()
        reason = ""
        with StopRequest() as stop, _quiet_unused_parameters():
            try:
                self.progress.begin(self.step, self.config.steps)
                if self.step < self.config.steps:
                    reason = self._loop(stop, begun)
                elif self._checkpoint is not None and self.rank == 0:
                    state.publish(self._checkpoint, WEIGHTS, self.run_dir)
            finally:
                self.progress.end()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
        assert self._checkpoint is not None
        return TrainResult(
            "stopped" if self.step < self.config.steps else "finished",
            self.step,
            reason if self.step < self.config.steps else "",
            self._checkpoint,
            dict(self._last["train"]),
            dict(self._last["val"]),
            time.monotonic() - begun,
        )

    def _loop(self, stop: StopRequest, begun: float) -> str:
        """Steps until the end or a reason to stop, which it returns; a checkpoint of the last step is written."""
        config = self.config
        deadline = math.inf if config.max_minutes is None else begun + 60 * config.max_minutes
        micro_batches = self._micro_batches()
        self._meter.restart_clock()
        while True:
            self._train_step(next(micro_batches) for _ in range(config.accumulate))
            self.progress.advance(self.step)
            last = self.step == config.steps
            due = {name: last or (every > 0 and self.step % every == 0) for name, every in self._periods().items()}
            wanted = "max_minutes" if time.monotonic() > deadline else stop.received
            reason = self._check(wanted, now=any(due.values()))
            if due["log"]:
                self._log()
            if not reason:
                with self._meter.paused():
                    if due["eval"] and self.validate is not None:
                        self.progress.note(f"Validating after step {self.step}.")
                        with self._evaluating():
                            scores = self.validate(self.step)
                        self._record("val", {name: float(value) for name, value in scores.items()})
                    if due["sample"] and self.sample is not None:
                        with self._evaluating():
                            self.sample(self.step)
            if due["save"] or reason:
                with self._meter.paused():
                    if reason:
                        self.progress.note(f"Stopping after step {self.step} ({reason}).")
                        self._check("", now=True)
                    self.save()
            if reason or last:
                return reason

    def _periods(self) -> dict[str, int]:
        config = self.config
        return {
            "log": config.log_every, "eval": config.eval_every, "sample": config.sample_every, "save": config.save_every
        }  # fmt: skip

    def _micro_batches(self) -> Iterator[MicroBatch]:
        config = self.config
        stop = max(config.steps, self.step + 1)
        positions = Positions(self.step, stop, config.batch_size, config.accumulate, self.rank, self.world_size)
        on_gpu = self.device.type == "cuda"
        for micro_batch in loader(self.data, positions, config.num_workers, pin=on_gpu):
            yield micro_batch.to(self.device)

    def _train_step(self, micro_batches: Iterator[MicroBatch]) -> None:
        config = self.config
        rate = self.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        _seed_everything(key("step", self.seed, self.step, self.rank))
        parts = torch.zeros(())
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Gradients are exchanged once per step, with the last part.
            last = number == config.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, values = self.wrapped(micro_batch.batch, micro_batch.noise)
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

    # --- checks and logs -----------------------------------------------------------------------------------------

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
        if self.config.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=self.step)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients; afterwards each module has the mode it had."""
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        try:
            with self.ema.applied(self.model), torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes the checkpoint of the present step and the run directory's weights. Raises UserError without space."""
        pending = self._meter.state()
        self._checkpoint = Path(distributed.on_main(lambda: self._write(pending)))
        return self._checkpoint

    def _write(self, pending: dict[str, Any]) -> str:
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
            "last": self._last,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        path = state.write_checkpoint(self.checkpoints, self.step, self._tensors(), content, self.config.keep)
        state.publish(path, WEIGHTS, self.run_dir)
        self.progress.note(f"Saved {path}.")
        if self.on_save is not None:
            self.on_save(self.step)
        return str(path)

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

        def prepare() -> str:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            found = state.find_checkpoint(self.checkpoints, resume)
            state.remove_temporaries(self.checkpoints)
            state.remove_temporaries(self.run_dir)
            self.metrics.truncate(0 if found is None else int(state.read_state(found)["step"]))
            return str(found or "")

        found = distributed.on_main(prepare)
        if not found:
            return
        path = Path(found)
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
        self._skipped, self._skipped_in_a_row = content["skipped"]
        self._last = content["last"]
        self._meter.load_state(content["interval"])
        self._checkpoint = path
        present = {"seed": self.seed, "batch_size": self.config.batch_size, "num_examples": self.num_examples}
        for name, value in present.items():
            if content[name] != value:
                logger.warning(
                    "Resumed with %s = %s instead of %s: the data continues elsewhere.", name, value, content[name]
                )
        self.progress.note(f"Resumed from {path}.")

    # --- what it would take --------------------------------------------------------------------------------------

    def dry_run(self, num_steps: int = 3, resume: str | Path | None = None) -> DryRun:
        """Measures `num_steps` steps after two to warm up, and writes nothing. The trainer cannot be run afterwards."""
        found = state.find_checkpoint(self.checkpoints, resume)
        done = 0 if found is None else int(state.read_state(found)["step"])
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
            self._train_step(next(micro_batches).to(self.device) for _ in range(config.accumulate))
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


class _Meter:
    """Sums of the losses and of the gradient norm since the last log, on the device, and the time they took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self.latest = self.norm = torch.zeros(0, device=device)
        self._sums: Tensor | None = None
        self._num_steps = 0  # in the sums
        self._num_timed = 0  # since the clock started
        self._begun = time.monotonic()

    def add(self, names: tuple[str, ...], losses: Tensor, norm: Tensor) -> None:
        """The losses (P,) and the gradient norm of one step."""
        self.names, self.latest, self.norm = names, losses, norm
        values = torch.cat([losses, norm.view(1).to(losses)])
        self._sums = values if self._sums is None else self._sums + values
        self._num_steps += 1
        self._num_timed += 1

    def take(self) -> tuple[dict[str, float], float, int]:
        """(means over steps and ranks by name, seconds, the steps in these seconds); begins anew."""
        means = self._means()
        seconds, num_timed = time.monotonic() - self._begun, self._num_timed
        self._sums, self._num_steps = None, 0
        self.restart_clock()
        return means, seconds, num_timed

    def _means(self) -> dict[str, float]:
        assert self._sums is not None
        values = distributed.mean_over_ranks(self._sums).double() / self._num_steps
        return dict(zip([*self.names, "grad_norm"], values.tolist(), strict=True))

    def restart_clock(self) -> None:
        self._begun, self._num_timed = time.monotonic(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._begun += time.monotonic() - begun

    def state(self) -> dict[str, Any]:
        """The open interval, as JSON; the same on every rank."""
        sums = None if self._sums is None else distributed.mean_over_ranks(self._sums).tolist()
        return {"names": list(self.names), "sums": sums, "num_steps": self._num_steps}

    def load_state(self, content: Mapping[str, Any]) -> None:
        self.names = tuple(content["names"])
        self._sums = None if content["sums"] is None else torch.tensor(content["sums"], device=self.device)
        self._num_steps = content["num_steps"]


class _Flags:
    """What all ranks must agree on after each step, read without making the host wait for a GPU that is still at work.

    A row is (reason to stop, is loss 0 not finite, ..., is the gradient norm not finite), maximised over ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def post(self, step: int, reason: int, bad: Tensor, now: bool) -> list[tuple[int, list[float]]]:
        """Hands in the row of `step`; returns those that can be read: on a GPU, and not `now`, only earlier ones."""
        row = torch.cat([torch.full((1,), float(reason), device=self.device), bad.float()])
        row = distributed.max_over_ranks(row)
        if self.device.type == "cuda":
            host = torch.empty(row.shape, pin_memory=True)
            host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, host, event))
        else:
            self._pending.append((step, row, None))
            now = True
        num_ready = len(self._pending) if now else len(self._pending) - 1
        ready, self._pending = self._pending[:num_ready], self._pending[num_ready:]
        rows = []
        for at, values, done in ready:
            if done is not None:
                done.synchronize()
            rows.append((at, values.tolist()))
        return rows


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles, in place, every block of the innermost module lists (or the whole model without any); returns how many.

    Blocks of one kind share their code, so this takes a fraction of the time of compiling the whole; and a module
    compiled in place keeps the names in its state dict.
    """
    blocks = [
        child
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for child in module
        if not any(isinstance(inner, nn.ModuleList) for inner in child.modules())
    ]
    for block in blocks or [model]:
        block.compile(backend=backend)
    return len(blocks or [model])


def _checkpoint_activations(model: nn.Module) -> None:
    able = [module for module in model.modules() if callable(getattr(module, "set_checkpointing", None))]
    if not able:
        raise UserError(
            "train.checkpointing = true, but this model's backbone cannot recompute activations. Leave it out."
        )
    for module in able:
        module.set_checkpointing(True)  # type: ignore[operator]


def _accelerator(config: TrainConfig, run_dir: Path) -> Accelerator:
    distributed.device()
    initialised = AcceleratorState._shared_state
    if initialised and initialised.get("_mixed_precision") not in (None, config.precision):
        # One process may train several times; accelerate holds the precision of the first time for all.
        AcceleratorState._reset_state()
    if config.precision == "fp16" and distributed.device().type == "cpu":
        raise UserError("train.precision = fp16 needs a GPU, and this run is on the CPU. Use bf16 or no.")
    accelerator = Accelerator(
        mixed_precision=config.precision,
        # Accumulation is done here, where its weights are known; a value from the launcher's environment must not
        # divide again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "trackers")),
        # An ablation may leave out a loss and with it the parameters that only this loss reaches.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, but training is data-parallel only. "
            "Choose multi-GPU or multi-CPU in `accelerate config`, or pass --multi_gpu to `accelerate launch`."
        )
    assert accelerator.num_processes == distributed.world_size(), "accelerate sees other processes than torch does"
    return accelerator


@contextmanager
def _quiet_unused_parameters() -> Iterator[None]:
    """Looking for unused parameters is meant; torch advises against it whenever there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        yield


def _check_sizes(config: TrainConfig, num_examples: int, world_size: int) -> None:
    if num_examples == 0:
        raise UserError("The training data holds no example. Check data.train and its split.")
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        nearest = max(1, round(config.batch_size / parts)) * parts
        raise UserError(
            f"train.batch_size = {config.batch_size} is the whole batch, over {world_size} process(es) and "
            f"train.accumulate = {config.accumulate} part(s), and must be a multiple of their product {parts}; for "
            f"example {nearest}."
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.name` -> number or text, which every tracker takes."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
