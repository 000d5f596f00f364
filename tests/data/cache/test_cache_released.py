"""Released feature files: read without running them, whatever their pickles ask for, and taken over into a cache."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.cache.build import Settings
from crossflow.data.cache.store import Cache
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader
from crossflow.data.safe_pickle import read_npy
from crossflow.engine import cache as caching
from crossflow.networks.codecs.registry import build_codec
from crossflow.tasks import load_config, task_class

WORDS = ("a red cube", "two green cones", "a small blue sphere on a plane")
LENGTH, WIDTH = 16, 16


def save(path: Path, content: object) -> Path:
    """Writes a pickled object as the released scripts do, by numpy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content, allow_pickle=True)
    return path


def sample(number: int = 0, size: int = 4) -> dict[str, object]:
    rng = np.random.default_rng(number)
    return {
        "image_latent_32": rng.standard_normal((8, size, size), dtype=np.float32),
        "token_embedding_clip": rng.standard_normal((LENGTH, WIDTH), dtype=np.float32),
        "token_embedding_t5": rng.standard_normal((LENGTH, 24), dtype=np.float32),
        "token_mask_clip": (np.arange(LENGTH) < 5).astype(np.int64),
        "token_mask_t5": (np.arange(LENGTH) < 6).astype(np.int64),
        "token_clip": np.arange(LENGTH),
        "batch_caption": WORDS[number % 3],
    }


