"""Gathering over ranks: the values, the gradients, and nothing at all with one process."""

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crossflow.core import distributed, losses, pairs
from crossflow.core.distributed import (
    gather,
    gather_with_grad,
    max_over_ranks,
    mean_over_ranks,
    on_main,
    shared,
    shared_in_stages,
)
from crossflow.core.errors import UserError

pytestmark = pytest.mark.forks


def on_ranks(function: Callable[[int], object], folder: Path, world_size: int = 2) -> list:
    """What `function(rank)` returns on each of `world_size` forked processes."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store = dist.FileStore(str(folder / "store"), world_size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
                distributed._reports()  # as distributed.device does; none ends before all are connected
                torch.save(function(rank), folder / f"{rank}.pt")
                dist.destroy_process_group()
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def test_one_process_is_not_distributed() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert gather_with_grad(x) is x
    assert torch.equal(gather(x), x)
    assert not gather(x).requires_grad
    assert torch.equal(mean_over_ranks(x), x)
    assert on_main(lambda: "said") == "said"
    distributed.barrier()


def test_gather_keeps_rank_order_and_type(tmp_path: Path) -> None:
    def function(rank: int) -> list[Tensor]:
        numbers = torch.arange(4.0).view(2, 2) + 10 * rank
        return [gather(numbers), gather(numbers > 2), gather(numbers.long()), gather(numbers.t())]

    first, second = on_ranks(function, tmp_path)
    expected = torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]])
    assert torch.equal(first[0], expected)
    assert torch.equal(first[1], expected > 2)
    assert first[1].dtype == torch.bool
    assert torch.equal(first[2], expected.long())
    assert torch.equal(first[3], torch.tensor([[0.0, 2], [1, 3], [10, 12], [11, 13]]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mean_and_maximum_over_ranks(tmp_path: Path) -> None:
    results = on_ranks(
        lambda rank: [f(torch.tensor([rank, 3.0 - rank])) for f in (mean_over_ranks, max_over_ranks)], tmp_path
    )
    for mean, largest in results:
        assert mean.tolist() == [0.5, 2.5]
        assert largest.tolist() == [1.0, 3.0]


def contrastive(z: Tensor, w: Tensor, everyone: Callable[[Tensor], Tensor], rank: int, whole: bool) -> Tensor:
    """Symmetric loss of the rows of z @ w against the rows of z: of this rank's rows, or of all (`whole`)."""
    a, b = F.normalize(z @ w, dim=1), F.normalize(z, dim=1)
    all_a, all_b = everyone(a), everyone(b)
    here = torch.arange(len(a)) + rank * len(a)
    if whole:
        a, b, here = all_a, all_b, torch.arange(len(all_a))
    return (F.cross_entropy(5 * a @ all_b.T, here) + F.cross_entropy(5 * b @ all_a.T, here)) / 2


