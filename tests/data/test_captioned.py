"""Which caption of a picture training takes."""

from collections import Counter

import numpy as np
import pytest

from crossflow.data.captioned import captioned_example
from crossflow.data.item import Item

ITEM = Item(id="0", image=np.zeros((4, 4, 3), np.uint8), captions=("first", "second", "third", "fourth"))


def shares(first_caption: float, number: int = 2000) -> dict[str, float]:
    generator = np.random.default_rng(0)
    counts = Counter(
        captioned_example(ITEM, 4, generator, first_caption=first_caption)["caption"] for _ in range(number)
    )
    return {caption: counts[caption] / number for caption in ITEM.captions}


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_the_first_caption_is_drawn_with_its_probability_and_otherwise_like_any(
    probability: float, share: float
) -> None:
    measured = shares(probability)
    assert measured["first"] == pytest.approx(share, abs=0.04)
    assert all(measured[caption] == pytest.approx((1 - share) / 3, abs=0.04) for caption in ITEM.captions[1:])


def test_without_a_preference_for_the_first_caption_no_random_number_is_spent_on_it() -> None:
    """Recipes without the setting see the same captions and latents whether or not the code knows it."""
    generator, expected = np.random.default_rng(5), np.random.default_rng(5)
    example = captioned_example(ITEM, 4, generator)
    assert (example["which"], example["seed"]) == (int(expected.integers(4)), int(expected.integers(2**62)))


@pytest.mark.parametrize(("caption", "text"), [(0, "first"), (2, "third"), (9, "fourth")])
def test_a_fixed_caption_leaves_the_latents_seed_as_it_is(caption: int, text: str) -> None:
    fixed = captioned_example(ITEM, 4, np.random.default_rng(5), caption=caption)
    drawn = captioned_example(ITEM, 4, np.random.default_rng(5))
    assert fixed["caption"] == text
    assert fixed["seed"] == drawn["seed"]
