"""Named protocols: everything but the model that a number depends on, one file of configs/protocols each.

A protocol fixes the split, how many items it has, what is done to pictures before and after, and how the number is
computed. What the model does (solver, steps, guidance) is not its matter and stands in the manifest beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crossflow.core.config import Section
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import RECIPES, build, read, shipped

FOLDER = RECIPES / "protocols"


class DepthRules(Section):
    alignment: Literal["none", "median", "affine"] = "none"
    """none: metric depth; median: one factor; affine: scale and shift of least squares, one pair per picture."""
    space: Literal["depth", "disparity"] = "depth"
    """Where scale and shift are fitted and applied."""
    min_depth: float = Field(1e-3, gt=0)
    """Metres; pixels measured at or below it do not count."""
    max_depth: float | None = None
    """Metres; pixels measured at or above it do not count, and predictions are clipped to it."""
    crop: Literal["none", "eigen", "garg", "nyu"] = "none"
    """The part of a picture that is scored."""
    picture: Literal["whole", "kitti"] = "whole"
    """What the model sees: the whole picture, or the 352 x 1216 pixels at the bottom centre (KITTI's benchmark)."""


class SrRules(Section):
    scale: int = Field(4, ge=2)
    """The run must enlarge by this factor."""
    crop: int | None = None
    """The centre square of every picture is resized to so many pixels; smaller pictures are left out. None: the whole.
    """
    shave: int | None = None
    """Pixels left out at every side; none: the scale."""


class TextRules(Section):
    prompts: Literal["first caption", "geneval", "scenes"] = "first caption"
    """first caption: that of each item; geneval: a metadata file of GenEval; scenes: the embedded world's six kinds."""
    samples: int = Field(1, ge=1)
    """Pictures of each prompt."""
    clip_score: bool = False
    """Also 100 max(0, cos) between picture and prompt by the network `clip`."""


class DistributionRules(Section):
    numbers: tuple[Literal["fid", "kid", "is"], ...] = ("fid",)
    reference: Literal["items", "split"] = "items"
    """The real pictures: those of the items that are scored, or all of the split."""
    size: int | None = None
    """Side of the real pictures' centre square, resized by antialiased bicubic interpolation; none: as sr.crop says."""


class Protocol(Section):
    """One named protocol. Pictures are rounded to uint8 before anything is measured on them."""

    name: str = ""
    task: Literal["t2i", "caption", "depth", "sr"]
    title: str
    """One line: what is measured, on what."""
    notes: tuple[str, ...] = ()
    """Where the rules come from, and what others do differently."""
    data: str | None = None
    """Data that are embedded; none: --data must say where they lie."""
    layout: str = ""
    """What --data looks like."""
    split: Literal["train", "val", "test", "all"] = "test"
    num_items: int | None = None
    """Items of the complete protocol; a score on fewer or more is marked as partial."""
    choose: int | None = None
    """So many of the split's items are taken, by a hash of their ids; none: all."""
    reader: dict[str, str] = Field(default_factory=dict)
    """Settings of the data format (behind the ? of --data), where it has them and --data does not say otherwise."""
    headline: tuple[str, ...] = ()
    """The numbers that tables show."""
    networks: dict[str, str] = Field(default_factory=dict)
    """Networks that measure, by role (features, clip, detector, lpips): an id, a folder or a file."""
    depth: DepthRules = DepthRules()
    sr: SrRules = SrRules()
    text: TextRules = TextRules()
    distribution: DistributionRules | None = None

    def using(self, networks: Mapping[str, str]) -> "Protocol":
        """With other networks in some roles. Raises UserError for a role the protocol does not have."""
        for role in networks:
            if role not in self.networks:
                raise unknown_name(f"network of the protocol {self.name}", role, self.networks)
        return self.model_copy(update={"networks": {**self.networks, **networks}})


def protocols() -> dict[str, Path]:
    """Shipped protocols by name, with their files; those that start with _ are only extended by others."""
    return shipped(FOLDER)


def load_protocol(source: str | Path) -> Protocol:
    """The protocol of a shipped name or a YAML file. Raises UserError for unknown names, keys and values."""
    return build(Protocol, {**read(source, FOLDER, "protocol"), "name": Path(source).stem})


def roles(given: Sequence[str]) -> dict[str, str]:
    """`["clip=FOLDER"]` -> {"clip": "FOLDER"}. Raises UserError for other words."""
    found = {}
    for word in given:
        role, equals, source = word.partition("=")
        if not (role and equals and source):
            raise UserError(f"{word!r} names no network: write ROLE=SOURCE, such as clip=FOLDER.")
        found[role] = source
    return found


def protocol_of(content: Mapping[str, Any]) -> Protocol:
    """The protocol as a manifest keeps it."""
    return build(Protocol, dict(content))
