"""Each disease of a run is named in the right sentence, and nothing is said of healthy runs."""

import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.data.dataset import Examples
from crossflow.engine.health import evidence as evidence_module
from crossflow.engine.health.checks import examine
from crossflow.engine.health.evidence import gather
from crossflow.engine.health.reference import Reference
from crossflow.engine.train import train
from crossflow.tasks import load_config

Trained = Callable[..., Path]
RECORDED = Path(__file__).parents[2] / "golden" / "health"
pytestmark = pytest.mark.slow


def names(folder: Path, *references: Reference) -> dict[str, str]:
    """Name of the check -> what it says, for a run beside these references."""
    return {finding.name: str(finding) for finding in examine(gather(folder, references=references))}


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECORDED.iterdir()))
def test_nothing_is_said_of_the_shipped_recipes(recipe: str) -> None:
    """tests/golden/health: what a training of each recipe wrote, without its weights, on a CPU."""
    evidence = gather(RECORDED / recipe, measure=False)
    assert evidence.reference is not None
    assert evidence.reference.recipe == recipe
    assert examine(evidence) == []


def test_nothing_is_said_of_a_healthy_run(healthy: Path, reference: Reference) -> None:
    assert names(healthy, reference) == {}


def test_a_collapsed_posterior(trained: Trained) -> None:
    messages = names(trained("loss.kl_weight=1000"))
    assert "the latent says nothing about the input. Lower loss.kl_weight (now 1000)" in messages["collapsed posterior"]
    assert "The inputs do not matter" in messages["ignored source"]


def test_an_exploding_kl(trained: Trained) -> None:
    messages = names(
        trained("loss.kl_weight=0", "train.lr=2", "train.grad_clip=0", "train.schedule=constant", "train.steps=30")
    )
    assert "The source posterior explodes: a mean of " in messages["exploding KL"]
    assert "Raise loss.kl_weight (now 0)" in messages["exploding KL"]


def test_a_learning_rate_of_a_hundred_times(trained: Trained, reference: Reference) -> None:
    messages = names(trained("train.lr=0.5"), reference)
    assert "train.lr=0.5 is 100 times that of depth_small_test (0.005)" in messages["learning rate"]
    assert "times the top of the band of depth_small_test" in messages["above the reference"]
    assert "train.lr=0.5 (recipe: 0.005)" in messages["above the reference"]


