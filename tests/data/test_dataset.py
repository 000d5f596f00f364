"""Order and augmentation follow from keys alone, and bad items are replaced the same way in every process."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.core import noise
from crossflow.core.errors import UserError
from crossflow.core.noise import order
from crossflow.data.dataset import Examples, _ItemGenerator, check
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader


class CountingReader(Reader):
    """Items with the value of their index; those in `broken` are bad. Counts how they were asked for."""

    prefix, layout, offers = "counting", "nothing", frozenset(("image",))

    def __init__(self, location="", split="train", *, image_size=None, limit=None, seed=0, broken=(), together=1):
        self.spec, self.split, self.fields = "counting", split, self.offers
        self.ids = [f"item{index}" for index in range(limit)]
        self.broken, self.batch_hint = set(broken), together
        self.calls: list[list[int]] = []

    def __getitem__(self, index):
        if index in self.broken:
            raise BadItem(self.ids[index], "broken")
        return Item(self.ids[index], np.full((2, 2, 3), index % 256, np.uint8))

    def load(self, indices):
        self.calls.append(list(indices))
        return super().load(indices)

    def fingerprint(self):
        return "0" * 32

    @property
    def loaded(self):
        return Counter(index for call in self.calls for index in call)


def name(item, generator):
    return item.id


def name_and_number(item, generator):
    return item.id, float(generator.random())


def folder_of_pictures(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Reader:
    for number in range(count):
        file = folder / f"{number:03d}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(file)
        if number in broken:
            file.write_bytes(b"not a picture")
    return open_reader(f"folder:{folder}@all", "train")


# --------------------------------------------------------------------------------------------------- augmentation keys


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    first = Examples(CountingReader(limit=20), name_and_number, seed=3)
    again = Examples(CountingReader(limit=20, together=8), name_and_number, seed=3, cache=False)
    keys = [(epoch, index) for epoch in range(3) for index in range(20)]
    forward = {key: first[key] for key in keys}
    backward = dict(zip(reversed(keys), again.__getitems__(list(reversed(keys))), strict=True))
    assert forward == backward
    assert len({number for _, number in forward.values()}) == 60
    assert Examples(CountingReader(limit=20), name_and_number, seed=4)[0, 0] != forward[0, 0]


def test_augmentation_numbers_never_change():
    """A run that is resumed with a newer version must go on alike. The number was computed once with numpy 2.4."""
    examples = Examples(CountingReader(limit=2), lambda item, generator: int(generator.integers(2**32)), seed=0)
    assert examples[0, 1] == 2771458061


def test_an_index_alone_means_epoch_zero_and_iteration_ends():
    examples = Examples(CountingReader(limit=4), name_and_number, seed=0)
    assert examples[2] == examples[0, 2]
    assert [id for id, _ in examples] == ["item0", "item1", "item2", "item3"]
    for index in (4, -1):
        with pytest.raises(IndexError):
            examples[0, index]


# ------------------------------------------------------------------------------------------------------------ bad items


def test_the_next_good_item_replaces_a_bad_one_with_the_augmentation_of_its_index():
    examples = Examples(CountingReader(limit=40, broken=(5, 6, 39)), name_and_number, seed=0, max_bad=0.1)
    clean = Examples(CountingReader(limit=40), name_and_number, seed=0)
    assert examples[2, 5] == ("item7", clean[2, 5][1])
    assert examples[0, 39] == ("item0", clean[0, 39][1])
    assert examples.bad == {"item5": "broken", "item6": "broken", "item39": "broken"}


def test_replacements_do_not_depend_on_earlier_accesses():
    keys = [(0, index) for index in range(40)]
    orders = (keys, keys[::-1], keys[7:] + keys[:7])
    results = []
    for sequence in orders:
        examples = Examples(CountingReader(limit=40, broken=(5, 6)), name_and_number, seed=0, max_bad=0.05)
        results.append({key: examples[key] for key in sequence})
    assert results[0] == results[1] == results[2]


def test_bad_items_are_read_once():
    reader = CountingReader(limit=40, broken=(5,))
    examples = Examples(reader, name, seed=0)
    for _ in range(3):
        examples[0, 5]
    assert reader.loaded[5] == 1


def test_more_bad_items_than_allowed_stop_with_ten_reasons():
    examples = Examples(CountingReader(limit=200, broken=range(100)), name, seed=0, max_bad=0.06)
    with pytest.raises(UserError) as error:
        examples[0, 0]
    message = str(error.value)
    assert "13 of 200 items are bad" in message
    assert message.count(": broken") == 10
    assert "and 3 more" in message


def test_bad_items_are_accepted_up_to_the_limit_and_refused_above():
    assert Examples(CountingReader(limit=100, broken=range(5)), name, seed=0)[0, 0] == "item5"
    with pytest.raises(UserError, match="6 of 100"):
        Examples(CountingReader(limit=100, broken=range(6)), name, seed=0)[0, 0]


def test_all_items_bad_is_an_error_at_any_limit():
    with pytest.raises(UserError, match="3 of 3 items are bad"):
        Examples(CountingReader(limit=3, broken=range(3)), name, seed=0, max_bad=1.0)[0, 1]


def test_items_bad_in_the_listing_count_immediately(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{broken\n')
    with pytest.raises(UserError, match=r"1 of 2 items are bad.*\n  x\.jsonl:2: line 2 of x\.jsonl is not JSON"):
        Examples(open_reader(f"jsonl:{tmp_path}/x.jsonl@all", "train"), name, seed=0)


def test_a_transform_may_reject_an_item():
    def choosy(item, generator):
        if item.id == "item3":
            raise BadItem(item.id, "too small")
        return item.id

    examples = Examples(CountingReader(limit=30), choosy, seed=0)
    assert examples[0, 3] == examples[1, 3] == "item4"
    assert examples.bad == {"item3": "too small"}


def test_bad_items_are_logged_once_each(caplog):
    examples = Examples(CountingReader(limit=40, broken=(5,)), name, seed=0)
    for _ in range(3):
        examples[0, 5]
    assert caplog.text.count("skipping item item5: broken") == 1


def test_damaged_files_on_disk_are_replaced(tmp_path):
    reader = folder_of_pictures(tmp_path, 40, broken=(0, 39))
    examples = Examples(reader, lambda item, generator: int(item.image[0, 0, 0]), seed=0)
    assert [examples[0, index] for index in range(40)] == [1, *range(1, 39), 1]
    assert set(examples.bad) == {"000.png", "039.png"}


def test_items_are_the_good_ones_in_order_up_to_the_limit():
    examples = Examples(CountingReader(limit=50, broken=(1,)), name, seed=0)
    assert [item.id for item in examples.items()] == [f"item{index}" for index in range(50) if index != 1]
    assert [item.id for item in examples.items(limit=3)] == ["item0", "item2", "item3"]
    assert examples.bad == {"item1": "broken"}
    assert set(examples.reader.loaded.values()) == {1}


def test_captions_come_without_decoding_pictures(tmp_path):
    rows = [f'{{"image": "{number}.png", "captions": ["a {number}", "b"]}}\n' for number in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(rows))  # of pictures that are not there
    examples = Examples(open_reader(f"jsonl:{tmp_path}/x.jsonl@all", "train"), name, seed=0)
    assert list(examples.captions(limit=2)) == ["a 0", "b", "a 1", "b"]


# --------------------------------------------------------------------------------------------------------------- memory


def test_small_sets_are_decoded_once():
    reader = CountingReader(limit=10)
    examples = Examples(reader, name, seed=0)
    for epoch in range(3):
        examples.__getitems__([(epoch, index) for index in range(10)])
    assert set(reader.loaded.values()) == {1}


def test_memory_stays_within_its_budget_and_without_cache_nothing_is_kept():
    big = CountingReader(limit=10)
    examples = Examples(big, name, seed=0, cache_bytes=3 * 1100)
    for _ in range(2):
        for index in range(10):
            examples[0, index]
    assert sorted(big.loaded.values()) == [1] * 3 + [2] * 7
    uncached = CountingReader(limit=10, together=4)
    examples = Examples(uncached, name, seed=0, cache=False)
    for _ in range(2):
        examples[0, 3]
    assert uncached.calls == [[3], [3]]


def test_rendering_readers_load_many_items_at_once_in_epoch_order():
    reader = CountingReader(limit=100, together=16)
    examples = Examples(reader, name, seed=5)
    sequence = order(5, 0, 100)[np.arange(100)].tolist()
    for index in sequence:
        assert examples[0, index] == f"item{index}"
    assert [len(call) for call in reader.calls if call] == [16] * 6 + [4]
    assert reader.calls[0] == sequence[:16]


def test_a_batch_is_loaded_in_one_call_and_repeats_once():
    reader = CountingReader(limit=50)
    examples = Examples(reader, name, seed=0)
    assert examples.__getitems__([(0, 4), (0, 9), (1, 4)]) == ["item4", "item9", "item4"]
    assert reader.calls == [[4, 9]]


def test_pickling_drops_decoded_items():
    examples = Examples(CountingReader(limit=50, broken=(1,)), name_and_number, seed=0)
    expected = [examples[0, index] for index in range(50)]
    again = pickle.loads(pickle.dumps(examples))
    assert not again._cached
    assert again.bad == {"item1": "broken"}
    assert [again[0, index] for index in range(50)] == expected


def test_workers_give_the_same_examples(tmp_path):
    reader = folder_of_pictures(tmp_path, 24, broken=(3,))
    examples = Examples(reader, name_and_number, seed=1)
    batches = [[(0, index) for index in range(first, first + 6)] for first in range(0, 24, 6)]
    loader = torch.utils.data.DataLoader(examples, batch_sampler=batches, num_workers=2, collate_fn=list)
    assert list(loader) == [[examples[key] for key in batch] for batch in batches]


def test_check_reads_everything_and_reports_progress(tmp_path):
    reader = folder_of_pictures(tmp_path, 40, broken=(2, 30))
    progress = []
    report = check(reader, lambda done, total: progress.append((done, total)))
    assert (report.total, report.good, report.num_captions) == (40, 38, 0)
    assert list(report.bad) == ["002.png", "030.png"]
    assert all("picture" in reason for reason in report.bad.values())
    assert progress[-1] == (40, 40)


def test_check_counts_captions():
    report = check(open_reader("scenes", "val", image_size=8, limit=40))
    assert (report.total, report.good, report.num_captions, report.bad) == (40, 40, 200, {})


def test_examples_of_scenes_render_together_and_repeat():
    reader = open_reader("scenes", "train", image_size=16, limit=40)
    examples = Examples(reader, lambda item, generator: item, seed=0)
    places = [(0, index) for index in order(0, 0, 40)[np.arange(8)].tolist()]
    once = [examples[key] for key in places]
    again = Examples(reader, lambda item, generator: item, seed=0, cache=False)
    for item, key in zip(once, places, strict=True):
        np.testing.assert_array_equal(item.image, again[key].image)
        assert item.captions == again[key].captions


def test_the_reset_generator_equals_a_new_one_keyed_by_epoch_and_index():
    generators = _ItemGenerator(3)
    for epoch, index in ((0, 0), (0, 1), (2, 1), (0, 0)):
        own = np.random.Generator(np.random.Philox(key=noise.key("augment", 3, epoch, index)))
        reset = generators.at(epoch, index)
        assert reset.integers(5) == own.integers(5)
        assert reset.integers(2**62) == own.integers(2**62)
        assert np.array_equal(reset.standard_normal(3), own.standard_normal(3))


def test_items_of_data_that_are_far_larger_than_the_memory_are_not_kept(tmp_path):
    for place in range(40):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(tmp_path / f"{place}.png")
    reader = open_reader(f"folder:{tmp_path}@all", "train")
    size = 1000 + 8 * 8 * 3
    for cache_bytes, kept in ((40 * size, 40), (20 * size, 20), (6 * size, 6), (4 * size, 0)):
        examples = Examples(reader, name, seed=0, cache_bytes=cache_bytes)
        examples.__getitems__(range(40))
        assert len(examples._cached) == kept
