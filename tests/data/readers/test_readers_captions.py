"""Karpathy's splits and the files of Flickr8k and Flickr30k, each on a miniature of the published layout."""

import json
import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, resolve_spec


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (9, 90, 30)).save(path)
    return path


def bad(reader: Reader) -> dict[str, str]:
    return {item.id: item.reason for item in reader.load(range(len(reader))) if isinstance(item, BadItem)}


def entry(number: int, split: str, folder: str = "val2014") -> dict:
    sentids = [10 * number + place for place in range(5)]
    sentences = [
        {"tokens": ["a", "cat"], "raw": f"A cat {sentid}. ", "imgid": number, "sentid": sentid} for sentid in sentids
    ]
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{100 + number:012d}.jpg",
        "cocoid": 100 + number,
        "imgid": number,
        "split": split,
        "sentids": sentids,
        "sentences": sentences,
    }


def karpathy(folder: Path, entries: list[dict], name: str = "dataset_coco.json") -> Path:
    for row in entries:
        picture(folder / row.get("filepath", "images") / row["filename"])
    file = folder / name
    file.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return file


COCO = [entry(0, "train", "train2014"), entry(1, "restval"), entry(2, "val"), entry(3, "test"), entry(4, "test")]


def test_karpathy_splits_and_restval_is_trained_on(tmp_path, caplog):
    karpathy(tmp_path, COCO)
    ids = {split: open_reader(f"karpathy:{tmp_path}", split).ids for split in ("train", "val", "test", "all")}
    assert ids["train"] == ["100", "101"]
    assert (ids["val"], ids["test"]) == (["102"], ["103", "104"])
    assert len(ids["all"]) == 5
    item = open_reader(f"{tmp_path}/dataset_coco.json", "test")[1]
    assert item.captions == tuple(f"A cat {number}." for number in range(40, 45))
    assert item.image.shape == (4, 6, 3)
    assert "2 pictures for test; the published file has 5000" in caplog.text


def test_a_scored_split_with_a_missing_picture_is_refused_and_training_skips_it(tmp_path):
    karpathy(tmp_path, COCO)
    (tmp_path / COCO[4]["filepath"] / COCO[4]["filename"]).unlink()
    (tmp_path / COCO[0]["filepath"] / COCO[0]["filename"]).unlink()
    with pytest.raises(UserError, match=r"1 of the 2 pictures of test do not match.*104: no such file.*\?images=DIR"):
        open_reader(f"karpathy:{tmp_path}", "test")
    assert list(bad(open_reader(f"karpathy:{tmp_path}?incomplete=skip", "test"))) == ["104"]
    assert list(bad(open_reader(f"karpathy:{tmp_path}", "train"))) == ["100"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cocoid": 7}, "its id 7 is not the number in"),
        ({"sentids": [1, 2, 3, 4, 5]}, "it lists the captions [1, 2, 3, 4, 5]"),
        ({"sentences": [{"raw": "A dog.", "imgid": 0, "sentid": 40}]}, "belongs to the picture 0"),
        ({"sentences": [], "sentids": []}, "has no caption"),
        ({"filename": "../../etc/passwd.jpg", "cocoid": 104}, "is not the number in"),
    ],
)
def test_inconsistent_ids_are_refused_in_a_scored_split(tmp_path, change, message):
    file = karpathy(tmp_path, COCO)
    file.write_text(json.dumps({"images": [*COCO[:4], COCO[4] | change]}))
    with pytest.raises(UserError, match=re.escape(message)):
        open_reader(f"karpathy:{file}", "test")


@pytest.mark.parametrize(("key", "name"), [("cocoid", "cocoid"), ("imgid", "imgid"), ("sentences", "sentid")])
def test_duplicate_ids_are_refused(tmp_path, key, name):
    file = karpathy(tmp_path, COCO)
    file.write_text(json.dumps({"images": [*COCO, entry(9, "train") | {key: COCO[1][key]}]}))
    with pytest.raises(UserError, match=f"gives the {name} "):
        open_reader(f"karpathy:{file}", "train")


