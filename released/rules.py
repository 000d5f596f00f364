"""Rules between our tensor names and those of a released file, and the two directions they are applied in.

A rule says of one kind of tensor of ours which reference keys it is made of. Expected shapes follow from our own
tensors, so a rule also says what a file must hold.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crossflow.core.errors import UserError


def _same(*parts: Tensor) -> Tensor:
    """One tensor as it is, several one below the other along the first axis."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _apart(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return (tensor,) if count == 1 else tensor.chunk(count)


@dataclass(frozen=True)
class Rule:
    """`pattern` (a regular expression for the whole of our name) -> `keys`, templates of the reference's keys.

    join: reference tensors -> ours; split: ours, number of keys -> reference tensors. Both must be exact inverses and
    work on the meta device; by default a tensor is taken as it is, and several are stacked along the first axis.
    optional: a file may lack it, and the tensor then keeps what the kind's `finish` gives it.
    """

    pattern: str
    keys: tuple[str, ...]
    join: Callable[..., Tensor] = _same
    split: Callable[[Tensor, int], tuple[Tensor, ...]] = _apart
    optional: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of ours: its `name`, the reference `keys` it is made of, and the rule between them."""

    name: str
    keys: tuple[str, ...]
    rule: Rule

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        return self.rule.join(*parts)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.keys, self.rule.split(tensor, len(self.keys)), strict=True))


def entries(names: Iterable[str], rules: Collection[Rule]) -> list[Entry]:
    """The entry of each of our tensor names, by the one rule whose pattern it matches."""
    found = []
    for name in names:
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        assert len(matches) == 1, f"{len(matches)} rules for {name}"
        rule, match = matches[0]
        found.append(Entry(name, tuple(match.expand(key) for key in rule.keys), rule))
    return found


def expected_shapes(ours: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, tuple[torch.Size, bool]]:
    """{reference key: (shape, whether it may be absent)} for our tensors (of any device; only shapes are read)."""
    return {
        key: (part.shape, entry.rule.optional)
        for entry in table
        for key, part in entry.split(torch.empty_like(ours[entry.name], device="meta")).items()
    }


def check(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, bool]], dropped: Mapping[str, str], kind: str
) -> list[str]:
    """The keys of `state` that are not used, each covered by a pattern of `dropped`.

    Raises UserError that lists every missing, misshapen and unknown key.
    """
    missing = [key for key, (_, optional) in shapes.items() if key not in state and not optional]
    wrong = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, (shape, _) in shapes.items()
        if key in state and state[key].shape != shape
    ]
    there = [key for key in shapes if key in state]
    wrong += [f"{key} is of {state[key].dtype}" for key in there if not state[key].is_floating_point()]
    unused = [key for key in state if key not in shapes]
    unknown = [key for key in unused if not any(re.fullmatch(pattern, key) for pattern in dropped)]
    found = [("missing", missing), ("of another shape or type", wrong), ("unknown", unknown)]
    if any(keys for _, keys in found):
        told = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in found if keys)
        raise UserError(
            f"These weights are not those of a {kind!r} network with these settings: {told}. "
            "Check the kind and the config, or the file."
        )
    return unused


def join_all(state: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """Reference tensors -> ours, by name; entries whose keys the file lacks are left out (see `check`)."""
    return {
        entry.name: entry.join(state[key] for key in entry.keys)
        for entry in table
        if all(key in state for key in entry.keys)
    }


def split_all(ours: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """Our tensors -> the reference's, by its own keys."""
    return {key: part for entry in table for key, part in entry.split(ours[entry.name]).items()}
