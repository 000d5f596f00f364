"""A run as a folder that diffusers loads, and what the pipeline in that folder does.

    model_index.json    names the pipeline's class, the model and the scheduler
    pipeline.py         the class, by which diffusers finds `RunPipeline`
    model/              component.py, by which diffusers finds `RunModel`, and the run directory model/run
    scheduler/          of a run sampled by Euler steps

Times are reversed there: sigma = 1 - t, from 1 (the source) to 0, and the velocity changes its sign.
B batch, H W height and width in pixels.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core import sampling
from crossflow.core.batch import Condition
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import replacing_folder, write_atomically, write_json
from crossflow.core.guidance import Guidance
from crossflow.core.model import CrossFlow
from crossflow.core.progress import Progress
from crossflow.core.solvers import Solution
from crossflow.engine.model_card import LIBRARY
from crossflow.engine.outputs import Outputs
from crossflow.engine.provenance import versions
from crossflow.engine.publish import copy_run, hide_folders
from crossflow.engine.sample import Pipeline, load
from crossflow.networks.hub import run_folder
from crossflow.tasks import load_config

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "map": "FlowMapEulerDiscreteScheduler"}
"""Solver of a run -> the scheduler of diffusers that takes the same steps."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RUN = Path("model/run")
"""Not beside component.py: of a component's folder with weights in it diffusers downloads only what it knows."""

_IMPORT = f"""
try:
    from crossflow.engine.for_diffusers import {{name}}
except ImportError as error:
    raise ImportError("This model needs the package {LIBRARY}, whose import is crossflow.") from error
"""
PIPELINE_FILE = f'''"""A CrossFlow model for diffusers; what it does is in the installed package {LIBRARY}."""

from diffusers import DiffusionPipeline
{_IMPORT.format(name="RunPipeline")}

class CrossFlowPipeline(RunPipeline, DiffusionPipeline):
    _optional_components = ["scheduler"]

    def __init__(self, model, scheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)
'''
COMPONENT_FILE = f'''"""The run directory beside this file as a component of a diffusers pipeline."""
{_IMPORT.format(name="RunModel")}

class CrossFlowModel(RunModel):
    pass
'''


def export(source: str | Path, target: Path, *, weights: str | None = None, overrides: Sequence[str] = ()) -> Path:
    """Writes a run, or a hub repository that holds one, as a folder for diffusers; returns the folder.

        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

    weights: ema | model; the averaged ones by default. overrides: settings of the run to replace, as key=value. Raises
    UserError for what is no run, and for a target that exists and is not empty.
    """
    run = run_folder(source)
    config = load_config(run, overrides)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty. Give a new folder.")
    version = {"_diffusers_version": versions(("diffusers",))["diffusers"]}
    scheduler = SCHEDULERS.get(config.sample.solver) if config.sample.time_grid == "uniform" else None
    index = {
        "_class_name": ["pipeline", "CrossFlowPipeline"],
        **version,
        "model": ["component", "CrossFlowModel"],
        "scheduler": [None if scheduler is None else "diffusers", scheduler],
    }
    with replacing_folder(target) as folder:
        if config.finetune.base is None:
            copy_run(run, folder / RUN, weights=weights, overrides=overrides)
        else:  # whose weights lie elsewhere in part
            load(run, weights=weights, device="cpu", overrides=overrides).save(folder / RUN)
        hide_folders(folder / RUN)
        write_atomically(folder / "model" / "component.py", COMPONENT_FILE)
        write_atomically(folder / "pipeline.py", PIPELINE_FILE)
        write_json(folder / "model_index.json", index)
        if scheduler is not None:
            settings = {"_class_name": scheduler, **version, "num_train_timesteps": 1000, "shift": 1.0}
            write_json(folder / "scheduler" / "scheduler_config.json", settings)
    return target


class ScheduledFlow:
    """`core.sampling.flow` by the steps of a scheduler of diffusers, which end at the times of its sigmas."""

    def __init__(self, scheduler: "SchedulerMixin") -> None:
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(
                f"{type(scheduler).__name__} chooses its own times and does not follow a flow from a source. Use "
                f"{' or '.join(SCHEDULERS.values())}, or set pipe.scheduler = None for the solver of the run."
            )
        self.scheduler = scheduler
        self.jumps = type(scheduler).__name__ == SCHEDULERS["map"]

    def __call__(
        self,
        model: CrossFlow,
        z: Tensor,
        guidance: Guidance,
        *,
        condition: Condition | None,
        steps: int,
        on_step: Progress | None = None,
        **unused: object,
    ) -> Solution:
        """z (B, *latent) at t = 0 -> the solution at t = 1. unused: what concerns the solver of the run."""
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=z.device, sigmas=[1 - i / steps for i in range(steps)])
        velocity = guidance.jumps(model, condition) if self.jumps else guidance.velocity(model, condition)
        times = [1 - sigma for sigma in scheduler.sigmas.tolist()]
        for step, timestep in enumerate(scheduler.timesteps):
            slope = velocity(z, *times[step : step + (2 if self.jumps else 1)])
            z = scheduler.step(-slope, timestep, z, return_dict=False)[0]
            if on_step is not None:
                on_step(step + 1, steps)
        num = sum(1 if self.jumps else guidance.evaluations(t) for t in times[:steps])
        return Solution(z, (num,) * len(z))


