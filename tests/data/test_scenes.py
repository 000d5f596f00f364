"""The embedded world: the same bytes from the same seed, exact depth, readable pictures, and captions that are true."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossflow.core.errors import UserError
from crossflow.data import scenes as world
from crossflow.data.scenes import Camera, Scene, captions, make_scene, place, render, scene_seed

SCENES = [make_scene(scene_seed("train", i)) for i in range(300)]


def staged(*solids, camera):
    """A scene with given solids under ordinary surroundings."""
    return Scene(0, tuple(solids), camera, SCENES[0].surroundings)


def line_of_sight(camera, row, column, size):
    """Origin and direction, per metre of depth, of the ray through the centre of a pixel."""
    u, v = ((2 * (i + 0.5) / size - 1) * world.HALF_VIEW for i in (column, row))
    cos, sin = math.cos(camera.pitch), math.sin(camera.pitch)
    return np.array([0, 0, camera.height]), np.array([u, cos - v * sin, -sin - v * cos])


# ---- sameness


def test_same_seed_gives_same_scene_and_pictures():
    again = [make_scene(scene.seed) for scene in SCENES[:20]]
    assert again == SCENES[:20]
    for first, second in zip(render(SCENES[:20], 32), render(again, 32), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [16, 32, 50])
def test_scene_rendered_alone_equals_its_picture_in_a_batch(size):
    batch = render(SCENES[:40], size)
    for i in (0, 7, 39):
        for alone, together in zip(render([SCENES[i]], size), batch, strict=True):
            np.testing.assert_array_equal(alone[0], together[i])


def test_rendered_bytes_equal_the_recorded_digest():
    """Pictures are part of results: a change to the world must be meant, and changes this digest."""
    image, depth, mask = render(SCENES[:16], 32)
    digest = hashlib.sha256(image.tobytes() + depth.tobytes() + mask.tobytes()).hexdigest()
    assert digest[:16] == "6159d151a806329e"


def test_types_and_shapes():
    image, depth, mask = render(SCENES[:3], 24)
    assert (image.dtype, depth.dtype, mask.dtype) == (np.uint8, np.float32, np.int8)
    assert image.shape == (3, 24, 24, 3)
    assert depth.shape == mask.shape == (3, 24, 24)
    assert render([], 24)[0].shape == (0, 24, 24, 3)


def test_scene_survives_json_exactly():
    for scene in SCENES[:50]:
        text = json.dumps(scene.to_json())
        assert len(text) < 1000
        assert Scene.from_json(json.loads(text)) == scene


def test_seeds_of_splits_are_disjoint():
    first = {split: scene_seed(split, 0) for split in world.SPLITS}
    last = {split: scene_seed(split, 2**40 - 1) for split in world.SPLITS}
    ranges = sorted((first[split], last[split]) for split in world.SPLITS)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize(("split", "index"), [("dev", 0), ("train", -1), ("val", 2**40)])
def test_seed_outside_a_split_is_a_user_error(split, index):
    with pytest.raises(UserError, match=split):
        scene_seed(split, index)


# ---- geometry


def test_depth_of_ground_is_closed_form():
    camera = Camera(height=1.4, pitch=0.3)
    _, depth, mask = render([staged(camera=camera)], 33)
    for row in range(33):
        origin, direction = line_of_sight(camera, row, 5, 33)
        along = -origin[2] / direction[2] if direction[2] < 0 else math.inf
        if along <= world.FAR:
            assert depth[0, row, 5] == pytest.approx(along, rel=1e-5)
            assert mask[0, row, 5] == world.GROUND
        else:
            assert depth[0, row, 5] == 0
            assert mask[0, row, 5] == world.SKY


def test_depth_of_sphere_is_closed_form():
    camera = Camera(height=1.4, pitch=0.3)
    solid = place(camera, ("sphere", "red"), "large", "metal", 0.3, 2.5, 0.0)
    _, depth, mask = render([staged(solid, camera=camera)], 41)
    centre, radius = np.array([0.3, 2.5, solid.half_width]), solid.half_width
    met = 0
    for row in range(41):
        for column in range(41):
            origin, direction = line_of_sight(camera, row, column, 41)
            roots = np.roots(
                [direction @ direction, 2 * direction @ (origin - centre), sum((origin - centre) ** 2) - radius**2]
            )
            if abs(roots[0].imag) > 1e-6:
                assert mask[0, row, column] < 1
            elif np.isreal(roots).all() and np.ptp(roots.real) > 0.02:
                met += 1
                assert mask[0, row, column] == 1
                assert depth[0, row, column] == pytest.approx(roots.real.min(), abs=2e-4)
    assert met > 100


@pytest.mark.parametrize("shape", ["cube", "cylinder", "cone"])
def test_depth_lies_on_the_surface(shape):
    camera = Camera(height=1.4, pitch=0.3)
    solid = place(camera, (shape, "blue"), "large", "rubber", -0.2, 2.4, 0.6)
    _, depth, mask = render([staged(solid, camera=camera)], 48)
    rows, columns = np.nonzero(mask[0] == 1)
    for row, column in zip(rows, columns, strict=True):
        origin, direction = line_of_sight(camera, row, column, 48)
        x, y, z = origin + depth[0, row, column] * direction - [solid.x, solid.y, 0]
        radius, a, h = math.hypot(x, y), solid.half_width, solid.height
        along = abs(x * math.cos(0.6) + y * math.sin(0.6)), abs(y * math.cos(0.6) - x * math.sin(0.6))
        gap = {
            "cube": max(*(part - a for part in along), abs(z - h / 2) - h / 2),
            "cylinder": max(radius - a, abs(z - h / 2) - h / 2),
            "cone": radius - a * (1 - z / h),
        }[shape]
        assert abs(gap) < 1e-3
    assert len(rows) > 100


def test_nearer_solid_hides_the_farther_one():
    camera = Camera(height=1.4, pitch=0.3)
    near = place(camera, ("sphere", "red"), "small", "rubber", 0.0, 2.2, 0.0)
    far = place(camera, ("sphere", "blue"), "large", "rubber", 0.0, 3.6, 0.0)
    for solids in ((near, far), (far, near)):
        _, _, mask = render([staged(*solids, camera=camera)], 64)
        shares = world.visible_shares(mask[0], 2)
        alone = [world.visible_shares(render([staged(s, camera=camera)], 64)[2][0], 1)[0] for s in solids]
        assert shares[solids.index(near)] == alone[solids.index(near)]
        assert shares[solids.index(far)] < alone[solids.index(far)]


def test_boxes_enclose_the_masks_tightly():
    size = 128
    for solid_scene in [scene for scene in SCENES if len(scene.objects) == 1][:40]:
        (solid,) = solid_scene.objects
        rows, columns = np.nonzero(render([solid_scene], size)[2][0] == 1)
        shown = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size
        np.testing.assert_allclose(shown, solid.box, atol=(3.0 if solid.shape == "cone" else 1.5) / size)


def test_mask_and_depth_agree():
    _, depth, mask = render(SCENES, 32)
    assert ((depth == 0) == (mask == world.SKY)).all()
    assert (depth[mask != world.SKY] > 0.5).all()
    assert depth.max() <= world.FAR
    for scene, picture, numbers in zip(SCENES, depth, mask, strict=True):
        assert set(np.unique(numbers)) <= {world.SKY, *range(len(scene.objects) + 1)}
        for i, solid in enumerate(scene.objects):
            middle = scene.camera.project(solid.x, solid.y, solid.height / 2)[2]
            assert np.abs(picture[numbers == i + 1] - middle).max() < 1.5 * solid.half_width + solid.height / 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_every_solid_covers_at_least_its_share(size):
    for scene, mask in zip(SCENES, render(SCENES, size)[2], strict=True):
        shares = world.visible_shares(mask, len(scene.objects))
        assert shares.min() >= world.MIN_SHARE
        assert all(shown > solid.share - 0.005 for shown, solid in zip(shares, scene.objects, strict=True))


def test_solids_do_not_overlap_and_differ_in_place():
    for scene in SCENES:
        for i, first_solid in enumerate(scene.objects):
            for other in scene.objects[:i]:
                assert (
                    math.hypot(first_solid.x - other.x, first_solid.y - other.y)
                    > first_solid.half_width + other.half_width
                )
                assert math.dist(first_solid.centre, other.centre) >= 0.2


def test_all_numbers_and_attributes_occur():
    counts = Counter(len(scene.objects) for scene in SCENES)
    assert all(0.25 < counts[number] / len(SCENES) < 0.42 for number in (1, 2, 3))
    for field, values in (
        ("shape", world.SHAPES), ("colour", world.COLOURS), ("size", world.SIZES), ("material", world.MATERIALS),
    ):  # fmt: skip
        frequencies = Counter(getattr(solid, field) for scene in SCENES for solid in scene.objects)
        assert set(frequencies) == set(values)
        assert min(frequencies.values()) > 0.4 * max(frequencies.values())


def test_colours_are_seen_in_the_picture():
    """The mean hue of a solid's pixels is nearer to that of its own colour than to any other, for nearly all solids."""
    image, _, mask = render(SCENES, 32)
    means, names = [], []
    for scene, picture, numbers in zip(SCENES, image, mask, strict=True):
        for i, solid in enumerate(scene.objects):
            colour = picture[numbers == i + 1].astype(float).mean(0)
            means.append(colour / np.linalg.norm(colour))
            names.append(solid.colour)
    means, names = np.array(means), np.array(names)
    centres = np.array([means[names == name].mean(0) for name in world.COLOURS])
    nearest = np.array(world.COLOURS)[((means[:, None] - centres) ** 2).sum(-1).argmin(1)]
    assert (nearest == names).mean() > 0.95


