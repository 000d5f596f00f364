"""Batch and Condition: frozen, and moved to a device as a whole."""

import dataclasses

import pytest
import torch

from crossflow.core.batch import Batch, Condition


def test_all_tensors_move_including_the_conditions() -> None:
    condition = Condition(tokens=torch.zeros(2, 3, 4), mask=torch.ones(2, 3, dtype=torch.bool))
    batch = Batch(features=torch.zeros(2, 5), target=torch.zeros(2, 4, 8, 8), condition=condition, ids=("a", "b"))
    moved = batch.to("meta")
    assert moved.features.device.type == moved.target.device.type == "meta"
    assert moved.condition is not None
    assert moved.condition.tokens is not None
    assert moved.condition.mask is not None
    assert moved.condition.tokens.device.type == moved.condition.mask.device.type == "meta"
    assert moved.condition.grid is None
    assert moved.weight is None
    assert moved.ids == ("a", "b")
    assert batch.features.device.type == "cpu", "the original stays"


def test_length_is_the_number_of_samples_and_fields_are_frozen() -> None:
    batch = Batch(features=torch.zeros(3, 5), target=torch.zeros(3, 4))
    assert len(batch) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.target = torch.zeros(1)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_on_the_device_and_nothing_else_changes(dtype: torch.dtype) -> None:
    condition = Condition(tokens=torch.ones(2, 3, 4, dtype=dtype), mask=torch.ones(2, 3, dtype=torch.bool))
    batch = Batch(features=torch.full((2, 5), 0.1, dtype=dtype), target=torch.zeros(2, 4), condition=condition)
    moved = batch.to("cpu")
    assert torch.equal(moved.features, batch.features.float())
    assert moved.features.dtype == torch.float32
    assert moved.condition is not None
    assert moved.condition.tokens is not None
    assert moved.condition.mask is not None
    assert (moved.condition.tokens.dtype, moved.condition.mask.dtype) == (torch.float32, torch.bool)
    assert batch.features.dtype == dtype


def test_rows_select_from_every_tensor_including_the_condition() -> None:
    rows = torch.tensor([2, 0])
    batch = Batch(
        features=torch.arange(6.0).reshape(3, 2),
        target=torch.arange(3.0)[:, None],
        weight=torch.arange(3.0)[:, None] + 10,
        condition=Condition(tokens=torch.arange(3.0).reshape(3, 1, 1)),
        ids=("a", "b", "c"),
    )
    part = batch[rows]
    assert part.features.tolist() == [[4, 5], [0, 1]]
    assert part.target.tolist() == [[2], [0]]
    assert part.weight is not None
    assert part.weight.tolist() == [[12], [10]]
    assert part.condition is not None
    assert part.condition.tokens is not None
    assert part.condition.tokens.flatten().tolist() == [2, 0]
    assert part.condition.grid is None
    assert len(batch[:1]) == 1
