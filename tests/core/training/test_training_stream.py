"""The order of the data follows from the position alone."""

from contextlib import nullcontext
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crossflow.core.training.stream import MicroBatches, Positions, loader, num_loaders, on_device


def test_each_epoch_visits_every_example_once_in_a_new_order(tiny: ModuleType) -> None:
    dataset = MicroBatches(tiny.Data(num=10), seed=3, latent_shape=(2,))
    shown = [dataset.example_at(position) for position in range(30)]
    orders = [[index for epoch, index in shown if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_order_does_not_depend_on_the_starting_position(tiny: ModuleType) -> None:
    through = MicroBatches(tiny.Data(num=7), seed=3, latent_shape=(2,))
    sequence = [through.example_at(position) for position in range(40)]
    for position in (39, 0, 20, 13, 14):
        fresh = MicroBatches(tiny.Data(num=7), seed=3, latent_shape=(2,))
        assert fresh.example_at(position) == sequence[position]
        assert through.example_at(position) == sequence[position]


def test_another_seed_gives_another_order(tiny: ModuleType) -> None:
    orders = [
        [MicroBatches(tiny.Data(num=20), seed, (2,)).example_at(position) for position in range(20)] for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_ranks_and_parts_share_a_batch_in_order(world_size: int, accumulate: int) -> None:
    ranks = [list(Positions(5, 7, 12, accumulate, rank, world_size)) for rank in range(world_size)]
    assert all(len(rank) == 2 * accumulate for rank in ranks)
    gathered = [number for parts in zip(*ranks, strict=True) for _, positions in parts for number in positions]
    assert gathered == list(range(60, 84))
    assert {step for rank in ranks for step, _ in rank} == {5, 6}


@pytest.mark.parametrize(
    ("cores", "processes", "on_cpu", "on_gpu"), [(1, 1, 0, 0), (2, 1, 0, 1), (8, 1, 2, 7), (64, 1, 4, 8), (64, 8, 2, 7)]
)
def test_workers_are_chosen_by_the_cores_of_a_process(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, on_cpu: int, on_gpu: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    data, cpu, gpu = tiny.Data(), torch.device("cpu"), torch.device("cuda")
    assert (num_loaders(None, data, cpu), num_loaders(None, data, gpu)) == (on_cpu, on_gpu)
    assert num_loaders(3, data, cpu) == 3
    data.in_workers = False
    assert (num_loaders(None, data, gpu), num_loaders(3, data, gpu)) == (0, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_do_not_change_the_batches(tiny: ModuleType, num_workers: int) -> None:
    state = torch.get_rng_state()
    dataset = MicroBatches(tiny.Data(num=7), seed=1, latent_shape=(2,))
    expected = [dataset[item] for item in Positions(2, 5, 6, 2, 0, 1)]
    loaded = list(loader(dataset, Positions(2, 5, 6, 2, 0, 1), num_workers, pin=False))
    assert len(loaded) == len(expected) == 6
    for got, want in zip(loaded, expected, strict=True):
        assert torch.equal(got.record["features"], want.record["features"])
        assert torch.equal(got.noise.source, want.noise.source)
        assert torch.equal(got.noise.time, want.noise.time)
    assert torch.equal(torch.get_rng_state(), state), "beginning to load draws from the global generator"


@pytest.mark.parametrize("ahead", [True, False])
def test_a_gpu_makes_the_next_batch_before_the_present_one_is_trained_on(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """The order of what the host asks for, with fake tensors and streams that only note their use."""
    data, events = tiny.Data(num=8), []
    side, main = MagicMock(), MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(stream))
    loaded = [MicroBatches(data, 1, (3,))[item] for item in Positions(0, 3, 2, 1, 0, 1)]

    def batch(record: dict) -> object:
        events.append("made")
        return data.batch(record)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in on_device(loaded, batch, torch.device("cuda"), ahead=ahead):
            events.append("trained")
    assert events == (["made", "made", "trained", "made", "trained", "trained"] if ahead else ["made", "trained"] * 3)
    assert side.wait_stream.call_count == ahead
    assert main.wait_event.call_count == 3 * ahead
    assert set(kept) == ({main} if ahead else set())
