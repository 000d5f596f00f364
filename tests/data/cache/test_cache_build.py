"""Making, interrupting, checking and reading caches: entries follow from content and networks, nothing else."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.training.prepare import blocks
from crossflow.data.cache import build
from crossflow.data.cache.build import Builder, Estimate, Settings
from crossflow.data.cache.keys import item_key
from crossflow.data.cache.shards import Shard, pack_texts, write_shard
from crossflow.data.cache.store import Cache
from crossflow.data.cache.verify import compare, verify
from crossflow.data.images import to_tensor
from crossflow.data.item import Item
from crossflow.data.readers import open_reader
from crossflow.data.resize import center_crop_resize
from crossflow.engine import cache as caching
from crossflow.tasks import load_config


@pytest.fixture
def builder(recipe, pictures, tmp_path: Path):
    """builder(folder name, ...): makes the cache of the pictures in shards of five items, in batches of two."""

    def make(name: str = "cache", *, data: str | None = None, more: tuple[str, ...] = (), **options) -> Builder:
        overrides = recipe(*more, **{key: options.pop(key) for key in ("text", "codec") if key in options})
        settings = options.pop("settings", Settings(items_per_shard=5, batch_size=2))
        config = load_config("t2i_tiny", overrides)
        return caching.builder(config, data or f"folder:{pictures}", tmp_path / name, settings=settings, **options)

    return make


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def keys(folder: Path, split: str = "train") -> dict[str, bytes]:
    cache = Cache(folder)
    rows = cache.rows(split)
    entries = [rows[index] for index in range(len(rows))]
    return {cache.id(each): cache.shard(each.shard)["keys"][each.row].numpy().tobytes() for each in entries}


# -- shards


def test_a_shard_round_trip_keeps_tensors_and_texts(tmp_path: Path):
    tensors = {"half": torch.randn(3, 4).half(), "wide": torch.randn(3, 2).bfloat16(), "none": torch.zeros(0, 7)}
    tensors["words"], tensors["words.offsets"] = pack_texts(["a", "", "zwei Würfel"])
    record = write_shard(tmp_path / "one.safetensors", tensors, {"num_items": 3})
    shard = Shard(tmp_path / "one.safetensors")
    assert all(torch.equal(shard[name], tensor) for name, tensor in tensors.items())
    assert [shard.text("words", row) for row in range(3)] == ["a", "", "zwei Würfel"]
    assert record["sha256"] == hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "one.json").read_text()) == record


@pytest.mark.slow
@given(texts=st.lists(st.text(max_size=20), max_size=6), rows=st.integers(0, 4), width=st.integers(1, 5))
@settings(max_examples=25)
def test_any_texts_and_rows_survive_a_shard(texts: list[str], rows: int, width: int):
    tensors = {"rows": torch.arange(rows * width, dtype=torch.float16).reshape(rows, width)}
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    tensors["captions"], tensors["captions.offsets"] = pack_texts(texts)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "a.safetensors", tensors, {})
        shard = Shard(Path(folder) / "a.safetensors")
        assert torch.equal(shard["rows"], tensors["rows"])
        assert [shard.text("captions", row) for row in range(len(texts))] == texts


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, (20).to_bytes(8, "little") + b'{"a": {"dtype": 1}}  '])
def test_a_file_that_is_not_a_shard_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        Shard(tmp_path / "bad.safetensors")


def test_a_shard_cannot_claim_bytes_beyond_its_end(tmp_path: Path):
    write_shard(tmp_path / "one.safetensors", {"x": torch.arange(100)}, {})
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="outside of the file"):
        Shard(tmp_path / "one.safetensors")


# -- what is in a cache


@pytest.mark.slow
def test_moments_and_token_features_are_the_networks_own_without_padding(builder, pictures, tmp_path: Path):
    result = builder(storage="float32", sizes=(16, 32))
    result.run()
    cache, reader = Cache(tmp_path / "cache"), open_reader(f"folder:{pictures}", "train")
    rows = cache.rows("train")
    assert len(rows) == 12
    assert cache.rows("all").starts[-1] == 16
    for index, item in enumerate(reader):
        entry = rows[index]
        assert (cache.id(entry), cache.captions(entry)) == (item.id, item.captions)
        for size in (16, 32):
            raw = result.extractor.codec.encode_moments(to_tensor(center_crop_resize(item.image, size))[None])
            read_back = cache.moments([entry], size)
            torch.testing.assert_close(read_back.mean, raw.mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(read_back.log_var, raw.log_var, atol=1e-5, rtol=1e-5)
        for number, caption in enumerate(item.captions):
            features, mask = result.extractor.text([caption])
            text_features, our_mask = cache.text([entry], [number])
            assert torch.equal(our_mask, mask)
            torch.testing.assert_close(text_features[mask], features[mask], atol=1e-5, rtol=1e-5)
            assert text_features[~mask].eq(0).all()
            pooled = result.extractor.text.pooled([caption])
            torch.testing.assert_close(cache.pooled([entry], [number]), pooled, atol=1e-5, rtol=1e-5)
    shard = cache.shard(0)
    num_tokens = sum(result.extractor.num_tokens(item.captions) for item in list(reader)[:5])
    assert len(shard["text"]) == num_tokens < 16 * shard["text.lengths"].numel()


def test_prompts_alone_are_cached_without_pictures(builder, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red cube\n\n  two   green cones \n", encoding="utf-8")
    builder(data=f"prompts:{tmp_path / 'prompts.txt'}").run()
    cache = Cache(tmp_path / "cache")
    rows = cache.rows("train")
    assert [cache.captions(rows[index]) for index in range(2)] == [("a red cube",), ("two green cones",)]
    assert list(cache.features["parts"]) == ["text"]
    assert list(cache.features["networks"]) == ["text"]
    assert not verify(tmp_path / "cache").problems


@pytest.mark.slow
def test_bad_items_are_left_out_counted_and_listed(builder, pictures, tmp_path: Path):
    (pictures / "train" / "03.png").write_bytes(b"no picture")
    settings = Settings(items_per_shard=5, batch_size=2, max_bad=0.1)
    summary = builder(settings=settings).run()
    assert (summary.num_items, list(summary.bad)) == (15, ["train/03.png"])
    assert summary.bad["train/03.png"].startswith("not a picture in a known format (10 bytes")
    assert "train/03.png" not in keys(tmp_path / "cache")
    assert builder(settings=settings).run().bad == summary.bad  # read back from what was written
    assert not verify(tmp_path / "cache").problems
    with pytest.raises(UserError, match="1 of 16 items are bad so far"):
        builder("strict", settings=Settings(max_bad=0.01)).run()


def test_features_that_are_not_finite_make_an_item_bad(builder, tmp_path: Path):
    result = builder(settings=Settings(max_bad=1.0))
    encode = result.extractor.codec.encode_moments

    def broken(images):
        raw = encode(images)
        raw.mean[0, 0, 0, 0] = float("nan")
        return raw

    result.extractor.codec.encode_moments = broken
    summary = result.run()
    assert summary.bad == {"train/00.png": "its features are not finite", "val/00.png": "its features are not finite"}


@pytest.mark.slow
def test_float16_overflow_is_refused_with_advice(builder):
    with pytest.raises(UserError, match="--storage bfloat16"):
        builder(more=("text.scale=1e6",)).run()
    builder("wide", more=("text.scale=1e6",), storage="bfloat16").run()


# -- keys


@pytest.mark.slow
def test_keys_follow_from_content_and_networks_alone(builder, pictures, tmp_path: Path):
    builder("one").run()
    shutil.copytree(pictures, tmp_path / "elsewhere")
    builder("two", data=f"folder:{tmp_path / 'elsewhere'}", settings=Settings(3, 1)).run()
    assert keys(tmp_path / "one") == keys(tmp_path / "two")
    assert len(set(keys(tmp_path / "one").values())) == 12
    for name, change in (("text", {"text": "other_text"}), ("codec", {"codec": "other_codec"}),
                         ("type", {"storage": "float32"}), ("size", {"sizes": (32,)})):  # fmt: skip
        builder(name, **change).run()
        assert not set(keys(tmp_path / name).values()) & set(keys(tmp_path / "one").values())


def test_a_key_depends_on_every_pixel_and_word():
    import numpy as np

    image = np.zeros((4, 5, 3), np.uint8)
    other = image.copy()
    other[3, 4, 2] = 1
    items = [
        Item("a", image, ("x", "y")), Item("a", other, ("x", "y")), Item("a", image.reshape(5, 4, 3), ("x", "y")),
        Item("a", image, ("xy",)), Item("a", image, ("y", "x")), Item("a", None, ("x", "y")),
    ]  # fmt: skip
    assert len({item_key(item, {"codec": 1}) for item in items} | {item_key(items[0], {"codec": 2})}) == 7
    assert item_key(items[0], {"codec": 1}) == item_key(Item("b", image.copy(), ("x", "y")), {"codec": 1})


@pytest.mark.slow
def test_changed_data_are_detected_when_continuing_and_comparing(builder, pictures, tmp_path: Path):
    builder().run()
    readers = {split: open_reader(f"folder:{pictures}", split) for split in ("train", "val")}
    assert not compare(tmp_path / "cache", readers).problems
    picture = Image.open(pictures / "train" / "07.png")
    picture.putpixel((12, 10), (1, 2, 3))
    picture.save(pictures / "train" / "07.png")
    (pictures / "val" / "01.txt").write_text("other words", encoding="utf-8")
    with pytest.raises(UserError, match=r"started with other data or settings: data\.train\.fingerprint"):
        builder()
    readers = {split: open_reader(f"folder:{pictures}", split) for split in ("train", "val")}
    problems = compare(tmp_path / "cache", readers).problems
    assert [problem.partition(":")[0] for problem in problems] == ["train/07.png", "val/01.png"]


# -- size, going on, checks


@pytest.mark.parametrize("more", [(), ("loss.encoder_target=image",), ("loss.encoder=none",)])
def test_the_estimated_size_is_close_to_the_actual_size(builder, more, tmp_path: Path):
    result = builder(more=more)
    expected = result.estimate()
    assert not (tmp_path / "cache").exists()
    summary = result.run()
    overhead = 1500 * len(result.parts)  # headers of shards, which large ones do not feel
    assert abs(summary.num_bytes - overhead - expected.num_bytes) < 0.2 * expected.num_bytes + overhead
    assert builder(more=more).estimate().finished == summary.num_bytes


def test_a_disk_without_room_is_refused_before_anything_is_written(builder, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    result = builder()
    with pytest.raises(UserError, match="are free on the disk of"):
        result.estimate().require(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    Estimate(1, 100, 100.0, free=60, finished=50).require(tmp_path)


@pytest.mark.slow
def test_an_interrupted_build_continues_and_ends_with_the_same_bytes(builder, tmp_path: Path):
    builder("whole").run()
    result = builder("parts")

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        result.run(stop)
    with pytest.raises(UserError, match="is not finished"):
        Cache(tmp_path / "parts")
    summary = builder("parts").run()
    assert summary.new_items == 16 - 5  # the first shard was whole
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert builder("parts").run().new_items == 0


class Killed(BaseException):
    """What nothing in the package catches."""


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before renaming", "after renaming"])
def test_a_kill_at_any_write_does_not_change_the_finished_cache(builder, monkeypatch, after: bool, tmp_path: Path):
    builder("whole").run()
    rename, writes = os.replace, []
    for deadly in range(10):  # the manifest, four shards with a .json file each, the manifest again
        writes.clear()

        def killing(source: Path, target: Path, deadly: int = deadly) -> None:
            writes.append(target)
            if after or len(writes) <= deadly:
                rename(source, target)
            if len(writes) > deadly:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing)
            with pytest.raises(Killed):
                builder(f"killed {deadly}").run()
        builder(f"killed {deadly}").run()
        assert digests(tmp_path / f"killed {deadly}") == digests(tmp_path / "whole")
    assert {path.name for path in writes} == {"cache.json", *digests(tmp_path / "whole")}


@pytest.mark.slow
@pytest.mark.parametrize("left", ["part", "no json", "cut", "no manifest"])
def test_the_remains_of_a_killed_build_are_repaired(builder, left: str, tmp_path: Path):
    builder("whole").run()
    builder("killed").run()
    folder = tmp_path / "killed"
    content = json.loads((folder / "cache.json").read_text()) | {"complete": False}
    (folder / "cache.json").write_text(json.dumps(content))
    if left == "part":
        abandoned(folder / ".tmp-99-train-00001.safetensors")
        (folder / "train-00001.json").unlink()
    elif left == "no json":
        (folder / "train-00002.json").unlink()
    elif left == "cut":
        (folder / "val-00000.safetensors").write_bytes(b"half")
    else:
        for path in folder.iterdir():
            path.unlink()
        abandoned(folder / ".tmp-99-cache.json")
    builder("killed").run()
    assert digests(folder) == digests(tmp_path / "whole")


def abandoned(path: Path) -> None:
    """What a process that was killed yesterday left."""
    path.write_bytes(b"half")
    os.utime(path, (time.time() - 86400,) * 2)


def test_files_of_another_running_process_are_kept(builder, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    young, old = tmp_path / "cache" / ".tmp-98-train-00001.safetensors", tmp_path / "cache" / ".tmp-99-cache.json"
    young.write_bytes(b"half")
    abandoned(old)
    assert builder("cache").run().complete
    assert young.exists()
    assert not old.exists()


@pytest.mark.slow
def test_processes_share_the_shards(builder, monkeypatch, tmp_path: Path):
    builder("whole").run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = builder("shared").run()
    assert not first.complete
    monkeypatch.setenv("RANK", "0")
    second = builder("shared").run()
    assert second.complete
    assert first.new_items + second.new_items == 16
    assert digests(tmp_path / "shared") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_other_settings_are_refused_in_the_same_folder(builder, tmp_path: Path):
    builder().run()
    with pytest.raises(UserError, match=r"features\.storage \(float16 -> float32\)"):
        builder(storage="float32")
    with pytest.raises(UserError, match=r"networks\.text\.sha256"):
        builder(text="other_text")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a feature cache"):
        builder("taken")


@pytest.mark.slow
def test_the_precision_of_the_networks_is_part_of_a_cache_and_offloading_is_not(builder, tmp_path: Path):
    builder("exact").run()
    builder("offloaded", offload=True).run()
    assert digests(tmp_path / "offloaded") == digests(tmp_path / "exact")
    builder("rounded", precision="bf16").run()
    assert "precision" not in Cache(tmp_path / "exact").features  # as caches were before precisions could be chosen
    assert Cache(tmp_path / "rounded").features["precision"] == "bf16"
    assert not set(keys(tmp_path / "exact").values()) & set(keys(tmp_path / "rounded").values())
    moments = [Cache(tmp_path / name).shard(0)["moments_16"].float() for name in ("exact", "rounded")]
    assert not torch.equal(*moments)
    torch.testing.assert_close(moments[1], moments[0], rtol=0.05, atol=0.05)
    with pytest.raises(UserError, match=r"features\.precision \(bf16 -> none\)"):
        builder("rounded")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        builder("new", precision="fp16")
    compiled = builder("compiled", compile=True).extractor
    compiled.prepare()
    assert all(block._compiled_call_impl is not None for block in blocks(compiled.text))


def change_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: change_byte(folder / "train-00001.safetensors", -5), "train-00001.safetensors: its SHA-256"),
        (lambda folder: (folder / "val-00000.safetensors").unlink(), "val-00000.safetensors: it is missing"),
        (lambda folder: (folder / "train-00000.json").write_text("{}"), "does not agree with the manifest"),
        (lambda folder: shutil.copy(folder / "val-00000.safetensors", folder / "x.safetensors"), "not in the manifest"),
    ],
)
def test_verifying_finds_damage(builder, damage, complaint, tmp_path: Path, capsys):
    builder().run()
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 0
    assert "16 items" in capsys.readouterr().out
    damage(tmp_path / "cache")
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("text.offsets", lambda x: x.flip(0), "offsets of text"),
        ("items.offsets", lambda x: x[:-1], "offsets of items"),
        ("moments_16", lambda x: x[:, :1], "moments_16 is"),
        ("moments_16", lambda x: x * float("nan"), "not finite"),
        ("text.pooled", lambda x: x.float(), "text.pooled is"),
        ("keys", lambda x: x[1:], "keys is"),
    ],
)
def test_verifying_looks_at_every_entry(builder, name, value, complaint, tmp_path: Path):
    """Also at what has the right checksum, such as the output of a faulty program."""
    builder().run()
    folder = tmp_path / "cache"
    shard, manifest = Shard(folder / "train-00001.safetensors"), json.loads((folder / "cache.json").read_text())
    place = next(n for n, each in enumerate(manifest["shards"]) if each["file"] == "train-00001.safetensors")
    about = {key: manifest["shards"][place][key] for key in ("split", "num_items", "num_captions", "bad")}
    tensors = {key: shard[key].clone() for key in shard.arrays}
    manifest["shards"][place] = write_shard(
        folder / "train-00001.safetensors", tensors | {name: value(tensors[name])}, about
    )
    (folder / "cache.json").write_text(json.dumps(manifest))
    problems = verify(folder).problems
    assert any(complaint in problem for problem in problems), problems


# -- the command line


def test_the_command_estimates_the_size_and_reports_skipped_items(recipe, pictures, tmp_path: Path, capsys):
    (pictures / "train" / "05.png").write_bytes(b"")
    command = ["cache", "--config", "t2i_tiny", "--data", f"folder:{pictures}", "--output", str(tmp_path / "cache")]
    command += ["--shard-items", "4", *recipe("data.max_bad=0.2")]
    assert main([*command, "--dry-run"]) == 0
    assert "12 train, 4 val items, moments_16, text: about" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "Cached 15 items (15 new, 1 skipped)" in captured.out
    assert "skipped train/05.png" in captured.err
    assert f"--data cache:{tmp_path / 'cache'}" in captured.out
    assert main(["cache", "--verify", str(tmp_path / "cache"), "--data", f"folder:{pictures}"]) == 0


def test_a_limited_cache_is_compared_with_its_own_items(recipe, pictures, tmp_path: Path, capsys):
    command = ["cache", "--config", "t2i_tiny", "--data", f"folder:{pictures}", "--output", str(tmp_path / "cache")]
    assert main([*command, "--num", "3", *recipe("seed=5")]) == 0
    verifying = ["cache", "--verify", str(tmp_path / "cache"), "--data", f"folder:{pictures}"]
    assert main(verifying) == 0
    for file in (pictures / "val").glob("*.txt"):
        file.write_text("other words", encoding="utf-8")
    assert main(verifying) == 2
    assert "has 3 problems" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--config", "t2i_tiny"], "needs --data and --output"),
        (["--config", "sr_tiny", "--data", "skimage", "--output", "x"], "nothing to cache"),
        (["--config", "t2i_tiny", "--data", "skimage", "--output", "x"], "needs captions and image"),
        (["--verify", "nowhere"], "is not a feature cache"),
    ],
)
def test_invalid_use_gives_a_message(argv, complaint, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *argv]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_continues_and_ends_with_the_same_bytes(forked, recipe, pictures, tmp_path: Path):
    def start(name: str):
        command = ["cache", "--config", "t2i_tiny", "--data", f"folder:{pictures}", "--output", str(tmp_path / name)]
        command += ["--shard-items", "1", "--batch-size", "1", *recipe()]
        return forked.Forked(["-m", "crossflow", *command], tmp_path / f"{name}.log")

    start("whole").finish()
    kills = 0
    for finished in (0, 4, 9):
        process = start("killed")
        started = time.monotonic()
        while process.poll() is None and len(list((tmp_path / "killed").glob("*.json"))) <= finished:
            assert time.monotonic() - started < 120
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert "Continuing" in start("killed").finish()
    # The file that a kill interrupted stays under its temporary name until it is an hour old.
    complete = {name: digest for name, digest in digests(tmp_path / "killed").items() if not name.startswith(".tmp-")}
    assert complete == digests(tmp_path / "whole")
