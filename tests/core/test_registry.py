"""Registry and the error for unknown names."""

import pytest

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.registry import Registry


@pytest.fixture
def shapes() -> Registry[int]:
    registry: Registry[int] = Registry("shape")
    registry.register("triangle")(3)
    registry.register("square")(4)
    return registry


def test_register_returns_what_it_enters() -> None:
    registry: Registry[type] = Registry("class")

    @registry.register("thing")
    class Thing:
        pass

    assert registry.get("thing") is Thing
    assert isinstance(Thing(), Thing)


def test_names_are_sorted(shapes: Registry[int]) -> None:
    assert shapes.names() == ["square", "triangle"]


def test_unknown_name_suggests_similar_and_lists_all_known(shapes: Registry[int]) -> None:
    with pytest.raises(
        UserError, match=r"Unknown shape 'triangel'\. Did you mean 'triangle'\? Known: square, triangle\."
    ):
        shapes.get("triangel")


def test_a_dissimilar_name_gives_no_hint(shapes: Registry[int]) -> None:
    with pytest.raises(UserError) as error:
        shapes.get("xyz")
    assert "Did you mean" not in str(error.value)
    assert "Known: square, triangle." in str(error.value)


def test_a_name_is_registered_once(shapes: Registry[int]) -> None:
    with pytest.raises(AssertionError, match="registered twice"):
        shapes.register("square")(5)
    assert shapes.get("square") == 4


def test_the_error_of_an_empty_table_lists_no_names() -> None:
    assert str(unknown_name("planet", "Vulcan", [])) == "Unknown planet 'Vulcan'. Known: none."


def test_a_common_prefix_does_not_make_names_similar() -> None:
    assert "Did you mean" not in str(unknown_name("setting", "path.xyzzy", ["path.name", "path.sigma_min"]))
    assert "Did you mean 'train.steps'?" in str(unknown_name("setting", "train.step", ["train.steps", "train.lr"]))
