"""The released CrossFlow and FlowTok weights <-> networks of this package, tensor by tensor, exact in both directions.

    model = from_reference("dimr", torch.load("t2i_256px_clip_dimr.pth", weights_only=True, mmap=True), config)
    state = to_reference(model)

Kinds: dimr, dit, flowtok (a CrossFlow, its loss heads in `.objective`), flowtitok, autoencoder_kl (codecs). A kind is a
table of rules: see rules.py, and kinds.py for how to add one.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.weights import shapes_only
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
"""Prefix of the tensors of a CrossFlow's objective, beside those of the generator."""


@dataclass(frozen=True)
class Reference:
    """The released file that a network comes from."""

    kind: str
    config: ReferenceConfig
    """The reference's own settings."""
    absent: tuple[str, ...] = ()
    """Optional keys that the file lacks."""
    dropped: Mapping[str, str] | None = None
    """{unused key: the reason}."""


def from_reference(kind: str, state_dict: Mapping[str, Tensor], config: ReferenceConfig) -> Any:
    """The network of a released file, in evaluation mode and in the file's own precision.

    kind: dimr | dit | flowtok -> CrossFlow with `.objective`; flowtitok | autoencoder_kl -> codec.
    state_dict: the file's keys and tensors (any device, including meta). The network shares their memory where nothing
    is rearranged, so do not modify them afterwards. config: the reference's own settings.
    Dropped keys are logged and listed in `.reference.dropped`.
    Raises UserError that lists every missing, mismatched and unknown key.

    >>> import torch
    >>> vae = {"ch": 32, "ch_mult": [1, 1, 1, 1], "in_channels": 3, "out_ch": 3, "num_res_blocks": 1, "z_channels": 4}
    >>> shapes = expected("autoencoder_kl", vae, ())
    >>> state = {key: torch.randn(shape) for key, shape in shapes.items()}
    >>> codec = from_reference("autoencoder_kl", state, vae)
    >>> codec.latent_shape(64)
    (4, 8, 8)
    >>> all(torch.equal(tensor, state[key]) for key, tensor in to_reference(codec).items())
    True
    """
    known = kind_named(kind)
    module = empty(kind, config, state_dict)
    own = tensors(module)
    table = entries(own, known.rules)
    shapes = expected_shapes(own, table)
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
    """The tensors of `model` under the released keys: the exact inverse of `from_reference`. Memory is shared where
    nothing is rearranged.

    kind: only for a model that `from_reference` did not create but that has the same parts, such as one trained on a
    released recipe. Dropped keys and keys that the file lacked are left out. A CrossFlow without `.objective` gives the
    generator's keys alone.
    Raises UserError when the kind is unknown or missing.
    """
    origin: Reference | None = getattr(model, "reference", None)
    if origin is None:
        if kind is None:
            raise UserError(
                "This network does not come from a released file: pass its kind and the reference's config."
            )
        origin = Reference(kind, dict(config or {}))
    own = tensors(model)
    state = split_all(own, entries(own, kind_named(origin.kind).rules))
    return {key: tensor for key, tensor in state.items() if key not in origin.absent}


def settings(kind: str, config: ReferenceConfig, keys: Collection[str]) -> dict[str, Any]:
    """The recipe of a released flow model, for `crossflow.core.settings.build` or a config.yaml.

    Raises UserError for a codec, which has no recipe, and for unsupported settings.
    """
    known = kind_named(kind)
    if known.settings is None:
        raise UserError(f"A {kind!r} network is a codec and has no recipe; use from_reference.")
    return known.settings(config, keys)


def empty(kind: str, config: ReferenceConfig, keys: Collection[str]) -> nn.Module:
    """The network on the meta device: shapes without memory. Raises UserError for invalid settings."""
    known = kind_named(kind)
    try:
        with shapes_only():
            return known.build(config, keys)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"This config does not describe a {kind!r} network; a setting has another type or value than in the "
            f"reference's code ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error


def expected(kind: str, config: ReferenceConfig, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    """{reference key: shape} of all tensors that a file of this kind and config may hold, without dropped ones.

    keys: of the file, which decide between variants with the same settings; () for none.
    """
    own = tensors(empty(kind, config, keys))
    shapes = expected_shapes(own, entries(own, kind_named(kind).rules))
    return {key: tuple(shape) for key, (shape, _) in shapes.items()}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with the tensors of a network, by the prefix of their names."""
    objective = module.objective if isinstance(module, CrossFlow) else None
    return {"": module} if objective is None else {"": module, HEADS: objective}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network by name, including those of its objective."""
    return {
        prefix + name: tensor
        for prefix, part in _parts(module).items()
        for name, tensor in part.state_dict().items()
        if not (prefix and name.startswith("model."))
    }


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for prefix, part in _parts(module).items():
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        part.load_state_dict(own, strict=False, assign=True)


def _reasons(unused: Collection[str], kind: Kind) -> dict[str, str]:
    return {
        key: next(reason for pattern, reason in kind.dropped.items() if re.fullmatch(pattern, key)) for key in unused
    }
