"""Every shipped recipe builds on the meta device, and those of the papers have the papers' parameter counts."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from crossflow.core.settings import shipped
from crossflow.core.training.optim import decay_groups
from crossflow.core.weights import shapes_only
from crossflow.engine.joint.config import is_joint
from crossflow.tasks import load_config, task_class

SINGLE = [name for name in shipped() if not is_joint(name)]
DATA = os.environ.get("CROSSFLOW_TEST_DATA")
M = 1e6
# Name: (flow network, encoder of the source, total), as in the papers and released files; those of OURS within 2 %;
# None where no paper gives a number.
PAPERS = {
    "t2i_256_clip_dimr": (950.8 * M, 110 * M, None),
    "t2i_256_t5_dimr": (950.8 * M, 165 * M, None),
    "t2i_512_clip_dimr": (985.4 * M, 97 * M, None),
    "t2i_512_t5_dimr": (985.4 * M, 142 * M, None),
    "t2i_512_t5_dit": (None, 142 * M, None),
    "flowtok_b": (None, None, 153 * M),
    "flowtok_xl": (None, None, 698 * M),
    "flowtok_h": (None, None, 1092 * M),
    "t2i_256_dimr_70m": (70 * M, None, None),
    "caption_351m": (351 * M, None, None),
    "depth_527m": (527 * M, None, None),
    "sr_505m": (505 * M, None, None),
}
OWN = {"t2i_256_dimr_70m", "caption_351m", "depth_527m", "sr_505m"}
IMAGE_HEADS = {"t2i_256_clip_dimr": 21 * M, "t2i_512_t5_dimr": 22 * M, "t2i_512_t5_dit": 22 * M}
FILES = {
    "t2i_256_clip_dimr": "t2i_256px_clip_dimr",
    "t2i_256_t5_dimr": "t2i_256px_t5_dimr",
    "t2i_512_clip_dimr": "t2i_512px_clip_dimr",
    "t2i_512_t5_dimr": "t2i_512px_t5_dimr",
    "t2i_512_t5_dit": "t2i_512px_t5_dit",
    "flowtok_xl": "FlowTok-XL",
    "flowtok_h": "FlowTok-H",
}


@functools.cache
def built(name):
    """(task, model) of a recipe, without memory, data or public networks; not to be modified."""
    config = load_config(name)
    task = task_class(config.task).outline(config)
    with shapes_only():
        return task, task.build_model()


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SINGLE) - {"caption_from_t2i"}))  # that one needs another run
def test_every_shipped_recipe_builds_on_the_meta_device(name):
    counts = built(name)[1].num_parameters()
    assert counts["flow"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_parameters_are_those_of_the_papers(name):
    task, model = built(name)
    counts = model.num_parameters()
    flow, encoder, everything = PAPERS[name]
    tolerance = 0.02 if name in OWN else 0.006
    if flow is not None:
        assert counts["flow"] == pytest.approx(flow, rel=tolerance)
    if encoder is not None:
        assert counts["source encoder"] == pytest.approx(encoder, rel=tolerance)
    if everything is not None:
        with shapes_only():
            assert num_parameters(task.build_objective(model)) == pytest.approx(everything, rel=tolerance)


@pytest.mark.parametrize("name", IMAGE_HEADS)
def test_image_heads_are_not_part_of_the_generator(name):
    task, model = built(name)
    with shapes_only():
        objective = task.build_objective(model)
    assert num_parameters(objective) - num_parameters(model) == pytest.approx(IMAGE_HEADS[name], rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="needs the key lists of the released files")
@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_the_network_of_its_released_file(name):
    from crossflow.released import from_reference

    about = json.loads((Path(DATA) / f"golden/checkpoints/{FILES[name]}.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in about["shapes"].items()}
    released, model = from_reference(about["kind"], state, about["config"]), built(name)[1]
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in released.state_dict().items()
    }
    assert released.source_encoder.kind == load_config(name).source.kind


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_declares_a_shape_that_no_paper_gives(name):
    declared = "this shape is ours" in shipped()[name].read_text()
    assert declared == (name in OWN)


def test_training_settings_are_those_of_the_papers():
    """Settings that no other test depends on."""
    t2i, flowtok = load_config("t2i_256_clip_dimr").train, load_config("flowtok_xl").train
    assert (t2i.batch_size, t2i.lr, t2i.warmup_steps, t2i.steps) == (1024, 1e-4, 5000, 600_000)
    assert (t2i.betas, t2i.weight_decay, t2i.ema) == ((0.9, 0.9), 0.03, 0.9999)
    assert load_config("t2i_512_clip_dimr").guidance.drop == 0.15
    assert load_config("t2i_512_t5_dit").guidance.drop == 0.1
    assert (flowtok.batch_size, flowtok.lr, flowtok.betas, flowtok.weight_decay) == (4096, 4e-4, (0.9, 0.95), 0.03)
    caption = load_config("caption_351m").train
    assert (caption.batch_size, caption.lr) == (256, 2e-4)
    assert caption.steps == 113_287 * 100 // 256
    depth = load_config("depth_527m").train
    assert (depth.batch_size, depth.lr, depth.final_lr, depth.schedule) == (64, 1e-4, 1e-8, "cosine")
    assert depth.steps == 24_231 * 50 // 64
    sr = load_config("sr_505m").train
    assert (sr.batch_size, sr.lr, sr.steps, sr.warmup_steps) == (512, 1e-4, 1_000_000, 5000)


MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def decayed_parameters(objective):
    """{name: whether it is the weight of a linear or convolutional layer} of the parameters under weight decay."""
    groups = decay_groups(objective, 0.1)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed
    return {
        f"{prefix}.{name}": isinstance(owner, MATRICES) and name == "weight"
        for prefix, owner in objective.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if id(parameter) in decayed
    }


@pytest.mark.parametrize("name", sorted(name for name in SINGLE if not name.startswith("caption")))
def test_weight_decay_acts_on_the_weights_of_linear_and_convolutional_layers_alone(name):
    task, model = built(name)
    with shapes_only():
        decayed = decayed_parameters(task.build_objective(model))
    assert [parameter for parameter, is_matrix in decayed.items() if not is_matrix] == []


@pytest.mark.slow
def test_queries_positions_and_tokens_of_captioning_are_not_decayed(tiny_run):
    """The text autoencoder's `mixing` is a matrix between patches and tokens, a linear map without a layer."""
    from crossflow.engine.sample import load

    pipe = load(tiny_run("caption"))
    decayed = decayed_parameters(
        nn.ModuleList([pipe.task.build_objective(pipe.model), pipe.task.text]).requires_grad_()
    )
    assert {name.split(".")[-1] for name, is_matrix in decayed.items() if not is_matrix} <= {"mixing"}
