"""A task of another package, written as CONTRIBUTING says: colourisation trains, resumes, samples, is scored under a
protocol of its own, ablates; and mistakes in a task are reported.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import crossflow
from crossflow import tasks
from crossflow.benchmarks.ablation.group import load_group
from crossflow.benchmarks.ablation.plan import Budget, Plan
from crossflow.benchmarks.ablation.run import run as run_ablation
from crossflow.benchmarks.evaluation.protocol import load_protocol, protocol_of
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.recipes import RECIPE_FOLDERS
from crossflow.data.item import Item
from crossflow.tasks import load_config, task_class
from crossflow.tasks.base import Task

FOLDER = Path(__file__).parent / "colourisation"
SMALL = [
    *("data.image_size=16", "data.num_train=24", "data.num_val=6", "source.width=16", "backbone.width=16"),
    *("backbone.depth=1", "backbone.heads=2", "train.batch_size=4", "sample.steps=2"),
]


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The module of the task, as an installed package would bring it."""
    spec = importlib.util.spec_from_file_location("colourisation", FOLDER / "adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["colourisation"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["colourisation"]


@pytest.fixture(scope="module")
def registered(package: ModuleType) -> Iterator[str]:
    tasks.register("colourisation", "colourisation:Adapter", recipes=FOLDER / "recipes")
    yield "colourisation"
    tasks.unregister("colourisation")
    RECIPE_FOLDERS.remove(FOLDER / "recipes")


@pytest.fixture(scope="module")
def run(registered: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for two steps and resumed for another two."""
    folder = tmp_path_factory.mktemp("runs") / "colour"
    command = ["train", "--task", registered, "--output", str(folder), *SMALL]
    assert main([*command, "train.steps=2"]) == 0
    assert main([*command, "--resume", "auto", "train.steps=4"]) == 0
    return folder


def test_an_installed_package_brings_its_task_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER / "recipes", tmp_path / "painters" / "recipes")
    shutil.copy(FOLDER / "adapter.py", tmp_path / "painters" / "__init__.py")
    about = tmp_path / "painters-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: painters\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[crossflow.tasks]\ncolourisation = painters:Adapter\n")
    assert "colourisation" not in tasks.task_names()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "colourisation" in tasks.task_names()
        config = load_config("colourisation_tiny")
        assert task_class("colourisation").__module__ == "painters"
        assert type(config).__name__ == "ColourConfig"
    finally:
        RECIPE_FOLDERS[:] = [folder for folder in RECIPE_FOLDERS if tmp_path not in folder.parents]
        sys.modules.pop("painters", None)


def test_the_task_is_short() -> None:
    assert len((FOLDER / "adapter.py").read_text().splitlines()) <= 150


def test_it_is_listed_without_being_imported(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert registered in tasks.task_names()
    assert main(["list", "tasks"]) == 0
    assert "Colourisation: a grey picture" in capsys.readouterr().out


def test_it_trains_resumes_and_is_scored(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 4
    scores = json.loads((run / "scores.json").read_text())
    assert scores["scores"].keys() == {"colour_error", "saturation", "num_items"}
    assert scores["baseline"]["saturation"] == 0, "the trivial output is grey"


def test_it_samples_pictures_of_any_size(run: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    (output,) = crossflow.load(run)(picture, output_type="np")
    assert output.shape == picture.shape
    assert output.dtype == np.uint8


def test_it_is_scored_under_a_protocol_of_its_own(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--checkpoint", str(run), "--protocol", str(FOLDER / "protocol.yaml")]
    assert main([*command, "--output", str(out)]) == 0
    content = json.loads((out / "metrics.json").read_text())
    assert content["manifest"]["protocol"]["colourisation"] == {"min_side": 16}
    assert content["manifest"]["num_items"] == content["baseline"]["num_items"] == 6
    assert protocol_of(content["manifest"]["protocol"]) == load_protocol(FOLDER / "protocol.yaml")
    strict = tmp_path / "strict.yaml"
    strict.write_text(f"extends: {FOLDER / 'protocol.yaml'}\ncolourisation: {{min_side: 99}}")
    assert main([*command[:3], "--protocol", str(strict), "--output", str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_it_ablates(registered: str, tmp_path: Path) -> None:
    budget = Budget(task=registered, recipe="colourisation_tiny", steps=2, seeds=(0,), num_items=4,
                    overrides=tuple(SMALL), only=("linear", "sincos"))  # fmt: skip
    plan = Plan(load_group("path"), budget, tmp_path)
    run_ablation(plan, lambda line: None, execute=lambda job, log, say: main(list(job.command)))
    for variant in budget.only:
        scores = json.loads((tmp_path / "evaluations" / f"{variant}-seed0" / "metrics.json").read_text())["scores"]
        assert np.isfinite(scores["colour_error"])


def test_validation_examples_are_not_augmented(registered: str) -> None:
    kind, config = task_class(registered), load_config("colourisation_tiny", SMALL)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    targets = [
        kind.transform(config, Item("a", image), np.random.default_rng(seed), augment=False)["target"]
        for seed in range(8)
    ]
    assert all((target == targets[0]).all() for target in targets)


# -- mistakes


def test_a_wrong_latent_shape_is_reported(package: ModuleType) -> None:
    class Wrong(package.Adapter):  # type: ignore[name-defined, misc]
        latent_shape = (1, 16, 16)

    config = package.ColourConfig(task="colourisation", data={"image_size": 16, "num_train": 4})
    task: Task = Wrong.learn(config, Wrong.dataset(config, "train"), lambda line: None)
    with pytest.raises(UserError, match=r"latent_shape \(1, 16, 16\).* \(3, 16, 16\)"):
        task.prepare(task.collate(Wrong.dataset(config, "train").first(2)))


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("colours", "colourisation:Colours", "needs a class named Colours"),
        ("colours", "colourisation:ColourMetric", "no subclass of Task"),
        ("colours", "colourisation:Adapter", "registered as 'colours', but .*name is 'colourisation'"),
        ("colours", "nowhere_at_all:Adapter", "could not be imported"),
    ],
)
def test_a_wrong_adapter_is_reported(package: ModuleType, name: str, adapter: str, message: str) -> None:
    tasks.register(name, adapter)
    try:
        with pytest.raises(UserError, match=message):
            task_class(name)
    finally:
        tasks.unregister(name)


def test_a_misspelt_headline_and_missing_attributes_are_reported(package: ModuleType) -> None:
    scoring = type("Misspelt", (package.ColourScoring,), {"headline": ("color_error",)})
    adapter = type("Headline", (package.Adapter,), {"Scoring": scoring, "name": "misspelt"})
    tasks.register("misspelt", adapter)
    tasks.register("empty", type("Empty", (Task,), {"name": "empty"}))
    try:
        with pytest.raises(UserError, match=r"names 'color_error'.*colour_error, saturation"):
            task_class("misspelt")
        with pytest.raises(UserError, match="set Config, Parts, Scoring, needs, input_kind"):
            task_class("empty")
    finally:
        tasks.unregister("misspelt")
        tasks.unregister("empty")


def test_a_missing_recipe_is_reported(package: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = type("Plain", (package.Adapter,), {"name": "plain"})
    tasks.register("plain", adapter)
    try:
        assert main(["train", "--task", "plain"]) == 2
        assert "has no recipe plain_tiny" in capsys.readouterr().err
    finally:
        tasks.unregister("plain")


def test_a_name_is_registered_once(registered: str) -> None:
    with pytest.raises(UserError, match="exists already"):
        tasks.register("sr", "colourisation:Adapter")
    with pytest.raises(UserError, match="exists already"):
        tasks.register(registered, "elsewhere:Adapter")


def test_a_protocol_names_scores_that_exist(registered: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: {FOLDER / 'protocol.yaml'}\nheadline: [colour]")
    with pytest.raises(UserError, match="protocol mine names 'colour'"):
        load_protocol(tmp_path / "mine.yaml")
