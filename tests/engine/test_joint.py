"""Joint runs: what is shared and what is not, equality with single runs, exact resuming, sampling by task."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import crossflow
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.noise import training_noise
from crossflow.core.training.joint import JointData, JointMicroBatches
from crossflow.core.training.stream import MicroBatches
from crossflow.engine.joint.config import load_joint
from crossflow.engine.joint.run import JointRun, estimate_jointly, train_jointly
from crossflow.engine.sample import load
from crossflow.engine.train import estimate, train
from crossflow.tasks import load_config

PAIR = "depth,sr"


class Numbers:
    """Examples that are their own places."""

    in_workers = ahead = True

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int]:
        return place

    def collate(self, examples: list[tuple[int, int]]) -> dict[str, tuple]:
        return {"places": tuple(examples)}


@pytest.fixture(scope="module")
def pair(tiny_settings):
    """pair(*overrides): the configuration of a tiny joint run of two tasks."""

    def config(*overrides: str, tasks: str = PAIR):
        settings = [*tiny_settings(tasks), "train.log_every=1", "train.save_every=1", *overrides]
        return load_joint("joint_tiny", settings, tasks)

    return config


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A picture that is no square."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.effect_noise((40, 24), 60).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def joint(pair, tmp_path_factory) -> Path:
    """A finished joint run of two tasks. Not to be written to."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    train_jointly(pair(), folder)
    return folder


