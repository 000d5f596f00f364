"""The language of scenes: captions, prompts of the GenEval kinds, and a parser for both.

Every sentence is true of the picture: an indefinite noun phrase ("a red cube", "two cones", "another sphere") stands
for a new solid, a definite one ("the red cube") for a solid mentioned before, or for a new one if there is none.
GenEval: Ghosh et al., "GenEval: an object-focused framework for evaluating text-to-image alignment", NeurIPS 2023.
"""

import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from crossflow.core.errors import unknown_name
from crossflow.data.scenes.world import COLOURS, RELATIONS, SHAPES, Scene, Solid

PROMPT_KINDS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")

ObjectName = tuple[str | None, str]  # (colour, shape); the colour is None where a text does not state it

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COUNT_OF = {name: number for number, name in enumerate(_NUMBERS) if number} | {
    "a": 1,
    "an": 1,
    "another": 1,
    "both": 2,
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_MATERIAL_WORDS = {"rubber": ("rubber", "matte"), "metal": ("metal", "shiny")}
_ADJECTIVES = {word for words in (*_SIZE_WORDS.values(), *_MATERIAL_WORDS.values()) for word in words}
_SHAPE_OF = {form: shape for shape in SHAPES for form in (shape, shape + "s")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
_PLACES = ("", " on the ground", " on a checkered floor", " under the sky")

T = TypeVar("T")
Adjectives = Callable[[Solid], tuple[str, ...]]


# ---- captions


def captions(scene: Scene) -> tuple[str, str, str, str, str]:
    """Five captions, the same for every call: short, colours, relations, every attribute, and a longer sentence.

    The first has the form of a GenEval prompt; each of them mentions every solid of the scene.
    """
    rng = random.Random(f"captions/{scene.seed}")
    solids = sorted(scene.objects, key=lambda solid: solid.centre)
    return (
        _short(rng, scene, solids),
        _colours(rng, solids),
        _related(rng, scene),
        _everything(rng, solids),
        _sentence(rng, scene, solids),
    )


def _choose(rng: random.Random, values: Sequence[T]) -> T:
    return values[int(rng.random() * len(values))]


def _shape_only(solid: Solid) -> tuple[str, ...]:
    return ()


def _colour_only(solid: Solid) -> tuple[str, ...]:
    return (solid.colour,)


def _name(solid: Solid) -> str:
    return f"{solid.colour} {solid.shape}"


def _phrase(count: int, adjectives: tuple[str, ...], shape: str) -> str:
    """ "a red cube", "an orange cone", "two cubes"."""
    words = " ".join((*adjectives, shape))
    if count == 1:
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"
    return f"{_NUMBERS[count]} {words}s"


def _enumerate(solids: Iterable[Solid], adjectives: Adjectives) -> str:
    """ "a red cube, two blue spheres and a green cone": equal descriptions are counted together."""
    groups = Counter((adjectives(solid), solid.shape) for solid in solids)
    return _join([_phrase(count, words, shape) for (words, shape), count in groups.items()])


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _short(rng: random.Random, scene: Scene, solids: list[Solid]) -> str:
    style = rng.random()
    if style < 1 / 3 and len(solids) == 2 and solids[0].shape != solids[1].shape:
        i, relation, j = _choose(rng, scene.relations)
        return f"a {scene.objects[i].shape} {relation} a {scene.objects[j].shape}"
    return _enumerate(solids, _shape_only if style < 2 / 3 else _colour_only)


def _colours(rng: random.Random, solids: list[Solid]) -> str:
    listed = _enumerate(solids, _colour_only)
    verb = "are" if listed.split()[0] in _NUMBERS else "is"
    start = _choose(rng, ("", "a picture of ", "a scene with ", f"there {verb} "))
    return f"{start}{listed}{_choose(rng, _PLACES)}"


def _related(rng: random.Random, scene: Scene) -> str:
    if len(scene.objects) == 1:
        return f"{_phrase(1, _colour_only(scene.objects[0]), scene.objects[0].shape)} {_whereabouts(scene.objects[0])}"
    if len({_name(solid) for solid in scene.objects}) == 1:
        return _related_equals(scene)
    i, relation, j = _choose(
        rng, [r for r in scene.relations if _name(scene.objects[r[0]]) != _name(scene.objects[r[2]])]
    )
    first, second = scene.objects[i], scene.objects[j]
    text = (
        f"{_phrase(1, _colour_only(first), first.shape)} {_choose(rng, _RELATION_WORDS[relation])} "
        f"{_phrase(1, _colour_only(second), second.shape)}"
    )
    for k in {0, 1, 2}.intersection(range(len(scene.objects))) - {i, j}:
        text += f" and {_third(rng, scene, k, i, j)}"
    return text


def _third(rng: random.Random, scene: Scene, k: int, i: int, j: int) -> str:
    """The last of three solids, with its relation to a mentioned solid of another name."""
    solid = scene.objects[k]
    known = {_name(scene.objects[i]), _name(scene.objects[j])}
    words = f"another {_name(solid)}" if _name(solid) in known else _phrase(1, (solid.colour,), solid.shape)
    ties = [r for r in scene.relations if r[0] == k and _name(scene.objects[r[2]]) != _name(solid)]
    _, relation, other = _choose(rng, ties)
    return f"{words} {_choose(rng, _RELATION_WORDS[relation])} the {_name(scene.objects[other])}"


def _related_equals(scene: Scene) -> str:
    """ "two red cubes, one in front of the other": the first relation that one of them has to all others."""
    number = len(scene.objects)
    listed = _enumerate(scene.objects, _colour_only)
    for relation in ("in front of", "left of", "behind", "right of"):
        for i in range(number):
            if sum(r[:2] == (i, relation) for r in scene.relations) == number - 1:
                return f"{listed}, one {relation} the {'other' if number == 2 else 'others'}"
    return f"{listed} next to one another"


def _whereabouts(solid: Solid) -> str:
    across = solid.centre[0]
    if across < 0.38:
        return "on the left"
    if across > 0.62:
        return "on the right"
    return "in the middle" if 0.44 < across < 0.56 else "all alone"


def _everything(rng: random.Random, solids: list[Solid]) -> str:
    size, material = int(rng.random() * 2), int(rng.random() * 2)
    size_first = rng.random() < 0.7

    def adjectives(solid: Solid) -> tuple[str, ...]:
        large, metal = _SIZE_WORDS[solid.size][size], _MATERIAL_WORDS[solid.material][material]
        if material == 1:  # "shiny red", but "red metal"
            return (large, metal, solid.colour) if size_first else (metal, large, solid.colour)
        return large, solid.colour, metal

    start = _choose(rng, ("", "", "a picture of ", "a view of "))
    return f"{start}{_enumerate(solids, adjectives)}{_choose(rng, _PLACES)}"


def _sentence(rng: random.Random, scene: Scene, solids: list[Solid]) -> str:
    number, names = len(solids), [_name(solid) for solid in solids]
    size, material = int(rng.random() * 2), int(rng.random() * 2)
    if number == 1:
        solid = solids[0]
        large, metal = _SIZE_WORDS[solid.size][size], solid.material
        start = _choose(rng, ("the only object here is ", "a single object: ", "there is only "))
        return f"{start}{_phrase(1, (large, solid.colour), solid.shape)} made of {metal}"
    if len(set(names)) == number and rng.random() < 0.6:
        return _tie(scene, rng, _choose(rng, scene.relations)) if number == 2 else _join(_chain(scene, rng))
    words = _SIZE_WORDS if rng.random() < 0.5 else _MATERIAL_WORDS
    which = size if words is _SIZE_WORDS else material

    def adjectives(solid: Solid) -> tuple[str, ...]:
        if words is _SIZE_WORDS:
            return words[solid.size][which], solid.colour
        word = words[solid.material][which]
        return (word, solid.colour) if which == 1 else (solid.colour, word)

    start = _choose(rng, (f"{_NUMBERS[number]} objects: ", f"there are {_NUMBERS[number]} objects, "))
    return f"{start}{_enumerate(solids, adjectives)}{_choose(rng, _PLACES)}"


def _chain(scene: Scene, rng: random.Random) -> list[str]:
    """Two clauses that together name all three solids."""
    middle = int(rng.random() * 3)
    others = [i for i in range(3) if i != middle]
    return [
        _tie(scene, rng, _choose(rng, [r for r in scene.relations if r[0] == i and r[2] == middle])) for i in others
    ]


def _tie(scene: Scene, rng: random.Random, relation: tuple[int, str, int]) -> str:
    i, name, j = relation
    verb = _choose(rng, ("is", "stands"))
    return f"the {_name(scene.objects[i])} {verb} {_choose(rng, _RELATION_WORDS[name])} the {_name(scene.objects[j])}"


# ---- parsing captions


def objects_of(scene: Scene) -> tuple[ObjectName, ...]:
    """The (colour, shape) of every solid of a scene, sorted; equal ones appear as often as they occur."""
    return tuple(sorted((solid.colour, solid.shape) for solid in scene.objects))


def parse_objects(text: str) -> tuple[ObjectName, ...]:
    """The (colour, shape) of every solid that a text mentions, sorted; colour None where it is not stated.

    Never fails: words outside the language of scenes are ignored, so any generated text can be scored.

    >>> parse_objects("a red cube behind two cones")
    ((None, 'cone'), (None, 'cone'), ('red', 'cube'))
    """
    names: list[ObjectName] = []
    count, colour, definite = 0, None, False
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _COUNT_OF or word == "the":
            count, colour, definite = _COUNT_OF.get(word, 0), None, word == "the"
        elif word in COLOURS:
            colour = word
        elif word in _SHAPE_OF:
            shape = _SHAPE_OF[word]
            known = definite and any(o[1] == shape and (colour is None or o[0] == colour) for o in names)
            if not known:
                names += [(colour, shape)] * (count or (1 if word == shape else 2))
            count, colour, definite = 0, None, False
        elif word not in _ADJECTIVES:
            count, colour, definite = 0, None, False
    return tuple(sorted(names, key=lambda name: (name[0] or "", name[1])))


def object_f1(mentioned: Iterable[ObjectName], truth: Iterable[ObjectName]) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1`` in [0, 1] of (colour, shape) pairs, counted with their multiplicity.

    A pair counts only if both parts agree; the scores are 0 if either side is empty.
    """
    predicted, true = Counter(mentioned), Counter(truth)
    right = (predicted & true).total()
    if right == 0:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    return {
        "precision": right / predicted.total(),
        "recall": right / true.total(),
        "f1": 2 * right / (predicted.total() + true.total()),
    }


def objects_in_references(references: Sequence[str]) -> tuple[ObjectName, ...]:
    """The solids in captions of one scene: those of the caption that states the most colours."""
    readings = [parse_objects(text) for text in references]
    return max(readings, key=lambda names: sum(colour is not None for colour, _ in names), default=())


# ---- prompts


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """``count`` solids of a shape, and of a colour unless it is None."""

    count: int
    shape: str
    colour: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with what it requires. ``relation`` holds of the first requirement with respect to the second."""

    kind: str
    text: str
    required: tuple[Requirement, ...]
    relation: str | None = None


def geneval_prompts(kind: str, seed: int, count: int) -> tuple[Prompt, ...]:
    """``count`` prompts of one of ``PROMPT_KINDS``; none repeats before all of its kind have occurred."""
    if kind not in PROMPT_KINDS:
        raise unknown_name("kind of prompts", kind, PROMPT_KINDS)
    rng = random.Random(f"prompts/{kind}/{seed}")
    all_prompts = _all_prompts(kind)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompts += sorted(all_prompts, key=lambda _: rng.random())
    return tuple(prompts[:count])


def _all_prompts(kind: str) -> list[Prompt]:
    shape_pairs = list(itertools.permutations(SHAPES, 2))
    if kind == "single_object":
        return [_prompt(kind, [Requirement(1, shape)]) for shape in SHAPES]
    if kind == "two_objects":
        return [_prompt(kind, [Requirement(1, a), Requirement(1, b)]) for a, b in shape_pairs]
    if kind == "counting":
        return [_prompt(kind, [Requirement(count, shape)]) for count in (2, 3) for shape in SHAPES]
    if kind == "colors":
        return [_prompt(kind, [Requirement(1, shape, colour)]) for colour in COLOURS for shape in SHAPES]
    if kind == "position":
        return [
            _prompt(kind, [Requirement(1, a), Requirement(1, b)], relation)
            for a, b in shape_pairs
            for relation in RELATIONS
        ]
    return [
        _prompt(kind, [Requirement(1, a, first), Requirement(1, b, second)])
        for a, b in shape_pairs
        for first, second in itertools.permutations(COLOURS, 2)
    ]


def _prompt(kind: str, required: list[Requirement], relation: str | None = None) -> Prompt:
    phrases = [_phrase(r.count, (r.colour,) if r.colour else (), r.shape) for r in required]
    text = f"{phrases[0]} {relation} {phrases[1]}" if relation else _join(phrases)
    return Prompt(kind, text, tuple(required), relation)
