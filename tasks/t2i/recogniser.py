"""The judge of generated scenes: a small network that finds the solids of a picture, trained on renders in a minute.

On an 8 x 8 grid each cell says whether a solid's centre is near, and if so which shape, colour, size and material it
has, how far the centre is and how far the solid stands from the camera (as in FCOS, Tian et al., ICCV 2019). Cells that
agree on a centre are one solid.
Its own accuracy is measured on renders it has not seen and kept beside its weights: no score is better than its judge.

Letters: B pictures, G cells along a side, N solids found.
"""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossflow.core.files import DamagedFile, read_metadata, read_tensors, user_cache, write_tensors
from crossflow.core.progress import Progress
from crossflow.core.recipes import ZOO
from crossflow.data.scenes import (
    COLOURS,
    FRONT_MARGIN,
    LEFT_MARGIN,
    MATERIALS,
    SHAPES,
    SIZES,
    Scene,
    make_scene,
    render,
    scene_seed,
)

logger = logging.getLogger(__name__)

VERSION = 2
SIDE = 32  # pixels; pictures of another size are resized to it
GRID = 8
HELD_OUT = 1000  # scenes on which the recogniser's own accuracy is measured

_ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}
_REACH = 0.75  # cells whose middle is so near to a centre (in cells, along either axis) speak for it
_EDGE = 1.25  # cells nearer than this to a centre, but beyond reach, may say either
_SAME = 0.16  # of the picture's width: centres nearer than this are one solid; those of real solids are 0.2 apart
_REACHED = 0.1  # of the picture's width: a solid whose centre is missed by more counts as not found
_FIRST_HELD_OUT = 2**39  # among the seeds of the recogniser's own split


