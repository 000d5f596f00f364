"""The table of released network kinds: what `from_reference`, `to_reference` and `crossflow convert` work from.

To add a kind: a module beside this file that makes a `Kind` and enters it, `KINDS.register("name")(Kind(...))`, and its
name in `MODULES` below.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from crossflow.core.registry import Registry
from crossflow.released.rules import Rule

ReferenceConfig = Mapping[str, Any]
"""The reference's own settings, as its configuration file has them."""


def _nothing(module: nn.Module) -> None:
    """Every tensor of the network is in the file."""


@dataclass(frozen=True)
class Kind:
    """One kind of released network.

    build: (reference's config, reference's keys) -> the empty network, a CrossFlow whose `objective` holds the loss
    heads, or a codec. It runs under torch.device("meta"), allocates nothing, and raises UserError for settings that
    are not ours. Every buffer of the network must be persistent or made by `finish`.
    rules: how our tensors are made of the reference's. Our names are those of the network's state dict; the tensors of
    a CrossFlow's objective (alignment head, temperature) are called "objective.NAME".
    dropped: {regular expression of whole reference keys: why they are not used}.
    finish: called on the loaded network, still missing (on the meta device) what no key holds: rotary tables, an
    absent temperature.
    settings: (reference's config, reference's keys) -> the settings of our recipe, as `crossflow.core.settings.build`
    takes them, so that a run directory can be written; None for codecs.
    """

    build: Callable[[ReferenceConfig, Collection[str]], nn.Module]
    rules: tuple[Rule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[nn.Module], None] = _nothing
    settings: Callable[[ReferenceConfig, Collection[str]], dict[str, Any]] | None = None


KINDS: Registry[Kind] = Registry("kind of released network")
MODULES: tuple[str, ...] = ("codecs", "flow")
"""Modules of this folder that enter kinds."""


def kind_named(name: str) -> Kind:
    """The kind called `name`; raises UserError that lists the known ones."""
    for module in MODULES:
        importlib.import_module(f"crossflow.released.{module}")
    return KINDS.get(name)
