"""An evaluation can be killed, resumed, repeated and compared; its numbers do not depend on the batches."""

import inspect
import itertools
import json
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from crossflow.benchmarks.evaluation import evaluate as evaluation
from crossflow.benchmarks.evaluation.evaluate import evaluate
from crossflow.benchmarks.evaluation.manifest import arithmetic, checksums
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.sample import Pipeline, load


def pictures(folder: Path, count: int, side: int = 40) -> str:
    """Smooth pictures in a folder; its spec."""
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side + number, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return f"folder:{folder}@all"


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def sr(tiny_run) -> Pipeline:
    return load(tiny_run("sr"))


@pytest.mark.slow
def test_a_killed_evaluation_continues_without_repeating_finished_items(sr, tmp_path: Path, monkeypatch) -> None:
    spec, protocol = pictures(tmp_path / "data", 7), load_protocol("set5-x4")
    options = {"spec": spec, "protocol": protocol, "settings": {"batch_size": 2}}
    whole = evaluate(sr, folder=tmp_path / "whole", **options)

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(sr, folder=tmp_path / "killed", progress=kill, **options)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    (tmp_path / "killed" / ".unfinished" / "00000000-00000001.safetensors").write_bytes(b"cut off")
    drawn: list[str] = []
    outputs = Pipeline.outputs

    def counted(self, inputs, ids, *others):
        drawn.extend(ids)
        return outputs(self, inputs, ids, *others)

    monkeypatch.setattr(Pipeline, "outputs", counted)
    again = evaluate(sr, folder=tmp_path / "killed", **options | {"settings": {"batch_size": 3}})
    assert drawn == ["0.png", "1.png", "4.png", "5.png", "6.png"]
    assert again.scores.values == pytest.approx(whole.scores.values, rel=1e-4)
    assert [row["id"] for row in again.scores.rows] == [row["id"] for row in whole.scores.rows]
    assert again.baseline == whole.baseline
    assert len(again.scores.pages) == 7
    assert not (tmp_path / "killed" / ".unfinished").exists()


def test_unfinished_batches_of_another_evaluation_are_not_used(sr, tmp_path: Path) -> None:
    spec = pictures(tmp_path / "data", 3)

    def kill(done: int, total: int) -> None:
        raise KeyboardInterrupt

    options = {"spec": spec, "folder": tmp_path / "out", "protocol": load_protocol("set5-x4")}
    with pytest.raises(KeyboardInterrupt):
        evaluate(sr, progress=kill, seed=1, **options)
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(sr, **options)
    assert (tmp_path / "out" / ".unfinished").is_dir()
    other = evaluate(sr, overwrite=True, **options)
    assert len(other.scores.rows) == 3
    assert other.manifest["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sr", "depth", "caption", "t2i"])
