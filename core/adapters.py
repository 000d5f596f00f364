"""Adapters: what fine-tuned runs change in the weights of another run, merged into these for sampling.

A low-rank adapter (LoRA, Hu et al. 2022) adds two matrices to a linear layer, W = W_base + (alpha / rank) B A with
A (rank, in) and B (out, rank), B zero at first. A fine-tuned run stores these, and the parameters that it trained
themselves. Merged, they cost nothing in sampling, and their strength can be chosen.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
_WRAPPED = ".base_layer."
"""Stands in the names of the parameters of a layer to which matrices were added."""


@dataclass(frozen=True)
class Adapter:
    """What a fine-tuned run stores: the two matrices of each adapted layer, and whole parameters."""

    tensors: Mapping[str, Tensor]
    factor: float
    """alpha / rank."""

    @functools.cached_property
    def whole(self) -> dict[str, Tensor]:
        """The parameters that were trained themselves, by their names in the model."""
        return {
            name.replace(_WRAPPED, "."): tensor
            for name, tensor in self.tensors.items()
            if not name.endswith((_DOWN, _UP))
        }

    @functools.cached_property
    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (rank, in) and B (out, rank) by the name of the weight (out, in) that they change."""
        layers = [name.removesuffix(_UP) for name in self.tensors if name.endswith(_UP)]
        return {f"{layer}.weight": (self.tensors[layer + _DOWN], self.tensors[layer + _UP]) for layer in layers}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the weights that it changes or brings, by name."""
        changed = {name: torch.Size((len(up), down.shape[1])) for name, (down, up) in self.matrices.items()}
        return changed | {name: tensor.shape for name, tensor in self.whole.items()}

    def moved(self, name: str, value: Tensor, base: Tensor, scale: float) -> Tensor:
        """`value` of the weight `name`, moved by `scale` times the change that the adapter makes to `base`."""
        if name in self.matrices:
            down, up = self.matrices[name]
            return (value.float() + scale * self.factor * (up.float() @ down.float())).to(value.dtype)
        own = self.whole[name].float()
        if value is base:  # exact at 0 and at 1
            return torch.lerp(base.float(), own, scale).to(base.dtype)
        return (value.float() + scale * (own - base.float())).to(value.dtype)


@dataclass
class Adapters:
    """Adapters by run over the weights of one base: W = W_base + sum of scale_i times the change of adapter i."""

    base: Mapping[str, Tensor]
    checksum: str
    """Of the base."""
    adapters: dict[str, Adapter]
    scales: dict[str, float]

    def merged(self) -> dict[str, Tensor]:
        """The weights that adapters change or bring, by name. What the base lacks is there at any scale."""
        weights: dict[str, Tensor] = {}
        for run, adapter in self.adapters.items():
            for name in (*adapter.matrices, *adapter.whole):
                base, own, scale = self.base.get(name), adapter.whole.get(name), self.scales[run]
                if own is not None and (base is None or own.shape != base.shape):
                    weights[name] = own
                    continue
                value = weights.get(name, self.base[name])
                weights[name] = adapter.moved(name, value, self.base[name], scale) if scale else value
        return weights

    def weights(self) -> dict[str, Tensor]:
        """All weights of the base and of its adapters."""
        return {**self.base, **self.merged()}