@pytest.mark.parametrize("whole", [False, True], ids=["own rows", "whole loss on every rank"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_averaged_gradients_are_those_of_one_process(tmp_path: Path, whole: bool, world_size: int) -> None:
    torch.manual_seed(0)
    z, w = torch.randn(6, 4), torch.randn(4, 4)
    alone = w.clone().requires_grad_()
    loss = contrastive(z, alone, lambda x: x, 0, whole=False)
    loss.backward()

    def function(rank: int) -> tuple[Tensor, Tensor]:
        own_part = w.clone().requires_grad_()
        size = 6 // world_size
        value = contrastive(z[rank * size : (rank + 1) * size], own_part, gather_with_grad, rank, whole)
        value.backward()
        return mean_over_ranks(value), mean_over_ranks(own_part.grad)  # the mean: what data-parallel training does

    for value, gradient in on_ranks(function, tmp_path, world_size):
        assert torch.allclose(value, loss.detach(), atol=1e-6)
        assert torch.allclose(gradient, alone.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
@pytest.mark.parametrize("rows_at_a_time", [1, 2])
def test_contrastive_losses_in_chunks_have_the_gradients_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows_at_a_time: int
) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 9, 4)

    def results(rows: slice) -> list[Tensor]:
        z0, target = (part[rows].clone().requires_grad_() for part in values)
        log_temperature, bias = torch.tensor(1.5, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        if name == "clip":
            loss = losses.clip_contrastive_loss(z0, target, log_temperature) + 0 * bias
        else:
            loss = losses.sigmoid_contrastive_loss(z0, target, log_temperature, bias)
        loss.backward()
        return [loss.detach(), log_temperature.grad, bias.grad, z0.grad, target.grad]

    whole = results(slice(0, 9))
    monkeypatch.setattr(pairs, "MAX_VALUES", 3 * 4 * rows_at_a_time)  # below the 36 values of a tensor
    gathered = 0

    def counting(tensor: Tensor) -> Tensor:
        nonlocal gathered
        gathered += 1
        assert len(tensor) <= rows_at_a_time
        return gather(tensor)

    monkeypatch.setattr(pairs, "gather", counting)

    def on_rank(rank: int) -> list[Tensor]:
        own = results(slice(3 * rank, 3 * rank + 3))
        assert gathered == -(-3 // rows_at_a_time) * (4 if name == "clip" else 2)
        return [mean_over_ranks(value) for value in own[:3]] + [gather(value) / 3 for value in own[3:]]

    for own in on_ranks(on_rank, tmp_path, 3):
        assert all(value.allclose(expected, atol=1e-6) for value, expected in zip(own, whole, strict=True))


@pytest.mark.parametrize(
    "text", ["[/gloo/transport/tcp/pair.cc:538] Read error", "Application timeout caused pair closure", "Broken pipe"]
)
def test_errors_of_a_lost_connection_are_told_from_others(text: str) -> None:
    with pytest.raises(distributed.LostProcess, match="waited for the scores"), distributed.waiting_for("the scores"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), distributed.waiting_for("the scores"):
        raise RuntimeError("shapes differ")


EXCHANGES: dict[str, Callable[[int], object]] = {
    "mean": lambda rank: mean_over_ranks(torch.ones(2)),
    "first process": lambda rank: on_main(lambda: time.sleep(2)),
    "shared parts": lambda rank: list(shared([0.0, 2.0, 0.0], time.sleep)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXCHANGES))
def test_a_process_that_hangs_is_named_in_every_exchange(tmp_path: Path, name: str) -> None:
    hanging = 0 if name == "first process" else 1

    def on_rank(rank: int) -> list[object]:
        distributed.limit_waiting(0.005, "x.limit")
        mean_over_ranks(torch.ones(1))
        if rank == hanging and name == "mean":
            time.sleep(2)
        try:
            with distributed.waiting_for("the scores of step 3"):
                EXCHANGES[name](rank)
        except distributed.LostProcess as error:
            return [str(error), list(error.silent)]
        return []

    results = on_ranks(on_rank, tmp_path)
    message, silent = results[1 - hanging]
    assert silent == [hanging]
    start = f"Process {hanging} has ended, or has not answered for 0.005 minutes (x.limit), while this one"
    assert message.startswith(f"{start} waited for the scores of step 3")


def test_an_abandoned_part_is_abandoned_by_all(tmp_path: Path) -> None:
    def on_rank(rank: int) -> list[str]:
        def work(part: int) -> int:
            if part == 3:  # of rank 1
                raise distributed.Abandoned("SIGTERM")
            return part

        try:
            return list(map(str, shared(range(6), work)))
        except distributed.Abandoned as abandoned:
            return [f"abandoned: {abandoned}"]

    assert on_ranks(on_rank, tmp_path) == [["abandoned: SIGTERM"]] * 2


def test_on_main_returns_its_value_or_raises_its_error_on_all_ranks(tmp_path: Path) -> None:
    def function(rank: int) -> list:
        result = on_main(lambda: {"path": Path("runs"), "rank": rank})

        def fail() -> str:
            raise UserError("no space")

        with pytest.raises(UserError, match="no space"):
            on_main(fail)
        return [str(result["path"]), result["rank"]]

    assert on_ranks(function, tmp_path) == [["runs", 0], ["runs", 0]]


def test_one_process_does_all_parts() -> None:
    assert list(shared([3, 4, 5], lambda part: part * part)) == [(3, 9), (4, 16), (5, 25)]
    assert list(shared([], str)) == []


def test_a_second_stage_runs_beside_the_work_on_the_next_part() -> None:
    began = [threading.Event() for _ in range(3)]

    def work(part: int) -> int:
        began[part].set()
        return part

    def finish(part: int) -> int:
        assert part == 2 or began[part + 1].wait(timeout=10), "the next part has not begun"
        return part * part

    assert list(shared_in_stages(range(3), work, finish)) == [(0, 0), (1, 1), (2, 4)]


def test_finished_parts_arrive_before_an_error_of_either_stage() -> None:
    def fail_at(place: int) -> Callable[[int], int]:
        def action(part: int) -> int:
            if part == place:
                raise UserError(f"part {part}")
            return part

        return action

    for stages in ((fail_at(2), int), (int, fail_at(2))):
        results = shared_in_stages(range(4), *stages)
        assert [next(results), next(results)] == [(0, 0), (1, 1)]
        with pytest.raises(UserError, match="part 2"):
            next(results)


def test_the_first_rank_can_finish_the_parts_of_all(tmp_path: Path) -> None:
    def on_rank(rank: int) -> dict:
        finished: list[str] = []

        def finish(result: str) -> int:
            finished.append(result)
            return len(result)

        pairs = list(shared_in_stages(range(3), lambda part: "x" * part, finish, finish_on_first=True))
        try:
            list(shared_in_stages(range(3), int, lambda part: 1 // part, finish_on_first=True))
        except Exception as error:
            return {"pairs": [list(pair) for pair in pairs], "finished": finished, "error": str(error)}
        return {}

    first, second = on_ranks(on_rank, tmp_path)
    assert (first["pairs"], first["finished"]) == ([[0, 0], [1, 1], [2, 2]], ["", "x", "xx"])
    assert (second["pairs"], second["finished"]) == ([], [])
    assert "zero" in first["error"]
    assert second["error"].startswith("process 0 raised ZeroDivisionError")


@pytest.mark.parametrize("num_parts", [0, 1, 4, 5])
def test_parts_are_shared_and_the_first_rank_gets_them_in_order(tmp_path: Path, num_parts: int) -> None:
    def on_rank(rank: int) -> dict:
        done: list[int] = []

        def work(part: int) -> str:
            done.append(part)
            return "x" * part

        return {"got": [list(pair) for pair in shared(range(num_parts), work)], "did": done}

    first, second = on_ranks(on_rank, tmp_path)
    assert first["got"] == [[part, "x" * part] for part in range(num_parts)]
    assert second["got"] == []
    assert first["did"] == list(range(0, num_parts, 2))
    assert second["did"] == list(range(1, num_parts, 2))


@pytest.mark.parametrize("kind", [UserError, ZeroDivisionError])
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, kind: type[Exception]) -> None:
    def on_rank(rank: int) -> list[str]:
        def work(part: int) -> int:
            if part == 3:  # of rank 1
                raise kind("part 3 is bad")
            return part

        try:
            list(shared(range(6), work))
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    first, second = on_ranks(on_rank, tmp_path)
    assert second == [kind.__name__, "part 3 is bad"]
    assert first == (
        ["UserError", "part 3 is bad"]
        if kind is UserError
        else ["RuntimeError", "process 1 raised ZeroDivisionError: part 3 is bad"]
    )
