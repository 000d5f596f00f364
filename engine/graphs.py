"""A run as graphs that other programs compute: ONNX for onnxruntime, or torch.export's for torch alone.

    source.onnx      features (token ids, features of a frozen text encoder, pixels), mask -> mean and log_var of z0
    velocity.onnx    z, t, unconditional -> dz/dt; of flow maps z, t, unconditional, end, scale; of a Gaussian source
                     also what it is conditioned on
    decoder.onnx     z1 -> pixels, depth in metres, or logits of tokens
    settings.json    the steps of the solver and what else the numbers mean
    README.md        a program that samples by them

The batch size is open, other sizes are fixed. B batch, C channels, H W height width, N tokens.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.batch import Jump
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.files import replacing_folder, write_atomically, write_json
from crossflow.core.model import CrossFlow
from crossflow.core.solvers import SOLVERS, TIME_GRIDS
from crossflow.engine.graph_readme import readme
from crossflow.engine.sample import Pipeline, load
from crossflow.tasks.base import Task, to_tensors

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
"""Library -> the ending of its files."""
TOLERANCE = 1e-4
"""Largest difference between a graph and its network, relative to values above 1."""
_TRACED, _CHECKED = 2, 3
"""Batch sizes: a graph made for one must be right for another."""
Tensors = dict[str, Tensor]


class SourceGraph(nn.Module):
    """inputs -> the mean of z0 and, if the source has one, its log-variance."""

    def __init__(self, task: Task, model: CrossFlow) -> None:
        super().__init__()
        self.networks = nn.ModuleList([model, *task.networks])
        self.task, self.model = task, model

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """features (B, ...), mask (B, N) bool -> one or two of (B, *latent)."""
        source = self.task.as_source(features, mask)
        posterior = self.model.source_encoder(source.features, source.mask)
        return (posterior.mean,) if posterior.log_var is None else (posterior.mean, posterior.log_var)


class VelocityGraph(nn.Module):
    """z, t, unconditional -> dz/dt; with end and scale of a flow map, and the inputs of a Gaussian source."""

    def __init__(self, task: Task, model: CrossFlow) -> None:
        super().__init__()
        self.networks = nn.ModuleList([model, *task.networks])
        self.task, self.model = task, model

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        unconditional: Tensor,
        end: Tensor | None = None,
        scale: Tensor | None = None,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """z (B, *latent), t, end, scale (B,) float, unconditional (B,) bool, features (B, ...) -> (B, *latent)."""
        jump = None if end is None or scale is None else Jump(end, scale)
        condition = None if features is None else self.task.as_source(features, mask).condition
        return (self.model.velocity(z, t, unconditional, self.model.encode_condition(condition), jump),)


class DecoderGraph(nn.Module):
    """z1 -> what outputs are made of."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.networks = nn.ModuleList(task.networks)
        self.task = task

    def forward(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, ...]:
        """z (B, *latent), features (B, ...) of codecs that read text -> (B, ...)."""
        return (self.task.decoded(z, features).float(),)


@dataclass(frozen=True)
class Graph:
    """A network to be exported.

    Attributes:
        inputs: example tensors by name, (B, ...) with B = 2.
        outputs: names.
    """

    network: nn.Module
    inputs: Tensors
    outputs: tuple[str, ...]

    def results(self, inputs: Tensors) -> list[Tensor]:
        """The outputs of the network itself."""
        with torch.no_grad():
            return list(self.network(**inputs))


