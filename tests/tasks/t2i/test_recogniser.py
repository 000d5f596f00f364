"""The judge of scenes: what it can say, that it learns, that its cache is safe, and (slow) that it is right."""

import json
import logging
from unittest import mock

import numpy as np
import pytest
import torch

from crossflow.cli import main
from crossflow.data.scenes import OPPOSITE, PROMPT_KINDS, RELATIONS, make_scene, render, scene_seed
from crossflow.tasks.t2i import recogniser as module
from crossflow.tasks.t2i.metric import T2IMetric
from crossflow.tasks.t2i.recogniser import Detection, Training, accuracy, load_recogniser, stands

SCENES = [make_scene(scene_seed("val", index)) for index in range(60)]
SHORT = Training(num_scenes=48, steps=3, batch_size=16, width=8)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT", 20)


def perfect_output(truths):
    """What a network that makes no mistake would say."""
    parts = {
        "near": torch.where(truths["near"] == 1, 9.0, -9.0)[..., None],
        "offset": (truths["centre"] - module._middles()) * module.GRID,
        "distance": truths["distance"][..., None],
    }
    for name, values in module._ATTRIBUTES.items():
        parts[name] = torch.nn.functional.one_hot(truths[name], len(values)).float()
    return torch.cat([parts[name] for name in module._CHANNELS], -1)


def named(solid):
    return solid.shape, solid.colour, solid.size, solid.material


def test_cells_can_say_every_scene():
    """Truths read back give exactly the solids: no two of them ever share a cell."""
    for scene, detections in zip(SCENES, module._read(perfect_output(module._truths(SCENES))), strict=True):
        assert len(detections) == len(scene.objects)
        for solid in scene.objects:
            (match,) = [
                detection
                for detection in detections
                if (detection.x, detection.y) == pytest.approx(solid.centre, abs=1e-5)
            ]
            assert named(match) == named(solid)
            assert match.distance == pytest.approx(solid.y)


def test_cells_between_two_solids_are_silent():
    """Cells may say either only beside one solid: between two they would invent a third."""
    near = module._truths(SCENES)["near"]
    for scene, cells in zip(SCENES, near, strict=True):
        gaps = torch.stack([
            (module._middles() - torch.tensor(solid.centre)).abs().amax(-1) * module.GRID for solid in scene.objects
        ])  # fmt: skip
        assert ((cells == 1) == (gaps < module._REACH).any(0)).all()
        assert (cells[(gaps < module._EDGE).sum(0) > 1] >= 0).all()


def test_mirrored_truths_are_those_of_the_mirrored_picture():
    truths = module._mirror_truths(module._truths(SCENES), torch.ones(len(SCENES)) > 0)
    for scene, detections in zip(SCENES, module._read(perfect_output(truths)), strict=True):
        expected = sorted((1 - solid.centre[0], solid.centre[1], *named(solid)) for solid in scene.objects)
        assert [detection[2:] for detection in expected] == [
            named(detection) for detection in sorted(detections, key=lambda detection: detection.x)
        ]
        np.testing.assert_allclose(
            [detection[0] for detection in expected], sorted(detection.x for detection in detections), atol=1e-5
        )


def test_perfect_judge_has_perfect_accuracy():
    answers = module._read(perfect_output(module._truths(SCENES)))
    assert set(accuracy(lambda images: answers, SCENES).values()) == {1.0}
    assert set(accuracy(lambda images: [()] * len(images), SCENES).values()) == {0.0}


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_exclude_their_opposites_and_need_a_margin(relation):
    near, far = (Detection("cube", "red", "small", "metal", x, 0.5, y, 1.0) for x, y in ((0.2, 2.0), (0.8, 3.0)))
    assert stands(relation, near, far) is (relation in ("left of", "in front of"))
    assert stands(relation, near, far) is stands(OPPOSITE[relation], far, near)
    assert not stands(relation, near, near)


