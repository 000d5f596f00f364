"""Settings: one YAML dialect, extends, overrides, errors that name the field, round trips."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given
from pydantic import ValidationError

from crossflow.benchmarks.ablation.group import load_group
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.core.config import Config, Section, TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.settings import RECIPES, build, dump, flat, merge, parse_overrides, parse_yaml, read, read_yaml

BASE = {"task": "toy"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def built(*overrides: str) -> Config:
    return build(Config, merge(BASE, parse_overrides(overrides)))


def test_a_file_overrides_the_files_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "task: toy\ntrain: {lr: 1.0e-3, steps: 10}\nsource: {kind: noisy}\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\ntrain: {steps: 20, batch_size: 8}\n")
    write(tmp_path / "c.yaml", "extends: b.yaml\ntrain: {batch_size: 4}\nseed: 3\n")
    settings = read(tmp_path / "c.yaml")
    assert settings == {
        "task": "toy",
        "train": {"lr": 1e-3, "steps": 20, "batch_size": 4},
        "source": {"kind": "noisy"},
        "seed": 3,
    }


def test_extends_finds_neighbouring_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "base.yaml", "task: toy\nseed: 5\n")
    write(tmp_path / "deep" / "top.yaml", "extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert read("deep/top.yaml") == {"task": "toy", "seed": 5}


def test_a_run_directory_is_read_by_its_config(tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", dump(built("seed=7")))
    assert build(Config, read(tmp_path)) == built("seed=7")


def test_extends_prefers_a_neighbouring_file_to_a_shipped_one(tmp_path: Path) -> None:
    write(tmp_path / "top.yaml", "extends: t2i_tiny\nseed: 3\n")
    assert read(tmp_path / "top.yaml") == {**read("t2i_tiny"), "seed": 3}
    write(tmp_path / "t2i_tiny.yaml", "task: toy\n")
    assert read(tmp_path / "top.yaml") == {"task": "toy", "seed": 3}


def test_a_file_may_extend_the_shipped_one_of_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "t2i_tiny.yaml", "extends: t2i_tiny\nseed: 3\n")
    assert read(tmp_path / "t2i_tiny.yaml") == {**read("t2i_tiny"), "seed": 3}


def test_extending_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extends 'nothing', which is neither .* nor a shipped recipe: .*t2i_tiny"):
        read(write(tmp_path / "top.yaml", "extends: nothing\n"))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circular_extends_is_a_user_error(tmp_path: Path, length: int) -> None:
    for i in range(length):
        write(tmp_path / f"r{i}.yaml", f"extends: r{(i + 1) % length}.yaml\n")
    with pytest.raises(UserError, match=r"extends itself: r0\.yaml -> .*r0\.yaml"):
        read(tmp_path / "r0.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1, 2", "not valid YAML"), ("- 1\n- 2\n", "holds list, expected a mapping")],
)
def test_unreadable_recipes_are_user_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "bad.yaml", text))


def test_missing_recipes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The recipe file .* does not exist"):
        read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Unknown recipe 'no_such_recipe'"):
        read("no_such_recipe")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("1E3", 1000.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("[0.9, 1e-2]", [0.9, 0.01]),
        ("coco:/data/x", "coco:/data/x"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("a=b", "a=b"),
        ("'3'", "3"),
    ],
)
def test_values_of_overrides(text: str, value: object) -> None:
    parsed = parse_overrides([f"x.y={text}"])["x"]["y"]
    assert parsed == value
    assert type(parsed) is type(value)


TABLES = [
    *RECIPES.glob("protocols/*.yaml"),
    *RECIPES.glob("ablations/*.yaml"),
    RECIPES.parent / "benchmarks/paper.yaml",
]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_mean_the_same_in_every_dialect(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "x: {b: 1, b: 1}\n", "- {no: 1, no: 2}\n"])
def test_repeated_keys_are_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"file\.yaml is not valid YAML: .*key '.*' is repeated"):
        read_yaml(write(tmp_path / "file.yaml", text))


def test_every_kind_of_file_is_read_in_the_same_dialect(tmp_path: Path) -> None:
    """`no` is a text and 1e-4 a number, in a recipe as in a protocol and in an ablation."""
    recipe = write(tmp_path / "recipe.yaml", "task: toy\ntrain: {precision: no, lr: 1e-4}\n")
    assert build(Config, read(recipe)).train == TrainConfig(precision="no", lr=1e-4)
    protocol = write(tmp_path / "p.yaml", "extends: nyu\nreader: {crop: no}\ndepth: {min_depth: 1e-4}\n")
    loaded = load_protocol(protocol)
    assert (loaded.reader["crop"], loaded.depth.min_depth) == ("no", 1e-4)
    group = (
        "title: t\nabout: a\nreference: no\nvariants: {no: {about: b, settings: {train: {precision: no, lr: 1e-4}}}}\n"
    )
    variants = load_group(str(write(tmp_path / "g.yaml", group))).variants
    assert variants["no"].settings == {"train": {"precision": "no", "lr": 1e-4}}


def test_flat_settings_are_dotted_paths() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2], "e": {}}
    settings = {"train": {"steps": 10, "betas": [0.9, 0.95]}, "seed": 1}
    assert parse_overrides([f"{name}={value}" for name, value in flat(settings).items()]) == settings


def test_overrides_nest_and_the_last_wins() -> None:
    settings = parse_overrides(["train.steps=10", "train.lr=1e-4", "seed=1", "train.steps=20"])
    assert settings == {"train": {"steps": 20, "lr": 1e-4}, "seed": 1}


def test_overrides_reach_the_configuration() -> None:
    config = built("train.lr=1e-4", "train.precision=no", "train.betas=[0.9, 0.95]", "source.kind=deterministic")
    assert config.train.lr == 1e-4
    assert config.train.precision == "no"
    assert config.train.betas == (0.9, 0.95)
    assert config.source.kind == "deterministic"


def test_precision_no_needs_no_quotes_in_a_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "task: toy\ntrain: {precision: no, lr: 1e-4}\n")
    assert build(Config, read(path)).train.precision == "no"


@pytest.mark.parametrize("override", ["train.steps", "=3", "steps 10"])
def test_malformed_overrides_are_user_errors(override: str) -> None:
    with pytest.raises(UserError, match="Write key=value"):
        parse_overrides([override])


def test_an_override_with_invalid_yaml_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"'train.betas=\[0.9' is not valid YAML"):
        parse_overrides(["train.betas=[0.9"])


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("train.batch_sise=3", "'train.batch_size'"),
        ("sorce.kind=noisy", "'source'"),
        ("lr=1e-3", "'train.lr'"),
        ("steps=3", "'train.steps' or 'sample.steps'"),
        ("train.guidance=3", "'interval.guidance' or 'sample.guidance'"),
    ],
)
def test_unknown_keys_suggest_full_paths_of_similar_keys(override: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        built(override)
    name = override.partition("=")[0]
    name = "sorce" if name.startswith("sorce") else name
    assert f"Unknown setting {name!r}. Did you mean {near}" in str(error.value)


def test_an_unknown_key_lists_its_section() -> None:
    known = r"Unknown setting 'path.xyzzy'\. Known: path.name, path.noise, path.sigma_min\."
    with pytest.raises(UserError, match=known):
        built("path.xyzzy=1")


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("train.lr=-1", "train.lr = -1"),
        ("train.steps=many", "train.steps = 'many'"),
        ("train.steps=1.5", "train.steps = 1.5"),
        ("source.kind=nosy", "source.kind = 'nosy'"),
        ("guidance.drop=1", "guidance.drop = 1"),
        ("sample.guidance=nan", "sample.guidance = 'nan'"),
        ("train=3", "train = 3"),
        ("backbone.conv=2", "backbone.conv = 2"),
        ("train.betas=[0.9, 1]", "train.betas.1 = 1"),
        ("sample.guidance_interval=[0, 2]", "sample.guidance_interval.1 = 2"),
        ("sample.guidance_interval=[0.9, 0.1]", "sample.guidance_interval = [0.9, 0.1]"),
    ],
)
def test_errors_name_the_field_and_its_invalid_value(override: str, name: str) -> None:
    with pytest.raises(UserError) as error:
        built(override)
    assert f"The setting {name} is invalid" in str(error.value)
    assert "Value error" not in str(error.value)  # pydantic's prefix


def test_a_missing_setting_and_several_problems_are_all_named() -> None:
    with pytest.raises(UserError) as error:
        build(Config, {"train": {"lr": 0, "stps": 3}})
    message = str(error.value)
    assert "'task' is missing" in message
    assert "train.lr = 0" in message
    assert "'train.stps'" in message


def test_dumped_configuration_builds_the_same() -> None:
    config = built(
        "train.lr=1e-5", "train.max_minutes=2.5", "data.train=folder:/ä b", "data.val='1e-4'", "train.trackers=[wandb]"
    )
    text = dump(config)
    assert build(Config, yaml.safe_load(text)) == config, "any reader of YAML reads the same"


@pytest.mark.parametrize("text", ["no", "1e-4", "12:30", "010", "true", "null", "", "a: b", "2024-01-01", "0.5", "~"])
def test_texts_that_look_like_something_else_survive_the_round_trip(tmp_path: Path, text: str) -> None:
    config = build(Config, merge(BASE, {"data": {"train": text}}))
    path = write(tmp_path / "r.yaml", dump(config))
    assert build(Config, read(path)) == config
    assert yaml.safe_load(dump(config))["data"]["train"] == text


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufeff\ufffe\uffff"))


@pytest.mark.slow
@given(TEXTS)
def test_any_text_survives_the_round_trip_in_both_dialects(text: str) -> None:
    config = build(Config, merge(BASE, {"data": {"train": text}}))
    written = dump(config)
    assert parse_yaml(written, "config")["data"]["train"] == text
    assert yaml.safe_load(written)["data"]["train"] == text


@given(st.floats(1e-12, 1e12), st.integers(0, 10**12), st.booleans())
def test_any_number_survives_an_override(lr: float, seed: int, joint: bool) -> None:
    parsed = parse_overrides([f"train.lr={json.dumps(lr)}", f"seed={seed}", f"caption.joint={json.dumps(joint)}"])
    assert parsed == {"train": {"lr": lr}, "seed": seed, "caption": {"joint": joint}}
    assert [type(value) for value in flat(parsed).values()] == [float, int, bool]


def test_configuration_is_frozen() -> None:
    config = built()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def test_tasks_add_sections_of_their_own() -> None:
    class Extra(Section):
        words: int = 3

    class Toy(Config):
        extra: Extra = Extra()

    config = build(Toy, merge(BASE, parse_overrides(["extra.words=5"])))
    assert config.extra.words == 5
    with pytest.raises(UserError, match=r"Unknown setting 'extra.wrds'\. Did you mean 'extra.words'"):
        build(Toy, merge(BASE, parse_overrides(["extra.wrds=5"])))


def test_merge_modifies_neither_side() -> None:
    base, over = {"a": {"x": 1}}, {"a": {"y": 2}}
    assert merge(base, over) == {"a": {"x": 1, "y": 2}}
    assert (base, over) == ({"a": {"x": 1}}, {"a": {"y": 2}})
