"""Ensembles: several samples of the source of an input, decoded and combined into one output with its uncertainty."""

from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.data.combined import Combined
from crossflow.engine.inputs import item_ids, read_inputs
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Input

DRAWN = {"mode": False}
"""Members start from samples of the source, also where the recipe starts from its mean."""


def ensemble(
    pipe: Pipeline, value: object, num: int = 8, *, seed: int = 0, on_step: Progress | None = None, **settings: object
) -> Combined:
    """One output for an input, combined from `num` samples of its source, with its uncertainty at each pixel.

    Args:
        value: as for `Pipeline`; member k is `pipe(value, num=num, seed=seed, mode=False)[k]`.
        num: at least 2.
        settings: fields of `SampleConfig`.

    Raises UserError for tasks whose outputs cannot be combined, and for a source without variance.

        depth = ensemble(pipe, "photo.jpg", num=8)
        depth.value, depth.uncertainty
    """
    (read,) = read_inputs([value], pipe.task.input_kind)
    return combine(pipe, read, num, seed, pipe.sample_settings(**(settings | DRAWN)), on_step)


def combine(
    pipe: Pipeline, value: Input, num: int, seed: int, settings: SampleConfig, on_step: Progress | None = None
) -> Combined:
    """As `ensemble`, for an input that the task can take as it is."""
    check_ensemble(pipe, num)
    ids, outputs = item_ids([value], num), []
    for start in range(0, num, settings.batch_size):
        part = ids[start : start + settings.batch_size]
        outputs += pipe.outputs([value] * len(part), part, seed, settings, on_step)
    return pipe.task.combination(outputs)


def check_ensemble(pipe: Pipeline, num: int) -> None:
    """Raises UserError where `num` members cannot be combined, or would be equal."""
    pipe.task.combination  # noqa: B018 (raises for tasks without one)
    if num < 2:
        raise UserError(f"An ensemble needs at least 2 members, got {num}.")
    if pipe.model.source_encoder.kind == "deterministic":
        raise UserError(
            "The members of this ensemble would be equal: the source of the run has no variance (source.kind = "
            "deterministic). Train with source.kind=noisy or variational."
        )
