"""Optimizer steps: an objective with its optimizer and the moving average of its weights."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from crossflow.core import distributed
from crossflow.core.batch import Batch
from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.joint import JointBatch, JointNoise
from crossflow.core.noise import Noise
from crossflow.core.training import checkpoint, sharding
from crossflow.core.training.ema import EMA
from crossflow.core.training.failures import NoMemory, is_out_of_memory
from crossflow.core.training.optim import build_optimizer, skip_if
from crossflow.core.training.prepare import (
    blocks,
    checkpoint_activations,
    compile_blocks,
    compiles,
)
from crossflow.core.training.shards import Stored
from crossflow.core.training.stream import MicroBatch


class _Losses(nn.Module):
    """The module wrapped for data parallelism and autocast; returns (loss, all losses as one detached vector)."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.names: tuple[str, ...] = ()

    def forward(self, batch: Batch | JointBatch, noise: Noise | JointNoise) -> tuple[Tensor, Tensor]:
        losses = self.objective(batch, noise)
        names = tuple(losses)
        assert names == (self.names or names), f"the losses changed their names from {self.names} to {names}"
        self.names = names
        return losses["loss"].float(), torch.stack([loss.detach().float() for loss in losses.values()])


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of this process, on its device."""

    names: tuple[str, ...]
    losses: Tensor
    """(len(names),) losses by name, averaged over the parts."""
    norm: Tensor
    """Norm of the gradient before clipping, a scalar."""
    unconditional: Tensor
    """Share of the samples that were unconditional, a scalar."""
    is_bad: Tensor
    """(len(names) + 1,) bool: which losses, and whether the gradient norm, are not finite, in which case the weights
    were not updated. With fp16 the norm is never bad: it may overflow.
    """
    overflowed: bool
    """Whether the gradient overflowed at the current fp16 scale, so that the weights were not updated."""


class Learner:
    """Makes optimizer steps; its state is saved and loaded as one.

    objective: module with the generator as `.model`, see `Trainer`; it is moved to the accelerator's device.
    """

    def __init__(self, config: TrainConfig, objective: nn.Module, accelerator: Accelerator) -> None:
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self._draw: Callable[..., list[Batch | JointBatch]] = objective.draw  # type: ignore[assignment]
        self.device: torch.device = accelerator.device
        if config.checkpointing:
            checkpoint_activations(self.model)
        self.compiled = compiles(config, self.device)
        """Whether the first step compiles the blocks of the model."""
        if self.compiled:
            compile_blocks(self.model)
        objective.to(self.device)
        self.losses = _Losses(objective)
        self.is_sharded = config.sharding == "fsdp" and distributed.world_size() > 1
        if self.is_sharded:
            sharding.shard(self.losses, blocks(self.model))  # replaces the parameters that follow
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
        self.optimizer = build_optimizer(
            objective,
            name=config.optimizer,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            scaled=accelerator.scaler is not None,
        )
        # Sharded weights exchange gradients by themselves; what is left for accelerate is the precision.
        self.wrapped = accelerator.prepare_model(self.losses, evaluation_mode=self.is_sharded)
        self.stepper = accelerator.prepare_optimizer(self.optimizer)
        self.ema = EMA(self.model, config.ema)
        self.phase: Callable[[str], AbstractContextManager[object]] = record_function
        """Surrounds each part of a step (data, encode, forward, backward, optimizer, ema), by default as a range in the
        traces of torch.profiler; measurements put a clock here.
        """
        self.interruptible: Callable[[], AbstractContextManager[object]] = nullcontext
        """Surrounds the part of a step that may be given up, since it changes neither weights nor averages."""
        self.copying: Future[Any] | None = None
        """A copy of `tensors` that another thread makes; steps and evaluations change nothing before its end."""

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> StepResult:
        """Makes one step with this process's parts of the batch at the learning rate `rate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.interruptible():
            total, unconditional = self._gradients(micro_batches)
        with self.phase("optimizer"):
            norm = self._clip()
            is_bad = ~torch.cat([total, norm.view(1).to(total)]).isfinite()
            self._await_copy()
            self._update(is_bad)
            overflowed = bool(self.stepper.step_was_skipped)
            self.stepper.zero_grad(set_to_none=True)
        if not overflowed:
            with self.phase("ema"):
                self.ema.update()  # of a skipped step: counts the unchanged weights once more
        return StepResult(self.losses.names, total, norm, unconditional, is_bad, overflowed)

    def _gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Computes the gradients; returns the losses by name and the share of unconditional samples.

        Raises NoMemory, and leaves no gradients then.
        """
        try:
            return self._differentiate(micro_batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Here and not above: a handled error keeps the activations in its traceback alive.
        self.stepper.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise NoMemory(reason)

    def _differentiate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        noises = [micro_batch.noise for micro_batch in micro_batches]
        with self.phase("forward"):
            batches = self._draw([micro_batch.batch for micro_batch in micro_batches], noises)
        num = len(batches)
        total = torch.zeros((), device=self.device)
        for number, (batch, noise) in enumerate(zip(batches, noises, strict=True), start=1):
            # Gradients are exchanged once per step, with the last part; sharded ones with each, to save their memory.
            exchanges = number == num or self.is_sharded
            with nullcontext() if exchanges else self.accelerator.no_sync(self.wrapped):
                with self.phase("forward"):
                    loss, values = self.wrapped(batch, noise)
                with self.phase("backward"):
                    # A loss that is not finite makes the gradient so, which all processes see without a message.
                    divisor = torch.where(values.isfinite().all(), float(num), float("nan"))
                    self.accelerator.backward(loss / divisor)
            total = total + values / num
        if self.is_sharded:
            sharding.average_gradients(self.parameters)
        return total, self._share_of_unconditional(batches)

    def _await_copy(self) -> None:
        if self.copying is not None:
            wait([self.copying])
            self.copying = None

    def _update(self, is_bad: Tensor) -> None:
        """Makes the optimizer's step unless the gradient is bad, see `StepResult`, without reading it if possible."""
        if self.accelerator.scaler is not None:  # which skips such steps itself
            is_bad[-1].zero_()
            self.stepper.step()
        elif (not self.is_sharded and skip_if(self.optimizer, is_bad[-1].float())) or not bool(is_bad[-1]):
            self.stepper.step()

    def _share_of_unconditional(self, batches: Sequence[Batch | JointBatch]) -> Tensor:
        flags = [batch.unconditional for batch in batches if batch.unconditional is not None]
        return torch.cat(flags).float().mean() if flags else torch.zeros((), device=self.device)

    def _clip(self) -> Tensor:
        """Clips the gradient and returns its norm before clipping, a scalar."""
        self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.is_sharded:
            norm = sharding.total_norm(gradients)
            if self.config.grad_clip > 0:
                sharding.clip(gradients, self.config.grad_clip, norm)
            return norm
        norm = nn.utils.get_total_norm(gradients)
        if self.config.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        return norm.detach()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context with averaged weights, in evaluation mode, without gradients; restores the mode of each module."""
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        try:
            with self.averaged(), torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model has its averaged weights, and has them whole. Every process must enter it."""
        self._await_copy()
        with self.ema.applied(self.model), sharding.assembled(self.losses) if self.is_sharded else nullcontext():
            yield

    def release(self) -> None:
        """Releases the process group, whose threads must end before the process does."""
        self.wrapped = self.losses
        self.accelerator.free_memory()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint by file: model, ema, objective (learned parts of the losses), optimizer.

        Without those that the model borrows from the base of a fine-tuned run.
        """
        learned = {name: value for name, value in self.objective.state_dict().items() if not name.startswith("model.")}
        borrowed: frozenset[str] = getattr(self.model, "borrowed", frozenset())
        own = {name: value for name, value in self.model.state_dict().items() if name not in borrowed}
        return {
            "model": own,
            "ema": {name: value for name, value in self.ema.state_dict().items() if name not in borrowed},
            "objective": learned,
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
        }

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint's content, as JSON."""
        scaler = self.accelerator.scaler
        return {"ema_updates": self.ema.num_updates, "scaler": None if scaler is None else scaler.state_dict()}

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Restores the tensors of the checkpoint `path` and its `state`.

        Raises UserError for a checkpoint of another model.
        """
        present = self.tensors()
        model, learned = (Stored(path, part).tensors(present[part]) for part in ("model", "objective"))
        borrowed: frozenset[str] = getattr(self.model, "borrowed", frozenset())
        kept = {name: value for name, value in self.model.state_dict().items() if name in borrowed}
        try:
            whole = {f"model.{name}": value for name, value in (kept | model).items()}
            self.objective.load_state_dict({**whole, **learned})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"The checkpoint {path} is of another model than the configuration describes: "
                f"{reason if len(reason) <= 400 else f'{reason[:400]} ...'}"
            ) from error
        self.ema.load_state_dict(Stored(path, "ema").tensors(present["ema"]), state["ema_updates"])
        optimizer = Stored(path, "optimizer")
        by_name = {name: parameter for parameter, name in self.names.items()}
        slots = {slot: by_name[name] for slot in optimizer.names if (name := slot.split("/", 1)[1]) in by_name}
        checkpoint.load_optimizer(self.optimizer, self.names, optimizer.tensors(slots))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
