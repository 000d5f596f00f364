"""Fine-tuning: the configuration of a run that learns own pictures from a trained run (docs/fine_tuning.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.core.config import Config, FinetuneConfig
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.settings import build, merge, parse_overrides
from crossflow.core.training.trained import default_rank
from crossflow.core.weights import shapes_only
from crossflow.data.readers import SEPARATOR, joined_parts
from crossflow.engine.distill import from_anywhere
from crossflow.networks.hub import run_folder
from crossflow.networks.run_weights import weights_of
from crossflow.tasks import load_config, task_class

METHODS = ("lora", "full", "parts")
LARGE = 200_000_000
"""Parameters from which a model is trained in the ways that save memory: those of the releases have more."""
NUM_STEPS = 600
KEPT = 0.5
"""Share of the samples from the data of the trained run, which it would forget otherwise."""
BATCH, LARGE_BATCH = 16, 8
RATE, RATE_WIDTH = 6e-3, 768
"""The learning rate of adapters for batches of BATCH, in layers with at most RATE_WIDTH inputs. It is lower in
proportion with smaller batches and in wider layers.
"""


@dataclass(frozen=True)
class Changes:
    """What is fine-tuned, and how."""

    method: str = "lora"
    """lora: low-rank adapters; full: all parameters; parts: those that `train` and `freeze` leave."""
    rank: int | None = None
    """Of the adapters; None: the largest with which they have less than 2 % of the model's weights."""
    train: Sequence[str] = ()
    """Patterns of the names of parameters that are trained themselves."""
    freeze: Sequence[str] = ()
    """Patterns of the names of what stays as it is."""
    keep: float | None = None
    """Share in [0, 1) of the samples that are drawn from the data of the trained run; None: KEPT where these can be
    read and the model is not large.
    """


