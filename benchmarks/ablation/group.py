"""A group of variants to compare: one file of configs/ablations, or one of the user's."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from crossflow.core.config import Section
from crossflow.core.settings import RECIPES, build, read, shipped
from crossflow.tasks import task_names

FOLDER = RECIPES / "ablations"


class Part(Section):
    """Settings of the training and the sampling that override those of a group, variant or recipe."""

    settings: dict[str, Any] = Field({})
    """Of the training, as in a recipe."""
    sample: dict[str, Any] = Field({})
    """Of the evaluation: fields of `sample`."""


class Stage(Section):
    """A further training of a variant; variants that use the same label share it."""

    label: str
    share: float = Field(gt=0, le=1)
    """Fraction of the steps of a run."""
    settings: dict[str, Any] = Field({})
    """On top of those of the group (`first`) or of the variant (`weak`)."""


class Variant(Part):
    """One row of an ablation."""

    about: str = ""
    paper: str | None = None
    """The corresponding row of the group's table in paper.yaml."""
    train: str | None = None
    """Label of its training; variants with the same label share one. None: the variant's name."""
    by_task: dict[str, Part] = Field({})
    first: Stage | None = None
    """An earlier training, from whose weights its own training starts."""
    weak: Stage | None = None
    """A shorter training, whose model guides its sampling."""
    against: str | None = None
    """The variant that it is compared with; None: the group's reference."""
    optional: bool = False
    """Skipped if the weights that it needs are unavailable."""


class Group(Part):
    """Variants that are trained and evaluated alike, but for the settings that they compare."""

    name: str
    title: str
    about: str
    table: str | None = None
    """The corresponding table of paper.yaml; None if no paper has one."""
    tasks: tuple[str, ...] = ()
    """Tasks that the group applies to; empty: every task."""
    task: str | None = None
    """The task that it is run on by default, when it applies to every task."""
    train: str | None = None
    """Label of the training that all variants share, if only their sampling differs."""
    by_task: dict[str, Part] = Field({})
    reference: str
    variants: dict[str, Variant]

    @model_validator(mode="after")
    def _agrees(self) -> "Group":
        for name in (self.reference, *(variant.against for variant in self.variants.values())):
            if name is not None and name not in self.variants:
                raise ValueError(f"{self.name} compares with {name!r}, which is not one of its variants")
        return self

    @property
    def default_task(self) -> str:
        """The task that the group is run on when none is named."""
        return self.task or (self.tasks or task_names())[0]

    def common(self, task: str) -> list[Part]:
        """What all variants share on a task, in order of precedence."""
        return [self, self.by_task.get(task, Part())]

    def parts(self, variant: str, task: str) -> list[Part]:
        """Everything that applies to a variant on a task; later parts override earlier ones."""
        own = self.variants[variant]
        return [*self.common(task), own, own.by_task.get(task, Part())]

    def comparisons(self) -> list[tuple[str, str]]:
        """(variant, variant to compare it with) for every variant but the reference."""
        pairs = [(name, variant.against or self.reference) for name, variant in self.variants.items()]
        return [(name, other) for name, other in pairs if name != other]


def groups() -> dict[str, Path]:
    """The shipped groups by name, with their files."""
    return shipped(FOLDER)


def load_group(source: str) -> Group:
    """A shipped group by name, or the group of a YAML file. Raises UserError for unknown names and wrong content."""
    return build(Group, {"name": Path(source).stem, **read(source, FOLDER, "ablation")})
