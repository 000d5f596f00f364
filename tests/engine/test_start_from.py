"""A run that starts from the weights of another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.source import SourceEncoder
from crossflow.engine.start_from import start_from
from crossflow.engine.train import Run
from crossflow.networks.trunks import IdentityTrunk
from crossflow.tasks import load_config


@pytest.fixture
def new_run(tiny_settings, tmp_path: Path):
    """new_run(*overrides): an untrained t2i run."""

    def make(*overrides: str, name: str = "run") -> Run:
        return Run.open(load_config("t2i_tiny", [*tiny_settings("t2i"), *overrides]), tmp_path / name)

    return make


@pytest.mark.slow
def test_a_run_starts_from_the_averaged_weights_and_heads_of_another(tiny_run, new_run) -> None:
    other = tiny_run("t2i")
    run, fresh = new_run(f"train.start_from={other}"), new_run(name="fresh")
    averaged, heads = load_file(other / "ema.safetensors"), load_file(other / "objective.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in run.model.state_dict().items())
    learned = {name: value for name, value in run.objective.state_dict().items() if not name.startswith("model.")}
    assert all(torch.equal(value, heads[name]) for name, value in learned.items())
    assert not all(torch.equal(value, averaged[name]) for name, value in fresh.model.state_dict().items())


def test_tensors_that_do_not_match_keep_their_initialisation(new_run, tmp_path: Path) -> None:
    small, deeper = new_run(), new_run("backbone.depth=2", "backbone.width=16", "source.width=32", name="deeper")
    state = {name: torch.full_like(value, 7) for name, value in small.model.state_dict().items()}
    save_file(state, tmp_path / "run" / "model.safetensors")
    before = {name: value.clone() for name, value in deeper.objective.state_dict().items()}
    start = start_from(tmp_path / "run", deeper.objective)
    after = deeper.objective.state_dict()
    kept = {name for name in after if torch.equal(after[name], before[name])}
    assert kept == set(start.initialised)
    assert any(".blocks.1." in name for name in kept)
    assert any(name.startswith("model.source_encoder") for name in kept)
    assert (after["model.backbone.blocks.0.attn.qkv.weight"] == 7).all()
    assert start.num_copied == len(after) - len(kept)
    assert f"{len(kept)} keep their random" in start.describe("run")


def test_invalid_starts_are_refused(new_run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run with weights"):
        new_run(f"train.start_from={tmp_path}")
    run = new_run(name="another")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="No weight of the run"):
        start_from(tmp_path, run.objective)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        start_from(tmp_path, run.objective)


@pytest.mark.slow
def test_a_frozen_source_encoder_keeps_its_weights(new_run, blind_judge, tmp_path: Path) -> None:
    first = new_run()
    save_file(first.model.state_dict(), tmp_path / "run" / "model.safetensors")
    second = new_run(f"train.start_from={tmp_path / 'run'}", "source.frozen=true", "seed=5", name="second")
    second.train()
    before, after = first.model.state_dict(), load_file(tmp_path / "second" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("source_encoder.")} <= same
    assert any(name.startswith("backbone.") and name not in same for name in before)
    with pytest.raises(UserError, match="learned nothing"):
        new_run("source.frozen=true", name="third")


def test_learned_positions_are_resized_for_larger_pictures(tmp_path: Path) -> None:
    def network(side: int) -> torch.nn.Module:
        backbone = build_backbone(BackboneConfig(name="dimr", size="tiny", width=16), (3, side, side))
        source = SourceEncoder(IdentityTrunk(3, False), "deterministic", (3, side, side))
        return torch.nn.ModuleDict({"model": CrossFlow(source, backbone)})

    small, large = network(8), network(16)
    save_file(small["model"].state_dict(), tmp_path / "model.safetensors")
    start = start_from(tmp_path, large)
    names = [f"backbone.stages.{number}.positions" for number in (0, 1)]
    assert start.resized == tuple(f"model.{name}" for name in names)
    assert start.initialised == ()
    before, after = small["model"].state_dict(), large["model"].state_dict()
    for name in names:
        pooled = torch.nn.functional.avg_pool2d(after[name].T.unflatten(1, (-1, int(len(after[name]) ** 0.5)))[None], 2)
        inner = before[name].T.unflatten(1, (-1, int(len(before[name]) ** 0.5)))[None]
        assert torch.corrcoef(torch.stack([pooled.flatten(), inner.flatten()]))[0, 1] > 0.9
