"""What holds for every task: gradients reach all parameters, results do not depend on batches, configurations build."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.core.noise import training_noise
from crossflow.core.settings import build, shipped
from crossflow.engine.joint.config import is_joint
from crossflow.engine.sample import load
from crossflow.tasks import load_config, task_class, task_names
from crossflow.tasks.base import Task

VARIANTS = [
    ("t2i", ["loss.encoder_target=image"]),
    ("t2i", ["loss.encoder_target=text"]),
    ("t2i", ["loss.encoder=sigmoid"]),
    ("t2i", ["loss.encoder=reconstruction", "loss.encoder_target=text"]),
    ("t2i", ["text.head=flatten"]),
    ("t2i", ["source.kind=deterministic"]),
    ("t2i", ["source.kind=noisy"]),
    ("t2i", ["source.kind=gaussian"]),
    ("caption", []),
    ("caption", ["caption.joint=true"]),
    ("caption", ["loss.encoder=contrastive", "loss.encoder_target=text"]),
    ("caption", ["loss.encoder=reconstruction", "loss.encoder_target=image", "caption.reading=0"]),
    ("caption", ["caption.reading=1", "caption.joint=true", "caption.conv_stem=true"]),
    ("caption", ["caption.autoencoder.layout=patches", "caption.autoencoder.encoder_depth=0"]),
    ("caption", ["source.kind=gaussian"]),
    ("depth", []),
    ("depth", ["source.kind=deterministic"]),
    ("depth", ["source.kind=gaussian"]),
    ("sr", []),
    ("sr", ["source.kind=variational"]),
    ("sr", ["source.kind=gaussian"]),
    ("t2i", ["source.condition=true"]),
    ("sr", ["sr.trunk=residual", "source.kind=variational", "loss.mean_weight=1"]),
]


@pytest.fixture
def prepared(tiny_settings):
    """prepared(task, overrides): a task that learned its parts from a few scenes, with its examples."""

    def make(name: str, overrides: list[str]) -> tuple[Task, list[object]]:
        config = load_config(f"{name}_tiny", [*tiny_settings(name), "guidance.drop=0.4", *overrides])
        kind = task_class(name)
        examples = kind.dataset(config, "train")
        task = kind.learn(config, examples, lambda line: None)
        return task, [examples[(0, index)] for index in range(8)]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2i", "caption"])
def test_captions_of_any_length_make_batches_of_one_shape(prepared, name: str) -> None:
    task, examples = prepared(name, [])
    shapes = []
    for caption in ("red", "a red cube left of a large blue metal sphere, " * 20):
        batch = task.prepare(task.collate([{**example, "caption": caption} for example in examples]))
        assert batch.alignment is not None
        tensors = (batch.features, batch.target, batch.alignment, *(() if batch.mask is None else (batch.mask,)))
        shapes.append([tensor.shape for tensor in tensors])
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"), VARIANTS, ids=lambda value: "+".join(value) if isinstance(value, list) else value
)
def test_gradients_reach_every_parameter(prepared, name: str, overrides: list[str]) -> None:
    task, examples = prepared(name, overrides)
    torch.manual_seed(0)
    objective = task.build_objective(task.build_model())
    with torch.no_grad():  # a fresh DiT is zero in many places, where no gradient passes
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = task.prepare(task.collate(examples))
    losses = objective(batch, training_noise(0, 0, range(8), batch.target.shape[1:]))
    assert losses["loss"].isfinite()
    losses["loss"].backward()
    for key, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, key
        if _reads_second_half(key) and objective.model.source_encoder.kind != "variational":
            continue
        assert parameter.grad.abs().sum() > 0, key


def _reads_second_half(key: str) -> bool:
    """Parameters that only make the log-variance, which only a variational source reads."""
    return "log_var" in key


@pytest.mark.parametrize("name", task_names())
def test_outputs_do_not_depend_on_the_batch(tiny_run, name: str) -> None:
    pipe = load(tiny_run(name))
    cases = pipe.task.scoring().cases(pipe.dataset("test", limit=4), 4).all()
    inputs, ids = [case.input for case in cases], [case.id for case in cases]
    together = pipe.outputs(inputs, ids, seed=3)
    backwards = pipe.outputs(inputs[::-1], ids[::-1], seed=3)[::-1]
    alone = [pipe.outputs([value], [name], seed=3)[0] for value, name in zip(inputs, ids, strict=True)]
    for a, b, c in zip(together, backwards, alone, strict=True):
        if isinstance(a, str):
            assert a == b == c
        else:
            np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1.01 if a.dtype == np.uint8 else 1e-4)
            np.testing.assert_allclose(a.astype(float), c.astype(float), atol=1.01 if a.dtype == np.uint8 else 1e-4)


@pytest.mark.parametrize("name", task_names())
def test_a_saved_pipeline_is_the_same(tiny_run, tmp_path: Path, name: str) -> None:
    pipe = load(tiny_run(name))
    again = load(pipe.save(tmp_path / "copy"))
    (case,) = pipe.task.scoring().cases(pipe.dataset("test", limit=1), 1).all()
    (a,), (b,) = pipe.outputs([case.input], ["x"], 0), again.outputs([case.input], ["x"], 0)
    assert a == b if isinstance(a, str) else np.array_equal(a, b)


@pytest.mark.parametrize("name", [name for name in shipped() if not is_joint(name)])
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert shipped()[name].read_text().startswith("# ")
    assert build(type(config), config.model_dump()) == config


@pytest.mark.parametrize("name", task_names())
def test_validation_examples_are_the_items_as_they_are(tiny_settings, name: str) -> None:
    """Other seeds of the augmentation change training examples, and no picture of a validation example."""
    changed = {"train": False, "val": False}
    for split in changed:
        for setting in (["seed=0"], ["seed=1"]):
            more = ["depth.augmentation.crop=0.5", "depth.augmentation.colour=0.3"] if name == "depth" else []
            config = load_config(f"{name}_tiny", [*tiny_settings(name), *more, *setting])
            examples = task_class(name).dataset(config, split, "scenes", limit=6)
            pictures = [
                value
                for example in examples.first(6)
                for key, value in example.items()
                if isinstance(value, torch.Tensor)
            ]
            if setting == ["seed=0"]:
                before = pictures
        changed[split] = any(not torch.equal(a, b) for a, b in zip(before, pictures, strict=True))
    assert changed["train"] == (name in ("depth", "sr")), "the others draw captions alone"
    assert not changed["val"]
