"""Text-to-image scores: verdicts of known cases, controls, intervals, a CLIP score that is the model's own cosine."""

import json

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.data.scenes import PROMPT_KINDS, Prompt, Requirement, geneval_prompts
from crossflow.tasks.t2i.metric import ClipScorer, T2IMetric, derangement, fulfils, scene_cases
from crossflow.tasks.t2i.recogniser import Detection

PICTURE = np.zeros((8, 8, 3), np.uint8)


def solid(name, x=0.5, distance=3.0):
    colour, shape = name.split()
    return Detection(shape, colour, "large", "rubber", x, 0.5, distance, 0.9)


def prompt(kind, *required, relation=None):
    return Prompt(kind, "text", tuple(Requirement(*requirement) for requirement in required), relation)


def drawn(goal):
    """What an obedient model would have drawn for a prompt."""
    names = [(f"{r.colour or 'red'} {r.shape}", index) for index, r in enumerate(goal.required) for _ in range(r.count)]
    x = {"left of": (0.2, 0.8), "right of": (0.8, 0.2)}.get(goal.relation, (0.4, 0.6))
    distance = {"in front of": (2.0, 3.0), "behind": (3.0, 2.0)}.get(goal.relation, (2.5, 2.5))
    return tuple(solid(name, x[index], distance[index]) for name, index in names)


