"""Specs are taken apart into location, options and split, and put together again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossflow.core.errors import UserError
from crossflow.data.readers import resolve_spec
from crossflow.data.spec import Option, parse_options, split_forced, split_location
from crossflow.data.splits import SPLITS

OPTIONS = {
    "crop": Option("part", "garg", ("garg", "eigen", "none")),
    "cap": Option("metres", "80", number=True),
    "list": Option("file", is_place=True),
}
names = st.text("abcXYZ019_-.", min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))
places = st.lists(names, min_size=1, max_size=3).map(lambda parts: "missing/" + "/".join(parts))
values = st.fixed_dictionaries(
    {},
    optional={
        "crop": st.sampled_from(("garg", "eigen", "none")),
        "cap": st.one_of(st.just("none"), st.floats(0.1, 1e4).map(str)),
        "list": names,
    },
)


@given(place=places, chosen=values, split=st.sampled_from(("", *SPLITS)))
def test_a_joined_spec_is_parsed_into_its_parts(place: str, chosen: dict[str, str], split: str) -> None:
    options = "&".join(f"{name}={value}" for name, value in chosen.items())
    spec = f"kitti:{place}" + (f"?{options}" if options else "") + (f"@{split}" if split else "")
    rest, forced = split_forced(spec)
    assert forced == split
    location, text = split_location(rest.removeprefix("kitti:"))
    assert (location, text) == (place, options)
    defaults = {name: option.default for name, option in OPTIONS.items()}
    assert parse_options(text, OPTIONS, spec) == defaults | chosen


@given(place=places, split=st.sampled_from(("", *SPLITS)))
def test_a_spec_of_a_missing_path_is_unchanged(place: str, split: str) -> None:
    spec = f"folder:{place}" + (f"@{split}" if split else "")
    assert resolve_spec(spec, Path("/nowhere")) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crob=garg", "Did you mean 'crop'"),
        ("crop=gard", "Did you mean 'garg'"),
        ("crop", "the option 'crop' has no value"),
        ("cap=-1", "must be a number above 0, or none"),
        ("cap=inf", "must be a number above 0, or none"),
        ("cap=far", "must be a number above 0, or none"),
    ],
)
def test_invalid_options_are_refused_with_the_valid_ones(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_options(text, OPTIONS, "kitti:x")
