"""Pictures, metric depth and masks of scenes, by vectorised analytic ray casting.

A picture averages 2 x 2 rays per pixel in linear light and is stored with gamma 2; depth and mask come from the ray
through the pixel's centre, where they are exact. A ray is
``(0, 0, h) + t (u, cos p - v sin p, -sin p - v cos p)``, and t is the depth along the optical axis.
Pixels are computed by additions, multiplications, divisions, square roots and comparisons only, each of which IEEE
arithmetic rounds correctly: a scene has the same bytes alone, in any batch and on any machine.

Letters: B scenes, S side of the picture, n side of the grid of rays, K solids of the batch, R rays.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.scenes.world import COLOURS, FAR, HALF_VIEW, SHAPES, Box, Scene

SKY, GROUND = -1, 0  # values of the mask; solid i has the value i + 1

_CHUNK_RAYS = 2**17  # the working arrays of a chunk then fit into the processor's cache
_SUN = (1.50, 1.40, 1.22)
_AMBIENT = (0.40, 0.44, 0.52)
_REFLECTANCES = {  # linear
    "red": (0.72, 0.03, 0.03),
    "orange": (1.00, 0.30, 0.02),
    "yellow": (0.95, 0.75, 0.04),
    "green": (0.04, 0.42, 0.07),
    "blue": (0.04, 0.15, 0.75),
    "purple": (0.24, 0.04, 0.50),
    "pink": (0.95, 0.30, 0.52),
    "white": (0.88, 0.88, 0.88),
}
_PALETTE = np.array([_REFLECTANCES[name] for name in COLOURS], np.float32)

Array = np.ndarray


def render(scenes: Sequence[Scene], size: int) -> tuple[Array, Array, Array]:
    """Image uint8 (B, S, S, 3) RGB, depth float32 (B, S, S) in metres, 0 where there is none, and mask int8 (B, S, S).

    The mask is -1 for sky (and for ground farther than ``FAR``, lost in haze), 0 for ground and i + 1 for solid i.
    """
    if size < 1:
        raise UserError(f"A picture of {size} x {size} pixels cannot be rendered: the size must be at least 1.")
    image = np.empty((len(scenes), size, size, 3), np.uint8)
    depth = np.empty((len(scenes), size, size), np.float32)
    mask = np.empty((len(scenes), size, size), np.int8)
    step = max(1, _CHUNK_RAYS // (4 * size * size))
    for start in range(0, len(scenes), step):
        part = slice(start, start + step)
        stage = _Stage.of(scenes[part])
        depth[part], mask[part] = _depth_and_mask(stage, size)
        image[part] = _picture(stage, size)
    return image, depth, mask


def visible_shares(mask: Array, count: int) -> Array:
    """The share of the picture that each of ``count`` solids covers, (count,), from one mask (S, S)."""
    return np.bincount(mask[mask > GROUND] - 1, minlength=count)[:count] / mask.size


class _Solids(NamedTuple):
    """K solids as columns; ``take`` repeats rows so that they line up with rays."""

    scene: Array
    slot: Array
    shape: Array
    colour: Array
    metal: Array
    x: Array
    y: Array
    half_width: Array
    height: Array
    cos: Array
    sin: Array

    def take(self, index: Array) -> "_Solids":
        return _Solids(*(column[index] for column in self))


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A chunk of scenes as arrays: one row per scene, and one row per solid."""

    scenes: Sequence[Scene]
    camera_height: Array
    cos_pitch: Array
    sin_pitch: Array
    sun: Array  # (B, 3) unit vectors towards the sun
    counts: Array  # (B,) solids per scene
    first: Array  # (B,) row of a scene's first solid
    solids: _Solids

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> "_Stage":
        counts = np.array([len(scene.objects) for scene in scenes])
        return cls(
            scenes=scenes,
            camera_height=_column([scene.camera.height for scene in scenes]),
            cos_pitch=_column([math.cos(scene.camera.pitch) for scene in scenes]),
            sin_pitch=_column([math.sin(scene.camera.pitch) for scene in scenes]),
            sun=_column([_direction(s.surroundings.sun_azimuth, s.surroundings.sun_elevation) for s in scenes]),
            counts=counts,
            first=np.cumsum(counts) - counts,
            solids=_columns_of_solids(scenes),
        )