def test_karpathy_of_flickr_has_file_names_as_ids_and_pictures_may_be_elsewhere(tmp_path):
    entries = []
    for number, split in enumerate(("train", "val", "test")):
        sentences = [{"raw": "A dog.", "imgid": number, "sentid": number}]
        entries.append(
            {
                "filename": f"99_{number}.jpg",
                "imgid": number,
                "split": split,
                "sentids": [number],
                "sentences": sentences,
            }
        )
        picture(tmp_path / f"pictures/99_{number}.jpg")
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match="do not match"):
        open_reader(f"karpathy:{tmp_path}", "test")
    reader = open_reader(f"karpathy:{tmp_path}?images=pictures", "test")
    assert reader.ids == ["99_2"]
    assert reader[0].captions == ("A dog.",)
    with pytest.raises(UserError, match="no such file or folder"):
        open_reader(f"karpathy:{tmp_path}?images=nowhere", "test")


def test_karpathy_refuses_missing_and_other_files(tmp_path):
    with pytest.raises(UserError, match="must contain one dataset_NAME"):
        open_reader(f"karpathy:{tmp_path}", "train")
    (tmp_path / "dataset_x.json").write_text('{"pictures": []}')
    with pytest.raises(UserError, match="not a file of Karpathy"):
        open_reader(f"karpathy:{tmp_path}", "train")


def tokens(path: Path, *names: str) -> Path:
    lines = [f"{name}#{place}\tA dog {place} ." for name in names for place in range(5)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_flickr8k_as_published(tmp_path):
    names = ["1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg"]
    for name in names:
        picture(tmp_path / "Flicker8k_Dataset" / name)
    # The published file has a caption file key that names no picture, and some pictures are in no split.
    tokens(tmp_path / "Flickr8k.token.txt", *names, "2258277193_586949ec62.jpg.1")
    for word, name in (("train", "1_a.jpg\n2_b.jpg"), ("dev", "3_c.jpg"), ("test", "4_d.jpg\n9_z.jpg")):
        (tmp_path / f"Flickr_8k.{word}Images.txt").write_text(name + "\n")
    reader = open_reader(str(tmp_path), "train")
    assert reader.spec.startswith("flickr:")
    assert reader.ids == ["1_a.jpg", "2_b.jpg"]
    assert reader[0].captions == tuple(f"A dog {place} ." for place in range(5))
    assert open_reader(f"flickr:{tmp_path}", "val").ids == ["3_c.jpg"]
    assert bad(open_reader(f"flickr:{tmp_path}", "test")) == {"9_z.jpg": "has no caption"}
    assert list(bad(open_reader(f"flickr:{tmp_path}", "all"))) == ["2258277193_586949ec62.jpg.1"]


@pytest.mark.parametrize("form", ["token", "csv"])
def test_flickr30k_as_published(tmp_path, form):
    for name in ("10", "20"):
        picture(tmp_path / f"flickr30k-images/{name}.jpg")
    if form == "token":
        tokens(tmp_path / "results_20130124.token", "10.jpg", "20.jpg")
    else:
        rows = [f'{name}.jpg| {place}| A "dog {place} .' for name in (10, 20) for place in range(5)]
        (tmp_path / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))
    (tmp_path / "train.txt").write_text("10\n")
    (tmp_path / "test.txt").write_text("20\n")
    reader = open_reader(f"flickr:{tmp_path}", "test")
    assert reader.ids == ["20.jpg"]
    assert len(reader[0].captions) == 5
    with pytest.raises(UserError, match="train, test but nothing for 'val'"):
        open_reader(f"flickr:{tmp_path}", "val")