class RunModel(nn.Module):
    """The component of a diffusers pipeline that holds a run: its networks and what else its task needs."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.network = pipe.model
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **unused: object) -> Self:
        """Loads the run in the component's `folder` to the CPU; torch_dtype: that of matrix products."""
        return cls(load(Path(folder) / RUN.name, device="cpu", precision=_precision(torch_dtype)))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        """That of matrix products."""
        return next(dtype for dtype, name in PRECISIONS.items() if name == self.pipe.precision)

    def to(self, *args: object, **kwargs: object) -> Self:
        """Moves everything to a device; a dtype becomes that of matrix products, and weights keep theirs."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.pipe.precision = _precision(value) or self.pipe.precision
            elif isinstance(value, str | int | torch.device) and not isinstance(value, bool):
                self.pipe.to(torch.device(value))
        return self


def _precision(dtype: torch.dtype | None) -> str | None:
    if dtype is not None and dtype not in PRECISIONS:
        raise UserError(f"Unknown dtype {dtype}. Known: {', '.join(map(str, PRECISIONS))}.")
    return None if dtype is None else PRECISIONS[dtype]


class CallSettings(TypedDict, total=False):
    """Settings of a call, by the names of diffusers; the run's own by default."""

    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int


class RunPipeline:
    """What the pipeline of an exported folder does; mixed with DiffusionPipeline there.

    pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    picture = pipe("a red cube", num_inference_steps=20, guidance_scale=3.0).images[0]
    """

    model: RunModel
    scheduler: Any
    progress_bar: Callable[..., Any]
    """Of DiffusionPipeline."""

    def __call__(
        self,
        prompt: object = None,
        image: object = None,
        *,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Unpack[CallSettings],
    ) -> Any:
        """Outputs for a prompt or a picture, or a list of them, equal to those of `crossflow.load(RUN)`.

        Args:
            prompt: for a run that takes text; the first argument may also be a picture.
            image: for a run that takes pictures: paths, PIL images, arrays or tensors.
            generator: its initial seed keys the noise; seed 0 without one.
            output_type: pil, np (values in [0, 1], channels last), pt (channels first), or latent.
            return_dict: False: a tuple.

        Returns:
            `.images`; `.prediction` of depth maps, float32 (B, H, W, 1) in metres, or for "pt" (B, 1, H, W); `.text` of
            captions. Outputs of different sizes come as a list.
        """
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output type", output_type, OUTPUT_TYPES)
        inputs = image if prompt is None else prompt
        if inputs is None:
            kind = "prompt" if self.model.pipe.task.input_kind == "text" else "picture"
            raise UserError(f"This model takes a {kind}: pipe({kind}).")
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "num_images_per_prompt": "num"}
        chosen: dict[str, Any] = {names.get(name, name): value for name, value in settings.items()}
        pipe = self.model.pipe
        pipe.flow = sampling.flow if self.scheduler is None else ScheduledFlow(self.scheduler)
        steps = chosen.get("steps", pipe.settings.steps)
        with self.progress_bar(total=steps) as bar:

            def on_step(done: int, total: int) -> None:
                bar.n = done
                bar.refresh()

            outputs = pipe(inputs, seed=0 if generator is None else generator.initial_seed(), output_type="np",
                           return_latents=output_type == "latent", on_step=on_step, **chosen)  # fmt: skip
        result = as_diffusers(outputs, output_type)
        return result if return_dict else result.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **unused: object) -> None:
        """Writes a folder for diffusers, as `export` does."""
        assert self.model.pipe.folder is not None
        export(self.model.pipe.folder, Path(save_directory), weights=self.model.pipe.weights)


def as_diffusers(outputs: Outputs, output_type: str) -> Any:
    """Outputs in the form of diffusers' own pipelines; `outputs` are arrays."""
    from diffusers import ImagePipelineOutput

    if outputs.latents is not None:
        return ImagePipelineOutput(images=_together([pieces.numpy() for pieces in outputs.latents], "pt"))
    if all(isinstance(value, str) for value in outputs.raw):
        return _output("CaptionPipelineOutput", text=outputs.captions)
    if all(value.ndim == 2 for value in outputs.raw):
        maps = [value[..., None] for value in outputs.raw]
        prediction = _together(maps, output_type)
        return _output("DepthPipelineOutput", prediction=prediction, uncertainty=None, latent=None)
    if output_type == "pil":
        from PIL import Image

        return ImagePipelineOutput(images=[Image.fromarray(pixels) for pixels in outputs.raw])
    pictures = [pixels.astype(np.float32) / 255 for pixels in outputs.raw]
    return ImagePipelineOutput(images=_together(pictures, output_type))


def _output(name: str, **fields: object) -> Any:
    """An output of diffusers' kind (of attributes, keys and, without the empty ones, numbers) with these fields."""
    from diffusers.utils import BaseOutput

    return make_dataclass(name, fields, bases=(BaseOutput,))(**fields)


def _together(arrays: Sequence[np.ndarray], output_type: str) -> Any:
    """Arrays as one batch, or as a list where their shapes differ; for "pt" as tensors, (H, W, C) as (C, H, W)."""
    values: Sequence[Any] = arrays
    if output_type == "pt":
        values = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        values = [value.movedim(-1, 0) if value.ndim == 3 else value for value in values]
    if len({value.shape for value in values}) > 1:
        return list(values)
    return torch.stack(list(values)) if output_type == "pt" else np.stack(list(values))
