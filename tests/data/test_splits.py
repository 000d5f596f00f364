"""Splits are disjoint, cover the data, and adding items moves no other item."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossflow.core.errors import UserError
from crossflow.data.splits import choose, published_split, require_split, select_split

ids = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=60, unique=True)


@pytest.mark.slow
@given(ids=ids)
def test_train_and_validation_items_divide_the_training_split(ids: list[str]) -> None:
    train, val = (select_split(ids, split, ("train", "test")) for split in ("train", "val"))
    assert sorted([*train, *val]) == list(range(len(ids)))
    assert train
    assert val


@given(ids=ids)
def test_data_with_a_validation_split_keep_all_their_training_items(ids: list[str]) -> None:
    for split in ("train", "val", "test", "all"):
        assert select_split(ids, split, ("train", "val", "test")) == range(len(ids))
    assert select_split(ids, "test", ("train", "test")) == range(len(ids))


def test_validation_items_are_two_percent_and_depend_on_no_other_item() -> None:
    names = [f"frame {number}" for number in range(20_000)]
    held_out, fewer = (select_split(some, "val", ("train",)) for some in (names, names[:5000]))
    assert len(held_out) / len(names) == pytest.approx(0.02, abs=0.003)
    assert fewer == [index for index in held_out if index < 5000]
    assert len(select_split(names[:3], "val", ("train",))) == 1
    assert not select_split(names[:1], "val", ("train",))


@pytest.mark.parametrize(
    ("split", "available", "published"),
    [
        ("val", ("train", "test"), "train"),
        ("val", ("train", "val"), "val"),
        ("val", ("test",), "val"),
        ("test", ("train", "test"), "test"),
        ("all", ("train", "test"), "all"),
    ],
)
def test_validation_items_lie_in_train_where_no_validation_split_is_published(split, available, published) -> None:
    assert published_split(split, available) == published


def test_no_message_advises_validating_on_the_test_split() -> None:
    for available in (("test",), ("train", "test"), ()):
        with pytest.raises(UserError) as error:
            require_split("nyu:x", "val", available)
        assert "@test" not in str(error.value)
        assert "data.val=SPEC" in str(error.value)


@given(ids=ids, limit=st.integers(1, 60), seed=st.integers(0, 3))
def test_a_larger_limit_keeps_the_items_of_a_smaller_one(ids: list[str], limit: int, seed: int) -> None:
    smaller, larger = choose(ids, limit, seed), choose(ids, limit + 1, seed)
    assert smaller == sorted(smaller)
    assert set(smaller) <= set(larger)
    assert len(smaller) == min(limit, len(ids))
