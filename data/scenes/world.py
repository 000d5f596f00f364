"""The procedural world: one to three solids on a ground plane, seen by a camera above the ground.

Frame: x right, y forward along the ground, z up, in metres; the camera stands at (0, 0, height) and looks along
``(0, cos(pitch), -sin(pitch))``. A point (x, y, z) has the depth ``d = y cos(pitch) + (height - z) sin(pitch)`` along
the optical axis and appears at ``u = x / d``, ``v = (-y sin(pitch) + (height - z) cos(pitch)) / d``.
Solids have fixed sizes in metres and the camera's height and field of view hardly vary, so metric depth is identifiable
from one picture. A scene is a function of its seed alone: numbers come from Python's ``random()``, whose stream is
guaranteed across versions, and are rounded to 4 decimals, so a scene round-trips through JSON exactly.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from crossflow.core.errors import UserError, unknown_name

SHAPES = ("cube", "sphere", "cylinder", "cone")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
RELATIONS = ("left of", "right of", "in front of", "behind")
OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
SPLITS = ("train", "val", "test", "recogniser")

HALF_VIEW = 0.48  # tangent of half the field of view (51 degrees), the same in both directions
FAR = 10.0  # metres along the optical axis; ground beyond it fades into haze and counts as sky
MIN_SHARE = 0.03  # of the picture, covered by every solid at least
LEFT_MARGIN = 0.15  # of the picture's width, between the centres of solids called left or right of one another
FRONT_MARGIN = 0.4  # metres along the ground, between the centres of solids called in front of or behind one another

_SEEDS_PER_SPLIT = 2**40
_RADIUS = {"small": 0.36, "large": 0.54}  # metres: a sphere's radius, from which the other solids' measures follow
_BODY = {"cube": (0.82, 1.64), "sphere": (1.0, 2.0), "cylinder": (0.80, 1.70), "cone": (0.98, 2.10)}
_FILL = {"cube": 0.73, "sphere": 0.76, "cylinder": 0.82, "cone": 0.53}  # minimum share of its box that a solid covers
_FOOTPRINT = {"cube": math.sqrt(2.0), "sphere": 1.0, "cylinder": 1.0, "cone": 1.0}  # of the half-width, seen from above

T = TypeVar("T")
Colour = tuple[float, float, float]
Box = tuple[float, float, float, float]

_GROUNDS: tuple[Colour, ...] = (  # linear reflectances, muted so that no ground looks like a solid's colour
    (0.30, 0.25, 0.18),
    (0.20, 0.24, 0.20),
    (0.20, 0.22, 0.27),
    (0.27, 0.22, 0.20),
    (0.17, 0.17, 0.18),
)
_SKIES: tuple[tuple[Colour, Colour], ...] = (  # linear colours at the zenith and at the horizon
    ((0.06, 0.22, 0.66), (0.58, 0.74, 0.90)),
    ((0.10, 0.26, 0.58), (0.84, 0.80, 0.72)),
    ((0.14, 0.22, 0.52), (0.90, 0.68, 0.50)),
    ((0.32, 0.40, 0.50), (0.72, 0.75, 0.78)),
    ((0.20, 0.16, 0.44), (0.84, 0.64, 0.70)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Camera:
    """The camera: ``height`` in metres above the ground, ``pitch`` in radians below the horizontal."""

    height: float
    pitch: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """The picture position (fractions of width and height, from the top left) and depth in metres of a point."""
        cos, sin = math.cos(self.pitch), math.sin(self.pitch)
        depth = y * cos + (self.height - z) * sin
        down = -y * sin + (self.height - z) * cos
        return 0.5 + x / depth / (2 * HALF_VIEW), 0.5 + down / depth / (2 * HALF_VIEW), depth


@dataclasses.dataclass(frozen=True, slots=True)
class Solid:
    """One solid: its attributes, its position on the ground and its place in the picture.

    ``x``, ``y`` metres on the ground; ``angle`` radians about the vertical (cubes); ``box`` = left, top, right, bottom
    of the whole solid as fractions of the picture, hidden parts included; ``share`` = a lower bound of the share of the
    picture that it visibly covers.
    """

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    angle: float
    box: Box
    share: float

    @property
    def half_width(self) -> float:
        """Radius of the base (half the edge of a cube) in metres."""
        return _BODY[self.shape][0] * _RADIUS[self.size]

    @property
    def height(self) -> float:
        """Height in metres."""
        return _BODY[self.shape][1] * _RADIUS[self.size]

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, as fractions of the picture's width and height."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """Light, ground and sky: colours are linear, in [0, 1]; angles in radians; ``tile`` in metres."""

    sun_azimuth: float
    sun_elevation: float
    ground: Colour
    tile: float
    contrast: float
    heading: float
    offset: tuple[float, float]
    zenith: Colour
    horizon: Colour


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture: the solids in the order of their placement, the camera and the surroundings.

    >>> scene = make_scene(scene_seed("val", 0))
    >>> 1 <= len(scene.objects) <= 3 and Scene.from_json(scene.to_json()) == scene
    True
    """

    seed: int
    objects: tuple[Solid, ...]
    camera: Camera
    surroundings: Surroundings

    @property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """Every (i, relation, j) that clearly holds between two solids in the picture."""
        pairs = ((i, j) for i in range(len(self.objects)) for j in range(len(self.objects)) if i != j)
        return tuple((i, name, j) for i, j in pairs for name in _relations(self.objects[i], self.objects[j]))

    def to_json(self) -> dict[str, Any]:
        """A compact dictionary of numbers, strings and lists; ``Scene.from_json`` gives back an equal scene."""
        return {
            "seed": self.seed,
            "objects": [list(_astuple(solid)) for solid in self.objects],
            "camera": list(_astuple(self.camera)),
            "surroundings": list(_astuple(self.surroundings)),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Scene":
        """The scene of ``to_json``, also after a round trip through text."""
        return cls(
            seed=values["seed"],
            objects=tuple(Solid(*_tuples(solid)) for solid in values["objects"]),
            camera=Camera(*values["camera"]),
            surroundings=Surroundings(*_tuples(values["surroundings"])),
        )


def scene_seed(split: str, index: int) -> int:
    """The seed of item ``index`` of a split. Splits are disjoint; ``recogniser`` is reserved for training the judge."""
    if split not in SPLITS:
        raise unknown_name("split of scenes", split, SPLITS)
    if not 0 <= index < _SEEDS_PER_SPLIT:
        raise UserError(
            f"Scene {index} of split {split!r} does not exist: the index must be 0 to {_SEEDS_PER_SPLIT - 1}."
        )
    return SPLITS.index(split) * _SEEDS_PER_SPLIT + index


def make_scene(seed: int) -> Scene:
    """The scene of a seed (an int >= 0): a third of them hold one solid, a third two, a third three."""
    rng = random.Random(seed)
    surroundings = _draw_surroundings(rng)
    kinds = _draw_kinds(rng)
    while True:
        camera = Camera(height=_uniform(rng, 1.3, 1.45), pitch=_uniform(rng, 0.29, 0.35))
        solids = _place_all(rng, camera, kinds)
        if solids:
            return Scene(seed, solids, camera, surroundings)


def place(camera: Camera, kind: tuple[str, str], size: str, material: str, x: float, y: float, angle: float) -> Solid:
    """A solid of kind (shape, colour) standing at (x, y), with its box and its unoccluded share of the picture."""
    shape, colour = kind
    half_width, tall = (measure * _RADIUS[size] for measure in _BODY[shape])
    box = _project_box(camera, shape, half_width, tall, x, y, angle)
    return Solid(shape, colour, size, material, x, y, angle, box, share=round(_FILL[shape] * _area(box), 4))


def _astuple(value: "Solid | Camera | Surroundings") -> tuple[Any, ...]:
    return tuple(getattr(value, field.name) for field in dataclasses.fields(value))


def _tuples(values: list[Any]) -> list[Any]:
    """The values with lists, which JSON has in place of tuples, turned back into tuples."""
    return [tuple(value) if isinstance(value, list) else value for value in values]


def _relations(a: Solid, b: Solid) -> list[str]:
    """The relations that clearly hold of a with respect to b."""
    names = []
    across, away = a.centre[0] - b.centre[0], a.y - b.y
    if abs(across) >= LEFT_MARGIN:
        names.append("left of" if across < 0 else "right of")
    if abs(away) >= FRONT_MARGIN:
        names.append("in front of" if away < 0 else "behind")
    return names


# ---- random choices


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def _choose(rng: random.Random, values: Sequence[T]) -> T:
    return values[int(rng.random() * len(values))]


def _draw_surroundings(rng: random.Random) -> Surroundings:
    zenith, horizon = _choose(rng, _SKIES)
    return Surroundings(
        sun_azimuth=_uniform(rng, 0.0, 2 * math.pi),
        sun_elevation=_uniform(rng, 0.8, 1.2),
        ground=_jitter(rng, _choose(rng, _GROUNDS)),
        tile=_uniform(rng, 0.5, 0.8),
        contrast=_uniform(rng, 0.12, 0.3),
        heading=_uniform(rng, 0.0, math.pi / 2),
        offset=(_uniform(rng, 0.0, 2.0), _uniform(rng, 0.0, 2.0)),
        zenith=_jitter(rng, zenith),
        horizon=_jitter(rng, horizon),
    )


def _jitter(rng: random.Random, colour: Colour) -> Colour:
    brightness = 0.92 + 0.16 * rng.random()
    red, green, blue = (round(value * brightness * (0.96 + 0.08 * rng.random()), 4) for value in colour)
    return red, green, blue


def _draw_kinds(rng: random.Random) -> list[tuple[str, str]]:
    """The (shape, colour) of each solid. Equal kinds are common enough for a model to learn counts ("three cubes")."""
    number = 1 + int(rng.random() * 3)
    first, second, third = _draw_distinct_colours(rng)
    shapes = [_choose(rng, SHAPES) for _ in range(3)]
    mode = rng.random()
    if mode < 0.15:  # the same kind throughout
        kinds = [(shapes[0], first)] * 3
    elif mode < 0.35:  # the same shape in several colours
        kinds = [(shapes[0], first), (shapes[0], second), (shapes[0], third)]
    elif mode < 0.50:  # a pair of the same kind and something else
        kinds = [(shapes[0], first), (shapes[1], second), (shapes[1], second)]
    else:
        kinds = [(shapes[0], first), (shapes[1], second), (shapes[2], third)]
    return kinds[:number]


def _draw_distinct_colours(rng: random.Random) -> list[str]:
    rest = list(COLOURS)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(3)]


