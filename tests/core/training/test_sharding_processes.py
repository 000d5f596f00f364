"""Sharded trainings: as many processes as are started give the losses of one, and each continues what others began."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from crossflow.core.training import checkpoint as state
from crossflow.core.training.saving import WEIGHTS
from crossflow.core.training.shards import Stored, consolidate

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("tiny_run.py"))
COMMON = ["--no-dropout", "--contrastive", "--blocks", "2", "log_every=1", "save_every=4"]
SHARDED = ['sharding="fsdp"', "background_saves=true"]


class Runs:
    """Trainings of the tiny model under `folder`, by any number of processes."""

    def __init__(self, forked: ModuleType, folder: Path) -> None:
        self.forked, self.folder = forked, folder

    def train(self, name: str, num: int, *arguments: str, status: int = 0) -> list[str]:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        command = [PROGRAM, str(self.folder / name), *COMMON, *arguments]
        return [process.finish(status) for process in self.forked.ranks(num, command, logs)]


@pytest.fixture
def runs(forked: ModuleType, tmp_path: Path) -> Runs:
    return Runs(forked, tmp_path)


def assert_same_weights(alone: Path, together: Path) -> None:
    for part in WEIGHTS:
        first, second = load_file(alone / f"{part}.safetensors"), load_file(together / f"{part}.safetensors")
        assert first.keys() == second.keys()
        assert all(first[name].allclose(second[name], atol=1e-5) for name in first), part


def assert_same_lines(tiny: ModuleType, first: Path, second: Path) -> None:
    for alone, shared in zip(tiny.lines(first), tiny.lines(second), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "settings", [["accumulate=1"], ['optimizer="muon"', 'precision="bf16"']], ids=["adamw", "muon"]
)
def test_four_processes_begin_two_continue_and_one_ends(tiny: ModuleType, runs: Runs, settings: list[str]) -> None:
    rel = 1e-4 if "accumulate=1" in settings else 2e-2
    runs.train("one", 1, *settings)
    runs.train("many", 4, *settings, *SHARDED, "steps=6")
    assert not list((runs.folder / "many" / "checkpoints").rglob(".*"))
    folder = runs.folder / "many" / "checkpoints" / "step_00000006"
    state.verify(folder)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") == [
        f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2, 3, 4)
    ]
    assert state.read_state(folder)["world_size"] == 4
    runs.train("many", 2, *settings, *SHARDED, "steps=9", "--resume", "auto")
    runs.train("many", 1, *settings, *SHARDED, "--resume", "auto")
    for alone, shared in zip(tiny.lines(runs.folder / "one"), tiny.lines(runs.folder / "many"), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=rel, abs=1e-7)
    if rel == 1e-4:
        assert_same_weights(runs.folder / "one", runs.folder / "many")


def test_a_whole_checkpoint_continues_sharded_and_is_consolidated(tiny: ModuleType, runs: Runs) -> None:
    settings = ["accumulate=2", "batch_size=8"]
    runs.train("one", 1, *settings)
    runs.train("many", 1, *settings, "steps=5")
    (runs.folder / "many" / "ema.safetensors").unlink()
    runs.train("many", 2, *settings, 'sharding="fsdp"', "--resume", "auto")
    assert_same_lines(tiny, runs.folder / "one", runs.folder / "many")
    assert_same_weights(runs.folder / "one", runs.folder / "many")
    newest, elsewhere = state.checkpoints(runs.folder / "many" / "checkpoints")[0], runs.folder / "elsewhere"
    assert len(consolidate(newest, WEIGHTS, elsewhere)) == 3
    assert_same_weights(runs.folder / "many", elsewhere)
    assert json.loads((newest / "checkpoint.json").read_text())["step"] == 12


def test_a_lost_shard_is_noticed_and_the_checkpoint_before_is_used(tiny: ModuleType, runs: Runs) -> None:
    runs.train("many", 2, *SHARDED)
    newest, before = state.checkpoints(runs.folder / "many" / "checkpoints")
    (newest / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(state.CorruptCheckpoint, match="is missing"):
        state.verify(newest)
    assert state.newest_good(newest.parent) == before
    shapes = {name: Stored(before, "model").shape(name) for name in Stored(before, "model").names}
    assert shapes["backbone.0.weight"] == (8, 3)


def test_scaled_gradients_are_refused(runs: Runs) -> None:
    # A process that is slower to join may only see that the other has ended.
    assert any("user error:" in output for output in runs.train("many", 2, *SHARDED, 'precision="fp16"', status=1))