class Answers:
    """A judge that finds, in the order of pictures, what it was told to find."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def __call__(self, images):
        return [next(self.answers) for _ in images]


def metric_of(cases, answers, **options):
    metric = T2IMetric(judge=Answers(answers), **options)
    for id, goal in cases:
        metric.add(id, PICTURE, goal)
    return metric


@pytest.mark.parametrize(
    ("goal", "detections", "verdict"),
    [
        (prompt("single_object", (1, "cube")), ["red cube"], True),
        (prompt("single_object", (1, "cube")), ["red cube", "blue cone"], True),
        (prompt("single_object", (1, "cube")), ["red sphere"], False),
        (prompt("single_object", (1, "cube")), [], False),
        (prompt("two_objects", (1, "cube"), (1, "cone")), ["red cube", "red cone"], True),
        (prompt("two_objects", (1, "cube"), (1, "cone")), ["red cube", "red cube"], False),
        (prompt("counting", (2, "cube")), ["red cube", "blue cube"], True),
        (prompt("counting", (2, "cube")), ["red cube"] * 3, False),
        (prompt("counting", (2, "cube")), ["red cube"], False),
        (prompt("counting", (3, "cone")), ["red cone"] * 3, True),
        (prompt("colors", (1, "cube", "red")), ["blue cube", "red cube"], True),
        (prompt("colors", (1, "cube", "red")), ["blue cube", "red cone"], False),
        (prompt("color_attribution", (1, "cube", "red"), (1, "cone", "blue")), ["red cube", "blue cone"], True),
        (prompt("color_attribution", (1, "cube", "red"), (1, "cone", "blue")), ["blue cube", "red cone"], False),
    ],
)
def test_verdicts_of_known_cases(goal, detections, verdict):
    assert fulfils(goal, [solid(name) for name in detections]) is verdict


@pytest.mark.parametrize(
    ("relation", "cube", "cone"),
    [
        ("left of", (0.2, 3.0), (0.7, 3.0)),
        ("right of", (0.7, 3.0), (0.2, 3.0)),
        ("in front of", (0.5, 2.0), (0.5, 3.0)),
        ("behind", (0.5, 3.0), (0.5, 2.0)),
    ],
)
def test_position_holds_one_way_only(relation, cube, cone):
    goal = prompt("position", (1, "cube"), (1, "cone"), relation=relation)
    assert fulfils(goal, [solid("red cube", *cube), solid("red cone", *cone)])
    assert not fulfils(goal, [solid("red cube", *cone), solid("red cone", *cube)])
    assert not fulfils(goal, [solid("red cube", *cube), solid("red sphere", *cone)])
    assert not fulfils(goal, [solid("red cube", *cube), solid("red cone", *cube)])


def test_cases_take_turns_and_are_the_same_for_a_seed():
    cases = scene_cases(20, seed=1)
    assert cases == scene_cases(20, seed=1)
    assert cases != scene_cases(20, seed=2)
    assert len({id for id, _ in cases}) == 20
    assert [goal.kind for _, goal in cases] == [PROMPT_KINDS[i % 6] for i in range(20)]
    assert cases[:7] == scene_cases(7, seed=1)


def test_obedient_model_scores_one_and_its_control_does_not():
    cases = scene_cases(120, seed=0)
    metric = metric_of(cases, [drawn(goal) for _, goal in cases])
    values = metric.compute()
    assert all(values[kind] == 1 for kind in (*PROMPT_KINDS, "overall"))
    assert values["num_items"] == 120
    assert values["shuffled_single_object"] == 0
    assert values["shuffled_colors"] == 0
    assert values["shuffled_overall"] < 0.25


def test_deaf_model_scores_as_its_control_does():
    """One that draws the same picture whatever the prompt gains nothing over the shuffled prompts."""
    cases = scene_cases(600, seed=0)
    values = metric_of(cases, [(solid("red cube", 0.2, 2.0), solid("red cone", 0.8, 3.0))] * 600).compute()
    assert 0 < values["overall"] < 0.5
    assert values["shuffled_overall"] == pytest.approx(values["overall"], abs=0.01)


def test_overall_is_the_mean_of_kinds_not_of_pictures():
    cases = [(f"a{i}", p) for i, p in enumerate(geneval_prompts("single_object", 0, 9))]
    cases += [("b", geneval_prompts("counting", 0, 1)[0])]
    metric = metric_of(cases, [*(drawn(goal) for _, goal in cases[:9]), ()])
    values = metric.compute()
    assert (values["single_object"], values["counting"], values["overall"]) == (1, 0, 0.5)
    assert "colors" not in values
    assert any("without" in note and "colors" in note for note in metric.notes)
    assert any("shuffled" in note for note in metric.notes)


def test_rows_are_json_and_carry_all_that_the_scores_need():
    cases = scene_cases(60, seed=0)
    first = metric_of(cases, [drawn(goal) if i % 3 else () for i, (_, goal) in enumerate(cases)])
    second = T2IMetric(judge=lambda images: [() for _ in images])
    second.extend(json.loads(json.dumps(first.rows))[::-1])
    assert second.compute() == first.compute()
    assert second.intervals() == first.intervals()


def test_intervals_surround_the_scores():
    cases = scene_cases(120, seed=0)
    metric = metric_of(cases, [drawn(goal) if i % 4 else () for i, (_, goal) in enumerate(cases)])
    values, intervals = metric.compute(), metric.intervals()
    for name in (*PROMPT_KINDS, "overall", "shuffled_overall"):
        low, high = intervals[name]
        assert 0 <= low <= values[name] <= high <= 1
        assert low < high
    assert intervals == metric.intervals()


def test_overall_interval_has_a_width_when_the_pictures_of_each_kind_agree():
    cases = scene_cases(12, seed=0)
    metric = metric_of(cases, [drawn(goal) if goal.kind == PROMPT_KINDS[0] else () for _, goal in cases])
    low, high = metric.intervals()["overall"]
    assert metric.compute()["overall"] == pytest.approx(1 / 6)
    assert low < 0.1 < 0.3 < high


@pytest.mark.parametrize("texts", [list("abcdef"), list("aabbcc"), list("aaabbc"), list("abababab")])
def test_derangement_gives_every_text_another(texts):
    partners = derangement(texts, "0")
    assert sorted(partners) == list(range(len(texts)))
    assert all(texts[partner] != text for partner, text in zip(partners, texts, strict=True))
    assert partners == derangement(texts, "0")


def test_derangement_leaves_out_what_has_no_other():
    assert derangement(list("aaa"), "0") == [None] * 3
    assert derangement([], "0") == []
    partners = derangement(list("aaab"), "0")
    assert sum(partner is not None for partner in partners) == 2


def test_captions_without_clip_are_counted_but_not_scored():
    metric = T2IMetric()
    metric.add("0", PICTURE, "a dog on a beach")
    assert metric.compute() == {"num_items": 1.0}
    assert any("CLIP" in note for note in metric.notes)


def test_metric_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"item 'x'.*uint8"):
        T2IMetric().add("x", np.zeros((8, 8, 3), np.float32), "a dog")


def test_nothing_scored_is_a_user_error():
    with pytest.raises(UserError, match="No items"):
        T2IMetric().compute()


# ---- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model with random weights and a tokenizer of a few words, as transformers saves them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 12, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    model.text_projection.weight.data.neg_()  # with these weights the cosines are positive
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "red": 5, "cube": 6, "blue": 7, "cone": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return str(folder)


def test_clip_score_is_the_models_cosine(clip_folder):
    import torch
    import transformers

    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    score = ClipScorer(clip_folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (
        [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711],
    ))  # fmt: skip
    calls = []
    texts = ["a red cube", "a tall blue cone"]
    together = score.scores([picture for picture in pictures for _ in texts], texts * len(pictures))
    for picture in pictures:
        for text in texts:
            pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
            with torch.no_grad():
                output = model(**tokenizer([text], return_tensors="pt"), pixel_values=pixels[None])
            cosine = float((output.image_embeds * output.text_embeds).sum())
            calls.append(cosine)
            assert score.scores([picture], [text])[0] == pytest.approx(100 * cosine, abs=1e-2)
            assert together[len(calls) - 1] == pytest.approx(100 * cosine, abs=1e-2), "texts of two lengths, padded"
    assert min(calls) > 0.1
    assert np.ptp(calls) > 0.1


def test_clip_score_is_averaged_and_long_prompts_are_cut(clip_folder):
    metric = T2IMetric(clip=clip_folder)
    picture = np.full((20, 30, 3), 200, np.uint8)
    rows = [metric.add(str(i), picture, text) for i, text in enumerate(["a red cube", "red cone " * 30])]
    assert metric.compute()["clip_score"] == pytest.approx(np.mean([row["clip_score"] for row in rows]))
    low, high = metric.intervals()["clip_score"]
    assert low <= high


def test_clip_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nothing-here"):
        T2IMetric(clip=str(tmp_path / "nothing-here"))


def test_pictures_of_one_shape_are_judged_together_with_the_rows_of_one_by_one():
    cases = scene_cases(6, 0)
    ids, prompts = [id for id, _ in cases], [goal for _, goal in cases]
    pictures = [np.zeros((side, side, 3), np.uint8) for side in (8, 8, 8, 16, 16, 8)]
    alone, shapes = metric_of(cases, [drawn(goal) for goal in prompts]), []

    def judge(images):
        shapes.append(images.shape[:2])
        return [drawn(prompts[sum(count for count, _ in shapes[:-1]) + number]) for number in range(len(images))]

    together = T2IMetric(judge=judge)
    assert together.add_all(ids, pictures, prompts) == alone.rows
    assert shapes == [(3, 8), (2, 16), (1, 8)]
    with pytest.raises(ValueError, match=f"item '{ids[0]}' has already been scored"):
        together.add_all(ids, pictures, prompts)
