"""Runs that are fine-tuned from trained ones: what they train and store, and how they are read again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.finetune import Changes, finetuned
from crossflow.engine.sample import load
from crossflow.engine.train import Run
from crossflow.networks.run_weights import weights_of

SMALL = ["train.steps=2", "train.batch_size=4", "data.num_train=8", "data.num_val=2", "train.save_every=1"]


@pytest.fixture(scope="module")
def adapter(tiny_run, blind_judge, tmp_path_factory) -> Path:
    """A t2i run of two steps whose adapter has learned at a rate that shows."""
    run = tmp_path_factory.mktemp("adapter") / "run"
    settings = ["train.lr=0.05", "train.warmup_steps=0", "train.ema=0", "loss.encoder=none"]
    assert main(["finetune", str(tiny_run("t2i")), "--data", "scenes", "--output", str(run), *SMALL, *settings]) == 0
    return run


def test_settings_follow_from_the_method(tiny_run, tmp_path: Path) -> None:
    base = tiny_run("t2i")
    make_pictures(tmp_path / "mine")
    lora = finetuned(str(base), f"folder:{tmp_path}/mine@all")
    assert lora.data.train == f"5000 * folder:{tmp_path}/mine@all + scenes"  # 4 pictures, as often as 20,000 scenes
    assert (lora.data.val, lora.loss.encoder) == ("scenes", "contrastive")
    alone = finetuned(str(base), "folder:mine", Changes(keep=0))
    assert (alone.data.train, alone.loss.encoder) == ("folder:mine", "none")
    assert lora.finetune.base == str(base.resolve())
    assert lora.finetune.checksum == weights_of(base).checksum
    assert lora.finetune.rank >= 1
    assert finetuned(str(base), "scenes", overrides=["finetune.rank=3"]).finetune.rank == 3
    full = finetuned(str(base), "scenes", Changes("full"))
    assert full.finetune.base is None
    assert full.train.start_from == full.train.parts_from == str(base.resolve())
    parts = finetuned(str(base), "scenes", Changes("parts", train=("backbone.*",)))
    assert (parts.finetune.rank, parts.finetune.train) == (0, ("backbone.*",))
    for changes, message in (
        (Changes("lorra"), "Did you mean 'lora'"),
        (Changes("parts"), "needs --train or --freeze"),
        (Changes("full", freeze=("*",)), "use --method parts"),
        (Changes("parts", rank=2, train=("*",)), "--rank is that of adapters"),
    ):
        with pytest.raises(UserError, match=message):
            finetuned(str(base), "scenes", changes)


@pytest.mark.slow
def test_a_run_stores_its_adapter_alone_and_samples_between_its_base_and_itself(adapter: Path, tiny_run) -> None:
    base, tuned = load(tiny_run("t2i")), load(adapter)
    stored = load_file(adapter / "model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in stored)
    assert sorted(path.name for path in (adapter / "checkpoints" / "step_00000002").iterdir()) == [
        "checkpoint.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    optimizer = load_file(adapter / "checkpoints" / "step_00000002" / "optimizer.safetensors")
    assert {name.split("/", 1)[1].removeprefix("model.") for name in optimizer} == stored.keys()
    as_trained = tuned("a red cube", output_type="np")[0]
    plain = base("a red cube", output_type="np")[0]
    assert not np.array_equal(as_trained, plain)
    tuned.adapter_scale = 0
    assert all(torch.equal(a, b) for a, b in zip(tuned.model.parameters(), base.model.parameters(), strict=True))
    assert np.array_equal(tuned("a red cube", output_type="np")[0], plain)
    with pytest.raises(UserError, match="no adapter whose scale"):
        base.adapter_scale = 0.5
    # the same as an adapter that is added to the base, and back again by a second one that takes it away
    added = base.add_adapter(adapter)
    assert np.array_equal(added("a red cube", output_type="np")[0], as_trained)
    assert added.adapters == {str(adapter): 1.0}
    with pytest.raises(UserError, match="stores all of its weights"):
        tuned.add_adapter(tiny_run("t2i"))
    with pytest.raises(UserError, match="fine-tuned from other weights"):
        load(tiny_run("sr")).add_adapter(adapter)


@pytest.mark.slow
def test_merged_weights_compute_what_was_trained(adapter: Path, tmp_path: Path, capsys) -> None:
    run = Run.open(load(adapter).task.config, adapter, resume="auto")
    trainer = run.trainer()
    trainer._restore("auto")
    run.release()
    network = run.model.eval()
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--to", "run", "--weights", "model"]) == 0
    merged = load(tmp_path / "merged", weights="model")
    assert merged.task.config.finetune.base is None
    assert merged.adapters == {}
    z, t, flags = torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([True, False, False])
    ids, mask = merged.task.text.tokens(["a red cube", "two cones", "a blue sphere"])
    with torch.no_grad():
        expected, velocity = network.velocity(z, t, flags), merged.model.velocity(z, t, flags)
        assert torch.allclose(velocity, expected, atol=1e-5)
        sources = [model.source_encoder(ids, mask).mean for model in (network, merged.model)]
    expected_source, source = sources
    assert torch.allclose(source, expected_source, atol=1e-5)
    halved = load(adapter, adapter_scale=0.5).model.source_encoder(ids, mask).mean
    assert not torch.allclose(halved, expected_source, atol=1e-3)
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "again"), "--to", "run"]) == 2
    assert "stores all of its weights" in capsys.readouterr().err
    assert main(["show", str(adapter)]) == 0
    assert "the parameters are what differs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_stopped_fine_tuning_continues_to_the_same_bits(adapter: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(adapter, stopped)
    for path in (*stopped.glob("*.safetensors"), stopped / "scores.json"):
        path.unlink()
    shutil.rmtree(stopped / "checkpoints" / "step_00000002")
    assert main(["train", "--output", str(stopped), "--resume", "auto"]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        expected, continued = load_file(adapter / name), load_file(stopped / name)
        assert expected.keys() == continued.keys()
        assert all(torch.equal(expected[key], continued[key]) for key in expected)


def test_a_missing_or_changed_base_is_explained(tiny_run, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_run("t2i"), base)
    opened = Run.open(finetuned(str(base), "scenes", Changes("parts", train=("backbone.final.*",)), SMALL), run)
    opened.trainer().save()
    opened.release()
    stored = load_file(run / "model.safetensors")
    assert stored.keys() == {"backbone.final.weight", "backbone.final.bias"}
    assert load(run).adapters == {str(run): 1.0}
    shutil.copy(base / "model.safetensors", base / "ema.safetensors")
    with pytest.raises(UserError, match="are not the ones this run was made with"):
        load(run)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"cannot be read: .* does not exist.*--set finetune.base=DIR"):
        load(run)


@pytest.mark.slow
def test_pictures_of_another_size_train_what_the_base_lacks(tiny_run, blind_judge, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    larger = ["data.image_size=32", "finetune.rank=2", *SMALL, "train.steps=1", "loss.encoder=none"]
    assert main(["finetune", str(tiny_run("t2i")), "--data", "scenes", "--output", str(run), *larger]) == 0
    out = "source_encoder.trunk.head.out"
    assert f"2 keep their random initialisation (model.{out}.weight, model.{out}.bias)" in " ".join(
        capsys.readouterr().out.split()
    )
    whole = {name for name in load_file(run / "model.safetensors") if ".lora_" not in name}
    assert whole == {f"{out}.weight", f"{out}.bias"}
    assert load(run)("a red cube")[0].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "options"), [("caption", ["--rank", "1"]), ("depth", ["--method", "full"])])
def test_other_tasks_are_fine_tuned(tiny_run, no_java, tmp_path: Path, task: str, options: list[str]) -> None:
    run, is_full = tmp_path / "run", "full" in options
    assert main(["finetune", str(tiny_run(task)), "--data", "scenes", "--output", str(run), *SMALL, *options]) == 0
    assert bool(load(run).adapters) != is_full
    before, after = (load_file(folder / "model.safetensors").keys() for folder in (tiny_run(task), run))
    assert (before == after) == is_full


@pytest.mark.slow
def test_two_processes_learn_what_one_does(forked, tiny_run, no_java, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    argv = ["finetune", str(tiny_run("depth")), "--data", "scenes", *SMALL, "train.lr=0.05", "train.warmup_steps=0"]
    assert main([*argv, "--output", str(alone)]) == 0
    for process in forked.ranks(2, ["-m", "crossflow", *argv, "--output", str(shared)], tmp_path):
        process.finish()
    expected, learned = (load_file(run / "model.safetensors") for run in (alone, shared))
    assert expected.keys() == learned.keys()
    assert any(tensor.abs().max() > 0.01 for name, tensor in expected.items() if ".lora_B." in name)
    for name, tensor in expected.items():
        assert torch.allclose(learned[name], tensor, atol=1e-4), name
    picture = np.zeros((16, 16, 3), np.uint8)
    depths = [load(run, device="cpu")(picture, output_type="np")[0] for run in (alone, shared)]
    assert np.allclose(*depths, rtol=1e-3)


def test_a_dry_run_says_what_is_trained(tiny_run, capsys) -> None:
    argv = [
        "finetune",
        str(tiny_run("t2i")),
        "--data",
        "scenes",
        "--method",
        "parts",
        "--train",
        "*.final.*",
        "--dry-run",
    ]
    assert main([*argv, *SMALL, "loss.encoder=none"]) == 0
    assert "trained 0.00M parameters" in " ".join(capsys.readouterr().out.split())


def make_pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number * 60, 90, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cyan wall\n")
