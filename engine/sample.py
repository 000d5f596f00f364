"""`crossflow.load(DIR)`: a task with its trained model, callable and savable; what sampling, evaluation and the latent
tools use.

pipe = crossflow.load("runs/t2i")
pictures = pipe(["a red cube"], seed=1)
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossflow.core import distributed, sampling
from crossflow.core.batch import Source
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors, write_atomically, write_tensors
from crossflow.core.model import CrossFlow
from crossflow.core.noise import item_noise
from crossflow.core.settings import build, dump
from crossflow.engine.folder import PROVENANCE, WEIGHTS
from crossflow.tasks.base import Flow, Task, build_task, load_config

OnStep = Callable[[int, int], None]


def load(
    source: str | Path, *, weights: str | None = None, device: str | None = None, overrides: Sequence[str] = ()
) -> "Pipeline":
    """The pipeline of a run directory, or of a hub repository that holds one.

    weights: "ema" (default when the run has them) or "model"; overrides: key=value settings of the run to be replaced,
    such as where its frozen networks lie now (text.encoder, codec.source). Raises UserError when files are missing,
    damaged or do not fit.
    """
    folder = _folder(source)
    config = load_config(folder, overrides)
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"Unknown weights {weights!r}. Known: {', '.join(WEIGHTS)}.")
    task = build_task(config)
    task.run_folder = folder
    task.restore(folder)
    kind = weights or ("ema" if (folder / WEIGHTS["ema"]).is_file() else "model")
    model = _load_model(task, folder / WEIGHTS[kind])
    return Pipeline(task, model, folder=folder, weights=kind, device=device)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"{folder} is not a run directory: it has no config.yaml. Give the "
                "folder that `crossflow train` wrote to."
            )
        return folder
    if folder.exists():
        raise UserError(
            f"{folder} is a file, but a checkpoint is a run directory. Convert released files with `crossflow convert`."
        )
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"There is no folder {source}. Give a run directory, or a hub id such as owner/name.")
    from huggingface_hub import snapshot_download

    try:
        wanted, unwanted = ["*.json", "*.yaml", "*.safetensors", "*.txt"], ["checkpoints/*", "evaluation/*"]
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's client raises many kinds, and each means the same to the user
        raise UserError(
            f"There is no folder {source}, and it cannot be had from the hub "
            f"({type(error).__name__}). Give a run directory, "
            "or download the repository and give its folder."
        ) from error


def _load_model(task: Task, path: Path) -> CrossFlow:
    """The task's model with the weights of a file, which is mapped into memory instead of being copied there."""
    with torch.device("meta"):
        model = task.build_model()
    _load_weights(model, path)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = task.build_model()  # it holds tables that are computed and not saved
        _load_weights(model, path)
    return model