def lines(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds")
    return [{name: row[name] for name in row if name not in ("kind", *clock)} for row in rows if row["kind"] == kind]


def test_a_batch_has_equally_many_samples_of_each_task_in_its_own_order():
    data = JointData({"a": Numbers(7), "b": Numbers(5)}, {"a": (1,), "b": (2,)})
    batches = JointMicroBatches(data, seed=3)
    loaded = batches[2, range(8, 16)]
    for turn, (name, shape) in enumerate({"a": (1,), "b": (2,)}.items()):
        alone = MicroBatches(data.members[name], 3, shape)
        assert loaded.record[name]["places"] == tuple(alone.examples_at(range(4, 8)))
        noise = training_noise(3, 2, range(8 + turn, 16, 2), shape)
        torch.testing.assert_close(loaded.noise.members[name].source, noise.source, rtol=0, atol=0)


def test_tasks_share_blocks_and_keep_their_first_and_last_layers():
    recipes = {name: load_config(f"{name}_tiny", ["backbone.conv=3", "backbone.size=mini"]) for name in ("depth", "sr")}
    separate = sum(estimate(config).parameters["flow"] for config in recipes.values())
    parts = estimate_jointly(load_joint("joint_tiny", ["train.batch_size=64"], PAIR)).parameters
    assert set(parts) == {"shared", "depth", "sr"}
    assert 0.9 < 2 * parts["shared"] / separate < 1


@pytest.mark.slow
def test_every_weight_of_every_task_gets_a_gradient(pair, tmp_path: Path):
    """The last layers are zero at first and hide the others, so this looks at the third step."""
    run = JointRun.open(pair("backbone.depth=2"), tmp_path / "run")
    trainer = run.trainer()
    for _ in trainer.trial(3):
        pass
    parameters = {name: value.detach().clone() for name, value in run.objective.named_parameters()}
    assert not any(name.startswith("tasks.depth.model") for name in parameters), "the body is held once"
    (parts,) = list(trainer._steps(3, 4))
    losses = run.objective(run.objective.draw([part.batch for part in parts], [part.noise for part in parts])[0],
                           parts[0].noise)  # fmt: skip
    losses["loss"].backward()
    without = [name for name, value in run.objective.named_parameters() if value.grad is None or not value.grad.any()]
    # No sample of these tiny batches is unconditional, so that row of the indicator is the only one without.
    assert without == []
    run.lock.release()


@pytest.mark.slow
def test_one_task_alone_is_trained_as_in_a_run_of_its_own(pair, tmp_path: Path):
    config = pair(tasks="depth")
    train_jointly(config, tmp_path / "joint")
    train(config.members["depth"], tmp_path / "alone")
    alone, together = lines(tmp_path / "alone"), lines(tmp_path / "joint")
    assert (
        [row["loss"] for row in alone] == [row["loss"] for row in together] == [row["depth/loss"] for row in together]
    )
    expected = load_file(tmp_path / "alone" / "ema.safetensors")
    actual = load(tmp_path / "joint" / "tasks" / "depth").model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_stopped_joint_run_continues_to_the_same_bits(pair, joint: Path, tmp_path: Path):
    parts = tmp_path / "parts"
    stopped = train_jointly(pair("train.max_minutes=0.00001"), parts)
    assert stopped.result.status == "stopped"
    assert stopped.result.step == 1
    train_jointly(pair(), parts, resume="auto")
    assert lines(parts) == lines(joint)
    for name in ("model", "ema", "objective"):
        whole, resumed = (load_file(folder / f"{name}.safetensors") for folder in (joint, parts))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert train_jointly(pair(), parts, resume="auto").already_finished
    with pytest.raises(UserError, match=r"other settings: weights.sr"):
        train_jointly(pair("weights.sr=2"), parts, resume="auto")


@pytest.mark.slow
def test_a_joint_run_does_all_of_its_tasks(joint: Path, photo: Path, tmp_path: Path, capsys):
    pipe = crossflow.load(joint)
    assert pipe.tasks == ("depth", "sr")
    assert pipe["depth"].model.backbone.blocks is pipe["sr"].model.backbone.blocks
    depth = pipe(str(photo), task="depth").depth[0]
    with pytest.raises(UserError, match="say which by task='depth', task='sr'"):
        pipe(str(photo))
    alone = load(pipe["depth"].save(tmp_path / "alone"))
    np.testing.assert_array_equal(alone(str(photo)).depth[0], depth)

    sample = ["sample", "--checkpoint", str(joint), "--input", str(photo), "--output", str(tmp_path / "out")]
    assert main(sample) == 2
    assert "say which by --task depth or --task sr" in capsys.readouterr().err
    assert main([*sample, "--task", "depth"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{photo.stem}_depth.npy"), depth)
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(joint), "--task", "sr", "--num", "2", "--json"]) == 0
    checksums = json.loads(capsys.readouterr().out)["manifest"]["checksums"]
    assert "ema.safetensors" in checksums


@pytest.mark.slow
def test_commands_that_read_a_run_read_the_tasks_of_a_joint_one(joint: Path, tmp_path: Path, capsys):
    assert main(["show", str(joint / "tasks" / "depth"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["step"], about["recipe"]) == (2, "depth_tiny")
    assert set(about["parameters"]) == {"backbone", "source encoder"}
    assert main(["doctor", str(joint), "--no-measuring", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [Path(report["subject"]).name for report in reports] == ["depth", "sr"]
    assert "flow" in reports[0]["facts"]
    assert main(["plot", str(joint / "tasks" / "sr"), "--output", str(tmp_path / "curves.png")]) == 0
    assert "val/flow" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_as_one(joint: Path, tmp_path: Path, forked):
    """The settings of the joint run, read from its own folders, on two processes."""
    shutil.copytree(joint, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors", "*.jsonl"))
    run = tmp_path / "run"
    for name in PAIR.split(","):
        (run / "tasks" / name / "scores.json").unlink()
    for process in forked.ranks(2, ["-m", "crossflow", "train", "--output", str(run), "--resume", "auto"], tmp_path):
        process.finish()
    for shared, alone in zip(lines(run), lines(joint), strict=True):
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_t2i_and_caption_are_two_directions_of_one_flow(pair, blind_judge, photo: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = pair("directions.caption=t2i", tasks="t2i,caption")
    assert list(config.members) == ["t2i"]
    outcome = train_jointly(config, run)
    assert set(outcome.tasks) == {"t2i", "caption"}
    assert train_jointly(config, run, resume="auto").already_finished
    pipe = crossflow.load(run)
    (caption,) = pipe(str(photo)).captions
    assert isinstance(caption, str)
    forwards, backwards = (pipe[name].model.backbone.state_dict() for name in ("t2i", "caption"))
    assert all(torch.equal(backwards[f"backbone.{name}"], value) for name, value in forwards.items())


@pytest.mark.parametrize(
    ("overrides", "tasks", "message"),
    [
        (["directions.caption=t2i", "tasks.t2i.data.image_size=32"], "t2i,caption", r"image_size is 32 for t2i and 16"),
        (["directions.caption=t2i", "tasks.t2i.source.kind=gaussian"], "t2i,caption", r"starts from noise, not from a"),
        (["directions.depth=sr"], PAIR, r"depth has no way to run the flow of sr backwards"),
        (["directions.caption=depth"], "t2i,caption", r"names none of the tasks that this run trains: t2i"),
    ],
)
def test_directions_need_latents_that_agree(pair, overrides: list[str], tasks: str, message: str):
    with pytest.raises(UserError, match=message):
        pair(*overrides, tasks=tasks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.sr.backbone.width=32"], r"backbone.width is 16 for depth and 32 for sr"),
        (["train.batch_size=5"], r"give a multiple of 2"),
        (["weights.t2i=1"], r"weights.t2i names none"),
        (["train.start_from=runs/x"], r"train.start_from is for runs of one task"),
        (["tasks.depth.extends=sr_tiny"], r"is a recipe of sr, not of depth"),
        (["caption.reading=0"], r"Unknown setting 'caption'"),
        (["tasks.depth.loss.kl_wait=1"], r"Task depth: Unknown setting 'loss.kl_wait'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_invalid_joint_settings_are_explained(pair, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        pair(*overrides)


def test_other_commands_say_how_to_name_a_task():
    with pytest.raises(UserError, match="is of several tasks, t2i, caption, depth, sr"):
        load_config("joint_tiny")
