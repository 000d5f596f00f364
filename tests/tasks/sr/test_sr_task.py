"""Super-resolution pairs: the source is the bicubic baseline, at the right place."""

from fractions import Fraction

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.data.item import Item
from crossflow.tasks import load_config
from crossflow.tasks.sr.dataset import Augmentation, enlarge, pair, reduce, to_multiple
from crossflow.tasks.sr.scoring import SrScoring


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 20
    return np.stack([127 + 100 * np.sin(x + y), 127 + 100 * np.cos(y), 127 + 100 * np.sin(2 * x)], 2).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2, 3, 4, Fraction(3, 2), Fraction(5, 2), Fraction(7, 3)])
def test_a_crop_is_the_picture_and_its_bicubic_version(scale: Fraction | int) -> None:
    image = smooth(97, 120)
    whole = enlarge(reduce(to_multiple(image, scale), scale), scale)
    count, unit = 0, Fraction(scale).numerator
    size = 12 * unit if unit < 5 else 6 * unit
    for seed in range(12):
        sharp, bicubic = pair(image, size, scale, Augmentation(), np.random.default_rng(seed))
        assert sharp.shape == bicubic.shape == (size, size, 3)
        for turned in _turns(sharp, bicubic):
            place = _find(image, turned[0])
            if place is None:
                continue
            count += 1
            same = whole[place[0] : place[0] + size, place[1] : place[1] + size]
            if same.shape == turned[1].shape and place[0] > 0 and place[1] > 0:
                inside = slice(unit, -unit)
                assert np.abs(same[inside, inside].astype(int) - turned[1][inside, inside]).max() <= 3
            break
    assert count == 12


def _turns(sharp: np.ndarray, bicubic: np.ndarray):
    for flip in (1, -1):
        for turns in range(4):
            yield np.rot90(sharp[:, ::flip], turns), np.rot90(bicubic[:, ::flip], turns)


def _find(image: np.ndarray, piece: np.ndarray) -> tuple[int, int] | None:
    size = len(piece)
    for top in range(image.shape[0] - size + 1):
        for left in range(image.shape[1] - size + 1):
            if np.array_equal(image[top, left], piece[0, 0]) and np.array_equal(
                image[top : top + size, left : left + size], piece
            ):
                return top, left
    return None


@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (31, 33)])
def test_pictures_smaller_than_the_crop_still_give_one(shape: tuple[int, int]) -> None:
    sharp, bicubic = pair(smooth(*shape), 32, 4, Augmentation(), np.random.default_rng(0))
    assert sharp.shape == bicubic.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("2", Fraction(2)), ("1.5", Fraction(3, 2)), ("2.3333", Fraction(7, 3)), ("1.1", Fraction(11, 10))],
)
def test_scales_are_whole_or_ratios(text: str, ratio: Fraction) -> None:
    settings = [
        f"sr.scale={text}",
        f"sr.crop={16 * ratio.numerator}",
        f"sr.tile={16 * ratio.numerator}",
        "sr.overlap=0",
    ]
    assert load_config("sr_tiny", settings).sr.ratio == ratio
    low = smooth(31, 20)
    assert enlarge(low, ratio).shape == (-(-31 * ratio // 1), -(-20 * ratio // 1), 3)
    high = to_multiple(smooth(97, 120), ratio)
    assert enlarge(reduce(high, ratio), ratio).shape == high.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["sr.scale=2.37"], "is near"), (["sr.scale=1"], "scale"), (["sr.scale=1.5", "sr.crop=32"], "multiple of 3")],
)
def test_scales_that_cannot_be_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("sr_tiny", settings)


@pytest.mark.parametrize("grey", [False, True])
def test_a_picture_stored_with_one_channel_is_scored_on_that_channel(grey: bool) -> None:
    image = np.repeat(smooth(64, 64)[..., :1], 3, axis=-1)
    case = SrScoring(load_config("sr_tiny", [])).case(Item("a", image, grey=grey))
    assert case.truth.shape == ((64, 64) if grey else (64, 64, 3))
    assert case.input.ndim == 3  # the network always sees three channels


def test_the_papers_recipe_trains_on_centre_squares_of_large_pictures_as_they_are() -> None:
    from crossflow.data.item import BadItem
    from crossflow.data.resize import center_crop_resize
    from crossflow.tasks import task_class

    config, task = load_config("sr_505m", ["data.image_size=32", "sr.tile=32", "sr.overlap=0"]), task_class("sr")
    picture = smooth(48, 70)
    examples = [
        task.transform(config, Item("a", picture), np.random.default_rng(seed), augment=True) for seed in range(6)
    ]
    square = center_crop_resize(picture, 32)
    for example in examples:
        np.testing.assert_array_equal(((example["target"].numpy() + 1) * 127.5).round(), square.transpose(2, 0, 1))
        low = enlarge(reduce(square, 4), 4)
        np.testing.assert_array_equal(((example["source"].numpy() + 1) * 127.5).round(), low.transpose(2, 0, 1))
    with pytest.raises(BadItem, match="31 pixels is below"):
        task.transform(config, Item("b", smooth(31, 70)), np.random.default_rng(0), augment=True)