def test_solids_cast_shadows():
    camera = Camera(height=1.4, pitch=0.3)
    solid = place(camera, ("cube", "white"), "large", "rubber", 0.0, 2.8, 0.6)
    sunny = dataclasses.replace(SCENES[0].surroundings, sun_azimuth=0.0)  # from the right
    bare, with_cube = (dataclasses.replace(staged(*s, camera=camera), surroundings=sunny) for s in ((), (solid,)))
    images, _, mask = render([bare, with_cube], 64)
    difference = (images[0].astype(int) - images[1]).mean(-1)
    darker = np.where(mask[1] == world.GROUND, difference, 0)
    left, right = darker[:, :32], darker[:, 32:]
    assert (left > 40).mean() > 0.01
    assert (right > 40).mean() < 0.2 * (left > 40).mean()


# ---- language

NAME = rf"(?:a|an|the|another) (?:({'|'.join(world.COLOURS)}) )?({'|'.join(world.SHAPES)})"
CLAIM = re.compile(rf"{NAME} (?:is |stands )?(?:to the )?({'|'.join(world.RELATIONS)}) {NAME}")


def measured(scene, mask, depth):
    """Centre across the picture and mean depth of each solid, from the rendered picture alone."""
    across = [np.nonzero(mask == i + 1)[1].mean() for i in range(len(scene.objects))]
    return list(zip(across, [depth[mask == i + 1].mean() for i in range(len(scene.objects))], strict=True))


