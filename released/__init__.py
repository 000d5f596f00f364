"""The released CrossFlow and FlowTok weights <-> our networks, tensor by tensor and exactly, in both directions.

model = from_reference("dimr", torch.load("t2i_256px_clip_dimr.pth", weights_only=True, mmap=True), config)
state = to_reference(model)

Kinds: dimr, dit, flowtok (a CrossFlow, its loss heads in `.objective`), flowtitok, autoencoder_kl (codecs). A kind is a
table of rules, see `kinds.py` (how one is added) and `rules.py`.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.released.kinds import KINDS, Kind, ReferenceConfig, kind_named
from crossflow.released.rules import check, entries, expected_shapes, join_all, split_all

__all__ = [
    "KINDS",
    "Kind",
    "Reference",
    "empty",
    "expected",
    "from_reference",
    "kind_named",
    "settings",
    "tensors",
    "to_reference",
]

logger = logging.getLogger(__name__)
HEADS = "objective."
"""What the tensors of a CrossFlow's objective are called beside those of the generator."""


@dataclass(frozen=True)
class Reference:
    """Where a network came from: its kind, the reference's settings, the optional keys its file lacked, and the keys
    that were dropped, each with the reason.
    """

    kind: str
    config: ReferenceConfig
    absent: tuple[str, ...] = ()
    dropped: Mapping[str, str] | None = None


def from_reference(kind: str, state_dict: Mapping[str, Tensor], config: ReferenceConfig) -> Any:
    """The network that a released file stands for, in evaluation mode and in the file's own precision.

    kind: dimr | dit | flowtok -> CrossFlow with `.objective`; flowtitok | autoencoder_kl -> codec.
    state_dict: the file's keys and tensors (any device, also meta). They are taken over without a copy where nothing
    has to be rearranged, so do not write to them afterwards. config: the reference's own settings.
    What was dropped is logged and listed in `.reference.dropped`.
    Raises UserError that lists every missing, misshapen and unknown key.
    """
    known = kind_named(kind)
    module = empty(kind, config, state_dict)
    ours = tensors(module)
    table = entries(ours, known.rules)
    shapes = expected_shapes(ours, table)
    unused = check(state_dict, shapes, known.dropped, kind)
    _fill(module, join_all(state_dict, table))
    known.finish(module)
    dropped = _reasons(unused, known)
    for reason in dict.fromkeys(dropped.values()):
        logger.info("%d tensors of the file are not used: %s", list(dropped.values()).count(reason), reason)
    absent = tuple(key for key in shapes if key not in state_dict)
    setattr(module, "reference", Reference(kind, dict(config), absent, dropped))  # noqa: B010 (not a module or tensor)
    return module.eval()


def to_reference(model: nn.Module, kind: str | None = None, config: ReferenceConfig | None = None) -> dict[str, Tensor]:
    """The tensors of `model` under the released keys, the exact inverse of `from_reference`; memory is shared with it
    where nothing has to be rearranged.

    kind: only for a model that did not come from `from_reference` but has the same parts (one trained here from a
    released recipe). Keys that were dropped, or that the file lacked, are not made up. A CrossFlow without `.objective`
    gives the generator's keys alone.
    Raises UserError when the kind is not known.
    """
    origin: Reference | None = getattr(model, "reference", None)
    if origin is None:
        if kind is None:
            raise UserError("This network did not come from a released file: say its kind, and the reference's config.")
        origin = Reference(kind, dict(config or {}))
    ours = tensors(model)
    state = split_all(ours, entries(ours, kind_named(origin.kind).rules))
    return {key: tensor for key, tensor in state.items() if key not in origin.absent}


def settings(kind: str, config: ReferenceConfig, keys: Collection[str]) -> dict[str, Any]:
    """Our recipe's settings for a released flow model, for `crossflow.core.settings.build` or a config.yaml."""
    known = kind_named(kind)
    if known.settings is None:
        raise UserError(f"A {kind!r} network is a codec; it has no recipe of its own.")
    return known.settings(config, keys)


def empty(kind: str, config: ReferenceConfig, keys: Collection[str]) -> nn.Module:
    """The network on the meta device: shapes without memory. Raises UserError for settings that make no network."""
    known = kind_named(kind)
    try:
        with torch.device("meta"):
            return known.build(config, keys)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"No {kind!r} network can be made with this config; one of its settings is not what the reference's code "
            f"takes ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error


def expected(kind: str, config: ReferenceConfig, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    """{reference key: shape} of all that a file of that kind and config can hold and we use."""
    ours = tensors(empty(kind, config, keys))
    shapes = expected_shapes(ours, entries(ours, kind_named(kind).rules))
    return {key: tuple(shape) for key, (shape, _) in shapes.items()}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The modules whose tensors belong to a network, by prefix of their names."""
    objective = module.objective if isinstance(module, CrossFlow) else None
    return {"": module} if objective is None else {"": module, HEADS: objective}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network by name; the objective's without the generator it trains."""
    return {
        prefix + name: tensor
        for prefix, part in _parts(module).items()
        for name, tensor in part.state_dict().items()
        if not (prefix and name.startswith("model."))
    }


def _fill(module: nn.Module, filled: Mapping[str, Tensor]) -> None:
    for prefix, part in _parts(module).items():
        own = {name.removeprefix(prefix): tensor for name, tensor in filled.items() if name.startswith(prefix)}
        part.load_state_dict(own, strict=False, assign=True)


def _reasons(unused: Collection[str], kind: Kind) -> dict[str, str]:
    return {
        key: next(reason for pattern, reason in kind.dropped.items() if re.fullmatch(pattern, key)) for key in unused
    }
