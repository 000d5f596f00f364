"""Distillation: the configuration of a run that learns from a trained one to need few steps (docs/few_steps.md)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossflow.core.config import Config, FinetuneConfig
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import build, merge, parse_overrides
from crossflow.data.readers import resolve_spec
from crossflow.engine.folder import RunFolder
from crossflow.networks.hub import run_folder
from crossflow.tasks import load_config, task_class

METHODS = ("composition", "derivative", "reflow")
NUM_STEPS = 4
"""Steps by which a distilled run samples unless told otherwise."""


def distilled(
    source: str,
    *,
    method: str = "composition",
    guidance: tuple[float, float] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The configuration of a run that starts from the run `source` and learns its guided flow in half as many steps.

    Args:
        source: run directory, or hub repository.
        method: composition | derivative (flow maps) | reflow; see `core.config.IntervalConfig`.
        guidance: lowest and highest scale that is built in; a range becomes an input of the network. By default the
            scale at which the run samples.
        overrides: key=value settings, which have the last word.

    Raises:
        UserError: for a run without a flow of its own, unknown methods and invalid settings.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    folder = run_folder(source).resolve()
    config = load_config(folder)
    if config.train.steps == 0:
        raise UserError(
            f"{source} has trained no flow of its own. Distil the run that it reads backwards, with "
            "interval.both_ways=0.5, and name the result in its place."
        )
    if config.loss.flow_weight == 0 or config.time.at_start == 1:
        raise UserError(
            f"{source} was trained at t = 0 alone (time.at_start = {config.time.at_start:g}, loss.flow_weight = "
            f"{config.loss.flow_weight:g}), so it takes one step already, and has no flow to distil."
        )
    own = config.sample.guidance if config.guidance.drop > 0 else 1.0
    kind = task_class(config.task)
    settings = merge(config.model_dump(mode="json"), _changes(config, folder, method, guidance or (own, own)))
    return build(kind.Config, merge(merge(settings, parse_overrides(kind.flow_alone)), parse_overrides(overrides)))


def _changes(config: Config, folder: Path, method: str, scales: tuple[float, float]) -> dict[str, Any]:
    """What a run that is distilled by `method` from the run in `folder` changes in its settings."""
    is_range = scales[0] < scales[1]
    changes: dict[str, Any] = {
        "data": {"train": from_anywhere(config.data.train, folder)},
        "source": {"frozen": True},
        # The flow alone, at all times: what trained the source, or one step, is done.
        "loss": {
            "encoder": "none",
            "kl_weight": 0.0,
            "encoder_gradient": "diagonal",
            "direction_weight": 0.0,
            "mean_weight": 0.0,
            "decoded": "none",
            "decoded_network": None,
        },
        "path": {"noise": 0.0},
        "time": {"at_start": 0.0, "points": ()},
        "guidance": {"drop": 0.0},
        "finetune": FinetuneConfig().model_dump(mode="json"),
        "interval": {
            "target": method,
            "teacher": str(folder),
            "guidance": scales,
            "guidance_interval": config.sample.guidance_interval,
        },
        "train": _shorter(config) | {"start_from": str(folder), "parts_from": None},
        "sample": {
            "solver": "euler" if method == "reflow" else "map",
            "steps": NUM_STEPS,
            "guidance": config.sample.guidance if is_range else 1.0,
            "guidance_interval": (0.0, 1.0),
            "zero_init": 0,
            "time_grid": "uniform",
        },
    }
    if method != "reflow":
        changes["interval"] |= {"both_ways": 0.25}
        changes["backbone"] = {"interval": "added", "guided": is_range}
    return changes


def from_anywhere(spec: str, folder: Path) -> str:
    """The data at `spec`, whose relative path is taken from the directory where the run in `folder` was started."""
    directory = RunFolder(folder).read_manifest().get("directory")
    return resolve_spec(spec, Path(directory), prefer_current=False) if isinstance(directory, str) else spec


def _shorter(config: Config) -> dict[str, float]:
    """Half of the run's steps at half of its learning rate, and its intervals between reports shortened with them."""
    names = ("steps", "warmup_steps", "save_every", "eval_every", "sample_every")
    return {name: (getattr(config.train, name) + 1) // 2 for name in names} | {"lr": config.train.lr / 2}
