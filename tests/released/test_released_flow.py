"""The released flow models: equal to the reference networks, complete or refused, and converted back bit for bit.

The recorded numbers are every k-th output value of the reference networks, k = max(1, number of values // 300) | 1.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from crossflow.core import losses
from crossflow.core.backbones.dit import DiT
from crossflow.core.errors import UserError
from crossflow.core.objective import Objective
from crossflow.core.paths import LinearPath
from crossflow.core.sampling import generate
from crossflow.core.settings import build
from crossflow.core.source import Posterior
from crossflow.core.weights import shapes_only
from crossflow.released import expected, from_reference, settings, to_reference
from crossflow.tasks import task_class

DATA = os.environ.get("CROSSFLOW_TEST_DATA")
GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = json.loads((GOLDEN / "released_flow.json").read_text())
EXACT = 1e-5
TOLERANCES = {"euler_step_in_dsigma": 2e-5, "euler_step_in_dt": 2e-5}
ADAPTOR = ("context_encoder.adaptor.fc1.weight",)


def shapes_of(name):
    """Keys and shapes of a fixture; only FlowTok's recorded file has a contrastive temperature."""
    about = FIXTURES[name]
    shapes = expected(about["kind"], about["config"], ADAPTOR if about["adaptor"] else ())
    return {key: shape for key, shape in shapes.items() if key != "open_clip.logit_scale"}


@pytest.fixture(scope="module")
def loaded(recipe):
    """loaded(NAME): (model, the reference's tensors by recipe), made once."""
    ready = {}

    def load(name):
        if name not in ready:
            about, state = FIXTURES[name], recipe.weights(shapes_of(name))
            ready[name] = from_reference(about["kind"], state, about["config"]), state
        return ready[name]

    return load


@pytest.fixture(scope="module")
def computed(recipe, recorded, loaded):
    """computed(NAME): (inputs by recipe and recorded values by name, our outputs from the inputs), made once."""
    ready = {}

    def compute(name):
        if name not in ready:
            about, prefix = FIXTURES[name], f"{name}."
            inputs = {key: recipe.tensor_of(f"{name}/{key}", shape) for key, shape in about["inputs"].items()}
            tensors = recorded("released_flow").items()
            right = {key.removeprefix(prefix): value for key, value in tensors if key.startswith(prefix)}
            ready[name] = inputs, right, outputs(loaded(name)[0], inputs | right, about["sampler"])
        return ready[name]

    return compute


@torch.no_grad()
def outputs(model, inputs, sampler):
    """All outputs that a fixture records, from its inputs."""
    objective, results = model.objective, {}
    posterior = model.source_encoder(inputs["context"], inputs.get("context_mask"))
    results |= {"mu": posterior.mean.flatten(1), "logvar": posterior.log_var.flatten(1)}
    rows = torch.arange(len(inputs["x"]))
    indicators = {"cond": rows < 0, "uncond": rows >= 0, "mixed": rows % 2 == 0}
    for i in (0, 1):
        for indicator, flags in indicators.items() if f"t{i}" in inputs else ():
            velocities = model.velocities(inputs["x"], inputs[f"t{i}"], flags)
            if isinstance(model.backbone, DiT):
                (results[f"v{i}_{indicator}"],) = velocities
            else:
                results |= {f"v{i}_{indicator}_stage{j}": velocity for j, velocity in enumerate(velocities)}
            assert torch.equal(model.velocity(inputs["x"], inputs[f"t{i}"], flags), velocities[-1])
    end = generate(model, inputs["z0"], steps=sampler["steps"], guidance=sampler["scale"], time_grid="released")
    results |= {"euler_step_in_dsigma": end, "euler_step_in_dt": end}
    if "x1" in inputs:
        point = LinearPath()(inputs["z0"], inputs["x1"], inputs["loss_t"])
        velocities = model.velocities(point.z_t, point.t, rows < 0)
        coefficients = list(objective.settings.coefficients)
        loss = losses.multi_resolution_loss(velocities, point.velocity, coefficients)
        results |= {"x_t": point.z_t, "velocity": point.velocity, "loss_diff": loss}
        log_ten = torch.tensor(math.log(10))
        results["clip_loss_scale10"] = losses.clip_contrastive_loss(inputs["z0"], inputs["img_feat"], log_ten)
        results["image_projection"] = objective.project_image(inputs["siglip_feat"])
    elif objective.settings.encoder_target == "tokens":
        results["context_projection"] = objective.project_text(inputs["context"])
        results["contrastive_loss"] = losses.clip_contrastive_loss(
            inputs["z0"], results["context_projection"], objective.log_temperature
        )
    return results


