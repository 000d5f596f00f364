"""How the code is written, read off its syntax trees: sizes of functions, names, types and docstrings."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 60
MAX_PARAMETERS = 7
MIN_DOCUMENTED = 0.95

# Participles and pronouns that say nothing about a value.
NOT_NAMES = {
    *("begun", "found", "given", "had", "made", "mine", "one", "ones", "ours", "said", "seen", "spared", "taken"),
    *("tell", "theirs", "told", "wanted", "whence"),
}
# Public functions whose keyword-only options do not count as parameters.
ENTRY_POINTS: set[str] = {
    "benchmarks/evaluation/evaluate.py:evaluate",
    "benchmarks/evaluation/evaluate.py:open",
    "engine/cache.py:builder",
    "engine/sample.py:__call__",
    "engine/sample.py:load",
    "engine/latents.py:arithmetic",
    "engine/latents.py:interpolate",
    "engine/latents.py:invert",
    "core/sampling.py:generate",
    "core/sampling.py:flow",
    "core/solvers.py:solve",
    "core/training/trainer.py:__init__",
    "engine/latents.py:edit",
}
# `Any` parameters and why a closer type is impossible.
ANY: dict[str, str] = {
    "commands/ablate.py:command": "click passes options by keyword",
    "commands/cache.py:command": "click passes options by keyword",
    "commands/checkpoint.py:run": "click passes options by keyword",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def package_files() -> list[Path]:
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in files if path.name != "setup.py")


def parameters(function: Function) -> list[ast.arg]:
    """All parameters but self and cls."""
    a = function.args
    extra = [argument for argument in (a.vararg, a.kwarg) if argument is not None]
    return [arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *extra) if arg.arg not in ("self", "cls")]


def is_command(function: Function) -> bool:
    """Whether its parameters are the options of a command, which click passes, or the fields of a form of the page."""
    words = ("click.", "command.command", "options.", "site.jobs.endpoint")
    return any(ast.unparse(decorator).startswith(words) for decorator in function.decorator_list)


def broken_conventions(path: str, tree: ast.Module) -> Iterator[str]:
    """`LINE: what is wrong` for a module."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield from wrong_function(path, node)
    yield from empty_names(tree)


def empty_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in new_names(node):
            if words := NOT_NAMES & set(name.lower().split("_")):
                yield f"{node.lineno}: {name}: {', '.join(sorted(words))} says nothing about the value"


def wrong_function(path: str, function: Function) -> Iterator[str]:
    place = f"{path}:{function.name}"
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if lines > MAX_LINES:
        yield f"{function.lineno}: {function.name} has {lines} lines"
    number = len(parameters(function)) - (len(function.args.kwonlyargs) if place in ENTRY_POINTS else 0)
    if number > MAX_PARAMETERS and not is_command(function):
        yield f"{function.lineno}: {function.name} has {number} parameters"
    for argument in parameters(function):
        if argument.annotation is not None and ast.unparse(argument.annotation) == "Any" and place not in ANY:
            yield f"{function.lineno}: {function.name}({argument.arg}: Any)"


def new_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.name] if isinstance(node, Function | ast.ClassDef) else []


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of public classes."""
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                if not any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
                    yield node
                if isinstance(node, ast.ClassDef):
                    scopes.append(node)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


ROOMS = sorted({path.parts[0] for path in package_files()})


@pytest.mark.parametrize("room", ROOMS)
def test_modules_keep_the_conventions(room: str) -> None:
    modules = [path.as_posix() for path in package_files() if path.parts[0] == room]
    broken = [f"{path}:{rule}" for path in modules for rule in broken_conventions(path, parse(Path(path)))]
    assert broken == []


@pytest.mark.slow
def test_tests_use_names_that_say_something() -> None:
    broken = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for rule in empty_names(parse(path.relative_to(ROOT))):
            if not rule.split(" ")[1].startswith("test_"):  # the name of a test is a sentence
                broken.append(f"{path.relative_to(ROOT)}:{rule}")
    assert broken == []


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_documented(room: str) -> None:
    documented, missing = 0, []
    for path in package_files():
        for node in public_definitions(parse(path)) if path.parts[0] == room else ():
            if ast.get_docstring(node):
                documented += 1
            else:
                missing.append(f"{path}:{node.lineno}: {node.name}")
    share = documented / (documented + len(missing)) if documented or missing else 1.0
    assert share >= MIN_DOCUMENTED, "\n".join(missing)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f():\n" + "    x = 1\n" * MAX_LINES, "has 61 lines"),
        ("def f(a, b, c, d, e, *, f, g, h): ...", "8 parameters"),
        ("def f(self, value: Any): ...", "f(value: Any)"),
        ("found = 3", "found"),
        ("def read_one(): ...", "one"),
        ("def f(*, told): ...", "told"),
    ],
)
def test_broken_conventions_are_reported(source: str, complaint: str) -> None:
    (broken,) = broken_conventions("core/a.py", ast.parse(source))
    assert complaint in broken


def test_public_definitions_are_listed() -> None:
    tree = ast.parse(
        "class A:\n    def f(self): ...\n    def _g(self): ...\nclass _B:\n    def h(self): ...\ndef k(): ..."
    )
    assert {node.name for node in public_definitions(tree)} == {"A", "f", "k"}


def test_code_and_docs_name_no_local_paths_or_issues() -> None:
    """Issues, absolute paths of one machine and package registries do not belong into code or docs."""
    forbidden = re.compile(r"/work/|\.\./shared|issue \d|pypi\.org|files\.pythonhosted", re.IGNORECASE)
    files = [*package_files(), *(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))]
    places = {
        f"{path}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if forbidden.search(line)
    }
    assert places == set()
