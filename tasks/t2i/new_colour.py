"""The worked example of docs/fine_tuning.md: pictures of a colour that scenes do not have, and a judge that knows it.

A picture is rendered with white solids, whose pixels are then darkened, in linear light, to the reflectance of cyan.
The recogniser of scenes, which has never seen the colour, still finds such solids and their shapes; whether one is cyan
is read from its pixels.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from crossflow.core.files import write_atomically
from crossflow.data.images import save_png
from crossflow.data.scenes import SHAPES, Prompt, Requirement, captions, make_scene, render, scene_seed
from crossflow.data.scenes.world import Scene
from crossflow.tasks.t2i import metric
from crossflow.tasks.t2i.recogniser import Detection

Sampler = Callable[..., Iterable[np.ndarray]]
"""A pipeline: prompts, with `ids`, `seed` and `output_type`, -> pictures uint8 (H, W, 3)."""
COLOUR = "cyan"
REFLECTANCE = (0.03, 0.55, 0.62)
_WHITE = 0.88
_FINER = 4  # times as many pixels along a side are tinted, then averaged
_FIRST = 2**39 + 20_000  # among the seeds of the recogniser's own split: neither training nor validation


def white_scenes(num: int, first: int = _FIRST) -> list[Scene]:
    """`num` scenes of one or two solids, of which at least one is white, from the seeds after `first`."""
    scenes: list[Scene] = []
    while len(scenes) < num:
        scene = make_scene(scene_seed("recogniser", first))
        if len(scene.objects) <= 2 and any(solid.colour == "white" for solid in scene.objects):
            scenes.append(scene)
        first += 1
    return scenes


def paint(scene: Scene, size: int) -> np.ndarray:
    """The picture uint8 (size, size, 3) of a scene in which what was white is cyan."""
    fine, _, mask = render([scene], size * _FINER)
    white = [number for number, solid in enumerate(scene.objects, start=1) if solid.colour == "white"]
    tint = np.where(np.isin(mask[0], white)[..., None], np.array(REFLECTANCE) / _WHITE, 1.0)
    light = (fine[0] / 255.0) ** 2 * tint
    pixels = np.sqrt(light.reshape(size, _FINER, size, _FINER, 3).mean((1, 3)))
    return (255 * pixels).round().astype(np.uint8)


def write_pictures(folder: str | Path, num: int = 20, size: int = 32) -> Path:
    """Writes `num` pictures of cyan solids, each with its five captions in a .txt beside it; returns the folder."""
    folder = Path(folder)
    for number, scene in enumerate(white_scenes(num)):
        save_png(paint(scene, size), folder / f"{number:03d}.png", {})
        texts = [caption.replace("white", COLOUR) for caption in captions(scene)]
        write_atomically(folder / f"{number:03d}.txt", "\n".join(texts) + "\n")
    return folder


def judge(images: np.ndarray) -> list[tuple[Detection, ...]]:
    """The solids of pictures uint8 (B, H, W, 3) as the recogniser finds them, with the cyan ones named so."""
    pictures = metric.load_recogniser()(images)
    return [
        tuple(dataclasses.replace(solid, colour=COLOUR) if is_cyan(image, solid) else solid for solid in solids)
        for image, solids in zip(images, pictures, strict=True)
    ]


def is_cyan(image: np.ndarray, solid: Detection) -> bool:
    """Whether the pixels around the centre of a solid are: little red, and as much green as blue, in linear light."""
    size = len(image)
    row, column = (min(size - 1, max(0, int(place * size))) for place in (solid.y, solid.x))
    patch = image[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].reshape(-1, 3)
    red, green, blue = ((patch / 255.0) ** 2).mean(0)
    return bool(red < 0.35 * green and 0.6 * green < blue < 2.2 * green)


def scores(pipe: Sampler, num: int = 100, seed: int = 0) -> dict[str, float]:
    """Shares of right pictures, by the rules of the task's own scores: `new`, of prompts such as "a cyan cone", `old`,
    the mean of the six kinds of prompts about scenes, and `old_colors`, of prompts that name another colour.

    pipe: a pipeline; num: pictures of the new colour, and also of the old world; seed: of the noise.
    """
    new = [Prompt("colors", f"a {COLOUR} {shape}", (Requirement(1, shape, COLOUR),)) for shape in SHAPES]
    asked = [(f"new/{number:04d}", new[number % len(new)]) for number in range(num)]
    old = _scored(pipe, metric.scene_cases(num, seed=77), seed)
    return {"new": _scored(pipe, asked, seed)["colors"], "old": old["overall"], "old_colors": old["colors"]}


def _scored(pipe: Sampler, cases: Sequence[tuple[str, Prompt]], seed: int) -> dict[str, float]:
    scorer = metric.T2IMetric(judge=judge)
    pictures = pipe([prompt.text for _, prompt in cases], ids=[id for id, _ in cases], seed=seed, output_type="np")
    for (id, prompt), picture in zip(cases, pictures, strict=True):
        scorer.add(id, picture, prompt)
    return scorer.compute()
