"""Distances equal their formulas, do not depend on batches, and are called FID only when Inception measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.benchmarks.evaluation import distances as distribution
from crossflow.benchmarks.evaluation import networks
from crossflow.benchmarks.evaluation.distances import (
    Statistics,
    class_score,
    distances,
    frechet_distance,
    kernel_distance,
)
from crossflow.benchmarks.evaluation.evaluate import evaluate
from crossflow.benchmarks.evaluation.networks import feature_network, lpips
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.sample import load

TINY = "timm:test_resnet@random"


def features(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, 6)) * [1, 2, 3, 1, 1, 0.5] + shift).astype(np.float32)


def statistics(*batches: np.ndarray) -> Statistics:
    found = Statistics()
    for batch in batches:
        found.add(batch)
    return found


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_frechet_distance_equals_the_formula_in_any_batches(shift):
    a, b = features(200, 0), features(150, 1, shift)
    expected = by_hand(a, b)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)
    parts = statistics(a[:7], a[7:120], a[120:]), statistics(b[:1], b[1:])
    assert frechet_distance(*parts) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_unbiased_mmd_and_repeats():
    a, b = features(60, 0), features(60, 1, 1.0)
    kernel = lambda x, y: (x.astype(np.float64) @ y.T.astype(np.float64) / 6 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (60 * 59)  # noqa: E731
    expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert kernel_distance(statistics(a), statistics(b), 0) == pytest.approx(expected, rel=1e-4)
    assert kernel_distance(statistics(a), statistics(b), 5) == kernel_distance(statistics(a), statistics(b), 5)


def test_class_score_of_known_logits():
    sure = torch.eye(4).repeat(1000, 1) * 100
    assert class_score(sure, 0) == pytest.approx(4, rel=0.02)
    assert class_score(torch.zeros(40, 4), 0) == pytest.approx(1)


def test_names_tell_whether_inception_measured():
    batches = [{"features": features(40, 0), "logits": features(40, 2)}]
    real = statistics(features(40, 1))
    numbers = ("fid", "kid", "is")
    assert set(distances(numbers, batches, real, True)[0]) == {"fid", "kid", "is"}
    others, notes = distances(numbers, batches, real, False)
    assert set(others) == {"frechet_distance", "kernel_distance", "class_score"}
    assert notes == []
    few = [{"features": features(4, 0)}]
    values, notes = distances(("fid", "is"), few, real, False)
    assert set(values) == {"frechet_distance"}
    assert "does not classify" in notes[0]
    assert "fewer than the 6 features" in notes[1]
    with pytest.raises(UserError, match="two pictures"):
        distances(("fid",), [], real, True)
    with pytest.raises(UserError, match="another network"):
        distances(("fid",), [{"features": features(9, 0)[:, :3]}], real, True)


def test_one_of_several_processes_computes_alone(monkeypatch):
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    batches = [{"features": features(40, 0), "logits": features(40, 2)}]
    values, _ = distances(("fid", "kid", "is"), batches, statistics(features(40, 1)), True)
    assert set(values) == {"fid", "kid", "is"}


def test_statistics_are_kept_whole(tmp_path: Path):
    one = statistics(features(30, 0))
    one.about = {"network": "tiny", "weights": "x"}
    one.save(tmp_path / "s.safetensors")
    other = distribution.read_statistics(tmp_path / "s.safetensors")
    assert other.about == one.about
    assert other.count == 30
    assert frechet_distance(one, other) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(other.features(), features(30, 0))
    (tmp_path / "s.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="no statistics"):
        distribution.read_statistics(tmp_path / "s.safetensors")


def test_a_timm_network_is_known_by_its_weights(tmp_path: Path):
    network = feature_network(TINY)
    assert not network.is_inception
    assert "never trained" in network.words
    assert network.checksum == feature_network(TINY).checksum
    pictures = [np.random.default_rng(k).integers(0, 255, (40, 40 + k, 3), dtype=np.uint8) for k in range(3)]
    together = network(pictures)["features"]
    for k, picture in enumerate(pictures):
        np.testing.assert_allclose(network([picture])["features"][0], together[k], atol=1e-5)
    torch.save(network.network.state_dict(), tmp_path / "w.pth")
    again = feature_network(f"timm:test_resnet={tmp_path / 'w.pth'}")
    assert again.checksum == network.checksum
    np.testing.assert_allclose(again(pictures)["features"], together, atol=1e-5)


def test_networks_that_cannot_be_had_say_what_to_put_where(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"{networks.INCEPTION_FILE}.*put the file there.*not FID"):
        feature_network("inception")
    with pytest.raises(UserError, match=r"no file.*gone"):
        feature_network("timm:test_resnet=gone.pth")
    with pytest.raises(UserError, match="timm network"):
        feature_network("timm:resnot50")
    with pytest.raises(UserError, match="unknown"):
        feature_network("clip")
    with pytest.raises(UserError, match=r"alexnet-owt.*lpips=alex=FILE"):
        lpips("alex")
    (tmp_path / "bad.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="cannot be read as weights"):
        feature_network(f"inception={tmp_path / 'bad.pth'}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        feature_network(f"timm:test_resnet={tmp_path / 'other.pth'}")


def folder_of_pictures(folder: Path, count: int) -> str:
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((66, 64 - (number == 0) * 40)).save(folder / f"{number}.png")
    return f"folder:{folder}@all"


def test_a_protocol_with_a_distance_runs_offline_and_its_statistics_are_carried(tiny_run, tmp_path: Path, capsys):
    rules = tmp_path / "mini.yaml"
    rules.write_text(
        "extends: imagenet-64-256\nsplit: all\nnetworks: {features: timm:test_resnet@random}\nsr: {crop: 32}\n"
        "distribution: {size: 32, numbers: [fid, kid, is]}\n"
    )
    spec, pipe = folder_of_pictures(tmp_path / "data", 6), load(tiny_run("sr"))
    protocol = load_protocol(rules)
    options = {"spec": spec, "protocol": protocol}
    one = evaluate(pipe, folder=tmp_path / "one", settings={"batch_size": 1}, **options)
    assert {"frechet_distance", "kernel_distance", "class_score", "psnr_rgb"} <= set(one.scores.values)
    assert "fid" not in one.scores.values
    assert one.scores.values["num_items"] == 5
    assert one.manifest["bad_items"] == {"0.png": "too small to be scored"}
    assert len(one.manifest["networks"]["features"]) == 64
    assert one.manifest["real_statistics"]["count"] == 5
    assert any("not FID" in note for note in one.scores.notes)
    saved = tmp_path / "real.safetensors"
    argv = ["statistics", "--protocol", str(rules), "--data", spec, "--output", str(saved)]
    assert main(argv) == 0
    other = evaluate(pipe, folder=tmp_path / "other", settings={"batch_size": 4}, statistics=saved, **options)
    assert one.scores.values == pytest.approx(other.scores.values, rel=1e-4, abs=1e-4)
    assert main([*argv, "--network", "features=timm:test_vit@random", "--output", str(tmp_path / "vit")]) == 0
    with pytest.raises(UserError, match="not by the same weights"):
        evaluate(pipe, folder=tmp_path / "x", statistics=tmp_path / "vit", **options)
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["manifest"]["protocol"]["name"] == "mini"


@pytest.mark.slow
def test_inception_is_read_without_running_anything_and_is_called_fid(tmp_path: Path, monkeypatch):
    """The architecture with random weights, saved as the published file is."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        random = kind("inception", ["2048", "logits_unbiased"])
    torch.save(random.state_dict(), tmp_path / "w.pth")
    network = feature_network(f"inception={tmp_path / 'w.pth'}")
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    found = network([picture, picture])
    expected = random(torch.from_numpy(picture).permute(2, 0, 1)[None])
    np.testing.assert_allclose(found["features"][0], expected[0][0].numpy(), atol=1e-5)
    assert found["logits"].shape == (2, 1008)
    assert network.is_inception


@pytest.mark.slow
def test_lpips_takes_its_backbone_from_a_file(tmp_path: Path):
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision import models

    torch.manual_seed(0)
    backbone = models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alex.pth")
    distance, checksum = lpips(f"alex={tmp_path / 'alex.pth'}")
    a, b = (np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8) for k in range(2))
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, b) > 1e-4
    reference = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    loaded = {
        f"net.slice{s}.{n}.{kind}" for s, n in ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10)) for kind in ("weight", "bias")
    }
    assert loaded <= set(reference.state_dict())
    reference.load_state_dict(
        {name: backbone.state_dict()["features." + name.split(".", 2)[2]] for name in loaded}, strict=False
    )
    pair = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (a, b)]
    with torch.no_grad():
        assert distance(a, b) == pytest.approx(float(reference(*pair)), abs=1e-6)
    assert len(checksum) == 64