def test_flickr_without_lists_has_no_splits(tmp_path):
    picture(tmp_path / "Images/1.jpg")
    (tmp_path / "captions.txt").write_text('image,caption\n1.jpg,"A dog , running ."\n1.jpg,A cat .\n1.jpg\n')
    with pytest.raises(UserError, match=r"no split lists.*@all"):
        open_reader(f"flickr:{tmp_path}", "test")
    reader = open_reader(f"flickr:{tmp_path}@all", "train")
    assert reader[0].captions == ("A dog , running .", "A cat .")
    assert len(bad(reader)) == 1
    (tmp_path / "captions.txt").rename(tmp_path / "dataset_flickr8k.json")
    with pytest.raises(UserError, match="write 'karpathy:"):
        open_reader(f"flickr:{tmp_path}", "test")


def test_coco_year_can_be_chosen(tmp_path, caplog):
    for year in ("2014", "2017"):
        picture(tmp_path / f"val{year}/{year}.jpg")
        content = {
            "images": [{"id": int(year), "file_name": f"{year}.jpg"}],
            "annotations": [{"image_id": int(year), "caption": "A cat."}],
        }
        for split in ("train", "val"):
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / f"annotations/captions_{split}{year}.json").write_text(json.dumps(content))
    caplog.set_level(logging.WARNING)
    assert open_reader(f"coco:{tmp_path}", "val").ids == ["2017"]
    assert "?year=" in caplog.text
    caplog.clear()
    assert open_reader(f"coco:{tmp_path}?year=2014", "val").ids == ["2014"]
    assert not caplog.text
    for file in (tmp_path / "annotations").glob("*2014.json"):
        file.unlink()
    with pytest.raises(UserError, match="no captions_SPLIT"):
        open_reader(f"coco:{tmp_path}?year=2014", "val")
    for file in (tmp_path / "annotations").glob("*2017.json"):
        file.rename(file.with_name(file.name.replace("2017", "")))
    assert open_reader(f"coco:{tmp_path}?year=2014", "val").ids == ["2017"], "files that say no year"


def test_specs_with_options_are_resolved_from_the_folder_of_a_run(tmp_path):
    karpathy(tmp_path / "started/coco", COCO)
    assert resolve_spec("karpathy:coco?incomplete=skip@val", tmp_path / "started") == (
        f"karpathy:{tmp_path}/started/coco?incomplete=skip@val"
    )
    assert resolve_spec("karpathy:coco?incomplete=skip", tmp_path) == "karpathy:coco?incomplete=skip"


def mjhq(folder: Path) -> Path:
    about = {f"id{n}": {"category": ("animals", "food")[n % 2], "prompt": f"a  thing {n}"} for n in range(4)}
    for id, row in about.items():
        picture(folder / "mjhq30k_imgs" / row["category"] / f"{id}.jpg")
    about |= {
        "idle": {"category": "food", "prompt": " "},
        "bare": {"prompt": "x"},
        "away": {"category": "..", "prompt": "x"},
    }
    picture(folder / "away.jpg")
    (folder / "meta_data.json").write_text(json.dumps(about))
    return folder


def test_mjhq_is_read_as_published(tmp_path):
    reader = open_reader(f"mjhq:{mjhq(tmp_path)}", "all")
    assert reader.ids[:4] == ["id0", "id1", "id2", "id3"]
    assert (reader[3].captions, reader[3].image.shape) == (("a thing 3",), (4, 6, 3))
    reasons = bad(reader)
    assert set(reasons) == {"idle", "bare", "away"}
    message = {"idle": "no prompt", "bare": "no category", "away": "leaves the data folder"}
    assert all(words in reasons[id] for id, words in message.items())
    assert open_reader(str(tmp_path), "all").ids == reader.ids


def test_mjhq_without_its_metadata_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no meta_data\.json"):
        open_reader(f"mjhq:{tmp_path}", "all")
    (tmp_path / "meta_data.json").write_text("[]")
    with pytest.raises(UserError, match="not the file of MJHQ-30K"):
        open_reader(f"mjhq:{tmp_path}", "all")
