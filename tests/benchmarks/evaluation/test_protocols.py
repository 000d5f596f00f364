"""Every shipped protocol is valid, is listed, and prepares pictures and cases as it says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.benchmarks.evaluation.plan import plan
from crossflow.benchmarks.evaluation.protocol import load_protocol, protocols
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.data.images import save_depth_png, save_png
from crossflow.data.readers import with_options
from crossflow.tasks.depth.scoring import bottom_centre

NAMES = (
    "b100-x4", "coco-fid10k", "coco-fid30k", "diode-affine", "eth3d-affine", "geneval", "imagenet-64-256", "karpathy",
    "kitti-affine", "kitti-eigen", "mjhq-30k", "nyu", "nyu-affine", "scannet-affine", "scenes-geneval", "set14-x4",
    "set5-x4", "urban100-x4",
)  # fmt: skip


@pytest.mark.slow
def test_all_shipped_protocols_are_listed(capsys) -> None:
    assert tuple(protocols()) == NAMES
    assert main(["list", "protocols"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_protocol_names_its_data_and_its_numbers(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.headline
    assert protocol.data or protocol.layout
    assert protocol.num_items or name == "imagenet-64-256"
    if protocol.distribution is not None:
        assert "features" in protocol.networks


def test_unknown_protocols_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'set5-x4'"):
        load_protocol("set5-x3")
    (tmp_path / "mine.yaml").write_text("extends: nyu\ndepth: {cropp: eigen}")
    with pytest.raises(UserError, match=r"depth\.crop"):
        load_protocol(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("extends: mine")
    with pytest.raises(UserError, match="extends itself"):
        load_protocol(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"The protocol file .* does not exist"):
        load_protocol(tmp_path / "none.yaml")


def test_a_protocol_of_the_user_changes_only_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: kitti-affine\ndepth: {space: disparity}")
    rules = load_protocol(tmp_path / "mine.yaml").rules
    assert (rules.alignment, rules.space, rules.crop, rules.max_depth) == ("affine", "disparity", "eigen", 80)


def test_the_kitti_crop_is_at_the_bottom_centre() -> None:
    picture = np.arange(375 * 1242).reshape(375, 1242)
    cut = bottom_centre(picture, 352, 1216)
    assert cut.shape == (352, 1216)
    assert cut[-1, 0] == picture[-1, 13]
    assert bottom_centre(picture[:100, :100], 352, 1216).shape == (100, 100)


def test_a_benchmark_reader_leaves_crop_and_cap_to_the_protocol() -> None:
    settings = load_protocol("kitti-affine").reader
    assert with_options("kitti:data/kitti", settings) == "kitti:data/kitti?crop=none&cap=none"
    assert with_options("kitti:k?cap=50@test", settings) == "kitti:k?cap=50&crop=none@test"
    assert with_options("eth3d:e", settings) == "eth3d:e?cap=none"
    coco = load_protocol("coco-fid30k").reader
    assert with_options("coco:c", coco) == with_options(with_options("coco:c", coco), coco) == "coco:c?year=2014"
    for other in ("pairs:rooms@all", "folder:a", "rooms"):
        assert with_options(other, settings) == other


@pytest.fixture
def rooms(tmp_path: Path) -> str:
    """Four pictures with depth, 60 x 80."""
    for kind in ("rgb", "depth"):
        (tmp_path / kind).mkdir()
    for number in range(4):
        random = np.random.default_rng(number)
        save_png(random.integers(0, 255, (60, 80, 3), dtype=np.uint8), tmp_path / "rgb" / f"{number}.png")
        save_depth_png(random.uniform(1, 12, (60, 80)).astype(np.float32), tmp_path / "depth" / f"{number}.png")
    return f"pairs:{tmp_path}@all"


def test_depth_is_scored_on_whole_pictures_by_the_protocols_rules(tiny_run, rooms: str) -> None:
    from crossflow.engine.sample import load
    from crossflow.tasks.depth.metric import depth_errors

    pipe = load(tiny_run("depth"))
    work = plan(pipe, load_protocol("nyu"), rooms, "all", 10)
    (_, case), *others = work.cases.at(range(4))
    assert len(others) == 3
    assert case.input.shape == (60, 80, 3)
    assert case.truth.shape == (60, 80)
    guess = np.full((60, 80), 3.0, np.float32)
    row = work.scoring.metric().add("0", guess, case.truth)
    inside = case.truth[5:58, 5:75]  # 45/480, 471/480, 41/640, 601/640 of the sides
    counted = inside[(inside > 1e-3) & (inside < 10)].astype(np.float64)
    assert row["num_pixels"] == counted.size
    assert row["abs_rel"] == pytest.approx(depth_errors(np.full(counted.size, 3.0), counted)["abs_rel"], abs=1e-9)


def test_an_affine_protocol_forgives_scale_and_shift_exactly(tiny_run, rooms: str) -> None:
    from crossflow.engine.sample import load

    pipe = load(tiny_run("depth"))
    work = plan(pipe, load_protocol("eth3d-affine"), rooms, "all", 10)
    metric = work.scoring.metric()
    for case in work.cases:
        row = metric.add(case.id, 0.37 * case.truth.astype(np.float64) - 5, case.truth)
        assert row["abs_rel"] == pytest.approx(0, abs=1e-6)
        assert row["delta1"] == 1


def test_the_depth_protocol_evaluates_a_run(tiny_run, rooms: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["evaluate", "--checkpoint", str(tiny_run("depth")), "--protocol", "nyu-affine", "--data", rooms]
    assert main([*argv, "--split", "all", "--output", str(out)]) == 0
    content = json.loads((out / "metrics.json").read_text())
    assert content["scores"]["num_items"] == 4
    assert 0 < content["scores"]["abs_rel"] < 1
    assert content["manifest"]["protocol"]["depth"]["alignment"] == "affine"
    assert "shorter side" in content["manifest"]["resize"]


def test_a_protocol_without_its_data_is_refused(tiny_run, tmp_path: Path, capsys) -> None:
    argv = ["evaluate", "--checkpoint", str(tiny_run("depth")), "--protocol", "nyu-affine"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "nyu-affine needs its data: give --data" in capsys.readouterr().err


def test_pictures_are_cut_and_reduced_as_imagenet_64_256_says(tiny_run, tmp_path: Path) -> None:
    from crossflow.data.resize import imresize_matlab
    from crossflow.engine.sample import load

    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (300, 262, 3), dtype=np.uint8)
    save_png(picture, folder / "a.png")
    save_png(picture[:255], folder / "b.png")
    pipe = load(tiny_run("sr"))
    work = plan(pipe, load_protocol("imagenet-64-256"), f"folder:{folder}@all", "all", 9)
    ((number, case),) = work.cases.at(range(2))
    assert number == 0
    square = np.array(Image.fromarray(picture[19:281]).resize((256, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(case.truth, square)
    np.testing.assert_array_equal(case.input, imresize_matlab(square, 0.25))
    assert work.cases.bad == {"b.png": "too small to be scored"}


def test_each_prompt_of_geneval_is_drawn_four_times_with_different_noise(tiny_run, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from crossflow.core.noise import item_noise
    from crossflow.engine.sample import load

    path = tmp_path / "evaluation_metadata.jsonl"
    line = '{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}\n'
    path.write_text(line * 2)
    pipe = load(tiny_run("t2i"))
    asked: list[str] = []
    eyes = {"detector": SimpleNamespace(expect=asked.extend)}
    work = plan(pipe, load_protocol("geneval"), str(path), "test", 10**9, eyes)
    cases = list(work.cases)
    assert [case.id for case in cases] == [f"0000{n}/{k}" for n in range(2) for k in range(4)]
    noise = item_noise(0, [case.id for case in cases], (3,))
    assert len({tuple(row.tolist()) for row in noise}) == 8
    assert len(work.cases.fingerprint()) == 32
    assert asked == ["cat", "cat"]


def test_scored_cases_do_not_depend_on_the_seed_of_the_run(tiny_run, rooms: str, tmp_path: Path) -> None:
    from crossflow.engine.sample import Pipeline, load

    (tmp_path / "two.yaml").write_text("extends: nyu\nchoose: 2")
    ways = [("t2i", None, None), ("t2i", "scenes-geneval", None), ("depth", tmp_path / "two.yaml", rooms)]
    for name, protocol, spec in ways:
        rules = load_protocol(protocol) if protocol else None
        pipe = load(tiny_run(name))
        chosen = []
        for seed in range(4):
            task = type(pipe.task)(pipe.task.config.model_copy(update={"seed": seed}), pipe.task.parts)
            chosen.append(plan(Pipeline(task, pipe.model), rules, spec, "test", 12))
        cases = {tuple((case.id, str(case.input) if name == "t2i" else "") for case in each.cases) for each in chosen}
        assert len(cases) == 1


@pytest.mark.skipif("CROSSFLOW_TEST_DATA" not in os.environ, reason="needs the real pictures")
@pytest.mark.slow
def test_the_bicubic_row_of_b100_is_the_published_one(tiny_run) -> None:
    from crossflow.engine.sample import load

    spec = f"folder:{os.environ['CROSSFLOW_TEST_DATA']}/data/sr/B100@all"
    work = plan(load(tiny_run("sr")), load_protocol("b100-x4"), spec, "all", 10**9)
    metric = work.scoring.metric()
    trivial = work.scoring.trivial(lambda: None)
    for case in work.cases:
        metric.add(case.id, trivial(case), case.truth)
    values = metric.compute()
    assert values["num_items"] == 100
    assert values["psnr_y"] == pytest.approx(25.96, abs=0.05)
    assert values["ssim_y"] == pytest.approx(0.6675, abs=0.002)
