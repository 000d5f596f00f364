"""Number formats of sampling: float32, or matrix products in a half type by autocast.

Under autocast the following stay in float32, each for its reason:

- statistics of norms, softmax, exp(log_var) and the losses: sums and exponentials of rounded values are far off;
- the time embedding: its angles reach 1000 radians, where bfloat16 has steps of 4;
- the state of the ODE: a step of 1/50 of a velocity is lost on a state of eight bits;
- latents of tokens that are read back as words: a near tie would fall to another word.

An adaptive solver always computes in float32: it would take the rounding of the velocity for its own error.
"""

from contextlib import AbstractContextManager

import torch

from crossflow.core.errors import UserError, unknown_name

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a precision -> the type of its matrix products."""
SMALLEST_ON_CPU = 4_000_000
"""Parameters from which bf16 is faster on a CPU with AMX, also for a single sample.

Measured on one core of a Xeon with AMX, guided velocities of DiT in bf16 against float32, for one sample and for eight:
1.3M parameters 1.05 and 1.8 times as fast, 4.2M 1.35 and 1.9, 9.7M (eight alone) 2.2, 16.5M (four) 2.7. Below 1M
conversions take more than they save.
"""


def default_precision(device: torch.device, num_parameters: int) -> str:
    """bf16 where the device multiplies matrices in it by units of its own, float32 elsewhere.

    These are GPUs from NVIDIA's Ampere on, and CPUs with AMX for models of at least `SMALLEST_ON_CPU` parameters.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        has_units = torch.cpu._is_amx_tile_supported()
        return "bf16" if has_units and num_parameters >= SMALLEST_ON_CPU else "float32"
    return "float32"


def check_precision(name: str, device: torch.device) -> str:
    """`name` itself. Raises UserError for an unknown precision, and for fp16 on a CPU, which has no units for it."""
    if name not in DTYPES:
        raise unknown_name("precision", name, DTYPES)
    if name == "fp16" and device.type == "cpu":
        raise UserError("Precision fp16 needs a GPU, and this model is on the CPU. Use bf16 or float32.")
    return name


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which matrix products are computed in `precision`, a name in `DTYPES`."""
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, DTYPES[precision])