def test_a_training_that_ended_in_nan(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Examples.__getitems__

    def poisoned(self, places):
        in_second_epoch = isinstance(places[0], tuple) and places[0][0] == 1
        scale = float("nan") if in_second_epoch else 1.0
        return [{**example, "source": example["source"] * scale} for example in load(self, places)]

    monkeypatch.setattr(Examples, "__getitems__", poisoned)
    with pytest.raises(UserError, match="not finite"):
        train(load_config("depth_tiny", small), tmp_path / "run")
    message = names(tmp_path / "run")["bad steps"]
    assert "Losses or gradients were NaN or infinite in 1 step, the last of them step 9" in message
    assert (
        f"Look at the items that {tmp_path / 'run' / 'bad_steps.jsonl'} lists, and lower train.lr (now 0.005)"
        in message
    )


def test_too_few_unconditional_samples(trained: Trained) -> None:
    messages = names(trained("guidance.drop=0.1", "train.batch_size=4"))
    assert "guidance.drop=0.1 asks for 10%: a step of 4 samples" in messages["no unconditional samples"]


def test_captions_of_other_pictures(trained: Trained, coloured: Callable[[bool], Path], blind_judge: None) -> None:
    small = ["text.max_length=8", "train.steps=50", "sample.steps=2", "data.num_val=8", "loss.encoder=none"]
    messages = {
        shuffled: names(trained(f"data.train=folder:{coloured(shuffled)}", *small, recipe="t2i_tiny"))
        for shuffled in (False, True)
    }
    assert "Check that inputs and targets of the data belong together" in messages[True]["ignored source"]
    assert "ignored source" not in messages[False]


def test_a_loader_that_is_too_slow(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Examples.__getitems__

    def slowly(self, places):
        time.sleep(0.2)
        return load(self, places)

    monkeypatch.setattr(Examples, "__getitems__", slowly)
    folder = trained("train.steps=8", "data.num_val=8")
    monkeypatch.undo()
    assert "The training waits for its data" in names(folder)["data-bound"]
    assert "Raise train.num_workers (now chosen by the cores)" in names(folder)["data-bound"]


def test_a_full_disk(edited: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = edited("train.steps=100")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    assert "1.0 kB are free, and the next checkpoints need" in names(folder)["disk"]
    assert "The run is at step 60 of 100." in names(folder)["unfinished"]


def test_validation_on_training_items(edited: Trained) -> None:
    messages = names(edited("data.val=scenes@train"))
    assert "24 of 24 validation items are training items too" in messages["validation on training data"]


def test_a_training_that_is_too_short(trained: Trained, reference: Reference) -> None:
    messages = names(trained("train.steps=4", "train.warmup_steps=3"), reference)
    assert "The run has 4 steps, and depth_small_test takes 60." in messages["too short"]
    assert "Scores are worse than those of depth_small_test: abs_rel " in messages["scores below the reference"]


def test_a_warm_up_that_never_ends(edited: Trained) -> None:
    assert "50 of the 60 steps are warm-up" in names(edited("train.warmup_steps=50"))["too short"]


def test_guidance_that_was_never_trained(edited: Trained) -> None:
    messages = names(edited("sample.guidance=3"))
    assert (
        "sample.guidance=3 needs a velocity that the run never learns: guidance.drop is 0."
        in messages["unguided training"]
    )


def test_an_average_that_is_too_slow(edited: Trained) -> None:
    messages = names(edited("train.ema=0.9999"))
    assert "train.ema=0.9999 averages the weights over 10,000 steps, and the run has 60." in messages["slow average"]


def test_an_average_that_lags(edited: Trained, trained: Trained) -> None:
    folder = edited()
    shutil.copy(trained("train.steps=4", "train.warmup_steps=3") / "ema.safetensors", folder / "ema.safetensors")
    assert "the average lags behind" in names(folder)["lagging average"]


def test_a_run_without_scores(edited: Trained) -> None:
    folder = edited()
    (folder / "scores.json").unlink()
    assert f"crossflow train --output {folder} --resume auto." in names(folder)["unscored"]


def test_scores_no_better_than_trivial(edited: Trained) -> None:
    folder = edited()
    content = json.loads((folder / "scores.json").read_text())
    content["scores"].update(content["baseline"])
    content["intervals"] = {name: [value * 0.9, value * 1.1] for name, value in content["baseline"].items()}
    (folder / "scores.json").write_text(json.dumps(content))
    assert "The run scores no better than the trivial baseline: abs_rel" in names(folder)["trivial scores"]


@pytest.mark.parametrize(
    ("change", "name", "sentence"),
    [
        (
            lambda step, line: {"flow": None} if step == 40 else {},
            "not finite",
            "flow (train) was NaN or infinite at step 40",
        ),
        (lambda step, line: {"flow": line["flow"] * (1 + step / 6)}, "rising loss", "The flow loss has risen"),
        (lambda step, line: {"flow": 1.0}, "no progress", "The flow loss has not fallen: 1 in the first quarter"),
        (lambda step, line: {"grad_norm": 1.0 + 50 * (step > 44)}, "gradient explosion", "has grown from 1 to 51"),
        (lambda step, line: {"grad_norm": 1e-9}, "vanished gradient", "so nothing is learned"),
        (lambda step, line: {"kl": 3.0**step}, "growing KL", "goes on growing"),
        (lambda step, line: {"skipped_steps": step // 2}, "skipped steps", "30 of 60 steps were skipped"),
    ],
)
def test_what_a_log_says(edited: Trained, change, name: str, sentence: str) -> None:
    folder = edited()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    changed = [line | (change(line["step"], line) if line["kind"] == "train" else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert sentence in names(folder)[name]


def test_overfitting(edited: Trained) -> None:
    folder = edited()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "val", "step": 61, "flow": 9.0, "flow_shuffled": 10.0}\n')
    assert "on held-out items has risen from" in names(folder)["overfitting"]


def test_a_run_is_examined_though_its_data_have_moved(edited: Trained) -> None:
    evidence = gather(edited("data.train=folder:nowhere"), references=())
    assert evidence.measured is None
    assert "nowhere" in evidence.not_measured
    assert examine(evidence) == []


def test_the_number_of_measured_items_is_bounded(edited: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "NUM_MEASURED", 5)
    measured = gather(edited(), references=()).measured
    assert measured is not None
    assert measured.num_items == 5