def largest_errors(results, right, pick):
    """{tensor: largest error}; `pick` selects the values of an output that are recorded."""
    return {name: (pick(value) - right[name].flatten()).abs().max().item() for name, value in results.items()}


def assert_small(errors):
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES.get(name, EXACT)}
    assert not wrong


def sampled(value):
    return value.flatten()[:: max(1, value.numel() // 300) | 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_networks_equal_the_reference(name, computed):
    _, right, results = computed(name)
    left = set(right) - set(results) - {"t0", "t1", "loss_t", "context_mask", "siglip_feat"}
    assert left <= {"kl_standard", "kl_official", "kl_official_sum"}
    assert_small(largest_errors(results, right, sampled))


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="needs the whole fixtures")
@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_equals_the_fixture(name, computed):
    from safetensors.torch import load_file

    folder = Path(DATA) / "golden"
    right, about = load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
    assert {key: list(shape) for key, shape in shapes_of(name).items()} == about["shapes"]
    inputs, recorded, results = computed(name)
    input_names = {"t0", "t1", "loss_t", "context_mask", "siglip_feat", "context", "x", "x1", "z0", "img_feat"}
    assert all(torch.equal((recorded | inputs)[key], right[key]) for key in input_names & right.keys())
    errors = largest_errors(results, right, torch.Tensor.flatten)
    posterior = Posterior(right["mu"], right["logvar"])
    relative = {}
    if "kl_standard" in right:
        for key, form in {"kl_standard": "standard", "kl_official": "released"}.items():
            relative[key] = (posterior.kl(form) / right[key] - 1).abs().max().item()
    if "kl_official_sum" in right:
        relative["kl_official_sum"] = (posterior.kl("released").sum() / right["kl_official_sum"] - 1).abs().item()
    assert set(right) - input_names == set(errors) | set(relative)
    assert_small(errors)
    assert all(error <= 1e-6 for error in relative.values()), relative


def test_both_kl_forms_as_recorded(recorded):
    """On moments that are recorded whole nowhere else: FlowTok's sum over the batch is the sum of its samples."""
    mean, log_var = torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, -1.0]])
    right = -0.5 * (1 - 1 - 1.2**6 - math.exp(-1) + 1 - 1)
    assert losses.kl_released(mean, log_var).item() == pytest.approx(right)
    assert losses.kl_standard(mean, log_var).item() == pytest.approx(-0.5 * (1 - 1 - 16 - math.exp(-1) + 1 - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crossflow_dimr_256_small", "flowtok_small", "crossflow_dit_512_small"])
def test_converting_back_is_exact(name, loaded):
    model, state = loaded(name)
    back = to_reference(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert model.reference.dropped == {}


def test_heads_belong_to_the_objective_and_not_to_the_generator(loaded):
    model, _ = loaded("flowtok_small")
    assert isinstance(model.objective, Objective)
    assert not any("alignment" in name or "temperature" in name for name in model.state_dict())
    assert not model.training
    with pytest.raises(UserError, match="no head for image"):
        model.objective.project_image(torch.zeros(1, 4))


@pytest.mark.slow
def test_the_temperature_of_a_file_survives(recipe):
    about, state = FIXTURES["crossflow_dimr_256_small"], recipe.weights(shapes_of("crossflow_dimr_256_small"))
    without = from_reference("dimr", dict(state), about["config"])
    assert without.objective.log_temperature.exp().item() == pytest.approx(1 / 0.07)
    assert "open_clip.logit_scale" in without.reference.absent
    state["open_clip.logit_scale"] = torch.tensor(3.0)
    restored = from_reference("dimr", state, about["config"])
    assert restored.objective.log_temperature.item() == 3.0
    assert torch.equal(to_reference(restored)["open_clip.logit_scale"], torch.tensor(3.0))


def test_missing_mismatched_and_unknown_keys_are_all_listed():
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes_of("flowtok_small").items()}
    del state["context_encoder.layers.1.attn.W_K.weight"], state["pos_embed"]
    state["t_embedder.mlp.0.bias"] = torch.empty(3, device="meta")
    state["extra.weight"] = torch.empty(1, device="meta")
    with pytest.raises(UserError) as error:
        from_reference("flowtok", state, FIXTURES["flowtok_small"]["config"])
    message = str(error.value)
    assert "2 missing" in message
    assert "pos_embed" in message
    assert "context_encoder.layers.1.attn.W_K.weight" in message
    assert "t_embedder.mlp.0.bias is (3,), not (72,)" in message
    assert "1 unknown: extra.weight" in message


def test_variants_that_were_not_released_and_incomplete_settings_are_refused():
    config = FIXTURES["crossflow_dimr_256_small"]["config"]
    with pytest.raises(UserError, match="norm_type = 'RMSN'"):
        from_reference("dimr", {}, config | {"norm_type": "RMSN"})
    with pytest.raises(UserError, match="lacks 'clip_dim'"):
        from_reference("dimr", {}, {key: value for key, value in config.items() if key != "clip_dim"})
    with pytest.raises(UserError, match="learn_sigma = True"):
        from_reference("flowtok", {}, FIXTURES["flowtok_small"]["config"] | {"learn_sigma": True})
    with pytest.raises(UserError, match="Did you mean 'dimr'"):
        from_reference("dimmr", {}, config)


@pytest.mark.skipif(DATA is None, reason="needs the key lists of the released files")
@pytest.mark.parametrize(
    ("name", "kind", "flow", "text"),
    [
        ("t2i_256px_clip_dimr", "dimr", 950_778_890, 110_156_512),
        pytest.param("t2i_256px_t5_dimr", "dimr", 950_778_890, 165_197_440, marks=pytest.mark.slow),
        pytest.param("t2i_512px_clip_dimr", "dimr", 985_439_246, 97_482_344, marks=pytest.mark.slow),
        pytest.param("t2i_512px_t5_dimr", "dimr", 985_439_246, 142_430_728, marks=pytest.mark.slow),
        ("t2i_512px_t5_dit", "dit", None, 142_430_728),
        ("FlowTok-XL", "flowtok", None, 23_665_184),
        pytest.param("FlowTok-H", "flowtok", None, 23_665_184, marks=pytest.mark.slow),
    ],
)
def test_every_key_of_the_released_files_is_used(name, kind, flow, text):
    """On the meta device: no key is missing, and only the image tower is dropped."""
    about = json.loads((Path(DATA) / f"golden/checkpoints/{name}.json").read_text())
    assert about["kind"] == kind
    state = {key: torch.empty(shape, device="meta") for key, shape in about["shapes"].items()}
    model = from_reference(kind, state, about["config"])
    counts = model.num_parameters()
    assert counts["source encoder"] == text
    assert flow is None or counts["flow"] == flow
    back = to_reference(model)
    left = state.keys() - back.keys()
    assert left == set(model.reference.dropped) == {key for key in state if key.startswith("open_clip.visual.")}
    assert {key: list(tensor.shape) for key, tensor in back.items()} == {
        key: shape for key, shape in about["shapes"].items() if key not in left
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crossflow_dimr_512_small", "flowtok_small"])
def test_settings_are_a_recipe_that_builds_the_same_network(name, loaded):
    about = FIXTURES[name]
    recipe = settings(about["kind"], about["config"], shapes_of(name))
    task = task_class("t2i").outline(build(task_class("t2i").Config, recipe))
    with shapes_only():
        built = task.build_model()
    reference = loaded(name)[0]
    assert {key: value.shape for key, value in built.state_dict().items()} == {
        key: value.shape for key, value in reference.state_dict().items()
    }
