"""User errors: apart from the errors of bad values, and with the names a user may have meant."""

from crossflow.core.errors import PARSING_ERRORS, UserError, unknown_name


def test_a_user_error_is_not_caught_as_a_bad_value() -> None:
    """What concerns the whole command, such as a missing library, is not taken for one damaged file."""
    assert not issubclass(UserError, (ValueError, *PARSING_ERRORS))


def test_unknown_names_suggest_similar_ones_first() -> None:
    message = str(unknown_name("setting", "train.stepz", ["train.steps", "train.lr", "sample.steps"]))
    assert message == (
        "Unknown setting 'train.stepz'. Did you mean 'train.steps'? Known: sample.steps, train.lr, train.steps."
    )
    assert str(unknown_name("solver", "x", [])) == "Unknown solver 'x'. Known: none."
