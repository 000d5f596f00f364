"""Networks as shapes: parameters without memory, for counting, for planning, and for filling from a file.

with shapes_only():
    network = DiT(...)          # every parameter is on the meta device
network.load_state_dict(state, assign=True)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = frozenset(
    getattr(owner, f"{name}_")
    for owner, names in (
        (torch.Tensor, ("normal", "uniform", "fill", "zero", "mul", "add", "erfinv", "clamp")),
        (torch.nn.init, ("normal", "uniform", "trunc_normal", "constant", "kaiming_uniform")),
    )
    for name in names
)
"""What initialisations are made of."""


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are: torch would trace each initialisation, half the time of building
    a network, to change values that do not exist.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if function in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules built in the body have parameters and buffers on the meta device, which are not initialised."""
    with torch.device("meta"), _Unfilled():
        yield
