"""Training from a cache gives the batches that it would give without one, and refuses a cache that does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.data.cache.build import Settings
from crossflow.data.dataset import Examples
from crossflow.engine import cache as caching
from crossflow.engine.sample import load
from crossflow.tasks import load_config, task_class
from crossflow.tasks.base import Task

PLACES = [(0, 3), (0, 5), (1, 3), (2, 11)]


def opened(overrides: list[str], data: str) -> Task:
    """A task as it trains on `data`, with its frozen networks."""
    return task_class("t2i").frozen(load_config("t2i_tiny", [*overrides, f"data.train={data}"]))


def train_data(task: Task) -> Examples:
    """The training examples that the configuration of a task names."""
    return task.dataset(task.config, "train")


def cached(folder: Path, overrides: list[str], data: Path, **options) -> str:
    config = load_config("t2i_tiny", overrides)
    caching.builder(config, f"folder:{data}", folder, settings=Settings(5, 4), **options).run()
    return f"cache:{folder}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("loss.encoder=reconstruction",),
        ("loss.encoder_target=image",),
        ("source.kind=gaussian",),
        ("source.trunk=released", "text.head=flatten", "source.width=16", "source.heads=2"),
        ("source.trunk=released", "text.head=flatten", "text.padding=zero"),
    ],
)
def test_batches_equal_those_without_a_cache(recipe, pictures, tmp_path: Path, more: tuple[str, ...]):
    settings = recipe(*more)
    spec = cached(tmp_path / "cache", settings, pictures, storage="float32")
    plain, reading = opened(settings, f"folder:{pictures}"), opened(settings, spec)
    data = {"plain": train_data(plain), "cache": train_data(reading)}
    reading.accept(data["cache"])
    direct = plain.prepare(plain.collate(data["plain"].__getitems__(PLACES)))
    from_cache = reading.prepare(reading.collate(data["cache"].__getitems__(PLACES))).to("cpu")
    torch.testing.assert_close(from_cache.target, direct.target, atol=1e-5, rtol=1e-5)
    assert from_cache.ids == direct.ids
    assert torch.equal(from_cache.mask, direct.mask)
    read = torch.ones_like(from_cache.mask) if "source.trunk=released" in more else from_cache.mask
    torch.testing.assert_close(from_cache.features[read], direct.features[read], atol=1e-5, rtol=1e-5)
    if direct.alignment is None:
        assert from_cache.alignment is None
    elif direct.alignment.shape == direct.features.shape:
        torch.testing.assert_close(from_cache.alignment[read], direct.alignment[read], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(from_cache.alignment, direct.alignment, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_batches_in_half_precision_differ_by_its_rounding(recipe, pictures, tmp_path: Path, storage, tolerance):
    settings = recipe()
    spec = cached(tmp_path / "cache", settings, pictures, storage=storage)
    plain, reading = opened(settings, f"folder:{pictures}"), opened(settings, spec)
    direct = plain.prepare(plain.collate(train_data(plain).__getitems__(PLACES)))
    record = reading.collate(train_data(reading).__getitems__(PLACES))
    assert record["features"].dtype == getattr(torch, storage)
    from_cache = reading.prepare(record)
    torch.testing.assert_close(from_cache.target, direct.target, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        from_cache.features[from_cache.mask], direct.features[from_cache.mask], atol=tolerance, rtol=tolerance
    )
    assert not torch.equal(from_cache.target, direct.target)


@pytest.mark.slow
def test_latents_are_drawn_anew_each_epoch_and_reproducibly(recipe, pictures, tmp_path: Path):
    settings = recipe()
    task = opened(settings, cached(tmp_path / "cache", settings, pictures))
    records = (task.collate(train_data(task).__getitems__([(epoch, 0)])) for epoch in (0, 1, 0))
    first, second, again = map(task.prepare, records)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.target, second.target)
    moments = train_data(task).reader.cache.moments([train_data(task)[0, 0]["entry"]], 16)
    scaled = task.codec.scaled(moments)
    drawn = torch.cat([task.prepare(task.collate(train_data(task).__getitems__([(e, 0)]))).target for e in range(400)])
    deviation = ((drawn - scaled.mean) / (scaled.log_var / 2).exp()).std(0)
    assert (deviation - 1).abs().max() < 0.2  # 400 draws: 0.035 is one standard deviation of each
    assert (drawn.mean(0) - scaled.mean).abs().max() < 0.25 * (scaled.log_var / 2).exp().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"text": "other_text"}, "another text encoder than the recipe's: sha256"),
        ({"codec": "other_codec"}, "another image codec than the recipe's: sha256"),
        ({"more": ("text.scale=10",)}, "text encoder than the recipe's: scale 1.0 instead of 10.0"),
        ({"more": ("data.image_size=32",)}, "no moments of size 32"),
        ({"more": ("loss.encoder_target=image",)}, "no pixels of size 16"),
        ({"more": ("text.max_length=12",)}, "text.max_length is 16, but 12 is needed"),
        (
            {"more": ("source.trunk=released", "text.head=flatten", "source.heads=2")},
            "text.padding is dropped, but kept is needed",
        ),
    ],
)
def test_a_cache_of_other_networks_is_refused(recipe, pictures, tmp_path: Path, change, complaint):
    spec = cached(tmp_path / "cache", recipe(), pictures)
    task = opened(recipe(*change.pop("more", ()), **change), spec)
    with pytest.raises(UserError, match=complaint):
        task.accept(train_data(task))


@pytest.mark.slow
def test_padding_is_cached_only_for_models_that_attend_to_it(recipe, pictures, tmp_path: Path):
    released = ("source.trunk=released", "text.head=flatten")
    tokens = {}
    for name, more in {"small": (), "released": released, "zero": (*released, "text.padding=zero")}.items():
        spec = cached(tmp_path / name, recipe(*more), pictures)
        reader = train_data(opened(recipe(*more), spec)).reader
        tokens[name] = len(reader.cache.shard(0)["text"])
    assert tokens["small"] == tokens["zero"] < tokens["released"] == 16 * 7  # captions of the first five items


@pytest.mark.slow
def test_embeddings_of_the_image_tower_are_cached_with_its_checksum(frozen, recipe, pictures, tmp_path: Path):
    aligned = ("loss.encoder_target=image", "tower.allow_random=true")
    settings = recipe(*aligned, f"tower.source={frozen['tower']}")
    spec = cached(tmp_path / "cache", settings, pictures, storage="float32")
    plain, reading = opened(settings, f"folder:{pictures}"), opened(settings, spec)
    reading.accept(train_data(reading))
    direct = plain.prepare(plain.collate(train_data(plain).__getitems__(PLACES))).alignment
    from_cache = reading.prepare(reading.collate(train_data(reading).__getitems__(PLACES))).alignment
    assert from_cache.shape == (4, 16)
    torch.testing.assert_close(from_cache, direct, atol=1e-5, rtol=1e-5)
    assert "pixels_16" not in train_data(reading).reader.cache.features["parts"]
    other = opened(recipe(*aligned, f"tower.source={frozen['other_tower']}"), spec)
    with pytest.raises(UserError, match="another image tower than the recipe's"):
        other.accept(train_data(other))


@pytest.mark.slow
def test_a_cache_with_another_scale_or_additional_features_is_accepted(recipe, pictures, tmp_path: Path):
    spec = cached(tmp_path / "cache", recipe("source.trunk=released", "text.head=flatten"), pictures, sizes=(16, 32))
    task = opened(recipe("codec.scale=2.0", "loss.encoder=none"), spec)
    task.accept(train_data(task))
    small = opened(recipe("loss.encoder=none"), spec)
    z = [each.prepare(each.collate(train_data(each).__getitems__(PLACES))).target for each in (task, small)]
    torch.testing.assert_close(z[0], 4 * z[1])


def test_a_task_on_pixels_has_nothing_to_cache(tiny_settings, tmp_path: Path):
    config = load_config("sr_tiny", tiny_settings("sr"))
    with pytest.raises(UserError, match="nothing to cache"):
        caching.builder(config, "skimage", tmp_path / "cache")


def test_tasks_on_pixels_refuse_a_cache(recipe, pictures, tiny_settings, tmp_path: Path):
    spec = cached(tmp_path / "cache", recipe(), pictures)
    config = load_config("sr_tiny", [*tiny_settings("sr"), f"data.train={spec}"])
    with pytest.raises(UserError, match="no image"):
        task_class("sr").dataset(config, "train")


def test_the_pixel_codec_measures_the_same_scale_from_a_cache(tiny_settings, pictures, tmp_path: Path):
    settings = [*tiny_settings("t2i"), "codec.factor=2"]
    spec = cached(tmp_path / "cache", settings, pictures, storage="float32")
    tasks, batches = [], []
    for data in (f"folder:{pictures}", spec):
        config, kind = load_config("t2i_tiny", [*settings, f"data.train={data}"]), task_class("t2i")
        examples = kind.dataset(config, "train")
        tasks.append(kind.learn(config, examples, lambda text: None))
        batches.append(tasks[-1].prepare(tasks[-1].collate(examples.__getitems__(PLACES))))
    torch.testing.assert_close(tasks[1].codec.scale, tasks[0].codec.scale)
    torch.testing.assert_close(batches[1].target, batches[0].target, atol=1e-5, rtol=1e-5)
    assert torch.equal(batches[1].features, batches[0].features)
    assert torch.equal(batches[1].alignment, batches[0].alignment)


@pytest.mark.slow
def test_captioning_reads_the_same_latents_from_a_cache(frozen, pictures, tiny_settings, tmp_path: Path):
    settings = [*tiny_settings("caption"), "codec.kind=autoencoder_kl", f"codec.source={frozen['codec']}"]
    config = load_config("caption_tiny", settings)
    caching.builder(config, f"folder:{pictures}", tmp_path / "cache", storage="float32").run()
    spec = f"cache:{tmp_path / 'cache'}"
    targets = []
    for data in (f"folder:{pictures}", spec):
        config = load_config("caption_tiny", [*settings, f"data.train={data}", f"data.val=folder:{pictures}"])
        examples = task_class("caption").dataset(config, "train")
        task = task_class("caption").learn(config, examples, lambda text: None)
        task.accept(examples)
        targets.append(task.prepare(task.collate(examples.__getitems__(PLACES))).features)
    torch.testing.assert_close(targets[1], targets[0], atol=1e-5, rtol=1e-5)
    without = task_class("caption").frozen(load_config("caption_tiny", [*settings, f"data.train={spec}"]))
    with pytest.raises(UserError, match=r"data\.val=SPEC"):
        without.accept(train_data(without))


@pytest.mark.slow
def test_a_run_trains_from_a_cache_resumes_to_the_same_weights_and_samples(
    recipe, pictures, blind_judge, tmp_path: Path
):
    from safetensors.torch import load_file

    from crossflow.cli import main

    settings = recipe("train.save_every=2")
    assert main(["cache", "--config", "t2i_tiny", "--data", f"folder:{pictures}", "--output",
                 str(tmp_path / "cache"), *settings]) == 0  # fmt: skip
    command = ["train", "--task", "t2i", "--data", f"cache:{tmp_path / 'cache'}", *settings]
    assert main([*command, "--output", str(tmp_path / "whole"), "train.steps=4"]) == 0
    assert main([*command, "--output", str(tmp_path / "parts"), "train.steps=2"]) == 0
    assert main([*command, "--output", str(tmp_path / "parts"), "train.steps=4", "--resume", "auto"]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (picture,) = load(tmp_path / "parts")("a red cube", output_type="np")
    assert picture.shape == (16, 16, 3)
    assert picture.dtype == np.uint8


def test_a_pickled_cache_opens_its_shards_again(recipe, pictures, tmp_path: Path):
    import pickle

    settings = recipe()
    task = opened(settings, cached(tmp_path / "cache", settings, pictures))
    reader = train_data(task).reader
    before = task.prepare(task.collate(train_data(task).__getitems__(PLACES))).target
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.ids[3] == reader.ids[3]
    moved = copy.cache.moments([copy[3].features], 16).mean
    assert torch.equal(moved, reader.cache.moments([reader[3].features], 16).mean)
    assert before.shape == (4, 4, 8, 8)