def finetuned(source: str, data: str, changes: Changes | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run that learns the data `data` from the run `source`.

    source: run directory, or hub repository. overrides: key=value settings, which have the last word. It is validated
    on the data of `source`, where these can be read, which shows what is forgotten. Raises UserError for a run without
    a flow of its own or with a teacher, patterns that do not fit the method, and invalid settings.
    """
    changes = _checked(changes or Changes())
    folder = run_folder(source).resolve()
    config = load_config(folder)
    if config.train.steps == 0 or config.interval.teacher is not None:
        origin = config.interval.teacher or "the run that it reads backwards"
        advice = "that one, and distil the result." if config.interval.teacher is not None else "that one."
        raise UserError(f"{source} has learned its flow from {origin}. Fine-tune {advice}")
    kind, weights = task_class(config.task), weights_of(folder)
    num_parameters = sum(tensor.numel() for tensor in weights.state.values())
    is_large = num_parameters > LARGE
    base = str(folder) if Path(source).expanduser().is_dir() else source
    old = _kept_data(config, folder, changes.keep, is_large=is_large)
    # The encoder loss holds the source encoder in its form, without which old inputs are lost. Among copies of a few
    # pictures alone it has no true negatives, and for a large model it would train a large head anew.
    loss = {"encoder": "none"} if old is None or is_large else {}
    settings = merge(
        config.model_dump(mode="json"),
        {
            "data": {
                "train": _joined(config, data, old, KEPT if changes.keep is None else changes.keep),
                "val": _readable(config, folder, "val"),
                "num_train": None,
            },
            "source": {"frozen": False},
            "loss": loss,
            "finetune": _section(changes, base, weights.checksum),
            "train": training_settings(config, changes.method, base, is_large=is_large),
        },
    )
    chosen = parse_overrides(overrides)
    tuned = build(kind.Config, merge(merge(settings, parse_overrides(kind.flow_alone)), chosen))
    if changes.method != "lora" or changes.rank is not None or "rank" in chosen.get("finetune", {}):
        return tuned
    with shapes_only():
        model = kind.outline(tuned).build_model()
    rank = default_rank(model, tuned.finetune, num_parameters)
    return tuned.model_copy(update={"finetune": tuned.finetune.model_copy(update={"rank": rank})})


def _checked(changes: Changes) -> Changes:
    if changes.method not in METHODS:
        raise unknown_name("method", changes.method, METHODS)
    if changes.method == "parts" and not (changes.train or changes.freeze):
        raise UserError("--method parts needs --train or --freeze with a pattern of names, such as 'backbone.*'.")
    if changes.method == "full" and (changes.train or changes.freeze):
        raise UserError("--method full trains all parameters. To train some of them, use --method parts.")
    if changes.method != "lora" and changes.rank is not None:
        raise UserError(f"--rank is that of adapters, which --method {changes.method} does not make.")
    return changes


def _section(changes: Changes, base: str, checksum: str) -> dict[str, Any]:
    """The section `finetune`: a run whose parameters are all trained stores them all, and needs no base."""
    section = FinetuneConfig()
    if changes.method != "full":
        rank = (changes.rank or 1) if changes.method == "lora" else 0
        section = FinetuneConfig(
            base=base, checksum=checksum, rank=rank, train=tuple(changes.train), freeze=tuple(changes.freeze)
        )
    return section.model_dump(mode="json")


def training_settings(config: Config, method: str, base: str, *, is_large: bool) -> dict[str, Any]:
    """Few steps of small batches; large models recompute activations, and keep frozen networks off the device."""
    is_full, batch_size = method == "full", LARGE_BATCH if is_large else BATCH
    settings: dict[str, Any] = {
        "steps": NUM_STEPS,
        "batch_size": batch_size,
        "accumulate": 1,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_lr": 0.0,
        "ema": 0.99,
        "weight_decay": 0.0,
        "save_every": NUM_STEPS // 2,
        "eval_every": 0,
        "sample_every": 0,
        "start_from": base if is_full else None,
        "parts_from": base if is_full else None,
    }
    if method == "lora":
        settings |= {"optimizer": "adamw", "lr": round(_adapter_rate(config) * batch_size / BATCH, 7)}
    else:
        settings |= {"lr": config.train.lr / 10} | ({"optimizer": "adamw8bit"} if is_large else {})
    return settings | ({"checkpointing": True, "offload": True} if is_large else {})


def _adapter_rate(config: Config) -> float:
    """The learning rate of adapters: the wider a layer, the larger is the change by its two matrices."""
    with shapes_only():
        model = task_class(config.task).outline(config).build_model()
    width = max(weight.shape[1] for weight in model.backbone.parameters() if weight.ndim == 2)
    return RATE * min(1.0, RATE_WIDTH / width)


def _readable(config: Config, folder: Path, split: str) -> str | None:
    """The data of a split of the run in `folder`; None if they cannot be read here."""
    spec = config.data.train if split == "train" else config.data.val or config.data.train
    spec = from_anywhere(spec, folder)
    try:
        task_class(config.task).dataset(config, split, spec)
    except UserError:
        return None
    return spec


def _kept_data(config: Config, folder: Path, keep: float | None, *, is_large: bool) -> str | None:
    """The data of the run in `folder`; None if nothing is kept of them. Raises UserError if they cannot be read."""
    old = None if keep == 0 or (keep is None and is_large) else _readable(config, folder, "train")
    if old is None and keep:
        raise UserError(
            f"--keep {keep:g} takes a share of the samples from the data of the trained run, which cannot be read "
            f"here: {config.data.train}. Join others: --data '20 * folder:mine + folder:OLD' --keep 0."
        )
    return old


def _joined(config: Config, data: str, old: str | None, share: float) -> str:
    """The data `data`, read so often beside `old` that these are a share of the samples."""
    if old is None or old == data:
        return data
    parts = joined_parts(data) or [(1, data)]
    kind = task_class(config.task)
    whole = config.model_copy(update={"data": config.data.model_copy(update={"num_train": None})})
    num_new, num_old = (len(kind.dataset(whole, "train", spec)) for spec in (data, old))
    times = max(1, round((1 - share) / share * num_old / num_new))
    return SEPARATOR.join([*(f"{times * number} * {part}" for number, part in parts), old])
