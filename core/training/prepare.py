"""Preparations before the first step: processes and precision, sizes, memory, compilation, checkpointing."""

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from torch import nn

from crossflow.core import distributed
from crossflow.core.allocator import keep_freed_memory
from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError

_SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles, in place, every block of the innermost module lists (or the whole model without any); returns how many.

    Blocks of one kind share their code, so this takes a fraction of the time of compiling the whole; and a module
    compiled in place keeps the names in its state dict.
    """
    compiled = blocks(model) or [model]
    for block in compiled:
        block.compile(backend=backend)
    return len(compiled)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the innermost module lists of `model`."""
    return [
        child
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for child in module
        if not any(isinstance(inner, nn.ModuleList) for inner in child.modules())
    ]


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether a training on `device` compiles its blocks: as set, or by default on a CUDA GPU with Triton.

    On the CPU compiling often takes longer than a run saves; without Triton torch cannot compile for a GPU; and sharded
    weights are gathered within the blocks, which divides what can be compiled.
    """
    if config.compile is None:
        has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return has_compiler and config.sharding == "none"
    return config.compile


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the backbone recompute its activations in the backward pass. Raises UserError if it cannot."""
    able = [module for module in model.modules() if callable(getattr(module, "set_checkpointing", None))]
    if not able:
        raise UserError(
            "train.checkpointing = true, but this model's backbone cannot recompute activations. Set it to false."
        )
    for module in able:
        module.set_checkpointing(True)  # type: ignore[operator]


def build_accelerator(config: TrainConfig, run_dir: Path, find_unused: bool = False) -> Accelerator:
    """The accelerator of this process, which joins those of a launcher. Raises UserError for unsupported settings.

    find_unused: look in every step for parameters that get no gradient, which data-parallel training has to know.
    """
    distributed.limit_waiting(config.timeout_minutes, "train.timeout_minutes")
    distributed.device()
    initialised = AcceleratorState._shared_state
    if initialised and initialised.get("_mixed_precision") not in (None, config.precision):
        # One process may train several times; accelerate would keep the precision of the first time.
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
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, but training is data-parallel only. "
            "Choose multi-GPU or multi-CPU in `accelerate config`, or pass --multi_gpu to `accelerate launch`."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    assert accelerator.num_processes == distributed.world_size(), (
        "accelerate and torch disagree on the number of processes"
    )
    return accelerator


def check_sizes(config: TrainConfig, num_examples: int, world_size: int) -> None:
    """Raises UserError for empty training data, or a batch size not divisible by processes times parts."""
    if num_examples == 0:
        raise UserError("The training data is empty. Check data.train and its split.")
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        nearest = max(1, round(config.batch_size / parts)) * parts
        raise UserError(
            f"train.batch_size = {config.batch_size} is the whole batch, over {world_size} process(es) and "
            f"train.accumulate = {config.accumulate} part(s), and must be a multiple of their product {parts}; for "
            f"example {nearest}."
        )


def check_sharding(config: TrainConfig, reads_trained_weights: bool) -> None:
    """Raises UserError for a training that cannot be sharded.

    reads_trained_weights: whether preparing a batch takes weights that are trained, which no process has as a whole.
    """
    if config.sharding == "none":
        return
    if config.optimizer == "adamw8bit":
        raise UserError(
            "train.sharding = fsdp divides the optimizer's averages itself, and not those of adamw8bit. Use "
            "train.optimizer adamw or muon, or train.sharding none."
        )
    if config.precision == "fp16":
        raise UserError("train.sharding = fsdp does not scale gradients, which fp16 needs. Use train.precision bf16.")
    if reads_trained_weights:
        raise UserError(
            "train.sharding = fsdp divides the weights among the processes, and this training prepares its batches "
            "with weights that it trains (a jointly trained decoder). Use train.sharding none."
        )


def seed_everything(seed: int, device: torch.device) -> None:
    """Seeds the global generators of Python, numpy and torch on the CPU and on `device`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would at every call queue a seed for each kind of unused device.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
