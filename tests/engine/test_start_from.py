"""A run that begins with the weights of another one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.core.errors import UserError
from crossflow.engine.start_from import start_from
from crossflow.engine.train import Run
from crossflow.tasks.base import load_config


@pytest.fixture
def begun(tiny_settings, tmp_path: Path):
    """begun(*overrides): a new, untrained t2i run."""

    def make(*overrides: str, name: str = "run") -> Run:
        return Run(load_config("t2i_tiny", [*tiny_settings("t2i"), *overrides]), tmp_path / name)

    return make


@pytest.mark.slow
def test_a_run_begins_with_the_averaged_weights_and_heads_of_another(tiny_run, begun) -> None:
    other = tiny_run("t2i")
    run, fresh = begun(f"train.start_from={other}"), begun(name="fresh")
    averaged, heads = load_file(other / "ema.safetensors"), load_file(other / "objective.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in run.model.state_dict().items())
    learned = {name: value for name, value in run.objective.state_dict().items() if not name.startswith("model.")}
    assert all(torch.equal(value, heads[name]) for name, value in learned.items())
    assert not all(torch.equal(value, averaged[name]) for name, value in fresh.model.state_dict().items())


def test_what_has_another_shape_or_is_new_keeps_its_own_start(begun, tmp_path: Path) -> None:
    small, deeper = begun(), begun("backbone.depth=2", "backbone.width=16", "source.width=32", name="deeper")
    state = {name: torch.full_like(value, 7) for name, value in small.model.state_dict().items()}
    save_file(state, tmp_path / "run" / "model.safetensors")
    before = {name: value.clone() for name, value in deeper.objective.state_dict().items()}
    start = start_from(tmp_path / "run", deeper.objective)
    after = deeper.objective.state_dict()
    kept = {name for name in after if torch.equal(after[name], before[name])}
    assert kept == set(start.fresh)
    assert any(".blocks.1." in name for name in kept)
    assert any(name.startswith("model.source_encoder") for name in kept)
    assert (after["model.backbone.blocks.0.attn.qkv.weight"] == 7).all()
    assert start.taken == len(after) - len(kept)
    assert f"{len(kept)} are new" in start.told("run")


def test_impossible_starts_are_told(begun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run with weights"):
        begun(f"train.start_from={tmp_path}")
    run = begun(name="another")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="No weight of the run"):
        start_from(tmp_path, run.objective)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        start_from(tmp_path, run.objective)


def test_a_frozen_source_encoder_stays_as_it_was_given(begun, blind_judge, tmp_path: Path) -> None:
    first = begun()
    save_file(first.model.state_dict(), tmp_path / "run" / "model.safetensors")
    second = begun(f"train.start_from={tmp_path / 'run'}", "source.frozen=true", "seed=5", name="second")
    second.train()
    before, after = first.model.state_dict(), load_file(tmp_path / "second" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("source_encoder.")} <= same
    assert any(name.startswith("backbone.") and name not in same for name in before)
    with pytest.raises(UserError, match="learned nothing"):
        begun("source.frozen=true", name="third")
