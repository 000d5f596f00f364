"""`crossflow.load(DIR)`: a task with its trained model, to be called, moved and saved.

B batch.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from crossflow.core import distributed, launcher, sampling
from crossflow.core.adapters import Adapters
from crossflow.core.allocator import keep_freed_memory
from crossflow.core.batch import Source
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.guidance import Guidance
from crossflow.core.model import CrossFlow
from crossflow.core.noise import item_noise
from crossflow.core.precision import autocast, check_precision, default_precision
from crossflow.core.progress import Progress
from crossflow.core.settings import build
from crossflow.core.solvers import SOLVERS, Solution
from crossflow.core.weights import kind_of_weights
from crossflow.data.dataset import Examples
from crossflow.engine.folder import PROVENANCE
from crossflow.engine.inputs import NEGATIVE, item_ids, no_negative_prompt, read_inputs
from crossflow.engine.outputs import Outputs, check_output_type
from crossflow.engine.provenance import open_data
from crossflow.engine.publish import HubMethods
from crossflow.networks.frozen import checksum_of, digest
from crossflow.networks.hub import Access, run_folder
from crossflow.networks.run_weights import weights_of
from crossflow.tasks import load_model, save_model
from crossflow.tasks.base import Pieces, Task


class Opening(Access, total=False):
    """How a run is opened: the arguments of `load` but for the run itself."""

    weights: str | None
    device: str | None
    precision: str | None
    batch_size: int | None
    compile: bool
    offload: bool
    overrides: Sequence[str]


def load(
    source: str | Path,
    *,
    weights: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch_size: int | None = None,
    compile: bool = False,
    offload: bool = False,
    adapter_scale: float | None = None,
    overrides: Sequence[str] = (),
    revision: str | None = None,
    **access: Unpack[Access],
) -> "Pipeline":
    """The pipeline of a run directory, or of a hub repository that holds one.

    Args:
        weights: "ema" (averaged; the default where the run has them) or "model" (of the last step).
        device: where everything runs, such as "cuda:1"; a GPU by default, if there is one.
        precision: float32, bf16 or fp16; by default see `core.precision.default_precision`.
        batch_size: pictures, captions or tiles computed together; by default the recipe's sample.batch_size.
        compile: compile the blocks of the model by torch.compile, which takes seconds to minutes at the first call.
        offload: keep the frozen text encoder and autoencoder on the CPU while they are not used.
        adapter_scale: how strongly the adapter of a fine-tuned run acts; by default 1, see `Pipeline.adapter_scale`.
        overrides: settings of the run to replace, as key=value: a new place of a frozen network (text.encoder,
            codec.source), for example.
        revision: branch, tag or commit of a hub repository; its main branch by default. `owner/name@v1` means the same.
        access: token, cache_dir and local_files_only, see `networks.hub.Access`.

    Raises:
        UserError: missing or damaged files, weights of another model, a repository that is unavailable.
    """
    folder = run_folder(source, revision, **access)
    kind = kind_of_weights(folder, weights)
    batch = () if batch_size is None else (f"sample.batch_size={batch_size}",)
    task, model = load_model(folder, weights=kind, overrides=[*overrides, *batch])
    pipe = Pipeline(task, model, folder=folder, weights=kind, device=device, precision=precision, offload=offload)
    if adapter_scale is not None:
        pipe.adapter_scale = adapter_scale
    return pipe.compile() if compile else pipe


class Pipeline(HubMethods):
    """A task with its trained model, ready to use: `crossflow.load` makes one.

        pipe = crossflow.load("runs/t2i")
        picture = pipe("a red cube", seed=1)[0]
        pictures = pipe(["a red cube", "a blue sphere"], num=4, steps=20, guidance=2.0).images
        pipe.save("runs/copy")

    `weights` names the loaded weights (ema | model), `folder` their run directory. Everything from features to decoded
    outputs is computed on `device`, with matrix products in `precision`; what leaves it are finished outputs.
    """

    from_pretrained = staticmethod(load)
    """`crossflow.load` by the name that other libraries of the hub use."""

    def __init__(
        self,
        task: Task,
        model: CrossFlow,
        *,
        folder: Path | None = None,
        weights: str = "model",
        device: str | None = None,
        precision: str | None = None,
        offload: bool = False,
    ) -> None:
        self.task = task
        self.model = model
        self.folder = folder
        self.weights = weights
        self.weak: CrossFlow | None = None
        """A weaker version of the model, which then guides (autoguidance) instead of the indicator."""
        self.guided_by: str | None = None
        """The run that `weak` came from."""
        self.flow: Callable[..., Solution] = sampling.flow
        """What integrates the guided velocity; a scheduler of another library may take its place."""
        self.deviation = 1.0
        """Factor of the deviation of the source, which measurements change; 0: z0 is its mean."""
        self.device = find_device(device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.precision = check_precision(precision or default_precision(self.device, num_parameters), self.device)
        self.task.to(self.device, offload=offload)
        self.model.to(self.device).eval()

    def __repr__(self) -> str:
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        settings, guide = self.settings, f" by {self.guided_by}" if self.guided_by is not None else ""
        return (
            f"Pipeline({self.task.name}, {self.folder or 'not saved'}, {self.weights} weights, "
            f"{millions:.2f}M parameters, {self.device}, {self.precision}; {settings.solver}, {settings.steps} steps, "
            f"guidance {settings.guidance:g}{guide})"
        )

    @property
    def settings(self) -> SampleConfig:
        """The recipe's sampling settings."""
        return self.task.config.sample

    def sample_settings(self, **overrides: object) -> SampleConfig:
        """The recipe's sampling settings with some replaced. Raises UserError for unknown or invalid ones."""
        return build(SampleConfig, {**self.settings.model_dump(), **overrides})

    @property
    def adapters(self) -> dict[str, float]:
        """The fine-tuned runs whose adapters act on the weights, with their scales."""
        return {} if self.model.adapters is None else dict(self.model.adapters.scales)

    @property
    def adapter_scale(self) -> float:
        """How strongly the adapter of a fine-tuned run acts: 0 the weights of its base, 1 as trained.

        With several, of the first; see `add_adapter`. Setting it changes the weights. Raises UserError without any.
        """
        return next(iter(self._own_adapters().scales.values()))

    @adapter_scale.setter
    def adapter_scale(self, scale: float) -> None:
        adapters = self._own_adapters()
        adapters.scales[next(iter(adapters.scales))] = scale
        self._merge()

    def _own_adapters(self) -> Adapters:
        if self.model.adapters is None:
            raise UserError(
                f"{self.folder or 'This model'} has no adapter whose scale could be set: it stores all of its weights."
            )
        return self.model.adapters

    def add_adapter(self, source: str | Path, scale: float = 1.0) -> "Pipeline":
        """Adds what another run was fine-tuned to change in the same base, `scale` times; returns self.

            pipe = crossflow.load("runs/t2i_small").add_adapter("runs/cyan", 0.8).add_adapter("runs/brown")

        The text encoder, sizes and settings stay those of this pipeline. Raises UserError for a run without an adapter,
        with another base, or with weights that this model lacks.
        """
        folder, own = run_folder(source), self.model.adapters
        added = weights_of(folder).adapters
        base = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()} if own is None else own.base
        checksum = checksum_of(map(digest, base.values())) if own is None else own.checksum
        if added is None or added.checksum != checksum:
            why = "it stores all of its weights" if added is None else "it was fine-tuned from other weights"
            raise UserError(
                f"{source} is no adapter for this model: {why}. Add runs that were fine-tuned, by lora or parts, from "
                "the same base."
            )
        ((run, adapter),) = added.adapters.items()
        state = self.model.state_dict()
        lacking = [name for name, value in adapter.shapes.items() if name not in state or state[name].shape != value]
        if lacking:
            raise UserError(f"{source} changes weights that this model lacks, such as {lacking[0]}.")
        others = own or Adapters(base, checksum, {}, {})
        adapters = Adapters(base, checksum, {**others.adapters, run: adapter}, {**others.scales, run: scale})
        self.model.adapters = adapters
        self._merge()
        return self

    def _merge(self) -> None:
        """Gives the model the weights of its base with its adapters at their present scales."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._own_adapters().merged().items():
            parameter = parameters[name]
            parameter.data = value.to(parameter.device, parameter.dtype)

    def to(self, device: str | torch.device) -> "Pipeline":
        """Moves everything to a device (`cpu`, `cuda:1`, ...); returns self. Raises UserError if it is unavailable."""
        self.device = find_device(str(device))
        check_precision(self.precision, self.device)
        self.task.to(self.device)
        self.model.to(self.device)
        if self.weak is not None:
            self.weak.to(self.device)
        return self

    def compile(self) -> "Pipeline":
        """Compiles the blocks of the model at their first use; returns self."""
        from crossflow.core.training.prepare import compile_blocks

        compile_blocks(self.model)
        return self

    def __call__(
        self,
        inputs: object,
        *,
        num: int = 1,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        output_type: str = "pil",
        return_latents: bool = False,
        on_step: Progress | None = None,
        **settings: object,
    ) -> Outputs:
        """Outputs for one input or a list of them, `num` of each, in order.

        Args:
            inputs: prompts; or pictures: paths, PIL images, arrays or tensors, see `inputs.read_picture`.
            seed: together with the input and the output's number it determines an output, so that
                `pipe([a, b])[1]` equals `pipe(b)[0]`, and `pipe([a, a])` equals `pipe(a, num=2)`.
            ids: keys of the noise, one for each output; by default those of `inputs.item_ids`.
            output_type: pil | np | pt, see `Outputs`.
            return_latents: keep the latents z1 in `Outputs.latents`.
            on_step: called with (done, total) after each solver step of a batch.
            settings: fields of `SampleConfig` (steps, solver, guidance, batch_size, ...) instead of the recipe's.

        Raises:
            UserError: inputs that the task cannot read, invalid settings, another number of ids than of outputs, NaNs.
        """
        check_output_type(output_type)
        for name in NEGATIVE & settings.keys():
            raise no_negative_prompt(str(inputs), str(settings[name]))
        chosen = self.sample_settings(**settings)
        values = read_inputs(inputs, self.task.input_kind)
        names = list(ids) if ids is not None else item_ids(values, num)
        if num < 1:
            raise UserError(f"Expected num >= 1 outputs of each input, got {num}.")
        if len(names) != len(values) * num:
            raise UserError(f"Expected an id for each of {len(values) * num} outputs, got {len(names)}.")
        repeated = [value for value in values for _ in range(num)]
        raw: list[Any] = []
        latents: list[Tensor] = []
        for start in range(0, len(repeated), chosen.batch_size):
            part = slice(start, start + chosen.batch_size)
            outputs, z1 = self._sample(repeated[part], names[part], seed, chosen, on_step)
            raw += outputs
            latents += [torch.stack(pieces).cpu() for pieces in z1] if return_latents else ()
        return Outputs(
            tuple(raw), self.task.pictures, seed, tuple(names), output_type, tuple(latents) if return_latents else None
        )

    def dataset(
        self,
        split: str,
        spec: str | None = None,
        *,
        limit: int | None = None,
        options: Mapping[str, str] | None = None,
        seed: int | None = None,
    ) -> Examples:
        """A split of the data at `spec`, by default the run's own; see `Task.dataset`. seed: replaces the run's."""
        config = self.task.config
        config = config if seed is None else config.model_copy(update={"seed": seed})
        return open_data(type(self.task), config, split, spec, run=self.folder, limit=limit, options=options)

    def outputs(
        self,
        inputs: Sequence[Any],
        ids: Sequence[str],
        seed: int,
        settings: SampleConfig | None = None,
        on_step: Progress | None = None,
    ) -> list[Any]:
        """The task's raw outputs for inputs it can take as they are (see `read_inputs`); `ids` key their noise."""
        return self._sample(inputs, ids, seed, settings or self.settings, on_step)[0]

    @torch.no_grad()
    def _sample(
        self,
        inputs: Sequence[Any],
        ids: Sequence[str],
        seed: int,
        settings: SampleConfig,
        on_step: Progress | None = None,
    ) -> tuple[list[Any], list[list[Tensor]]]:
        """The raw outputs, and the latents z1 (*latent) of their pieces. Pieces of one shape share batches."""
        pieces = [self.task.pieces(value) for value in inputs]
        names = [part.names(id) for part, id in zip(pieces, ids, strict=True)]
        decoded: dict[tuple[int, int], Any] = {}
        latents: dict[tuple[int, int], Tensor] = {}
        for places in _batches(pieces, settings.batch_size):
            source = self.source([pieces[i].values[k] for i, k in places])
            z0 = self.latents(source, [names[i][k] for i, k in places], seed, settings.mode)
            z1 = self.solve(source, z0, settings, on_step).z
            latents |= zip(places, z1, strict=True)
            decoded |= zip(places, self.decode(z1, source.features), strict=True)
        numbers = [range(len(part.values)) for part in pieces]
        outputs = [part.join([decoded[i, k] for k in numbers[i]]) for i, part in enumerate(pieces)]
        return outputs, [[latents[i, k] for k in numbers[i]] for i in range(len(pieces))]

    @torch.no_grad()
    def source(self, values: Sequence[Any]) -> Source:
        """Pieces of inputs, all of one shape, as the model reads them."""
        with autocast(self.device, self.precision):
            return self.task.source(values).to(self.device)

    @torch.no_grad()
    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[Any]:
        """The outputs of latents z1 (B, *latent), on the host. features (B, ...): those of their sources, where
        known.
        """
        with autocast(self.device, self.precision):
            return self.task.decode(z1.float(), features)

    @torch.no_grad()
    def latents(self, source: Source, ids: Sequence[str], seed: int = 0, mode: bool = False) -> Tensor:
        """z0 (B, *latent): a sample of the source posterior with the noise of (seed, id), or its mean."""
        source = source.to(self.device)
        with autocast(self.device, self.precision):
            posterior = self.model.source_encoder(source.features, source.mask)
        if self.model.source_encoder.kind == "gaussian":
            noise = self.deviation * item_noise(seed, ids, self.noise_shape(source))
            return noise.to(self.device, non_blocking=True)
        if mode or posterior.log_var is None:
            return posterior.mode()
        noise = self.deviation * item_noise(seed, ids, posterior.mean.shape[1:])
        return posterior.sample(noise=noise.to(self.device, non_blocking=True))

    def noise_shape(self, source: Source) -> tuple[int, ...]:
        """(*latent) of the noise that a Gaussian source begins with."""
        shape = self.task.latent_shape
        grid = source.condition.grid if source.condition is not None else None
        return (*shape[:1], *grid.shape[-2:]) if grid is not None and len(shape) == 3 else shape

    def generate(self, source: Source, z0: Tensor, settings: SampleConfig, on_step: Progress | None = None) -> Tensor:
        """z0 (B, *latent) -> z1 (B, *latent) on this pipeline's device.

        Raises UserError for NaNs, and for guidance of a model that was never trained without its source.
        """
        return self.solve(source, z0, settings, on_step).z

    def solve(
        self,
        source: Source,
        z0: Tensor,
        settings: SampleConfig,
        on_step: Progress | None = None,
        *,
        keep_trajectory: bool = False,
    ) -> Solution:
        """As `generate`; the solution may keep the states (B, *latent) after each step."""
        scheme = SOLVERS.get(settings.solver)
        is_untrained = self.weak is None and self.task.config.guidance.drop == 0 and not scheme.jumps
        if settings.guidance != 1 and is_untrained:
            raise UserError(
                f"guidance = {settings.guidance:g} needs a model that was also trained without its source; this run "
                "has guidance.drop = 0. Use guidance 1, guide with a weaker run, or train with guidance.drop=0.1."
            )
        guidance = Guidance(settings.guidance, settings.guidance_interval, settings.zero_init / max(settings.steps, 1))
        condition = source.condition.to(self.device) if source.condition is not None else None
        kept = {"keep_trajectory": True} if keep_trajectory else {}  # schedulers of other libraries keep none
        with self._precise(settings.solver):
            solution = self.flow(
                self.model,
                z0.to(self.device).float(),
                guidance,
                condition=condition,
                weak=self.weak,
                solver=settings.solver,
                steps=settings.steps,
                time_grid=settings.time_grid,
                on_step=on_step,
                **kept,
            )
        _without_nans(solution.z, settings)
        return solution

    @torch.no_grad()
    def invert(self, source: Source, z1: Tensor, settings: SampleConfig, on_step: Progress | None = None) -> Tensor:
        """z1 (B, *latent) -> z0 (B, *latent) on this pipeline's device, backwards along the flow without guidance.

        Only the condition of `source` is used. Raises UserError for NaNs.
        """
        condition = source.condition.to(self.device) if source.condition is not None else None
        solver, steps, z = settings.solver, settings.steps, z1.to(self.device).float()
        with self._precise(solver):
            z0 = sampling.invert(self.model, z, condition=condition, solver=solver, steps=steps, on_step=on_step)
        return _without_nans(z0, settings)

    def _precise(self, solver: str) -> AbstractContextManager[object]:
        """The context around a whole integration of a state in float32, so that weights are converted once."""
        if self.device.type == "cpu":
            keep_freed_memory()
        return autocast(self.device, "float32" if SOLVERS.get(solver).adaptive else self.precision)

    def guide_with(self, other: "Pipeline") -> "Pipeline":
        """Turns on autoguidance by another run, smaller or trained less; returns self.

        Raises UserError if the other run works on other latents.
        """
        if other.task.name != self.task.name or other.task.latent_shape != self.task.latent_shape:
            raise UserError(
                f"A guiding model needs the same latents: {other.folder} is a {other.task.name} run on "
                f"{other.task.latent_shape}, this is a {self.task.name} run on {self.task.latent_shape}."
            )
        self.weak = other.model.to(self.device).eval()
        self.guided_by = str(other.folder)
        return self

    def save(self, folder: str | Path) -> Path:
        """Writes a complete run directory (configuration, weights, tokenizer, codec); returns it."""
        target = Path(folder)
        save_model(self.task, self.model, target, sorted({"model", self.weights}))
        if self.folder is not None and self.folder.resolve() != target.resolve():
            for name in PROVENANCE:
                if (self.folder / name).is_file():
                    shutil.copy(self.folder / name, target / name)
        return target


def find_device(name: str | None) -> torch.device:
    """A device by its name; by default that of this process under a launcher, else a GPU if there is one.

    Raises UserError if it is unavailable.
    """
    if name is None and launcher.world_size() > 1:
        return distributed.device()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's words depend on how it was built
        raise UserError(f"The device {name!r} is unavailable ({str(error).splitlines()[0]}). Use cpu.") from error


def _without_nans(latents: Tensor, settings: SampleConfig) -> Tensor:
    """The latents themselves. Raises UserError for NaNs in the end of an integration."""
    if latents.isnan().any():
        raise UserError(
            f"The sampled latents contain NaNs (guidance = {settings.guidance:g}, {settings.solver}, "
            f"{settings.steps} steps): values became too large on the way. Use a smaller guidance or, in latent "
            "arithmetic, a smaller strength; if that does not help, the weights are damaged."
        )
    return latents


def _batches(pieces: Sequence[Pieces], size: int) -> Iterator[list[tuple[int, int]]]:
    """Places (input, piece) in batches of at most `size` pieces of one shape, in the order of the inputs."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, part in enumerate(pieces):
        for k, value in enumerate(part.values):
            groups.setdefault(getattr(value, "shape", ()), []).append((i, k))
    for places in groups.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]
