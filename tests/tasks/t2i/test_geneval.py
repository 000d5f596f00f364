"""GenEval's rules on known boxes; a detector that sees nothing and a CLIP model that names no colours are refused."""

import json

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.tasks.t2i.detector import AS_GENEVAL, Detector, cut_out, expect_colours, expect_sight
from crossflow.tasks.t2i.geneval import DetectedObject, GenEvalMetric, judge, read_prompts, relations

PICTURE = np.zeros((100, 100, 3), np.uint8)


def at(name: str, left: float, top: float, score: float = 0.95, size: float = 10) -> DetectedObject:
    return DetectedObject(name, score, (left, top, left + size, top + size))


def right(prompt: dict, detections: list[DetectedObject], colours=("red",) * 9) -> bool:
    return judge(prompt, detections, lambda boxes: list(colours[: len(boxes)]))[0]


def wants(tag: str, *include: dict, exclude=()) -> dict:
    return {"tag": tag, "prompt": tag, "include": list(include), "exclude": list(exclude)}


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}


def test_objects_must_be_there_with_enough_confidence():
    assert right(wants("single_object", CAT), [at("cat", 0, 0, 0.31)])
    assert not right(wants("single_object", CAT), [at("cat", 0, 0, 0.3)])
    assert not right(wants("single_object", CAT), [at("dog", 0, 0)])
    assert right(wants("two_object", CAT, DOG), [at("dog", 0, 0), at("cat", 50, 0)])
    assert not right(wants("two_object", CAT, DOG), [at("cat", 50, 0)])