def _column(values: Sequence[float | tuple[float, ...]]) -> Array:
    return np.array(values, np.float32)


def _direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    flat = math.cos(elevation)
    return flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)


def _columns_of_solids(scenes: Sequence[Scene]) -> _Solids:
    rows = [
        (b, slot, SHAPES.index(s.shape), COLOURS.index(s.colour), s.material == "metal", s)
        for b, scene in enumerate(scenes)
        for slot, s in enumerate(scene.objects)
    ]
    scene, slot, shape, colour, metal = (np.array([row[i] for row in rows], np.int64) for i in range(5))
    solids = [row[5] for row in rows]
    return _Solids(
        scene, slot, shape, colour, metal.astype(bool),
        x=_column([s.x for s in solids]),
        y=_column([s.y for s in solids]),
        half_width=_column([s.half_width for s in solids]),
        height=_column([s.height for s in solids]),
        cos=_column([math.cos(s.angle) for s in solids]),
        sin=_column([math.sin(s.angle) for s in solids]),
    )  # fmt: skip


# ---- rays


class _Rays(NamedTuple):
    """The rays of a chunk. The grid is regular, so u depends on the column and all else on scene and row."""

    u: Array  # (n,)
    dy: Array  # (B, n)
    dz: Array  # (B, n)
    ground: Array  # (B, n) depth at which a row meets the ground; inf where it does not within FAR


def _cast(stage: _Stage, n: int) -> _Rays:
    u = ((2.0 * np.arange(n) + 1.0) / n - 1.0).astype(np.float32) * np.float32(HALF_VIEW)
    cos, sin = stage.cos_pitch[:, None], stage.sin_pitch[:, None]
    dy, dz = cos - u * sin, -sin - u * cos
    with np.errstate(divide="ignore"):
        ground = stage.camera_height[:, None] / -dz
    return _Rays(u, dy, dz, np.where((ground > 0) & (ground <= FAR), ground, np.float32(np.inf)))


class _Hits(NamedTuple):
    """Where rays meet the solid in front."""

    pixel: Array  # index into the flat (B n n) grid
    solid: Array
    t: Array
    point: tuple[Array, Array, Array]
    normal: tuple[Array, Array, Array]


def _meet(stage: _Stage, rays: _Rays) -> _Hits:
    """Every ray that meets a solid, with the solid in front."""
    n = len(rays.u)
    solid, pixel = _pixels_in_boxes([s.box for scene in stage.scenes for s in scene.objects], stage.solids.scene, n)
    row = pixel // n
    direction = (rays.u[pixel - row * n], rays.dy.reshape(-1)[row], rays.dz.reshape(-1)[row])
    height = stage.camera_height[stage.solids.scene[solid]]
    origin = (np.zeros_like(height), np.zeros_like(height), height)
    kept, t, normal = _intersect(stage.solids, solid, origin, direction)
    solid, pixel = solid[kept], pixel[kept]
    nearest = np.full(stage.counts.size * n * n, np.inf, np.float32)
    np.minimum.at(nearest, pixel, t)
    front = np.flatnonzero(t == nearest[pixel])
    kept, solid, pixel, t = kept[front], solid[front], pixel[front], t[front]
    x, y, z = (o[kept] + t * d[kept] for o, d in zip(origin, direction, strict=True))
    return _Hits(pixel, solid, t, (x, y, z), (normal[0][front], normal[1][front], normal[2][front]))


def _pixels_in_boxes(boxes: Sequence[Box], scene: Array, n: int) -> tuple[Array, Array]:
    """For each box, every grid position inside it: (box index (R,), flat position in the (B n n) grid (R,))."""
    edges = np.array(boxes).reshape(-1, 4) * n
    low = np.clip(np.floor(edges[:, :2] - 0.5), 0, n - 1).astype(np.int64)
    high = np.clip(np.ceil(edges[:, 2:] - 0.5), 0, n - 1).astype(np.int64) + 1
    width, height = (high - low).T
    total = width * height
    box = np.repeat(np.arange(len(total)), total)
    within = np.arange(len(box)) - np.repeat(np.cumsum(total) - total, total)
    down = within // width[box]
    start = (scene * n + low[:, 1]) * n + low[:, 0]
    return box, start[box] + within + down * (n - width)[box]


