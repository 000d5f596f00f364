"""Named protocols: everything but the model that a number depends on, one file of configs/protocols each.

A protocol fixes the split, how many items it has, what is done to pictures before and after, and how the number is
computed. Solver, steps and guidance belong to the model and are recorded in the manifest. The section of a protocol
that only its task understands (crops, alignment, ...) holds the rules of that task's scoring.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model

from crossflow.core.config import Section
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import RECIPES, build, read, shipped
from crossflow.tasks import check_headline, task_class, task_names

FOLDER = RECIPES / "protocols"
DISTANCES = {
    "fid": ("fid", "frechet_distance"),
    "kid": ("kid", "kernel_distance"),
    "is": ("is", "class_score"),
}
"""Number -> its name by Inception, and by another network."""


class DistributionRules(Section):
    """Distances between the distributions of generated and of real pictures."""

    numbers: tuple[Literal["fid", "kid", "is"], ...] = ("fid",)
    reference: Literal["items", "split", "train"] = "items"
    """The real pictures: those of the scored items, all of the split, or the training pictures of the same data.

    Where an output is made from its item's own picture, only `train` measures anything: the reference must not contain
    the pictures that are restored. `--statistics FILE` replaces them, for example by published statistics.
    """
    size: int | None = None
    """Side to which the centre squares of real and generated pictures are resized (antialiased bicubic); None: whole
    pictures.
    """
    smaller: Literal["enlarged", "left out"] = "enlarged"
    """What happens to real pictures whose shorter side is below `size`."""


class Protocol(Section):
    """One named protocol. Pictures are rounded to uint8 before anything is measured on them.

    `load_protocol` gives the subclass of the protocol's task, which has the section with the task's rules.
    """

    section: ClassVar[str] = ""
    """Name of the field with the task's rules."""

    name: str = ""
    task: str
    title: str
    """One line: what is measured, on what."""
    notes: tuple[str, ...] = ()
    """Where the rules come from, and what others do differently."""
    data: str | None = None
    """Embedded data; None: --data is required."""
    layout: str = ""
    """Form of --data, for messages and lists."""
    split: Literal["train", "val", "test", "all"] = "test"
    num_items: int | None = None
    """Items of the complete protocol; a score on fewer or more is marked as partial."""
    choose: int | None = None
    """Number of items chosen from the split by a hash of their ids; None: all."""
    reader: dict[str, str] = Field(default_factory=dict)
    """Options of the data format (after the ? of --data), where it has them and --data does not set them."""
    headline: tuple[str, ...] = ()
    """Names of the scores that tables show first."""
    networks: dict[str, str] = Field(default_factory=dict)
    """Networks that measure, by role (features, clip, detector, lpips): an id, a folder or a file."""
    distribution: DistributionRules | None = None

    @property
    def rules(self) -> Section:
        """The rules of the task's scoring."""
        rules: Section = getattr(self, self.section)
        return rules

    def using(self, networks: Mapping[str, str]) -> "Protocol":
        """A copy with other networks in some roles. Raises UserError for a role the protocol does not have."""
        for role in networks:
            if role not in self.networks:
                raise unknown_name(f"network of the protocol {self.name}", role, self.networks)
        return self.model_copy(update={"networks": {**self.networks, **networks}})


def protocols() -> dict[str, Path]:
    """Shipped protocols by name, with their files; those that start with _ are only extended by others."""
    return shipped(FOLDER)


def load_protocol(source: str | Path) -> Protocol:
    """The protocol of a shipped name or a YAML file.

    Raises UserError for unknown names, tasks, keys and values, and for a headline that names no score.
    """
    return _build({**read(source, FOLDER, "protocol"), "name": Path(source).stem})


def protocol_of(content: Mapping[str, Any]) -> Protocol:
    """The protocol as a manifest keeps it. Manifests of earlier versions also hold the sections of other tasks, which
    are ignored.
    """
    own = _section(str(content.get("task")))
    others = {_section(name) for name in task_names()} - {own}
    return _build({key: value for key, value in content.items() if key not in others})


def roles(words: Sequence[str]) -> dict[str, str]:
    """`["clip=FOLDER"]` -> {"clip": "FOLDER"}. Raises UserError for any other form."""
    sources = {}
    for word in words:
        role, equals, source = word.partition("=")
        if not (role and equals and source):
            raise UserError(f"Expected a network as ROLE=SOURCE, such as clip=FOLDER, got {word!r}.")
        sources[role] = source
    return sources


def _build(settings: Mapping[str, Any]) -> Protocol:
    if "task" not in settings:
        raise UserError(f"The protocol {settings.get('name')} does not name its task: add a line `task: NAME`.")
    protocol = build(_kind(str(settings["task"])), settings)
    scores = list(task_class(protocol.task).Scoring.scores(protocol.rules))
    numbers = protocol.distribution.numbers if protocol.distribution is not None else ()
    scores += [name for number in numbers for name in DISTANCES[number]]
    check_headline(protocol.headline, scores, f"the protocol {protocol.name}")
    return protocol


@functools.cache
def _kind(task: str) -> type[Protocol]:
    """The protocols of a task: `Protocol` with the section of the task's rules."""
    section, rules = _section(task), task_class(task).Scoring.Rules
    kind = create_model("Protocol", __base__=Protocol, **{section: (rules, rules())})  # type: ignore[call-overload]
    kind.section = section
    return kind


def _section(task: str) -> str:
    return task_class(task).Scoring.section or task