def test_counts_are_exact_and_need_high_confidence():
    three = wants("counting", {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
    cats = [at("cat", 20 * k, 0) for k in range(4)]
    assert right(three, cats[:3])
    assert not right(three, cats)
    assert not right(three, cats[:2])
    assert not right(three, [*cats[:2], at("cat", 60, 0, 0.9)])
    assert right(three, [*cats[:3], at("cat", 80, 0, 0.5)])


def test_colours_belong_to_the_surest_objects():
    red = wants("colors", {**CAT, "color": "red"})
    assert right(red, [at("cat", 0, 0)], ("red",))
    assert not right(red, [at("cat", 0, 0)], ("blue",))
    assert not right(red, [at("cat", 0, 0, 0.9), at("cat", 50, 0, 0.8)], ("blue", "red"))
    both = wants("color_attr", {**CAT, "color": "red"}, {**DOG, "color": "red"})
    assert right(both, [at("cat", 0, 0), at("dog", 50, 0)])


def test_places_are_relative_to_the_named_object():
    left = wants("position", DOG, {**CAT, "position": ["left of", 0]})
    assert right(left, [at("cat", 0, 0), at("dog", 50, 0)])
    assert not right(left, [at("cat", 50, 0), at("dog", 0, 0)])
    assert not right(left, [at("cat", 0, 0)])
    assert not right(left, [at("cat", 0, 0), at("cat", 90, 0, 0.5), at("cat", 90, 9, 0.99), at("dog", 50, 0)])


def test_relations_of_boxes():
    box = (40, 40, 60, 60)
    assert relations((0, 40, 20, 60), box) == {"left of"}
    assert relations((80, 45, 95, 55), box) == {"right of"}
    assert relations((40, 0, 60, 20), box) == {"above"}
    assert relations((40, 80, 60, 99), box) == {"below"}
    assert relations((0, 0, 20, 20), box) == {"left of", "above"}
    assert relations(box, box) == set()
    assert relations((43, 40, 63, 60), box) == set(), "within a tenth of the sizes"
    assert relations((45, 40, 65, 60), box) == set(), "beyond the slack by less than half of the distance"
    assert relations((49, 40, 69, 60), box) == {"right of"}
    assert relations((326, 138, 436, 262), (20, 8, 158, 39)) == {"right of"}, "so far right that it is not below"


def test_the_score_is_the_mean_of_the_kinds():
    metric = GenEvalMetric(
        lambda pictures: [[at("cat", 0, 0)] for _ in pictures], lambda picture, boxes: ["red"] * len(boxes)
    )
    for number, prompt in enumerate([*[wants("single_object", CAT)] * 3, wants("two_object", CAT, DOG)]):
        metric.add(str(number), PICTURE, prompt)
    values = metric.compute()
    assert (values["single_object"], values["two_object"], values["overall"]) == (1, 0, 0.5)
    assert metric.rows[3]["reason"] == "0 of 1 dog"
    assert "counting" in metric.notes[0]
    assert set(metric.intervals()) == {"single_object", "two_object", "overall"}
    with pytest.raises(ValueError, match="uint8"):
        metric.add("x", PICTURE.astype(float), wants("single_object", CAT))


def test_a_detector_that_sees_nothing_is_noted_beside_the_scores():
    metric = GenEvalMetric(lambda pictures: [[]], lambda picture, boxes: [])
    metric.add("0", PICTURE, wants("single_object", CAT))
    assert metric.compute()["overall"] == 0
    assert "found nothing at all in 1 of 1" in metric.notes[-1]


def test_the_self_test_catches_an_all_zero_detector():
    with pytest.raises(UserError, match=r"does not see.*cat: nothing"):
        expect_sight("blind", lambda pictures: [[]])
    with pytest.raises(UserError, match="does not see"):
        expect_sight("unsure", lambda pictures: [[at(name, 0, 0, 0.2) for name in ("cat", "person", "cup")]])
    shapes = {(300, 451, 3): "cat", (512, 512, 3): "person", (400, 600, 3): "cup"}
    expect_sight("sees", lambda pictures: [[at(shapes[picture.shape], 0, 0)] for picture in pictures])
    with pytest.raises(UserError, match="plain colours"):
        expect_colours(lambda picture, boxes: ["red"])
    centres = {(220, 20, 20): "red", (20, 160, 30): "green", (20, 40, 220): "blue", (250, 230, 20): "yellow"}
    expect_colours(lambda picture, boxes: [centres[tuple(picture[112, 112].tolist())]])


def test_a_detector_with_random_weights_is_refused_by_what_it_sees(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_queries=5, num_labels=3,
    )  # fmt: skip
    transformers.DetrForObjectDetection(config).save_pretrained(tmp_path)
    transformers.DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not see"):
        Detector(str(tmp_path))
    with pytest.raises(UserError, match="nothing-here"):
        Detector(str(tmp_path / "nothing-here"))


def test_classes_are_called_as_in_the_prompts_and_unknown_ones_refused():
    detector = object.__new__(Detector)
    detector.source = "tiny"
    detector.labels = {number: AS_GENEVAL.get(name, name) for number, name in enumerate(("cat", "mouse", "sofa"))}
    detector.expect(["cat", "computer mouse", "couch"])
    with pytest.raises(UserError, match="no class for tv remote, zebra"):
        detector.expect(["cat", "zebra", "tv remote"])


def test_objects_are_cut_out_of_their_surroundings():
    picture = np.full((20, 30, 3), 7, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:8, 10:12] = True
    patch = cut_out(picture, DetectedObject("cat", 1.0, (10, 5, 14, 8), mask))
    assert patch.shape == (3, 4, 3)
    assert patch[:, :2].tolist() == np.full((3, 2, 3), 7).tolist()
    assert (patch[:, 2:] == 153).all()
    assert cut_out(picture, DetectedObject("cat", 1.0, (29.5, 19.5, 40, 40))).shape == (1, 1, 3)


def test_prompts_are_read_and_wrong_ones_named(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    good = wants("single_object", CAT)
    path.write_text(json.dumps(good) + "\n" + json.dumps(wants("position", DOG, {**CAT, "position": ["above", 0]})))
    assert read_prompts(path)[0] == good
    for wrong, message in (
        ({"prompt": "a", "tag": "shape", "include": [CAT]}, "`tag`"),
        (wants("colors"), "at least one"),
        (wants("colors", {"class": "cat", "count": 0}), "count of cat"),
        (wants("position", {**CAT, "position": ["above", 0]}), "earlier object"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(wrong))
        with pytest.raises(UserError, match=rf"line 2.*{message}"):
            read_prompts(path)
    with pytest.raises(UserError, match="evaluation_metadata"):
        read_prompts(tmp_path / "none.jsonl")
