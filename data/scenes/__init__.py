"""The embedded world: procedural scenes, their pictures with metric depth, and their captions.

``make_scene(scene_seed(split, index))`` -> Scene; ``render(scenes, size)`` -> images, depths, masks;
``captions(scene)`` -> five sentences.
"""

from crossflow.data.scenes.language import (
    PROMPT_KINDS,
    ObjectName,
    Prompt,
    Requirement,
    captions,
    geneval_prompts,
    object_f1,
    objects_in_references,
    objects_of,
    parse_objects,
)
from crossflow.data.scenes.render import GROUND, SKY, render, visible_shares
from crossflow.data.scenes.world import (
    COLOURS,
    FAR,
    FRONT_MARGIN,
    HALF_VIEW,
    LEFT_MARGIN,
    MATERIALS,
    MIN_SHARE,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Camera,
    Scene,
    Solid,
    Surroundings,
    make_scene,
    place,
    scene_seed,
)

__all__ = [
    "COLOURS", "FAR", "FRONT_MARGIN", "GROUND", "HALF_VIEW", "LEFT_MARGIN", "MATERIALS", "MIN_SHARE", "OPPOSITE",
    "PROMPT_KINDS", "RELATIONS", "SHAPES", "SIZES", "SKY", "SPLITS", "Camera", "ObjectName", "Prompt",
    "Requirement", "Scene", "Solid", "Surroundings", "captions", "geneval_prompts", "make_scene", "object_f1",
    "objects_in_references", "objects_of", "parse_objects", "place", "render", "scene_seed", "visible_shares",
]  # fmt: skip
