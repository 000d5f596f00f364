"""Which parameters a fine-tuned run trains: some of its base's own, and the matrices of low-rank adapters.

See core/adapters.py for what becomes of them.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from crossflow.core.config import FinetuneConfig
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow

TARGETS = ("*.attn.*", "*.cross.*", "*.up", "*.down", "*.mlp.gate", "*.mlp.value", "*.mlp.out")
"""The linear layers of attention and feed-forwards, by the names that they have in all networks."""
LARGEST_SHARE = 0.02
"""Of the weights of a model: what an adapter of the default rank has at most."""
LARGEST_RANK = 32


def adapt(model: CrossFlow, settings: FinetuneConfig, new: Collection[str] = ()) -> None:
    """Leaves what `settings` say to be trained of a model with the weights of its base, in place, and adds matrices.

    new: names of parameters that the base lacks, which are trained in any case. Raises UserError for patterns without a
    match, for settings that leave nothing to be trained, and without peft.
    """
    parameters = dict(model.named_parameters())
    chosen = _matching(settings.train, parameters, "train")
    if not settings.train and settings.rank == 0:
        chosen = set(parameters)
    layers = linear_layers(model, settings) if settings.rank else []
    frozen = _matching(settings.freeze, [*parameters, *layers], "freeze")
    layers = [name for name in layers if name not in frozen and f"{name}.weight" not in (chosen - frozen) | set(new)]
    trained = {id(parameters[name]) for name in (chosen - frozen) | set(new)}
    if not trained and not layers:
        raise UserError("finetune.freeze leaves nothing to be trained: freeze less, or name other finetune.targets.")
    if layers:
        _add_matrices(model, layers, settings)
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.borrowed = frozenset(model.state_dict().keys() - own)


def linear_layers(model: nn.Module, settings: FinetuneConfig) -> list[str]:
    """The names of the linear layers that get matrices. Raises UserError for a pattern without a match."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if settings.targets:
        chosen = _matching(settings.targets, layers, "targets")
        return [name for name in layers if name in chosen]
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in TARGETS)]


def default_rank(model: nn.Module, settings: FinetuneConfig, num_parameters: int) -> int:
    """The largest power of two, up to LARGEST_RANK, with which the matrices are less than LARGEST_SHARE of a model of
    `num_parameters`.
    """
    layers = dict(model.named_modules())
    lengths = sum(sum(layers[name].weight.shape) for name in linear_layers(model, settings))
    rank = 1
    while rank < LARGEST_RANK and 2 * rank * lengths < LARGEST_SHARE * num_parameters:
        rank *= 2
    return rank


def _matching(patterns: Sequence[str], names: Iterable[str], setting: str) -> set[str]:
    """The names that match a pattern. Raises UserError, with near names, for a pattern without a match."""
    names, matching = list(names), set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3)
            example = f" Near names: {', '.join(near)}." if near else f" Names look like {names[0]}." if names else ""
            raise UserError(f"The pattern {pattern!r} of finetune.{setting} matches nothing.{example}")
        matching |= matches
    return matching


def _add_matrices(model: nn.Module, layers: list[str], settings: FinetuneConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "Adapters (finetune.rank > 0) are trained by peft, which is not installed. Install it by pip install "
            '"crossflow-toolkit[finetune]", or train parameters themselves: --method full or parts.'
        ) from error
    alpha = settings.rank * settings.factor
    inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=layers), model)
