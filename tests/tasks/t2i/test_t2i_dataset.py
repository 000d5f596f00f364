"""Which caption of a picture training takes."""

from collections import Counter

import numpy as np
import pytest

from crossflow.data.readers import Item
from crossflow.tasks.t2i.dataset import example

ITEM = Item(id="0", image=np.zeros((4, 4, 3), np.uint8), captions=("first", "second", "third", "fourth"))


def shares(first_caption: float, number: int = 2000) -> dict[str, float]:
    generator = np.random.default_rng(0)
    taken = Counter(example(ITEM, 4, generator, first_caption)["caption"] for _ in range(number))
    return {caption: taken[caption] / number for caption in ITEM.captions}


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_the_first_caption_is_taken_by_its_chance_and_otherwise_like_any(chance: float, share: float) -> None:
    found = shares(chance)
    assert found["first"] == pytest.approx(share, abs=0.04)
    assert all(found[caption] == pytest.approx((1 - share) / 3, abs=0.04) for caption in ITEM.captions[1:])


def test_without_a_chance_nothing_is_drawn_for_it() -> None:
    """Runs that do not use it see the captions and latents that they saw before it was there."""
    generator = np.random.default_rng(5)
    one, known = example(ITEM, 4, generator), np.random.default_rng(5)
    assert (one["which"], one["seed"]) == (int(known.integers(4)), int(known.integers(2**62)))
