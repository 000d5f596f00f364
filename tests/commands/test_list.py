"""The names that options accept."""

import pytest

from crossflow.cli import main
from crossflow.commands import list as list_command
from crossflow.core.backbones import BACKBONES
from crossflow.core.settings import shipped
from crossflow.core.solvers import SOLVERS
from crossflow.data.readers import READERS
from crossflow.tasks import task_names


@pytest.mark.parametrize("what", ["tasks", "configs", "datasets", "solvers", "backbones"])
def test_all_registered_names_are_listed(capsys, what: str) -> None:
    assert main(["list", what]) == 0
    known = {
        "tasks": task_names(),
        "configs": shipped(),
        "datasets": READERS.names(),
        "solvers": SOLVERS.names(),
        "backbones": BACKBONES.names(),
    }
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line[1:2].strip()} == set(known[what])  # the others go on with a row


@pytest.mark.parametrize("what", ["tasks", "configs"])
def test_descriptions_end_with_their_sentence(capsys, what: str) -> None:
    rows = {"tasks": list_command._tasks, "configs": list_command._configs}[what]()
    assert rows
    for name, description in rows:
        assert description.endswith((".", ")")), f"{name}: {description}"
        assert description.count("(") == description.count(")"), f"{name}: {description}"


def test_the_first_sentence_may_span_lines() -> None:
    text = "Depth of\n  v1.5 data, e.g. NYU. More.\n\nLast."
    assert list_command.first_sentence(text) == "Depth of v1.5 data, e.g. NYU."