@pytest.mark.slow
def test_training_moves_the_network_and_leaves_global_chance_alone(quick):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    steps = []
    first = module.train_recogniser(SHORT, progress=lambda done, total: steps.append((done, total)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert steps == [(1, 3), (2, 3), (3, 3)]
    again = module.train_recogniser(SHORT)
    for name, weights in first.network.state_dict().items():
        assert torch.equal(weights, again.network.state_dict()[name]), name
    assert {"shape", "colour", "count", "relation", "training_seconds"} <= set(first.report)


@pytest.mark.slow
def test_loss_of_a_fixed_batch_falls():
    torch.manual_seed(0)
    images, truths = torch.from_numpy(render(SCENES, module.SIDE)[0]), module._truths(SCENES)
    still = torch.zeros(len(SCENES)) > 0
    network = module._Network(8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = module._loss(network(module._mirror(images, still)), truths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.slow
def test_every_parameter_gets_a_gradient():
    network = module._Network(8)
    images = module._mirror(torch.from_numpy(render(SCENES[:8], module.SIDE)[0]), torch.zeros(8) > 0)
    module._loss(network(images), module._truths(SCENES[:8])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [16, 32, 64, 100])
def test_pictures_of_any_size_are_taken(size):
    pixels = module._prepare(render(SCENES[:2], size)[0])
    assert pixels.shape == (2, 3, module.SIDE, module.SIDE)
    assert pixels.abs().max() < 1 + 1e-5
    native = module._prepare(render(SCENES[:2], module.SIDE)[0])
    assert (pixels - native).abs().mean() < 0.08


def test_what_is_no_picture_is_refused():
    judge = module.Recogniser(module._Network(8), {})
    with pytest.raises(ValueError, match="uint8"):
        judge(np.zeros((1, 32, 32, 3), np.float32))
    assert judge(np.zeros((0, 32, 32, 3), np.uint8)) == []


@pytest.mark.slow
def test_cache_gives_back_the_same_judge(quick, tmp_path, monkeypatch):
    first = load_recogniser(SHORT, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(module, "train_recogniser", None)  # a second training would fail
    second = load_recogniser(SHORT, cache=tmp_path)
    assert second.report == first.report
    images = render(SCENES, module.SIDE)[0]
    assert second(images) == first(images)


@pytest.mark.slow
def test_damaged_cache_file_is_replaced(quick, tmp_path, caplog):
    load_recogniser(SHORT, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        load_recogniser(SHORT, cache=tmp_path)
    assert "trained again" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1
    assert len(file.read_bytes()) == pytest.approx(len(whole), abs=100)


def test_cache_key_follows_training_and_world(monkeypatch):
    key = module._content_key(SHORT)
    assert key == module._content_key(SHORT)
    assert key != module._content_key(Training())
    monkeypatch.setattr(module, "render", lambda scenes, size: (np.zeros(3),))
    assert key != module._content_key(SHORT)


@pytest.fixture(scope="module")
def judge():
    """The judge that ships, which scores rest on. Where the world, its look or the training change, benchmarks/zoo.sh
    makes it again.
    """
    with mock.patch.object(module, "train_recogniser", None):  # a training would fail
        return load_recogniser()


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_judge_is_right_on_renders_it_has_not_seen(judge, size):
    scenes = [make_scene(scene_seed("test", index)) for index in range(1000)]
    measured = accuracy(judge, scenes, size)
    for name, expected in {"count": 0.97, "shape": 0.97, "colour": 0.99, "relation": 0.97}.items():
        assert measured[name] >= expected, (name, measured)
        assert measured[name] == pytest.approx(judge.report[name], abs=0.02)
    assert json.loads(json.dumps(judge.report)) == judge.report


@pytest.mark.slow
def test_real_pictures_of_what_prompts_ask_score_nearly_one(judge):
    """Renders chosen to fulfil a prompt of each kind are judged right; judged by other prompts most are wrong."""
    from crossflow.data.scenes import geneval_prompts
    from crossflow.tasks.t2i.metric import fulfils

    scenes = [make_scene(scene_seed("test", index)) for index in range(1500)]
    truths = [tuple(Detection(*named(s), *s.centre, s.y, 1.0) for s in scene.objects) for scene in scenes]
    clear = [len(scene.relations) == 2 * len(scene.objects) * (len(scene.objects) - 1) for scene in scenes]
    metric = T2IMetric(judge=judge)
    for kind in PROMPT_KINDS:
        for number, prompt in enumerate(geneval_prompts(kind, 0, 25)):
            fits = [
                i
                for i, detections in enumerate(truths)
                if fulfils(prompt, detections) and (clear[i] or kind != "position")
            ]
            if fits:
                metric.add(f"{kind}/{number}", render([scenes[fits[number % len(fits)]]], 32)[0][0], prompt)
    values = metric.compute()
    assert values["overall"] > 0.93, values
    assert values["shuffled_overall"] < 0.5
    assert values["judge_shape"] == judge.report["shape"]


@pytest.mark.slow
def test_the_judge_is_loaded_when_the_trained_run_is_scored(tmp_path, tiny_settings, monkeypatch):
    run = tmp_path / "run"
    steps = []

    def load_recogniser():
        steps.extend(path.name for path in (run / "checkpoints").iterdir())
        return lambda images: [()] * len(images)

    monkeypatch.setattr("crossflow.tasks.t2i.metric.load_recogniser", load_recogniser)
    settings = [*tiny_settings("t2i"), "train.eval_every=1", "train.sample_every=1"]
    assert main(["train", "--task", "t2i", "--output", str(run), *settings]) == 0
    assert steps == ["step_00000002"]
    assert list((run / "samples").glob("step_*.png"))