def _load_weights(model: CrossFlow, path: Path) -> None:
    """Raises UserError unless the file holds exactly the model's tensors."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}: the run has not saved weights yet, or the file was removed."
        )
    state = read_tensors(path, "Use another checkpoint of the run.")
    expected = model.state_dict()
    wrong = [
        *(f"{key} is missing" for key in expected if key not in state),
        *(f"{key} is not part of this model" for key in state if key not in expected),
        *(
            f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not fit the model of its config.yaml: {'; '.join(wrong[:5])}{more}.")
    model.load_state_dict({key: tensor.to(expected[key].dtype) for key, tensor in state.items()}, assign=True)


class Pipeline:
    """A task and its model, ready for use. `weights` says which weights it carries (ema | model)."""

    def __init__(
        self,
        task: Task,
        model: CrossFlow,
        *,
        folder: Path | None = None,
        weights: str = "model",
        device: str | None = None,
    ) -> None:
        self.task = task
        self.model = model
        self.folder = folder
        self.weights = weights
        self.weak: CrossFlow | None = None
        """An under-trained version of the model: guidance is then by it (autoguidance) instead of by the indicator."""
        self.guided_by: str | None = None
        """The run that `weak` came from."""
        self.device = find_device(device)
        self.model.to(self.device).eval()

    @property
    def settings(self) -> SampleConfig:
        return self.task.config.sample

    def sample_settings(self, **overrides: Any) -> SampleConfig:
        """The recipe's sampling settings with some of them replaced; UserError for unknown or impossible ones."""
        return build(SampleConfig, {**self.settings.model_dump(), **overrides})

    def __call__(
        self,
        inputs: Any,
        *,
        ids: Sequence[str] | None = None,
        num: int = 1,
        seed: int = 0,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> list[Any]:
        """Outputs for one input or a list of them (prompts; pictures or their paths), `num` of each, in order.

        The noise of output k of input i follows from (seed, ids[i], k) alone; ids default to the inputs' numbers.
        settings: fields of `SampleConfig` (steps, solver, guidance, ...). on_step(done, total) after each solver step
        of a batch.
        """
        single = not isinstance(inputs, (list, tuple))
        given = [inputs] if single else list(inputs)
        read = [self.task.read_input(value) for value in given]
        names = list(ids) if ids is not None else [str(index) for index in range(len(given))]
        repeated = [(value, f"{name}/{k}") for value, name in zip(read, names, strict=True) for k in range(num)]
        outputs: list[Any] = []
        chosen = self.sample_settings(**settings)
        for start in range(0, len(repeated), chosen.batch_size):
            part = repeated[start : start + chosen.batch_size]
            outputs += self.outputs([value for value, _ in part], [name for _, name in part], seed, chosen, on_step)
        return outputs

    @torch.no_grad()
    def outputs(
        self,
        inputs: Sequence[Any],
        ids: Sequence[str],
        seed: int,
        settings: SampleConfig | None = None,
        on_step: OnStep | None = None,
    ) -> list[Any]:
        """Outputs of one batch of read inputs."""
        return self.task.run(inputs, self.flow(seed, settings or self.settings, on_step), ids)

    def flow(self, seed: int, settings: SampleConfig, on_step: OnStep | None = None) -> Flow:
        """The function that a task calls to turn sources into z1; sources are taken in parts of settings.batch_size."""

        def run(source: Source, ids: Sequence[str]) -> Tensor:
            parts = [
                self.generate(part, self.latents(part, names, seed, settings.mode), settings, on_step)
                for part, names in _parts(source, ids, settings.batch_size)
            ]
            return torch.cat(parts).float().cpu()

        return run

    @torch.no_grad()
    def latents(self, source: Source, ids: Sequence[str], seed: int = 0, mode: bool = False) -> Tensor:
        """z0 (B, *latent): a sample of the source posterior with the noise of (seed, id), or its mean."""
        source = source.to(self.device)
        posterior = self.model.source_encoder(source.features, source.mask)
        if self.model.source_encoder.kind == "gaussian":
            shape = self._gaussian_shape(source)
            return item_noise(seed, ids, shape).to(self.device)
        if mode or posterior.log_var is None:
            return posterior.mode()
        return posterior.sample(noise=item_noise(seed, ids, posterior.mean.shape[1:]).to(self.device))

    def _gaussian_shape(self, source: Source) -> tuple[int, ...]:
        shape = self.task.latent_shape
        grid = source.condition.grid if source.condition is not None else None
        return (*shape[:1], *grid.shape[-2:]) if grid is not None and len(shape) == 3 else shape

    def generate(self, source: Source, z0: Tensor, settings: SampleConfig, on_step: OnStep | None = None) -> Tensor:
        """z0 (B, *latent) -> z1 on this pipeline's device. Raises UserError when there are NaNs in it."""
        if settings.guidance != 1 and self.weak is None and self.task.config.guidance.drop == 0:
            raise UserError(
                f"guidance = {settings.guidance:g} needs a model that was trained without its source now and then, and "
                "this run has guidance.drop = 0. Use guidance 1, a weaker run to guide with, or guidance.drop=0.1."
            )
        condition = source.condition.to(self.device) if source.condition is not None else None
        z1 = sampling.generate(
            self.model,
            z0.to(self.device),
            condition=condition,
            solver=settings.solver,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
            zero_init=settings.zero_init,
            time_grid=settings.time_grid,
            weak=self.weak,
            on_step=on_step,
        )
        if z1.isnan().any():
            raise UserError(
                f"There are NaNs in what was sampled (guidance = {settings.guidance:g}, {settings.solver}, "
                f"{settings.steps} steps): numbers on the way became too large. Give smaller ones, of guidance or of "
                "an arithmetic's strength; if that does not help, the weights are damaged."
            )
        return z1

    def guide_with(self, other: "Pipeline") -> "Pipeline":
        """Guides by the model of another run, trained less or smaller, on the same latents. Returns self."""
        if other.task.name != self.task.name or other.task.latent_shape != self.task.latent_shape:
            raise UserError(
                f"A model can be guided only by one on the same latents; {other.folder} is a {other.task.name} run on "
                f"{other.task.latent_shape}, not {self.task.name} on {self.task.latent_shape}."
            )
        self.weak = other.model.to(self.device).eval()
        self.guided_by = str(other.folder)
        return self

    def save(self, folder: str | Path) -> Path:
        """Writes a complete run directory (configuration, weights, tokenizer, codec); returns it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / "config.yaml", dump(self.task.config))
        for kind in {"model", self.weights}:
            write_tensors(target / WEIGHTS[kind], self.model.state_dict())
        self.task.save(target)
        if self.folder is not None and self.folder.resolve() != target.resolve():
            for name in PROVENANCE:
                if (self.folder / name).is_file():
                    shutil.copy(self.folder / name, target / name)
        return target


def find_device(name: str | None) -> torch.device:
    """The device called so; none: this process's own under a launcher, else a GPU if there is one.

    Raises UserError when there is no such device.
    """
    if name is None and distributed.announced():
        return distributed.device()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's words depend on how it was built
        raise UserError(f"There is no device {name!r} here ({str(error).splitlines()[0]}). Use cpu.") from error


def _parts(source: Source, ids: Sequence[str], size: int) -> Iterator[tuple[Source, Sequence[str]]]:
    for start in range(0, len(source), size):
        yield source[start : start + size], ids[start : start + size]