@pytest.mark.slow
def test_relations_claimed_by_captions_hold_in_the_picture():
    _, depths, masks = render(SCENES, 64)
    checked = Counter()
    for scene, depth, mask in zip(SCENES, depths, masks, strict=True):
        places = measured(scene, mask, depth)
        for text in captions(scene):
            for colour_a, shape_a, relation, colour_b, shape_b in CLAIM.findall(text):
                fits = [
                    (places[i], places[j])
                    for i, a in enumerate(scene.objects)
                    for j, b in enumerate(scene.objects)
                    if i != j and a.shape == shape_a and b.shape == shape_b
                    and colour_a in ("", a.colour) and colour_b in ("", b.colour)
                ]  # fmt: skip
                holds = {
                    "left of": lambda a, b: a[0] < b[0],
                    "right of": lambda a, b: a[0] > b[0],
                    "in front of": lambda a, b: a[1] < b[1],
                    "behind": lambda a, b: a[1] > b[1],
                }[relation]
                assert any(holds(a, b) for a, b in fits), (text, places)
                checked[relation] += 1
    assert min(checked[relation] for relation in world.RELATIONS) > 30


def test_captions_name_every_solid_and_agree():
    for scene in SCENES:
        five = captions(scene)
        assert five == captions(scene)
        assert len(set(five)) >= 4
        truth = world.objects_of(scene)
        for text in five[1:]:
            assert world.parse_objects(text) == truth, text
        short = world.parse_objects(five[0])
        assert Counter(shape for _, shape in short) == Counter(shape for _, shape in truth)
        assert {colour for colour, _ in short} <= {None, *(colour for colour, _ in truth)}
        assert world.objects_in_references(five) == truth
        assert len(five[0].split()) <= 11
        assert max(len(text.split()) for text in five) <= 30


