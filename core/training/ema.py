"""A moving average of the weights: shadow <- d shadow + (1 - d) weight, with d = min(decay, (1 + n) / (10 + n)).

n counts the updates made before; the small d of the first updates forgets the initial weights quickly.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crossflow.core.training.sharding import is_divided, like, local


class EMA:
    """The average of the trained parameters of `model` in float32; all else is that of the model.

    Sharded parameters have averages of their local rows.

    decay in [0, 1); num_updates is the n above.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shadows = [local(parameter).float().clone() for parameter in self.parameters]
        self._applied = False

    def decay_at(self, num_updates: int) -> float:
        """d of the update after `num_updates` others."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current weights."""
        assert not self._applied, "the model holds the averaged weights"
        weights = [local(parameter).float() for parameter in self.parameters]
        torch._foreach_lerp_(self.shadows, weights, 1 - self.decay_at(self.num_updates))
        self.num_updates += 1

    @contextmanager
    def applied(self, model: nn.Module | None = None) -> Iterator[None]:
        """Context in which `model` (default: the averaged model itself) has the averaged weights."""
        assert model is None or model is self.model, "an average belongs to one model"
        assert not self._applied, "the averaged weights are already applied"
        weights = [_exchange(*pair) for pair in zip(self.parameters, self.shadows, strict=True)]
        self._applied = True
        try:
            yield
        finally:
            for parameter, weight in zip(self.parameters, weights, strict=True):
                _exchange(parameter, weight)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        """`model.state_dict()` with the averages in place of the parameters, so it loads into the model itself."""
        average = {
            id(parameter): like(parameter, shadow)
            for parameter, shadow in zip(self.parameters, self.shadows, strict=True)
        }
        state = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in average:
                state[name] = average[id(parameter)]
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """The inverse of `state_dict`, with the number of updates made."""
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for name, shadow in zip(trained, self.shadows, strict=True):
            shadow.copy_(local(state[name]))
        self.num_updates = num_updates


def _exchange(parameter: Tensor, values: Tensor) -> Tensor:
    """Gives the parameter other values of its local rows; returns those before."""
    if is_divided(parameter):  # its memory is registered with FSDP
        rows = local(parameter)
        before = rows.clone()
        rows.copy_(values)
        return before
    before = parameter.data
    parameter.data = values.to(parameter.dtype)  # float32 weights: the shadow itself, no copy
    return before