# ---- placing


def _place_all(rng: random.Random, camera: Camera, kinds: list[tuple[str, str]]) -> tuple[Solid, ...]:
    """Solids that fit the picture and one another, or () when one of them found no room."""
    placed: list[Solid] = []
    cos, sin = math.cos(camera.pitch), math.sin(camera.pitch)
    farthest = 3.2 if len(kinds) == 1 else 4.0
    for kind in kinds:
        size, material = _choose(rng, SIZES), _choose(rng, MATERIALS)
        half_width, tall = (measure * _RADIUS[size] for measure in _BODY[kind[0]])
        # Beyond this depth a solid would cover less than MIN_SHARE. _fit decides; this only saves attempts.
        deepest = math.sqrt(_FILL[kind[0]] * 2 * half_width * tall / (1.2 * MIN_SHARE)) / (2 * HALF_VIEW)
        reach = min(farthest, (deepest - camera.height * sin) / cos + 0.4)
        for _ in range(12):
            y = _uniform(rng, 1.8, reach)
            depth = y * cos + camera.height * sin
            room = HALF_VIEW * depth - half_width  # metres from the middle within which the picture holds the solid
            x = _uniform(rng, -room, room)
            turn = _uniform(rng, 0.35, 1.22)
            if any(_touch(kind[0], half_width, x, y, other) for other in placed):
                continue  # _fit would say so too, after projecting the solid
            # A cube shows two sides, turned by 20 to 70 degrees from the line of sight, to differ from a cylinder.
            angle = round(turn - math.atan2(x, y), 4)
            fitted = _fit(place(camera, kind, size, material, x, y, angle), placed)
            if fitted:
                placed = fitted
                break
        else:
            return ()
    return tuple(placed)


