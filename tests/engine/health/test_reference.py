"""Reference bands: shipped ones belong to the recipes as they are; bands are measured from finished runs alone."""

import json
from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.engine.health.reference import Reference, measure_reference, nearest, read_reference, read_references
from crossflow.engine.joint.config import load_joint
from crossflow.engine.run_log import RunLog
from crossflow.tasks import load_config

SHIPPED = read_references()


@pytest.mark.parametrize("reference", SHIPPED, ids=lambda reference: reference.recipe)
def test_a_shipped_band_is_that_of_the_recipe_as_it_is(reference: Reference) -> None:
    """Otherwise measure it again: train the recipe, then `crossflow doctor RUN --save-reference FILE`."""
    recipe, _, task = reference.recipe.partition(".")
    config = load_joint(recipe).members[task] if task else load_config(recipe)
    assert reference.differences(config) == {}
    assert 0 < reference.steps <= config.train.steps
    assert bool(reference.scores) == (reference.steps == config.train.steps)
    assert nearest(config, SHIPPED) == reference


@pytest.mark.slow
def test_a_band_holds_the_run_it_comes_from(healthy: Path, reference: Reference) -> None:
    curve = RunLog.read(healthy).curve("flow")
    for step, value in zip(curve.steps, curve.values, strict=True):
        low, median, high = reference.train["flow"].at(step)
        assert low * 0.9999 <= value <= high * 1.0001
        assert median == pytest.approx(value, rel=1e-4)
    scores = json.loads((healthy / "scores.json").read_text())
    for name, band in reference.scores.items():
        assert band.low <= scores["scores"][name] <= band.high
    assert reference.posterior["spread"] > 0


@pytest.mark.slow
def test_a_reference_survives_its_file(reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(reference.model_dump_json())
    assert read_reference(path) == reference
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_reference(path)


@pytest.mark.slow
def test_only_runs_of_the_same_settings_make_a_reference(healthy: Path, edited, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has other settings than .*: train\.lr"):
        measure_reference("x", [healthy, edited("train.lr=1")])
    (tmp_path / "edited" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no metrics"):
        measure_reference("x", [tmp_path / "edited"])


@pytest.mark.slow
def test_a_run_that_has_not_ended_makes_a_shorter_band_without_scores(edited) -> None:
    folder = edited()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    (folder / "scores.json").unlink()
    short = measure_reference("x", [folder])
    assert (short.steps, short.scores) == (20, {})
    assert short.train["flow"].steps == (5, 10, 15, 20)


@pytest.mark.slow
def test_bands_are_held_against_runs_of_the_same_data_and_model(healthy: Path, reference: Reference) -> None:
    assert reference.fits(load_config(healthy, ["train.lr=1", "seed=3", "loss.kl_weight=1"]))
    assert not reference.fits(load_config(healthy, ["backbone.width=64"]))
    assert not reference.fits(load_config(healthy, ["data.image_size=32"]))
    assert reference.differences(load_config(healthy, ["seed=3", "train.save_every=7"])) == {}
    assert nearest(load_config("sr_tiny"), [reference]) is None