def test_batches_do_not_change_the_numbers(tiny_run, tmp_path: Path, monkeypatch, task: str) -> None:
    monkeypatch.setattr("crossflow.tasks.caption.metric.JAVA_METRICS", ())  # they take long and see texts alone
    pipe = load(tiny_run(task))
    first, other = (
        evaluate(pipe, num=5, folder=tmp_path / str(size), settings={"batch_size": size}).scores for size in (1, 4)
    )
    assert [row["id"] for row in first.rows] == [row["id"] for row in other.rows]
    assert first.values == pytest.approx(other.values, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_an_evaluation_is_repeated_from_its_manifest_and_differences_are_named(
    tiny_run, tmp_path: Path, capsys
) -> None:
    spec, run = pictures(tmp_path / "data", 5), str(tiny_run("sr"))
    argv = ["evaluate", "--checkpoint", run, "--protocol", "set5-x4", "--data", spec, "batch_size=2", "--seed", "3"]
    assert main([*argv, "--steps", "3", "--output", str(tmp_path / "a")]) == 0
    assert main(["evaluate", "--repeat", str(tmp_path / "a" / "metrics.json")]) == 0
    assert "(5 compared)" in capsys.readouterr().out
    before, after = metrics(tmp_path / "a"), metrics(tmp_path / "a" / "repeated")
    assert before["scores"] == after["scores"]
    assert before["manifest"]["sample"] == after["manifest"]["sample"]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a" / "repeated")]) == 0
    assert "agree in everything" in capsys.readouterr().out
    assert main([*argv, "--steps", "1", "--output", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    output = capsys.readouterr().out
    assert "sample.steps: 3 -> 1" in output
    assert "evaluations: 3 -> 1" in output
    assert "measured differently" not in output
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "data" / "1.png")
    assert main(["evaluate", "--repeat", str(tmp_path / "a")]) == 2
    assert "data.fingerprint" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "not an evaluation" in capsys.readouterr().err


def test_a_manifest_records_everything_that_the_numbers_depend_on(sr, tmp_path: Path) -> None:
    report = evaluate(
        sr, spec=pictures(tmp_path / "data", 5), protocol=load_protocol("set5-x4"), folder=tmp_path / "out"
    )
    manifest = metrics(tmp_path / "out")["manifest"]
    assert manifest == json.loads(json.dumps(report.manifest))
    assert manifest["protocol"]["sr"] == {"scale": 4, "crop": None, "shave": 4}
    assert manifest["num_items"] == 5
    assert len(manifest["ids"]["sha256"]) == 64
    assert len(manifest["checksums"]["ema.safetensors"]) == 64
    assert {"config.yaml", "codec/codec.json"} <= set(manifest["checksums"])
    assert "objective.safetensors" not in manifest["checksums"]
    assert manifest["precision"] == "float32"
    assert manifest["tf32"] == {"matmul": False, "cudnn": torch.backends.cudnn.allow_tf32}
    assert manifest["evaluations"] == manifest["sample"]["steps"]
    assert {"torch", "torchmetrics", "timm", "scikit-image"} <= set(manifest["versions"])
    for name in ("seed", "precision", "weights", "resize", "started", "seconds", "machine", "processor", "device"):
        assert manifest[name] is not None, name
    assert report.scores.notes == []


@pytest.mark.parametrize("allowed", [True, False])
def test_precision_and_tf32_are_recorded_as_they_are(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(torch.bfloat16))
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        recorded = arithmetic(model, "bf16")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert recorded["precision"] == "bf16, weights in bfloat16 and float32"
    assert recorded["tf32"]["matmul"] is allowed


@pytest.mark.slow
def test_the_checksums_of_joint_captioning_cover_its_text_autoencoder(tiny_settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*tiny_settings("caption"), "caption.joint=true"]
    assert main(["train", "--task", "caption", "--output", str(run), *settings]) == 0
    pipe = load(run)
    before = checksums(pipe)["objective.safetensors"]
    weights = load_file(run / "objective.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, run / "objective.safetensors")
    assert checksums(pipe)["objective.safetensors"] != before


def usage_of(thing: object) -> str:
    """The code behind `Usage::` in a docstring."""
    lines = (inspect.getdoc(thing) or "").partition("Usage::\n\n")[2].splitlines()
    return textwrap.dedent("\n".join(itertools.takewhile(lambda line: not line or line[0] == " ", lines)))


@pytest.mark.parametrize("thing", [evaluate, evaluation.Evaluation])
def test_the_usage_in_docstrings_runs(thing: object, tiny_run, tmp_path: Path, monkeypatch) -> None:
    import crossflow

    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "Set5", 2)
    (tmp_path / "runs").mkdir()
    shutil.copytree(tiny_run("sr"), tmp_path / "runs" / "sr")
    names = {"crossflow": crossflow, "load_protocol": load_protocol, "pipe": load("runs/sr")}
    code = usage_of(thing)
    assert "set5-x4" in code
    exec(code, names | {"evaluate": evaluate, "Evaluation": evaluation.Evaluation})
    assert len(list((tmp_path / "runs" / "sr" / "evaluation").glob("set5-x4-*/metrics.json"))) == 1


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"solver": "ab2", "steps": 5}, 6),
        ({"solver": "euler", "steps": 4, "guidance": 2.0}, 8),
        ({"solver": "ab2", "steps": 4, "guidance": 6.0, "guidance_interval": (0.0, 0.5)}, 9),
    ],
)
def test_a_manifest_counts_network_evaluations_with_autoguidance(
    tiny_run, tmp_path: Path, settings: dict, count: int
) -> None:
    pipe = load(tiny_run("sr"))
    pipe.guide_with(load(tiny_run("sr")))
    spec, protocol = pictures(tmp_path / "data", 2), load_protocol("set5-x4")
    report = evaluate(pipe, spec=spec, protocol=protocol, folder=tmp_path / "out", settings=settings)
    assert report.manifest["evaluations"] == count


def test_scores_on_fewer_items_than_the_protocol_are_marked_as_partial(sr, tmp_path: Path) -> None:
    spec = pictures(tmp_path / "data", 3)
    report = evaluate(sr, spec=spec, protocol=load_protocol("set5-x4"), folder=tmp_path / "out")
    assert "3 items were scored, but set5-x4 has 5" in report.scores.notes[-1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_items(sr, tmp_path: Path, monkeypatch) -> None:
    """Of the pictures that were scored only those of the page are kept."""
    import gc

    monkeypatch.setattr(evaluation, "MEMORY", 0)
    monkeypatch.setattr(evaluation, "NUM_TILES", 1)
    alive = []

    from crossflow.data.cases import Case

    def cases(done: int, total: int) -> None:
        gc.collect()
        alive.append(sum(isinstance(each, Case) for each in gc.get_objects()))

    evaluate(
        sr, spec=pictures(tmp_path / "data", 8), protocol=load_protocol("set5-x4"), folder=tmp_path / "out",
        settings={"batch_size": 2}, progress=cases,
    )  # fmt: skip
    assert len(alive) == 4
    assert max(alive) <= 4


def test_protocols_refuse_other_tasks_missing_data_and_unknown_roles(sr, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is for depth runs"):
        evaluate(sr, protocol=load_protocol("nyu"), spec="scenes")
    with pytest.raises(UserError, match="needs its data"):
        evaluate(sr, protocol=load_protocol("set5-x4"))
    with pytest.raises(UserError, match="network of the protocol"):
        load_protocol("set5-x4").using({"clip": "somewhere"})


@pytest.mark.slow
@pytest.mark.skipif("CROSSFLOW_TEST_DATA" not in os.environ, reason="needs the real pictures")
def test_the_bicubic_row_of_set5_is_the_published_one(sr, tmp_path: Path) -> None:
    spec = f"folder:{os.environ['CROSSFLOW_TEST_DATA']}/data/sr/Set5@all"
    report = evaluate(sr, spec=spec, protocol=load_protocol("set5-x4"), folder=tmp_path / "out", settings={"steps": 1})
    assert report.baseline["psnr_y"] == pytest.approx(28.42, abs=0.05)
    assert report.baseline["ssim_y"] == pytest.approx(0.8104, abs=0.002)
    assert report.scores.notes == []