# ---- intersections: each takes rays in the solid's own frame (origin at the middle of its base) and returns the
# smallest positive t and the outward normal there; t is inf for a miss. `a` is the half-width, `h` the height.

_Vector = tuple[Array, Array, Array]
_Meeting = tuple[Array, _Vector]


def _intersect(solids: _Solids, index: Array, origin: _Vector, direction: _Vector) -> tuple[Array, Array, _Vector]:
    """The rays that meet their solid: their positions in ``index``, t and the normal."""
    kept, depths, normals = [], [], []
    shapes = solids.shape[index]
    for number, name in enumerate(SHAPES):
        rays = np.flatnonzero(shapes == number)
        solid = solids.take(index[rays])
        ox, oy, oz = origin[0][rays] - solid.x, origin[1][rays] - solid.y, origin[2][rays]
        dx, dy, dz = (part[rays] for part in direction)
        if name == "cube":
            ox, oy = ox * solid.cos + oy * solid.sin, oy * solid.cos - ox * solid.sin
            dx, dy = dx * solid.cos + dy * solid.sin, dy * solid.cos - dx * solid.sin
        with np.errstate(divide="ignore", invalid="ignore"):
            t, (nx, ny, nz) = _MEETINGS[name]((ox, oy, oz), (dx, dy, dz), solid.half_width, solid.height)
        if name == "cube":
            nx, ny = nx * solid.cos - ny * solid.sin, ny * solid.cos + nx * solid.sin
        met = np.flatnonzero(t < np.inf)
        kept.append(rays[met])
        depths.append(t[met])
        normals.append((nx[met], ny[met], nz[met]))
    x, y, z = (np.concatenate([normal[axis] for normal in normals]) for axis in range(3))
    return np.concatenate(kept), np.concatenate(depths), (x, y, z)


_NEVER = np.float32(np.inf)
_TOUCH = np.float32(1e-4)  # metres; a ray that starts on a surface does not meet it again


def _meet_cube(o: _Vector, d: _Vector, a: Array, h: Array) -> _Meeting:
    half = h * np.float32(0.5)
    enter, leave = np.full_like(h, -np.inf), np.full_like(h, np.inf)
    entries = []
    for origin, direction, extent in ((o[0], d[0], a), (o[1], d[1], a), (o[2] - half, d[2], half)):
        first, second = (-extent - origin) / direction, (extent - origin) / direction
        entries.append(np.minimum(first, second))
        enter = np.fmax(enter, entries[-1])
        leave = np.fmin(leave, np.maximum(first, second))
    normal = tuple(np.where(entry == enter, -np.sign(x), np.float32(0)) for entry, x in zip(entries, d, strict=True))
    return np.where((enter <= leave) & (enter > _TOUCH), enter, _NEVER), (normal[0], normal[1], normal[2])


def _meet_sphere(o: _Vector, d: _Vector, a: Array, h: Array) -> _Meeting:
    oz = o[2] - a
    square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    half = o[0] * d[0] + o[1] * d[1] + oz * d[2]
    # The squared distance of the line from the centre, not the textbook discriminant, whose terms cancel in float32.
    nearest = -half / square
    px, py, pz = o[0] + nearest * d[0], o[1] + nearest * d[1], oz + nearest * d[2]
    inside = a * a - (px * px + py * py + pz * pz)
    t = nearest - np.sqrt(inside / square)
    t = np.where((inside >= 0) & (t > _TOUCH), t, _NEVER)
    return t, ((o[0] + t * d[0]) / a, (o[1] + t * d[1]) / a, (oz + t * d[2]) / a)


def _meet_cylinder(o: _Vector, d: _Vector, a: Array, h: Array) -> _Meeting:
    square = d[0] * d[0] + d[1] * d[1]
    nearest = -(o[0] * d[0] + o[1] * d[1]) / square
    px, py = o[0] + nearest * d[0], o[1] + nearest * d[1]
    side = nearest - np.sqrt((a * a - (px * px + py * py)) / square)
    z = o[2] + side * d[2]
    side = np.where((side > _TOUCH) & (z >= 0) & (z <= h), side, _NEVER)
    top = _meet_disc(o, d, a, h)
    t = np.minimum(side, top)
    flat = (top < side).astype(np.float32)
    return t, ((o[0] + t * d[0]) / a * (1 - flat), (o[1] + t * d[1]) / a * (1 - flat), flat)