@given(seed=st.integers(0, 2**60))
@settings(max_examples=50, deadline=None)
def test_any_scene_survives_json_and_its_captions_read_back_as_its_solids(seed: int):
    scene = make_scene(seed)
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    for text in captions(scene)[1:]:
        assert world.parse_objects(text) == world.objects_of(scene), text


def test_full_caption_names_sizes_and_materials():
    words = {"little": "small", "big": "large", "matte": "rubber", "shiny": "metal"}
    for scene in SCENES:
        text = captions(scene)[3]
        phrases = Counter()
        for phrase in re.split(r",| and ", text):
            named = [words.get(word, word) for word in re.findall("[a-z]+", phrase)]
            number = next((n for n, name in ((2, "two"), (3, "three")) if name in named), 1)
            (shape,) = [s for s in world.SHAPES if s in named or s + "s" in named]
            boxes = [
                [value for value in group if value in named] for group in (world.SIZES, world.COLOURS, world.MATERIALS)
            ]
            phrases[(*(value for (value,) in boxes), shape)] += number
        assert phrases == Counter((s.size, s.colour, s.material, s.shape) for s in scene.objects), text


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("", ()),
        ("nothing to see", ()),
        ("a red cube", (("red", "cube"),)),
        ("Two big shiny blue spheres, one behind the other.", (("blue", "sphere"), ("blue", "sphere"))),
        ("a cube left of a red cone", ((None, "cube"), ("red", "cone"))),
        ("a red cube left of a blue cone and another red cube behind the blue cone",
         (("blue", "cone"), ("red", "cube"), ("red", "cube"))),
        ("the red cube is behind the green cone", (("green", "cone"), ("red", "cube"))),
        ("red red of the a a cylinder cylinder", ((None, "cylinder"), (None, "cylinder"))),
    ],
)  # fmt: skip
def test_parser_reads(text, objects):
    assert world.parse_objects(text) == objects


def test_object_f1_of_known_cases():
    truth = (("red", "cube"), ("blue", "sphere"))
    assert world.object_f1(truth, truth) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert world.object_f1([("red", "cube")], truth) == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert world.object_f1([("blue", "cube"), ("red", "sphere")], truth)["f1"] == 0
    assert world.object_f1([("red", "cube")] * 2, truth)["f1"] == 0.5
    assert world.object_f1([], truth)["f1"] == 0


@pytest.mark.parametrize("kind", world.PROMPT_KINDS)
def test_prompts_say_what_they_require(kind):
    prompts = world.geneval_prompts(kind, seed=3, count=60)
    assert prompts == world.geneval_prompts(kind, seed=3, count=60)
    assert prompts != world.geneval_prompts(kind, seed=4, count=60)
    assert len(prompts) == 60
    for prompt in prompts:
        needed = Counter({(r.colour, r.shape): r.count for r in prompt.required})
        assert Counter(world.parse_objects(prompt.text)) == needed
        assert (prompt.relation is not None) == (kind == "position")
        assert prompt.relation is None or f" {prompt.relation} " in prompt.text
        assert all(r.colour is not None for r in prompt.required) == (kind in ("colors", "color_attribution"))


def test_every_form_of_prompt_occurs_among_captions():
    def form(text):
        text = re.sub(rf"\b({'|'.join(world.COLOURS)})\b", "COLOUR", text)
        text = re.sub(rf"\b({'|'.join(world.SHAPES)})(s?)\b", r"SHAPE\2", text)
        return re.sub(r"\b(a|an) ", "a ", text)

    phrases = {form(text) for scene in SCENES for text in captions(scene)}
    for kind in world.PROMPT_KINDS:
        assert {form(prompt.text) for prompt in world.geneval_prompts(kind, 0, 100)} <= phrases


def test_unknown_kind_of_prompts_lists_the_known():
    with pytest.raises(UserError, match="single_object"):
        world.geneval_prompts("single", 0, 1)


def test_empty_picture_size_is_a_user_error():
    with pytest.raises(UserError, match="at least 1"):
        render(SCENES[:1], 0)


def test_scene_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCENES[0].seed = 1