def raw(path: Path, program: bytes) -> Path:
    """A .npy file that holds one object, pickled by hand."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(file.getvalue() + program)
    return path


# -- reading


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", "<i4", "|u1", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_by_numpy(tmp_path: Path, dtype: str, order: str):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 4, 5)), dtype=dtype, order=order)
    restored = read_npy(save(tmp_path / "a.npy", {"x": array, "again": array, "text": "Würfel", "n": 3, "none": None}))
    assert restored["x"].dtype == array.dtype
    assert np.array_equal(restored["x"], array)
    assert np.array_equal(restored["again"], array)
    assert (restored["text"], restored["n"], restored["none"]) == ("Würfel", 3, None)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_older_pickles_are_read_too(tmp_path: Path, protocol: int):
    content = {"caption": "a cube", "flags": [True, None], "large": 2**40, "part": 0.5}
    restored = read_npy(raw(tmp_path / "a.npy", pickle.dumps(content, protocol)))
    assert restored == content | {"flags": None}  # lists are parsed but not returned


def test_plain_arrays_need_no_pickle(tmp_path: Path):
    save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    assert np.array_equal(read_npy(tmp_path / "a.npy"), np.arange(6.0).reshape(2, 3))


class Runs:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda mark: {"x": Runs(os.mkdir, mark)}, "posix.mkdir"),
        (lambda mark: {"x": Runs(eval, f"__import__('os').mkdir({mark!r})")}, "builtins.eval"),
        (lambda mark: {"x": np.array([Runs(os.mkdir, mark)], dtype=object)}, "posix.mkdir"),
        (lambda mark: {Runs(os.mkdir, mark): 1}, "posix.mkdir"),
        (lambda mark: {"x": Path(mark)}, "pathlib"),
        (lambda mark: {"x": np.float32(1)}, "scalar"),
        (lambda mark: {"x": torch.zeros(1)}, "torch"),
        (lambda mark: {"x": {1, 2}}, "instruction"),
    ],
)
def test_a_pickle_with_other_instructions_is_refused_and_not_executed(tmp_path: Path, make, named: str):
    mark = tmp_path / "it ran"
    file = save(tmp_path / "features" / "evil.npy", make(str(mark)))
    with pytest.raises(UserError, match="is refused: its pickle asks for") as error:
        read_npy(file)
    assert named in str(error.value)
    with pytest.raises(UserError, match="is refused"):
        open_reader(f"npy:{tmp_path / 'features'}@all", "train")[0]
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",  # the usual attack
        b"(S'touch ran'\niposix\nsystem\n.",  # the INST instruction
        b"cnumpy\nndarray\n(I3\ntR.",  # an array made by a call of its class
        b"cnumpy\ndtype\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00P1\n.",  # a persistent id
        b"cnumpy.core.multiarray\n_reconstruct\n}X\x08\x00\x00\x00__code__Nsb.",  # the state of something not made
        b"cbuiltins\ngetattr\ncnumpy\nndarray\nX\x01\x00\x00\x00T\x86R.",
    ],
)
def test_handwritten_pickle_programs_are_refused(tmp_path: Path, program: bytes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, UserError), match=r"is refused|is damaged"):
        read_npy(raw(tmp_path / "a.npy", program))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy"]


NESTED = b")\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60))  # tuples of twice the one before: 2^60 in all


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04}X\x01\x00\x00\x00x\x8e" + (2**60).to_bytes(8, "little") + b"abcs.",  # a text of 2^60 bytes
        b"\x80\x04}\x8d" + (2**60).to_bytes(8, "little") + b"abcK\x01s.",  # a name of 2^60 bytes
        b"\x80\x04}" + NESTED + b"K\x01s.",  # to be hashed
        b"\x80\x04" + NESTED + b")R.",  # to be put into words
        b"\x80\x04}X\x01\x00\x00\x00xcnumpy._core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85cnumpy\ndtype\n"
        + NESTED
        + b"\x85R\x89C\x00tbs.",
    ],
)
def test_a_pickle_of_excessive_size_or_work_is_refused(tmp_path: Path, program: bytes):
    with pytest.raises((ValueError, UserError), match=r"is refused|is damaged|bytes|not of numbers"):
        read_npy(raw(tmp_path / "a.npy", program))


@pytest.mark.slow
def test_any_truncation_or_flipped_byte_makes_a_bad_item(tmp_path: Path):
    good = save(tmp_path / "a.npy", sample()).read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 5, 60, *rng.integers(100, len(good), 40)]:
        (tmp_path / "a.npy").write_bytes(good[:length])
        (item,) = open_reader(f"npy:{tmp_path}@all", "train").load([0])
        assert isinstance(item, BadItem)
    for place in rng.integers(0, len(good), 300):
        content = bytearray(good)
        content[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.npy").write_bytes(content)
        try:
            (item,) = open_reader(f"npy:{tmp_path}@all", "train").load([0])
        except UserError as error:
            assert "is refused" in str(error)  # noqa: PT017  (either outcome is right)


def test_an_array_that_claims_more_than_the_file_holds_is_damaged(tmp_path: Path):
    file = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**4)}
    np.lib.format.write_array_header_1_0(file, about)
    (tmp_path / "a.npy").write_bytes(file.getvalue() + b"1234")
    with pytest.raises(ValueError, match="is truncated"):
        read_npy(tmp_path / "a.npy")


# -- the layouts


def test_a_training_folder_gives_captions_arrays_and_pictures(tmp_path: Path):
    for number in range(3):
        save(tmp_path / "features" / f"{number}.npy", sample(number))
    (tmp_path / "imgs").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "imgs" / f"{number}.png")
    lines = [json.dumps({"img_path": f"{number}.png", "prompt": "x"}) for number in range(2)]
    (tmp_path / "img_text_pair.jsonl").write_text("\n".join(lines))
    reader = open_reader(f"npy:{tmp_path}@all", "train")
    assert reader.fields == {"image", "captions", "released"}
    items = list(reader)
    assert [item.captions for item in items] == [(WORDS[number],) for number in range(3)]
    assert [item.image is not None for item in items] == [True, True, False]
    assert np.array_equal(items[1].features["token_embedding_t5"], sample(1)["token_embedding_t5"])


def test_a_validation_folder_joins_a_pictures_moments_with_each_caption(tmp_path: Path):
    for number in range(2):
        part = sample(number)
        save(tmp_path / f"{number}.npy", part["image_latent_32"])
        for k in range(2):
            save(tmp_path / f"{number}_{k}.npy", {
                "promt": WORDS[k], "token_embedding": part["token_embedding_clip"],
                "token_mask": part["token_mask_clip"], "token": part["token_clip"],
            })  # fmt: skip
    save(tmp_path / "empty_context.npy", {"token_embedding": np.zeros(3), "batch_caption": ""})
    items = list(open_reader(f"npy:{tmp_path}@all", "train"))
    assert [item.id for item in items] == ["0_0", "0_1", "1_0", "1_1"]
    assert items[3].captions == (WORDS[1],)
    assert np.array_equal(items[3].features["image_latent_32"], sample(1)["image_latent_32"])


@pytest.fixture
def released(tmp_path: Path, frozen) -> Path:
    """A folder as the released scripts write it, of the tiny networks, with the pictures it was made from."""
    task = task_class("t2i").frozen(load_config("t2i_tiny", released_settings(frozen)))
    rng, folder = np.random.default_rng(0), tmp_path / "released"
    for number in range(6):
        image = torch.from_numpy(rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32))
        raw_moments = task.codec.encode_moments(image)
        features, mask = task.text.frozen([WORDS[number % 3]])
        save(folder / "features" / f"{number:02d}.npy", {
            "image_latent_16": torch.cat([raw_moments.mean, raw_moments.log_var], 1)[0].numpy(),
            "token_embedding_clip": features[0].numpy(),
            "token_mask_clip": mask[0].long().numpy(),
            "token_embedding_t5": np.zeros((LENGTH, 4096), np.float32),
            "token_mask_t5": np.ones(LENGTH, np.int64),
            "batch_caption": WORDS[number % 3],
        })  # fmt: skip
    return folder


def released_settings(frozen, *more: str) -> list[str]:
    return [
        "data.image_size=16", f"text.encoder={frozen['text']}", "text.max_length=16", "codec.kind=autoencoder_kl",
        f"codec.source={frozen['codec']}", "loss.encoder_target=text", "backbone.width=16", *more,
    ]  # fmt: skip


def imported(folder: Path, released: Path, settings: list[str]) -> Cache:
    config = load_config("t2i_tiny", settings)
    caching.builder(config, f"npy:{released}@all", folder, storage="float32", settings=Settings(4, 2)).run()
    return Cache(folder)


def test_released_features_are_imported_without_padding(frozen, released, tmp_path: Path):
    cache = imported(tmp_path / "cache", released, released_settings(frozen))
    rows = cache.rows("all")
    assert len(rows) == 6
    for index in range(6):
        released_array = read_npy(released / "features" / f"{index:02d}.npy")
        mean, log_var = np.split(released_array["image_latent_16"], 2)
        moments = cache.moments([rows[index]], 16)
        assert np.array_equal(moments.mean[0], mean)
        assert np.array_equal(moments.log_var[0], log_var)
        features, mask = cache.text([rows[index]], [0])
        assert np.array_equal(mask[0], released_array["token_mask_clip"] == 1)
        assert np.array_equal(features[0][mask[0]], released_array["token_embedding_clip"][mask[0].numpy()])
    num_tokens = sum(len(cache.shard(number)["text"]) for number in range(2))
    assert num_tokens == sum(read_npy(file)["token_mask_clip"].sum() for file in released.glob("features/*.npy"))
    config = load_config("t2i_tiny", [*released_settings(frozen), f"data.train=cache:{cache.folder}@all"])
    task, examples = task_class("t2i").frozen(config), task_class("t2i").dataset(config, "train")
    task.accept(examples)
    batch = task.prepare(task.collate(examples.first(4)))
    assert batch.target.shape == (4, *build_codec("autoencoder_kl", source=frozen["codec"]).latent_shape(16))


@pytest.mark.parametrize("more", [("text.scale=10",), ("text.encoder=other_text",)])
def test_features_of_another_text_encoder_are_refused(frozen, released, tmp_path: Path, more):
    more = tuple(part.replace("other_text", frozen["other_text"]) for part in more)
    with pytest.raises(UserError, match="come from another text encoder than the recipe's"):
        imported(tmp_path / "cache", released, released_settings(frozen, *more))


def test_moments_of_another_size_and_missing_pictures_are_reported(frozen, released, tmp_path: Path):
    with pytest.raises(UserError, match="need image_latent_32, but 00 has image_latent_16"):
        imported(tmp_path / "size", released, released_settings(frozen, "data.image_size=32"))
    with pytest.raises(UserError, match="encoder loss needs pictures"):
        imported(tmp_path / "pictures", released, released_settings(frozen, "loss.encoder_target=image"))


def test_training_directly_on_released_features_is_refused_with_advice(frozen, released):
    config = load_config("t2i_tiny", released_settings(frozen, f"data.train=npy:{released}@all"))
    with pytest.raises(UserError, match="no image"):
        task_class("t2i").dataset(config, "train")
