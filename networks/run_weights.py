"""The weights of a run directory: those of its file, and for a fine-tuned run those of its base beneath them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from crossflow.core.adapters import Adapter, Adapters
from crossflow.core.config import FinetuneConfig
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.settings import build, read
from crossflow.core.weights import kind_of_weights, load_weights, read_state, weights_file
from crossflow.networks.frozen import checksum_of, digest, expect_checksum
from crossflow.networks.hub import CONFIG, run_folder


@dataclass(frozen=True)
class RunWeights:
    """All weights of a run; `adapters`: how they come about, for a run that was fine-tuned from a base."""

    state: Mapping[str, Tensor]
    origin: Path
    """The run's own file."""
    adapters: Adapters | None = None

    @property
    def checksum(self) -> str:
        """SHA-256 of all weights."""
        return checksum_of(digest(tensor) for tensor in self.state.values())


def weights_of(folder: Path, kind: str | None = None, settings: FinetuneConfig | None = None) -> RunWeights:
    """The weights of a run directory, averaged ones where it has them.

    kind: ema | model. settings: the section `finetune` of the run; by default that of its configuration. Raises
    UserError for missing and damaged files, and for a base that is missing or has other weights than it had.
    """
    if settings is None:
        recorded = read(folder) if (folder / CONFIG).is_file() else {}
        settings = build(FinetuneConfig, recorded.get("finetune", {}))
    chosen = kind_of_weights(folder, kind)
    path, own = weights_file(folder, chosen), read_state(folder, chosen)
    if settings.base is None:
        return RunWeights(own, path)
    base, run = _base(folder, settings), str(folder)
    adapters = Adapters(base.state, base.checksum, {run: Adapter(own, settings.factor)}, {run: 1.0})
    return RunWeights(adapters.weights(), path, adapters)


def _base(folder: Path, settings: FinetuneConfig) -> RunWeights:
    assert settings.base is not None
    try:
        base = weights_of(run_folder(settings.base))
    except UserError as error:
        raise UserError(
            f"The run in {folder} stores what fine-tuning changed in {settings.base}, which cannot be read: {error} "
            "If it has moved, give its place: --set finetune.base=DIR."
        ) from error
    expect_checksum(settings.base, base.checksum, settings.checksum)
    return base


def load_run(build_model: Callable[[], CrossFlow], folder: Path, kind: str, settings: FinetuneConfig) -> CrossFlow:
    """The model that `build_model` makes, with the weights of a run, and its `adapters` if it was fine-tuned.

    Raises UserError as `weights_of` does, and for weights of another model.
    """
    weights = weights_of(folder, kind, settings)
    if weights.adapters is None:
        return load_weights(build_model, weights.state, weights.origin)
    model = load_weights(build_model, weights.adapters.merged(), weights.origin, weights.adapters.base)
    model.adapters = weights.adapters
    return model
