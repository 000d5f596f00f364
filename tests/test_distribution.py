"""Dockerfile, conda recipe and nox sessions agree with the package."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import yaml

import crossflow

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def requirements() -> dict[str, str]:
    """Lower bound by name, of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(">=") for line in lines if line and not line.startswith("#"))


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their words."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_built_from_what_the_wheel_holds() -> None:
    steps = instructions()
    names = [name for name, _ in steps]
    assert set(names) <= {"ARG", "FROM", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert names.index("FROM") == 1
    copied = {source for name, words in steps if name == "COPY" for source in shlex.split(words)[:-1]}
    assert [source for source in copied if not list(ROOT.glob(source))] == []
    assert copied >= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert copied >= {"requirements.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE", "py.typed", "*.py"}


def test_the_image_has_arguments_for_torch_and_extras_that_exist() -> None:
    arguments = dict(words.split("=") for name, words in instructions() if name == "ARG")
    assert arguments["TORCH"] == "cpu"
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] <= f">={arguments['PYTHON']}"
    runs = " ".join(words for name, words in instructions() if name == "RUN")
    assert re.findall(r"\$\{(\w+)\}", runs) == ["TORCH", "EXTRAS"]
    assert ("USER", "crossflow") in instructions()


def test_the_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / ".ci" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    python, *run = recipe["requirements"]["run"]
    assert python == f"python {PROJECT['requires-python']}"
    assert run == [f"{CONDA_NAMES.get(name, name)} >={bound}" for name, bound in requirements().items()]
    assert str(recipe["context"]["version"]) == crossflow.__version__
    assert recipe["package"]["name"] == PROJECT["name"]
    (entry,) = recipe["build"]["python"]["entry_points"]
    assert entry.split(" = ") == ["crossflow", PROJECT["scripts"]["crossflow"]]


def test_nox_begins_with_the_oldest_python() -> None:
    tree = ast.parse((ROOT / ".ci" / "noxfile.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    pythons = ast.literal_eval(values["PYTHONS"])
    assert f">={pythons[0]}" == PROJECT["requires-python"]
    assert [f"Programming Language :: Python :: {python}" for python in pythons] == [
        line for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.", line)
    ]
