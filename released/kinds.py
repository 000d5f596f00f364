"""The table of released network kinds: what `from_reference`, `to_reference` and `crossflow convert` work from.

To add a kind, write a module beside this file that registers one, `KINDS.register("name")(Kind(...))`, and add the
module's name to `MODULES` below.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from crossflow.core.registry import Registry
from crossflow.released.rules import Rule

ReferenceConfig = Mapping[str, Any]
"""The reference's own settings, by the names of its configuration file."""


def _complete(module: nn.Module) -> None:
    """For a network whose file holds every tensor."""


@dataclass(frozen=True)
class Kind:
    """One kind of released network.

    build: (reference's config, reference's keys) -> the empty network, a CrossFlow whose `objective` holds the loss
    heads, or a codec. It runs under torch.device("meta"), allocates nothing, and raises UserError for unsupported
    settings. Every buffer of the network must be persistent or set by `finish`.
    rules: from tensor names to reference keys. Names are those of the network's state dict; the tensors of a
    CrossFlow's objective (alignment head, temperature) have the prefix "objective.".
    dropped: {regular expression of whole reference keys: the reason why they are unused}.
    finish: sets the tensors of the loaded network that the file lacks, which are still on the meta device: rotary
    tables, an absent temperature.
    settings: (reference's config, reference's keys) -> the settings of a recipe, as `crossflow.core.settings.build`
    takes them, from which a run directory is written; None for codecs.
    """

    build: Callable[[ReferenceConfig, Collection[str]], nn.Module]
    rules: tuple[Rule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[nn.Module], None] = _complete
    settings: Callable[[ReferenceConfig, Collection[str]], dict[str, Any]] | None = None


KINDS: Registry[Kind] = Registry("kind of released network")
MODULES: tuple[str, ...] = ("codecs", "flow")
"""Modules of this folder that register kinds."""


def kind_named(name: str) -> Kind:
    """The kind called `name`. Raises UserError that lists the known ones."""
    for module in MODULES:
        importlib.import_module(f"crossflow.released.{module}")
    return KINDS.get(name)