def export_graphs(
    source: str | Path,
    target: Path,
    library: str,
    *,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    size: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Writes the graphs of a run, or of a hub repository that holds one, to a new folder.

    Args:
        library: "onnx" or "torch".
        weights: ema | model; the averaged ones by default.
        overrides: settings of the run to replace, as key=value, such as sample.steps=8.
        size: (H, W) of the pictures that a run from pictures will read; data.image_size squared by default.

    Returns:
        The largest difference between each graph, computed by its library, and its network.

    Raises:
        UserError: what is no run, a target that exists and is not empty, a missing library, a network that cannot be
            exported, a difference above `TOLERANCE`.
    """
    expect_library(library)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty. Give a new folder.")
    pipe = load(source, weights=weights, device="cpu", precision="float32", overrides=overrides)
    graphs = graphs_of(pipe, size)
    settings = settings_of(pipe, graphs)
    with replacing_folder(target) as folder:
        differences = {}
        for name, graph in graphs.items():
            path = folder / f"{name}{SUFFIXES[library]}"
            _write(graph, path, library)
            differences[name] = largest_difference(graph, path, library)
        write_json(folder / "settings.json", settings)
        assert pipe.folder is not None
        tokenizers = sorted(path for path in pipe.folder.glob("**/tokenizer.json") if "checkpoints" not in path.parts)
        if tokenizers:
            shutil.copyfile(tokenizers[0], folder / "tokenizer.json")
        write_atomically(folder / "README.md", readme(settings, library, has_tokenizer=bool(tokenizers)))
    return differences


def expect_library(library: str) -> None:
    """Raises UserError when what writes and runs the graphs is not installed."""
    if library != "onnx":
        return
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Exporting to ONNX needs the extra onnx: pip install 'crossflow-toolkit[onnx]' ({error})."
        ) from error


def graphs_of(pipe: Pipeline, size: tuple[int, int] | None = None) -> dict[str, Graph]:
    """The graphs of a pipeline by name, with example inputs of batch 2."""
    task, model = pipe.task, pipe.model
    inputs = _example_inputs(task, size)
    with torch.no_grad():
        source = task.as_source(**inputs)
        z = model.source_encoder(source.features, source.mask).mean
        if model.source_encoder.kind == "gaussian":
            z = torch.zeros(_TRACED, *pipe.noise_shape(source))
    named = {"features": inputs["inputs"], **{name: inputs[name] for name in ("mask",) if name in inputs}}
    step: Tensors = {"z": z, "t": torch.rand(_TRACED), "unconditional": torch.tensor([False, True])}
    if model.jumps:
        step |= {"end": torch.ones(_TRACED), "scale": torch.full((_TRACED,), 2.0)}
    if source.condition is not None:
        step |= named
    graphs = {"velocity": Graph(VelocityGraph(task, model), step, ("velocity",))}
    if model.source_encoder.kind != "gaussian":
        encoder = SourceGraph(task, model)
        moments = ("mean", "log_var") if model.source_encoder.kind in ("variational", "noisy") else ("mean",)
        graphs["source"] = Graph(encoder, named, moments)
    reads = {"features": source.features} if task.decodes_features else {}
    graphs["decoder"] = Graph(DecoderGraph(task), {"z": z, **reads}, ("output",))
    for graph in graphs.values():
        graph.network.eval()
    return graphs


def _example_inputs(task: Task, size: tuple[int, int] | None) -> Tensors:
    """Arguments of `Task.as_source`: those of two prompts, or of two pictures as large as the model takes them."""
    if task.input_kind == "text":
        if size is not None:
            raise UserError("--size is of the pictures that a run reads, and this run reads text. Leave it out.")
        source = task.source(["a", "b"])
        return {"inputs": source.features} | ({} if source.mask is None else {"mask": source.mask})
    side = task.config.data.image_size
    picture = np.zeros((*(size or (side, side)), 3), np.uint8)
    pixels = to_tensors([task.pieces(picture).values[0]] * _TRACED)
    return {"inputs": pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))}


def settings_of(pipe: Pipeline, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """What a program needs to know beside the graphs; JSON types only."""
    shapes = {
        name: {key: [str(value.dtype).removeprefix("torch."), *value.shape[1:]] for key, value in graph.inputs.items()}
        for name, graph in graphs.items()
    }
    chosen, model = pipe.settings, pipe.model
    return {
        "task": pipe.task.name,
        "weights": pipe.weights,
        "latent": list(graphs["velocity"].inputs["z"].shape[1:]),
        "source": model.source_encoder.kind,
        "solver": chosen.solver,
        "jumps": model.jumps,
        "steps": [list(step) for step in steps_of(chosen)],
        "inputs": shapes,
        "outputs": {name: list(graph.outputs) for name, graph in graphs.items()},
        "output": list(graphs["decoder"].results(graphs["decoder"].inputs)[0].shape[1:]),
    }


def steps_of(settings: SampleConfig) -> list[tuple[float, float, float]]:
    """(t, length, guidance) of every Euler step, or jump, of these settings; a velocity of zero needs no step.

    >>> steps_of(SampleConfig(steps=4, guidance=3.0, guidance_interval=(0.0, 0.5), zero_init=1))
    [(0.25, 0.25, 3.0), (0.5, 0.25, 3.0), (0.75, 0.25, 1.0)]
    """
    from crossflow.core.guidance import TIME_TOLERANCE

    if SOLVERS.get(settings.solver).adaptive:
        raise UserError(
            f"The solver {settings.solver} chooses its own steps, which a table cannot hold. Export with another one: "
            "--set sample.solver=euler."
        )
    grid = TIME_GRIDS[settings.time_grid](settings.steps)
    first, last = settings.guidance_interval
    steps = list(zip(grid.times, grid.lengths, strict=True))[settings.zero_init :]
    within = [first - TIME_TOLERANCE <= t <= last + TIME_TOLERANCE for t, _ in steps]
    return [(t, h, settings.guidance if inside else 1.0) for (t, h), inside in zip(steps, within, strict=True)]


def _write(graph: Graph, path: Path, library: str) -> None:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with torch.no_grad():
        program = torch.export.export(
            graph.network, (), graph.inputs, dynamic_shapes={name: {0: batch} for name in graph.inputs}, strict=False
        )
    if library == "torch":
        torch.export.save(program, path)
        return
    large = sum(value.nbytes for value in graph.network.state_dict().values()) > 1 << 30  # protobuf holds 2 GB
    torch.onnx.export(
        program,
        (),
        path,
        kwargs=graph.inputs,
        dynamo=True,
        output_names=graph.outputs,
        external_data=large,
        verbose=False,
    )


def largest_difference(graph: Graph, path: Path, library: str) -> float:
    """Of the outputs of a written graph for another batch size, over max(1, largest value). Raises UserError where it
    exceeds `TOLERANCE`.
    """
    inputs = {name: torch.cat([value, value.flip(0)])[:_CHECKED] for name, value in graph.inputs.items()}
    expected = graph.results(inputs)
    outputs = READERS[library](path)({name: value.numpy() for name, value in inputs.items()})
    pairs = zip(outputs, expected, strict=True)
    worst = max(float((torch.from_numpy(a) - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)
    if not worst <= TOLERANCE:
        raise UserError(
            f"The graph {path.name} differs from its network by {worst:.1e}, more than {TOLERANCE:.0e}. Use another "
            "version of torch or onnxruntime."
        )
    return worst


Reader = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def _read_onnx(path: Path) -> Reader:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _read_torch(path: Path) -> Reader:
    network = torch.export.load(path).module()
    return lambda inputs: [y.detach().numpy() for y in network(**{k: torch.from_numpy(v) for k, v in inputs.items()})]


READERS: dict[str, Callable[[Path], Reader]] = {"onnx": _read_onnx, "torch": _read_torch}
