"""Statistics of real pictures: kept complete, sampled over all pictures, read from published files, resized alike."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.benchmarks.evaluation.distances import frechet_distance
from crossflow.benchmarks.evaluation.evaluate import evaluate
from crossflow.benchmarks.evaluation.feature_networks import FeatureNetwork, feature_network
from crossflow.benchmarks.evaluation.protocol import DistributionRules, load_protocol
from crossflow.benchmarks.evaluation.real_pictures import prepare
from crossflow.benchmarks.evaluation.statistics import Accumulator, Statistics, read_statistics
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.files import write_tensors
from crossflow.engine.sample import load

TINY = "timm:test_resnet@random"
WIDTH = 2048


def features(count: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def accumulated(values: np.ndarray, batch: int, **options: int) -> Statistics:
    accumulator = Accumulator(**options)
    for start in range(0, len(values), batch):
        accumulator.add(values[start : start + batch])
    return accumulator.statistics({"network": "tiny", "weights": "x"})


# -- accumulating


def test_the_sample_covers_all_pictures_for_any_batch_size() -> None:
    """The features are the numbers of the pictures."""
    numbers = np.arange(1000, dtype=np.float32)[:, None]
    sample = accumulated(numbers, 7, size=100).sample[:, 0]
    assert len(set(sample.tolist())) == 100
    assert (np.diff(sample) > 0).all()
    assert 300 < np.median(sample) < 700
    assert sample.max() > 900
    assert sample.min() < 100
    np.testing.assert_array_equal(sample, accumulated(numbers, 333, size=100).sample[:, 0])
    assert not np.array_equal(sample, accumulated(numbers, 7, size=100, seed=1).sample[:, 0])


def test_every_picture_is_equally_likely_in_the_sample() -> None:
    numbers = np.arange(40, dtype=np.float32)[:, None]
    counts = np.zeros(40)
    for seed in range(400):
        counts[accumulated(numbers, 6, size=10, seed=seed).sample[:, 0].astype(int)] += 1
    assert counts.sum() == 4000
    assert abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_few_pictures_are_all_in_the_sample_in_their_order() -> None:
    values = features(30, 0)
    statistics = accumulated(values, 7)
    np.testing.assert_array_equal(statistics.sample, values)
    np.testing.assert_allclose(statistics.mean, values.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), atol=1e-5)
    with pytest.raises(UserError, match="at least two pictures"):
        accumulated(values[:1], 7)


# -- files


def test_statistics_are_saved_completely(tmp_path: Path) -> None:
    statistics = accumulated(features(30, 0), 10)
    statistics.save(tmp_path / "s.safetensors")
    again = read_statistics(tmp_path / "s.safetensors")
    assert (again.about, again.count) == (statistics.about, 30)
    assert frechet_distance(statistics, again) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(again.sample, statistics.sample)
    (tmp_path / "s.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="does not contain statistics"):
        read_statistics(tmp_path / "s.safetensors")


def test_statistics_of_version_0_1_are_read_without_their_sample(tmp_path: Path) -> None:
    values = features(30, 0).astype(np.float64)
    sums = {"total": values.sum(0), "products": values.T @ values, "kept": values[:10].astype(np.float32)}
    write_tensors(tmp_path / "s.safetensors", sums, {"statistics": json.dumps({"count": 30, "network": "tiny"})})
    statistics = read_statistics(tmp_path / "s.safetensors")
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), atol=1e-6)
    assert (statistics.count, statistics.sample.shape) == (30, (0, 6))


def network(is_inception: bool, checksum: str = "x") -> FeatureNetwork:
    tiny_network = feature_network(TINY)
    tiny_network.is_inception, tiny_network.checksum = is_inception, checksum
    return tiny_network


@pytest.mark.slow
def test_published_statistics_are_read_and_belong_to_inception(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    mean, covariance = np.arange(WIDTH, dtype=np.float64), np.eye(WIDTH)
    np.savez(path, mu=mean, sigma=covariance, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    statistics = read_statistics(path)
    np.testing.assert_array_equal(statistics.mean, mean)
    np.testing.assert_array_equal(statistics.covariance, covariance)
    assert statistics.count is None
    assert statistics.about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    statistics.expect_network(network(is_inception=True))
    with pytest.raises(UserError, match="Published statistics are of Inception"):
        statistics.expect_network(network(is_inception=False))


def test_published_files_with_other_content_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(UserError, match="arrays mu and sigma"):
        read_statistics(path)
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="arrays mu and sigma"):
        read_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"\(3,\) and \(4, 4\)"):
        read_statistics(path)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(UserError, match="not finite"):
        read_statistics(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="arrays mu and sigma"):
        read_statistics(path)


def test_statistics_of_another_network_are_refused() -> None:
    statistics = accumulated(features(30, 0), 10)
    statistics.expect_network(network(is_inception=False, checksum="x"))
    with pytest.raises(UserError, match="not from the same weights"):
        statistics.expect_network(network(is_inception=False, checksum="y"))


# -- in an evaluation


def test_real_and_generated_pictures_are_prepared_by_one_rule() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    assert prepare(DistributionRules(), picture) is picture
    enlarged = prepare(DistributionRules(size=64), picture)
    assert enlarged is not None
    assert enlarged.shape == (64, 64, 3)
    assert prepare(DistributionRules(size=64, smaller="left out"), picture) is None
    np.testing.assert_array_equal(prepare(DistributionRules(size=40, smaller="left out"), picture), picture[:, 10:50])


def write_pictures(folder: Path, count: int, seed: int = 0) -> None:
    """Smooth pictures, the first of which is too small for a side of 32."""
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng((seed, number)).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((66, 64 - (number == 0) * 40)).save(folder / f"{number}.png")


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """imagenet-64-256 at 32 px by an untrained network."""
    rules = tmp_path / "mini.yaml"
    rules.write_text(
        "extends: imagenet-64-256\nsplit: test\nnetworks: {features: timm:test_resnet@random}\nsr: {crop: 32}\n"
        "distribution: {numbers: [fid, kid, is], size: 32}\n"
    )
    return rules


@pytest.mark.slow
def test_super_resolution_is_compared_with_training_pictures(tiny_run, tmp_path: Path, mini: Path) -> None:
    """Not with the very pictures that are restored."""
    for split, count in (("train", 9), ("test", 6)):
        write_pictures(tmp_path / "data" / split, count, seed=count)
    pipe, protocol, spec = load(tiny_run("sr")), load_protocol(mini), f"folder:{tmp_path / 'data'}"
    singly = evaluate(pipe, spec=spec, protocol=protocol, folder=tmp_path / "one", settings={"batch_size": 1})
    assert singly is not None
    assert {"frechet_distance", "kernel_distance", "class_score", "psnr_rgb"} <= set(singly.scores.values)
    assert "fid" not in singly.scores.values
    assert singly.scores.values["num_items"] == 5
    assert singly.manifest["bad_items"].keys() == {"test/0.png"}
    assert singly.manifest["real_statistics"]["count"] == 8
    assert singly.manifest["real_statistics"]["split"] == "train"
    assert len(singly.manifest["networks"]["features"]) == 64
    assert any("not FID" in note for note in singly.scores.notes)
    saved = tmp_path / "real.safetensors"
    argv = ["statistics", "--protocol", str(mini), "--data", spec]
    assert main([*argv, "--output", str(saved)]) == 0
    other = evaluate(
        pipe, spec=spec, protocol=protocol, folder=tmp_path / "two", settings={"batch_size": 4}, statistics=saved
    )
    assert other is not None
    assert singly.scores.values == pytest.approx(other.scores.values, rel=1e-4, abs=1e-4)
    vit = tmp_path / "vit.safetensors"
    assert main([*argv, "--network", "features=timm:test_vit@random", "--output", str(vit)]) == 0
    with pytest.raises(UserError, match="not from the same weights"):
        evaluate(pipe, spec=spec, protocol=protocol, folder=tmp_path / "three", statistics=vit)


def test_data_without_training_pictures_need_a_file_of_statistics(tiny_run, tmp_path: Path, mini: Path) -> None:
    write_pictures(tmp_path / "data", 4)
    options = {"protocol": load_protocol(mini), "folder": tmp_path / "out", "split": "all"}
    with pytest.raises(UserError, match=r"Give --statistics FILE: published statistics"):
        evaluate(load(tiny_run("sr")), spec=f"folder:{tmp_path / 'data'}@all", **options)


def test_the_imagenet_protocol_is_never_measured_against_its_own_items() -> None:
    assert load_protocol("imagenet-64-256").distribution.reference == "train"


def test_pictures_of_another_size_than_the_protocol_are_resized_like_the_real_ones(tiny_run, tmp_path, mini) -> None:
    """The drawn pictures are 32 px; at a size of 24 px both sides shrink, and features are computed at 24 px."""
    sizes = set()

    class Recorder(FeatureNetwork):
        def __call__(self, pictures):
            sizes.update(picture.shape for picture in pictures)
            return super().__call__(pictures)

    tiny_network = feature_network(TINY)
    write_pictures(tmp_path / "data" / "train", 4)
    write_pictures(tmp_path / "data" / "test", 4, seed=1)
    mini.write_text(mini.read_text().replace("size: 32}", "size: 24}"))
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(tiny_network.network, tiny_network.run, tiny_network.words)
        patch.setattr("crossflow.benchmarks.evaluation.networks.feature_network", lambda source: recorder)
        evaluate(
            load(tiny_run("sr")), spec=f"folder:{tmp_path / 'data'}", protocol=load_protocol(mini),
            folder=tmp_path / "out",
        )  # fmt: skip
    assert sizes == {(24, 24, 3)}