def _meet_cone(o: _Vector, d: _Vector, a: Array, h: Array) -> _Meeting:
    """The side ``x^2 + y^2 = (s (h - z))^2`` with s = a / h; seen from above or from the side, the base never shows."""
    slope = a / h
    oz, square_slope = o[2] - h, slope * slope
    square = d[0] * d[0] + d[1] * d[1] - square_slope * d[2] * d[2]
    half = o[0] * d[0] + o[1] * d[1] - square_slope * oz * d[2]
    rest = o[0] * o[0] + o[1] * o[1] - square_slope * oz * oz
    root = np.sqrt(half * half - square * rest)
    t = np.full_like(root, _NEVER)
    for candidate in ((-half - root) / square, (-half + root) / square):
        z = o[2] + candidate * d[2]
        t = np.where((candidate > _TOUCH) & (z >= 0) & (z <= h) & (candidate < t), candidate, t)
    px, py, pz = o[0] + t * d[0], o[1] + t * d[1], square_slope * (h - (o[2] + t * d[2]))
    length = np.sqrt(px * px + py * py + pz * pz)
    return t, (px / length, py / length, pz / length)


def _meet_disc(o: _Vector, d: _Vector, a: Array, h: Array) -> Array:
    t = (h - o[2]) / d[2]
    px, py = o[0] + t * d[0], o[1] + t * d[1]
    return np.where((t > _TOUCH) & (px * px + py * py <= a * a), t, _NEVER)


_MEETINGS: dict[str, Callable[[_Vector, _Vector, Array, Array], _Meeting]] = {
    "cube": _meet_cube,
    "sphere": _meet_sphere,
    "cylinder": _meet_cylinder,
    "cone": _meet_cone,
}


# ---- depth and mask


def _depth_and_mask(stage: _Stage, size: int) -> tuple[Array, Array]:
    rays = _cast(stage, size)
    hits = _meet(stage, rays)
    depth = np.broadcast_to(rays.ground[:, :, None], (len(stage.scenes), size, size)).copy()
    mask = np.where(depth < np.inf, np.int8(GROUND), np.int8(SKY))
    depth[depth == np.inf] = 0
    depth.reshape(-1)[hits.pixel] = hits.t
    mask.reshape(-1)[hits.pixel] = stage.solids.slot[hits.solid] + 1
    return depth, mask


# ---- colour


def _picture(stage: _Stage, size: int) -> Array:
    """(B, S, S, 3) uint8."""
    n = 2 * size
    rays = _cast(stage, n)
    hits = _meet(stage, rays)
    backdrop = _backdrop(stage, rays)  # three of (B, n, n)
    solids = _shade(stage, rays, hits)
    image = np.empty((len(stage.scenes), size, size, 3), np.uint8)
    for channel in range(3):
        linear = backdrop[channel]
        linear.reshape(-1)[hits.pixel] = solids[channel]
        rows = linear[:, 0::2] + linear[:, 1::2]
        mean = (rows[:, :, 0::2] + rows[:, :, 1::2]) * np.float32(0.25)
        image[..., channel] = np.sqrt(np.minimum(mean, np.float32(1))) * np.float32(255) + np.float32(0.5)
    return image


def _backdrop(stage: _Stage, rays: _Rays) -> list[Array]:
    """Sky and ground, as if nothing stood on it but shadows."""
    surroundings = [scene.surroundings for scene in stage.scenes]
    is_ground = rays.ground < np.inf
    depth = np.where(is_ground, rays.ground, np.float32(0))
    light = _checker(stage, rays, depth) * _contact(stage, rays, depth)
    lit = np.where(_ground_in_shadow(stage, rays, depth), np.float32(0), stage.sun[:, 2, None, None])
    haze = depth / np.float32(FAR)
    haze = haze * haze * haze
    haze = np.where(is_ground, haze, np.float32(1))[:, :, None]
    sky = _sky_mix(rays.dz)
    channels = []
    for channel in range(3):
        zenith, horizon, ground = (
            _column([getattr(s, name)[channel] for s in surroundings])[:, None, None]
            for name in ("zenith", "horizon", "ground")
        )
        far = horizon + (zenith - horizon) * sky[:, :, None]
        near = ground * light * (np.float32(_AMBIENT[channel]) + np.float32(_SUN[channel]) * lit)
        channels.append(near + (far - near) * haze)
    return channels


