"""The memory of an optimizer step before the first one is made: the step is rehearsed with fake tensors.

Fake tensors have shapes and storages without memory, so the rehearsal of a model of any size costs nothing but the time
of dispatching its operations. What it counts is what the allocator would hold: the process itself, the workspaces of
libraries and fragmentation come on top.
"""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossflow.core.batch import Batch, map_tensors
from crossflow.core.config import TrainConfig
from crossflow.core.noise import Noise
from crossflow.core.training.checkpoint import num_bytes, optimizer_tensors
from crossflow.core.training.ema import EMA
from crossflow.core.training.optim import build_optimizer
from crossflow.core.training.prepare import checkpoint_activations

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device."""

    parts: dict[str, int]
    """`weights`, `gradients`, `optimizer` and `ema` in full, and `activations`: the rest of the peak."""
    peak: int
    checkpoint: int
    """Bytes of the tensors of a checkpoint."""
    num_trained: int
    """Number of trained parameters."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it and still alive; `peak` is their maximum.

    >>> with LiveBytes() as memory:
    ...     kept = torch.zeros(256)
    ...     del kept
    >>> memory.live, memory.peak
    (0, 1024)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Runs an operation and counts its new storages; views and in-place results share theirs."""
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def rehearse(
    config: TrainConfig, objective: nn.Module, batch: Batch, noise: Noise, *, num_processes: int = 1
) -> StepMemory:
    """The memory of a step of `objective`, a module on the meta device with the generator as `.model`.

    batch, noise: of any number of examples, from which the shapes of a full part are taken. num_processes: those that
    share the batch.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_examples, size = len(batch), max(1, config.batch_size // (config.accumulate * num_processes))

    def part(tensor: Tensor) -> Tensor:
        rows = size if tensor.ndim and len(tensor) == num_examples else len(tensor)
        return torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype)

    with FakeTensorMode(), LiveBytes() as memory:
        fake = _without_data(objective)
        if config.checkpointing:
            checkpoint_activations(fake)
        batches = [replace(map_tensors(part, batch), unconditional=torch.zeros(size, dtype=torch.bool))]
        batches += [map_tensors(torch.empty_like, batches[0]) for _ in range(1, config.accumulate)]
        return _rehearse(config, fake, batches, map_tensors(part, noise), memory, num_processes)


def _rehearse(
    config: TrainConfig,
    objective: nn.Module,
    batches: list[Batch],
    noise: Noise,
    memory: LiveBytes,
    num_processes: int,
) -> StepMemory:
    """As `rehearse`, with a fake module and the fake parts of a step."""
    model: nn.Module = objective.model  # type: ignore[assignment]
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    ema = EMA(model, config.ema)
    state = _optimizer_state(config, objective, trained, names)  # made by the first step, and there from then on
    # Data parallelism copies gradients into buckets that live as long as the run.
    buckets = sum(parameter.nbytes for parameter in trained) if num_processes > 1 else 0
    for batch in batches[:2]:  # a second part meets the gradients of the first; further ones add nothing
        with torch.autocast("cpu", dtype=_AUTOCAST.get(config.precision), enabled=config.precision in _AUTOCAST):
            loss = objective(batch, noise)["loss"]
        loss.backward()
        del loss
    parts = {
        "weights": sum(tensor.nbytes for tensor in (*objective.parameters(), *objective.buffers())),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": num_bytes(state),
        "ema": sum(shadow.nbytes for shadow in ema.shadows),
    }
    peak = memory.peak + buckets
    parts["activations"] = max(0, peak - sum(parts.values()))
    borrowed = sum(model.state_dict()[name].nbytes for name in getattr(model, "borrowed", ()))
    saved = num_bytes(objective.state_dict()) + num_bytes(model.state_dict()) + num_bytes(state) - 2 * borrowed
    return StepMemory(parts, peak, saved, sum(parameter.numel() for parameter in trained))


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device whose weights are tensors of the surrounding FakeTensorMode."""
    modules = [module, *getattr(module, "companions", ())]
    tensors = [tensor for part in modules for tensor in (*part.parameters(), *part.buffers())]
    fakes: dict[int, Any] = {}
    for tensor in tensors:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_weight = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
    return copy.deepcopy(module, fakes)


def _optimizer_state(
    config: TrainConfig, objective: nn.Module, trained: Sequence[nn.Parameter], names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """The tensors of the optimizer after its first step."""
    if config.optimizer == "adamw8bit":  # its kernels do not run on fake tensors
        return {names[parameter]: _eight_bit_averages(parameter) for parameter in trained}
    optimizer = build_optimizer(
        objective,
        name=config.optimizer,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        scaled=config.precision == "fp16",
    )
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer_tensors(optimizer, names)


def _eight_bit_averages(parameter: nn.Parameter) -> Tensor:
    """Memory of both averages: two bytes per value and two float32 per block of 256, or small parameters in float32."""
    size = parameter.numel()
    num_bytes = 8 * size if size < 4096 else 2 * size + 8 * -(-size // 256)
    return torch.empty(num_bytes, dtype=torch.uint8, device=parameter.device)