def _fit(solid: Solid, placed: list[Solid]) -> list[Solid]:
    """``placed`` plus the solid, with updated shares, or [] when it does not fit."""
    left, top, right, bottom = solid.box
    if left < 0.02 or top < 0.02 or right > 0.98 or bottom > 0.98 or solid.share < 1.2 * MIN_SHARE:
        return []
    together = [*placed, solid]
    for other in placed:
        if _touch(solid.shape, solid.half_width, solid.x, solid.y, other) or not _relations(solid, other):
            return []
        near, far = (solid, other) if solid.y < other.y else (other, solid)
        hidden = _area(_intersection(near.box, far.box))
        if hidden > 0.25 * _area(far.box) or math.dist(near.centre, far.centre) < 0.2:
            return []
        share = round(far.share - hidden, 4)
        if share < 1.2 * MIN_SHARE:
            return []
        together = [dataclasses.replace(far, share=share) if item is far else item for item in together]
        if far is solid:
            solid = together[-1]
    return together


def _touch(shape: str, half_width: float, x: float, y: float, other: Solid) -> bool:
    """Whether a solid at (x, y) would stand nearer to another than 8 cm from footprint to footprint."""
    reach = _FOOTPRINT[shape] * half_width + _FOOTPRINT[other.shape] * other.half_width
    return math.hypot(x - other.x, y - other.y) < reach + 0.08


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _intersection(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _project_box(camera: Camera, shape: str, half_width: float, tall: float, x: float, y: float, angle: float) -> Box:
    """The exact box of a solid in the picture, as fractions of its width and height."""
    cos, sin = math.cos(camera.pitch), math.sin(camera.pitch)
    bottom, top = camera.height, camera.height - tall  # metres under the camera
    if shape == "sphere":
        middle = (bottom + top) / 2
        depth, down = y * cos + middle * sin, middle * cos - y * sin
        bounds = (*_sphere_bounds(x, depth, half_width), *_sphere_bounds(down, depth, half_width))
    elif shape == "cube":
        along, across = half_width * math.cos(angle), half_width * math.sin(angle)
        near, far = along - across, along + across
        u, v = [], []
        for dx, dy in ((near, far), (-far, near), (-near, -far), (far, -near)):
            for below in (bottom, top):
                depth = (y + dy) * cos + below * sin
                u.append((x + dx) / depth)
                v.append((below * cos - (y + dy) * sin) / depth)
        bounds = (min(u), max(u), min(v), max(v))
    else:
        low = _rim_bounds(x, y, bottom, cos, sin, half_width)
        high = _rim_bounds(x, y, top, cos, sin, half_width if shape == "cylinder" else 0.0)
        bounds = (min(low[0], high[0]), max(low[1], high[1]), min(low[2], high[2]), max(low[3], high[3]))
    left, right, upper, lower = (round(0.5 + bound / (2 * HALF_VIEW), 4) for bound in bounds)
    return left, upper, right, lower


def _sphere_bounds(offset: float, depth: float, radius: float) -> tuple[float, float]:
    """Tangents of the two lines of sight that touch a sphere, in the plane of the axis and ``offset``."""
    middle, square = offset * depth, depth * depth - radius * radius
    spread = radius * math.sqrt(offset * offset + square)
    return (middle - spread) / square, (middle + spread) / square


def _rim_bounds(
    x: float, y: float, below: float, cos: float, sin: float, radius: float
) -> tuple[float, float, float, float]:
    """Minimum and maximum u, then v, of a horizontal circle ``below`` metres under the camera.

    u is extreme where ``(u d - x)^2 = r^2 (1 + u^2 cos^2)``, v at the circle's nearest and farthest points.
    """
    depth = y * cos + below * sin
    square = depth * depth - (radius * cos) ** 2
    spread = radius * math.sqrt(depth * depth + cos * cos * (x * x - radius * radius))
    near = (below * cos - (y - radius) * sin) / (depth - radius * cos)
    far = (below * cos - (y + radius) * sin) / (depth + radius * cos)
    return (x * depth - spread) / square, (x * depth + spread) / square, min(near, far), max(near, far)