def _sky_mix(rise: Array) -> Array:
    """0 at the horizon, towards 1 at the zenith, for a direction that rises by ``rise`` per metre along the axis."""
    rise = np.maximum(rise, np.float32(0))
    return rise / (np.float32(0.12) + rise)


def _checker(stage: _Stage, rays: _Rays, depth: Array) -> Array:
    """(B, n, n) factor around 1: a soft checker that fades with distance, before it could alias."""
    surroundings = [scene.surroundings for scene in stage.scenes]
    tile = _column([s.tile for s in surroundings])[:, None]
    cos = _column([math.cos(s.heading) for s in surroundings])[:, None] / tile
    sin = _column([math.sin(s.heading) for s in surroundings])[:, None] / tile
    start = [_column([s.offset[axis] for s in surroundings])[:, None] for axis in range(2)]
    y = depth * rays.dy
    across = (depth * cos)[:, :, None] * rays.u + (start[0] - y * sin)[:, :, None]
    along = (depth * sin)[:, :, None] * rays.u + (start[1] + y * cos)[:, :, None]
    contrast = _column([s.contrast for s in surroundings])[:, None]
    fade = contrast / (np.float32(1) + depth * depth * np.float32(0.03))
    return _soft_stripes(across) * _soft_stripes(along) * fade[:, :, None] + np.float32(1)


def _soft_stripes(position: Array) -> Array:
    """A smoothed square wave in [-1, 1] of period 2."""
    phase = position - np.floor(position * np.float32(0.5)) * np.float32(2)
    return np.clip(np.abs(phase - np.float32(1)) * np.float32(8) - np.float32(4), np.float32(-1), np.float32(1))


def _contact(stage: _Stage, rays: _Rays, depth: Array) -> Array:
    """(B, n, n) factor below 1 close to a solid, which keeps light from the ground around it."""
    light = np.ones((len(stage.scenes), len(rays.u), len(rays.u)), np.float32)
    for slot in range(int(stage.counts.max(initial=0))):
        who = np.flatnonzero(stage.counts > slot)
        solid = stage.solids.take(stage.first[who] + slot)
        across = depth[who][:, :, None] * rays.u - solid.x[:, None, None]
        away = depth[who] * rays.dy[who] - solid.y[:, None]
        square = (solid.half_width * solid.half_width)[:, None, None]
        light[who] *= np.float32(1) - np.float32(0.55) * square / (
            np.float32(0.35) * square + across * across + (away * away)[:, :, None]
        ) * np.float32(0.6)
    return light


def _ground_in_shadow(stage: _Stage, rays: _Rays, depth: Array) -> Array:
    """(B, n, n) bool."""
    n = len(rays.u)
    boxes = [_shadow_box(scene, solid) for scene in stage.scenes for solid in range(len(scene.objects))]
    solid, pixel = _pixels_in_boxes(boxes, stage.solids.scene, n)
    row = pixel // n
    t = depth.reshape(-1)[row]
    near = np.flatnonzero(t > 0)
    solid, pixel, row, t = solid[near], pixel[near], row[near], t[near]
    point = (t * rays.u[pixel - row * n], t * rays.dy.reshape(-1)[row], np.zeros_like(t))
    sun = stage.sun[stage.solids.scene[solid]]
    hidden, _, _ = _intersect(stage.solids, solid, point, (sun[:, 0], sun[:, 1], sun[:, 2]))
    shadow = np.zeros((len(stage.scenes), n, n), bool)
    shadow.reshape(-1)[pixel[hidden]] = True
    return shadow