@dataclasses.dataclass(frozen=True, slots=True)
class Detection:
    """A solid that was found: attributes, centre as fractions of the picture, metres from the camera, confidence."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    distance: float
    confidence: float


def stands(relation: str, a: Detection, b: Detection) -> bool:
    """Whether a stands in the relation to b, with half the margin that captions keep when they claim it."""
    across, away = b.x - a.x, b.distance - a.distance
    return {
        "left of": across > LEFT_MARGIN / 2,
        "right of": across < -LEFT_MARGIN / 2,
        "in front of": away > FRONT_MARGIN / 2,
        "behind": away < -FRONT_MARGIN / 2,
    }[relation]


@dataclasses.dataclass(frozen=True)
class Training:
    """How the recogniser is trained; part of the name of its cache file."""

    num_scenes: int = 12_000
    steps: int = 700
    batch_size: int = 128
    lr: float = 4e-3
    width: int = 32
    seed: int = 0


class Recogniser:
    """Finds solids in pictures. ``report`` holds its accuracy on held-out renders, in [0, 1], by name."""

    def __init__(self, network: "_Network", report: dict[str, float]) -> None:
        self.network = network.eval()
        self.report = report

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> list[tuple[Detection, ...]]:
        """Pictures uint8 (B, H, W, 3) of any square size -> the solids of each, the surest first."""
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"the recogniser takes uint8 pictures (B, H, W, 3), got {images.dtype} {images.shape}")
        solids: list[tuple[Detection, ...]] = []
        for start in range(0, len(images), 256):
            solids += _read(self.network(_prepare(images[start : start + 256])))
        return solids


def load_recogniser(
    training: Training | None = None, *, cache: Path | None = None, progress: Progress | None = None
) -> Recogniser:
    """The recogniser that ships with the package, or that of the user's cache, or a newly trained one, which is then
    kept there.

    Args:
        training: how it is trained; None: the usual way, about two minutes on two cores. That one ships.
        cache: folder of the file; None: ``$XDG_CACHE_HOME/crossflow`` or ``~/.cache/crossflow``.
        progress: called with (steps done, steps) while training.
    """
    training = training or Training()
    name = f"recogniser-v{VERSION}-{_content_key(training)}.safetensors"
    if (ZOO / name).is_file():
        return _load(ZOO / name, training)
    path = (cache or user_cache()) / name
    if path.exists():
        try:
            return _load(path, training)
        except (DamagedFile, RuntimeError, ValueError, KeyError) as error:  # it is replaced
            logger.warning("The recogniser in %s cannot be read (%s); it is trained again.", path, error)
    logger.info("No recogniser of scenes in %s yet; one is trained, which takes about a minute.", path.parent)
    recogniser = train_recogniser(training, progress=progress)
    _save(recogniser, path)
    return recogniser


# ---- network


class _Network(nn.Module):
    """Pictures (B, 3, 32, 32) in [-1, 1] -> a reading of every cell (B, 8, 8, C); ``_CHANNELS`` names the C numbers."""

    def __init__(self, width: int) -> None:
        from timm.layers import ConvNormAct
        from timm.models.resnet import BasicBlock

        super().__init__()
        self.layers = nn.Sequential(
            ConvNormAct(3, width // 2, 3),
            ConvNormAct(width // 2, width, 3, stride=2),
            BasicBlock(width, width),
            ConvNormAct(width, 2 * width, 3, stride=2),
            BasicBlock(2 * width, 2 * width),
            BasicBlock(2 * width, 2 * width),
            nn.Conv2d(2 * width, sum(_CHANNELS.values()), 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).permute(0, 2, 3, 1)


_CHANNELS = {"near": 1, "offset": 2, "distance": 1} | {name: len(values) for name, values in _ATTRIBUTES.items()}


def _split(output: Tensor) -> dict[str, Tensor]:
    return dict(zip(_CHANNELS, output.split(list(_CHANNELS.values()), dim=-1), strict=True))


def _prepare(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, 32, 32) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-2:] != (SIDE, SIDE):
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return pixels


def _middles() -> Tensor:
    """Middles of the cells as fractions of the picture, (G, G, 2): x, y."""
    line = (torch.arange(GRID) + 0.5) / GRID
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)


def _read(output: Tensor) -> list[tuple[Detection, ...]]:
    """Solids of each picture: cells that are sure, the surest first, unless a surer one speaks for the same centre."""
    parts = _split(output.float())
    sure = parts["near"][..., 0].sigmoid()
    centres = _middles() + parts["offset"] / GRID
    attributes = {name: parts[name].argmax(-1) for name in _ATTRIBUTES}
    pictures = []
    for picture in range(len(output)):
        solids: list[Detection] = []
        cells = (sure[picture] > 0.5).nonzero().tolist()
        for row, column in sorted(cells, key=lambda cell: -float(sure[picture, cell[0], cell[1]])):
            x, y = centres[picture, row, column].tolist()
            if any(math.dist((x, y), (solid.x, solid.y)) < _SAME for solid in solids):
                continue
            named = {name: values[int(attributes[name][picture, row, column])] for name, values in _ATTRIBUTES.items()}
            distance = float(parts["distance"][picture, row, column, 0])
            solids.append(Detection(**named, x=x, y=y, distance=distance, confidence=float(sure[picture, row, column])))
        pictures.append(tuple(solids))
    return pictures


# ---- training


@torch.enable_grad()  # a score may be asked for where gradients are off
def train_recogniser(training: Training, *, progress: Progress | None = None) -> Recogniser:
    """A recogniser trained on renders of its own seeds, with its accuracy on held-out ones. Global chance stays put."""
    started = time.monotonic()
    scenes = [make_scene(scene_seed("recogniser", index)) for index in range(training.num_scenes)]
    images = torch.from_numpy(render(scenes, SIDE)[0])
    truths = _truths(scenes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = _fit(training, images, truths, progress)
    recogniser = Recogniser(network, {})
    seconds = time.monotonic() - started
    held_out = [make_scene(scene_seed("recogniser", _FIRST_HELD_OUT + index)) for index in range(HELD_OUT)]
    recogniser.report = accuracy(recogniser, held_out) | {"training_seconds": round(seconds, 1)}
    logger.info("Recogniser trained in %.0f s; accuracy on held-out renders: %s", seconds, recogniser.report)
    return recogniser


def _fit(training: Training, images: Tensor, truths: dict[str, Tensor], progress: Progress | None) -> _Network:
    network = _Network(training.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=training.steps, pct_start=0.15)
    for step in range(training.steps):
        chosen = torch.randint(len(images), (training.batch_size,))
        mirrored = torch.rand(training.batch_size) < 0.5
        pixels = _augment(_mirror(images[chosen], mirrored))
        loss = _loss(network(pixels), _mirror_truths({name: part[chosen] for name, part in truths.items()}, mirrored))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, training.steps)
    return network


def _truths(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What the cells should say: ``near`` (B, G, G) 1 yes, 0 no, -1 either; the rest holds where ``near`` is 1.

    A cell at the edge of one solid may speak for it or be silent; one between two solids has to be silent, since it
    would invent a third in their middle.
    """
    most = max(len(scene.objects) for scene in scenes)
    centres = torch.full((len(scenes), most, 2), math.inf)
    values = {name: torch.zeros(len(scenes), most, dtype=torch.long) for name in _ATTRIBUTES}
    distances = torch.zeros(len(scenes), most)
    for b, scene in enumerate(scenes):
        centres[b, : len(scene.objects)] = torch.tensor([solid.centre for solid in scene.objects])
        distances[b, : len(scene.objects)] = torch.tensor([solid.y for solid in scene.objects])
        for name, known in _ATTRIBUTES.items():
            numbers = [known.index(getattr(solid, name)) for solid in scene.objects]
            values[name][b, : len(numbers)] = torch.tensor(numbers)
    gaps = (_middles()[None, :, :, None] - centres[:, None, None]).abs().amax(-1) * GRID  # (B, G, G, most), in cells
    gap, whose = gaps.min(-1)
    near = torch.where(gap < _REACH, 1.0, torch.where((gaps < _EDGE).sum(-1) == 1, -1.0, 0.0))
    rows = torch.arange(len(scenes))[:, None, None]
    truths = {name: numbers[rows, whose] for name, numbers in values.items()}
    return truths | {"near": near, "distance": distances[rows, whose], "centre": centres[rows, whose]}


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1] in channels-last memory, some of them mirrored."""
    images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _mirror_truths(truths: dict[str, Tensor], mirrored: Tensor) -> dict[str, Tensor]:
    chosen = {}
    for name, values in truths.items():
        turned = values.flip(2)
        if name == "centre":
            turned = torch.stack([1 - turned[..., 0], turned[..., 1]], -1)
        chosen[name] = torch.where(mirrored.view(-1, *[1] * (values.ndim - 1)), turned, values)
    return chosen


def _augment(pixels: Tensor) -> Tensor:
    """Faults that generated pictures have: casts of colour, too much or little contrast, blur, noise."""
    size = len(pixels)
    gain = 1 + 0.08 * torch.randn(size, 1, 1, 1) + 0.03 * torch.randn(size, 3, 1, 1)
    shift = 0.05 * torch.randn(size, 1, 1, 1) + 0.03 * torch.randn(size, 3, 1, 1)
    blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    mix = torch.rand(size, 1, 1, 1) * (torch.rand(size, 1, 1, 1) < 0.4)
    noise = torch.rand(size, 1, 1, 1) * 0.12 * (torch.rand(size, 1, 1, 1) < 0.5)
    changed = (pixels + mix * (blurred - pixels)) * gain + shift + noise * torch.randn_like(pixels)
    return changed.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _loss(output: Tensor, truths: dict[str, Tensor]) -> Tensor:
    parts = _split(output)
    counted, near = truths["near"] >= 0, truths["near"] == 1
    loss = F.binary_cross_entropy_with_logits(parts["near"][..., 0][counted], truths["near"][counted]) * 4
    for name in _ATTRIBUTES:
        loss = loss + F.cross_entropy(parts[name][near], truths[name][near])
    offset = (truths["centre"] - _middles()) * GRID
    loss = loss + F.smooth_l1_loss(parts["offset"][near], offset[near], beta=0.2)
    return loss + F.smooth_l1_loss(parts["distance"][..., 0][near], truths["distance"][near], beta=0.2)


# ---- its own accuracy


def accuracy(recogniser: Recogniser, scenes: Sequence[Scene], size: int = SIDE) -> dict[str, float]:
    """Shares in [0, 1] of what is right on renders of these scenes; a solid that is not found counts as wrong.

    ``count``: pictures in which exactly as many solids are found as there are. ``relation``: claims that captions may
    make and that are seen to hold.
    """
    right = dict.fromkeys(("count", *_ATTRIBUTES, "relation"), 0)
    num_solids = sum(len(scene.objects) for scene in scenes)
    num_relations = 0
    for scene, detections in zip(scenes, recogniser(render(scenes, size)[0]), strict=True):
        right["count"] += len(detections) == len(scene.objects)
        matches = [_nearest(solid.centre, detections) for solid in scene.objects]
        for solid, match in zip(scene.objects, matches, strict=True):
            for name in _ATTRIBUTES:
                right[name] += match is not None and getattr(match, name) == getattr(solid, name)
        for i, relation, j in scene.relations:
            a, b = matches[i], matches[j]
            right["relation"] += a is not None and b is not None and stands(relation, a, b)
            num_relations += 1
    totals = {"count": len(scenes), "relation": num_relations}
    return {name: number / max(1, totals.get(name, num_solids)) for name, number in right.items()}


def _nearest(centre: tuple[float, float], detections: Sequence[Detection]) -> Detection | None:
    near = [solid for solid in detections if math.dist(centre, (solid.x, solid.y)) < _REACHED]
    return min(near, key=lambda solid: math.dist(centre, (solid.x, solid.y)), default=None)


# ---- cache


def _content_key(training: Training) -> str:
    """Changes with the world's look and with the training, so that no judge outlives what it was trained for."""
    sample = [make_scene(scene_seed("recogniser", index)) for index in range(8)]
    digest = hashlib.sha256(render(sample, SIDE)[0].tobytes())
    digest.update(json.dumps([dataclasses.asdict(training), _ATTRIBUTES, GRID, SIDE, _REACH, _EDGE]).encode())
    return digest.hexdigest()[:16]


def _save(recogniser: Recogniser, path: Path) -> None:
    write_tensors(path, recogniser.network.state_dict(), {"report": json.dumps(recogniser.report)})


def _load(path: Path, training: Training) -> Recogniser:
    report = json.loads(read_metadata(path)["report"])
    weights = read_tensors(path)
    network = _Network(training.width)
    network.load_state_dict(weights)
    return Recogniser(network, report)
