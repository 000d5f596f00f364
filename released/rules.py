"""Rules between the tensor names of a network of this package and the keys of a released file.

A rule says which reference keys hold one kind of tensor, and how to convert in both directions. The shapes that a file
must have follow from the network's own tensors.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crossflow.core.errors import UserError


def _concatenate(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return (tensor,) if count == 1 else tensor.chunk(count)


@dataclass(frozen=True)
class Rule:
    """`pattern`, a regular expression for a whole tensor name -> `keys`, templates of the reference's keys.

    join: reference tensors -> own tensor; split: own tensor, number of keys -> reference tensors. They must be exact
    inverses and work on the meta device. By default a single tensor stays as it is, and several are concatenated along
    the first axis. optional: a file may lack the keys; the kind's `finish` then sets the tensor.
    """

    pattern: str
    keys: tuple[str, ...]
    join: Callable[..., Tensor] = _concatenate
    split: Callable[[Tensor, int], tuple[Tensor, ...]] = _chunk
    optional: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of a network: its `name`, the reference `keys` that hold it, and the rule between them."""

    name: str
    keys: tuple[str, ...]
    rule: Rule

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """The reference's tensors, in the order of `keys` -> the network's tensor."""
        return self.rule.join(*parts)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The network's tensor -> the reference's tensors by key."""
        return dict(zip(self.keys, self.rule.split(tensor, len(self.keys)), strict=True))


def entries(names: Iterable[str], rules: Collection[Rule]) -> list[Entry]:
    """The entry of each tensor name, by the only rule whose pattern it matches.

    >>> rules = [Rule(r"attn\\.qkv\\.(weight|bias)", (r"W_Q.\\1", r"W_K.\\1", r"W_V.\\1"))]
    >>> entries(["attn.qkv.bias"], rules)[0].keys
    ('W_Q.bias', 'W_K.bias', 'W_V.bias')
    """
    table = []
    for name in names:
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        assert len(matches) == 1, f"{len(matches)} rules for {name}"
        rule, match = matches[0]
        table.append(Entry(name, tuple(match.expand(key) for key in rule.keys), rule))
    return table


def expected_shapes(tensors: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, tuple[torch.Size, bool]]:
    """{reference key: (shape, whether it is optional)} for a network's tensors, on any device."""
    return {
        key: (part.shape, entry.rule.optional)
        for entry in table
        for key, part in entry.split(torch.empty_like(tensors[entry.name], device="meta")).items()
    }


def check(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, bool]], dropped: Mapping[str, str], kind: str
) -> list[str]:
    """The unused keys of `state`, each covered by a pattern of `dropped`.

    Raises UserError that lists every missing, mismatched and unknown key.
    """
    missing = [key for key, (_, optional) in shapes.items() if key not in state and not optional]
    mismatched = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, (shape, _) in shapes.items()
        if key in state and state[key].shape != shape
    ]
    present = [key for key in shapes if key in state]
    mismatched += [f"{key} is of {state[key].dtype}" for key in present if not state[key].is_floating_point()]
    unused = [key for key in state if key not in shapes]
    unknown = [key for key in unused if not any(re.fullmatch(pattern, key) for pattern in dropped)]
    problems = {"missing": missing, "of another shape or type": mismatched, "unknown": unknown}
    summary = "; ".join(f"{len(keys)} {name}: {', '.join(keys)}" for name, keys in problems.items() if keys)
    if summary:
        raise UserError(
            f"These weights are not those of a {kind!r} network with these settings: {summary}. "
            "Check the kind and the config, or the file."
        )
    return unused


def join_all(state: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """Reference tensors -> the network's, by name, without entries whose keys the file lacks (see `check`)."""
    return {
        entry.name: entry.join(state[key] for key in entry.keys)
        for entry in table
        if all(key in state for key in entry.keys)
    }


def split_all(tensors: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """The network's tensors by name -> the reference's, by key."""
    return {key: part for entry in table for key, part in entry.split(tensors[entry.name]).items()}