def _shadow_box(scene: Scene, index: int) -> Box:
    """The part of the picture in which the solid's shadow on the ground can lie: a strip away from the sun."""
    solid, surroundings = scene.objects[index], scene.surroundings
    east, north, up = _direction(surroundings.sun_azimuth, surroundings.sun_elevation)
    reach = solid.height / up
    wide = 1.5 * solid.half_width
    flat = math.hypot(east, north)
    ax, ay = east / flat * wide, north / flat * wide  # half the strip's width, along and (turned) across the light
    ends = [(ax, ay), (-ax - east * reach, -ay - north * reach)]
    corners = [
        scene.camera.project(solid.x + ex + side * ay, solid.y + ey - side * ax, 0.0)
        for ex, ey in ends
        for side in (-1, 1)
    ]
    across, along = [corner[0] for corner in corners], [corner[1] for corner in corners]
    return min(across), min(along), max(across), max(along)


def _shade(stage: _Stage, rays: _Rays, hits: _Hits) -> list[Array]:
    """Linear colour of the solids' visible points, three of (R,).

    Lambert's law under sun and sky, a highlight, and for metal a tinted mirror image of sky and ground.
    """
    solids = stage.solids
    scene = solids.scene[hits.solid]
    colour = _PALETTE[solids.colour[hits.solid]]
    metal = solids.metal[hits.solid].astype(np.float32)
    sun = stage.sun[scene]
    (px, py, pz), (nx, ny, nz) = hits.point, hits.normal
    facing = nx * sun[:, 0] + ny * sun[:, 1] + nz * sun[:, 2]
    lit = np.maximum(facing, np.float32(0)) * _sunlit(stage, hits, sun)
    # Directions of the line of sight and of its reflection.
    vz = pz - stage.camera_height[scene]
    length = np.sqrt(px * px + py * py + vz * vz)
    vx, vy, vz = px / length, py / length, vz / length
    turn = np.float32(2) * (vx * nx + vy * ny + vz * nz)
    rx, ry, rz = vx - turn * nx, vy - turn * ny, vz - turn * nz
    shine = np.maximum(rx * sun[:, 0] + ry * sun[:, 1] + rz * sun[:, 2], np.float32(0)) * (lit > 0)
    broad = shine * shine
    broad = broad * broad * broad  # power 6
    sharp = broad * broad * broad
    sharp = sharp * sharp  # power 36
    grazing = np.float32(1) + turn * np.float32(0.5)
    grazing = grazing * grazing * grazing
    open_sky = np.float32(0.62) + np.float32(0.38) * nz
    sky, up = _sky_mix(rz), np.clip(rz * np.float32(5) + np.float32(0.5), np.float32(0), np.float32(1))
    diffuse = np.float32(1) - np.float32(0.62) * metal
    mirror = metal * (np.float32(0.78) + np.float32(0.3) * grazing)
    highlight = metal * sharp * np.float32(1.6) + (np.float32(1) - metal) * broad * np.float32(0.10)
    surroundings = [item.surroundings for item in stage.scenes]
    channels = []
    for channel in range(3):
        zenith, horizon, ground = (
            _column([getattr(s, name)[channel] for s in surroundings])[scene]
            for name in ("zenith", "horizon", "ground")
        )
        bounce = ground * np.float32(_AMBIENT[channel] + 0.7 * _SUN[channel])
        around = bounce + (horizon + (zenith - horizon) * sky - bounce) * up
        tint = colour[:, channel]
        light = np.float32(_AMBIENT[channel]) * open_sky + np.float32(_SUN[channel]) * np.float32(0.75) * lit
        channels.append(tint * light * diffuse + tint * around * mirror + highlight * np.float32(_SUN[channel]))
    return channels


def _sunlit(stage: _Stage, hits: _Hits, sun: Array) -> Array:
    """(R,) 0 where another solid stands between a visible point and the sun, else 1."""
    solids = stage.solids
    scene, slot = solids.scene[hits.solid], solids.slot[hits.solid]
    lit = np.ones(len(hits.solid), np.float32)
    for step in range(1, int(stage.counts.max(initial=0))):
        rays = np.flatnonzero(stage.counts[scene] > step)
        other = stage.first[scene[rays]] + (slot[rays] + step) % stage.counts[scene[rays]]
        point = (hits.point[0][rays], hits.point[1][rays], hits.point[2][rays])
        hidden, _, _ = _intersect(solids, other, point, (sun[rays, 0], sun[rays, 1], sun[rays, 2]))
        lit[rays[hidden]] = 0
    return lit
