"""Every library that the package imports is declared, at run time or by an extra, with a lower bound."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
SOURCES = [path for folder in FOLDERS for path in (folder.glob if folder == ROOT else folder.rglob)("*.py")]
# timm brings the version that matches torch.
BROUGHT = {"torchvision": "timm"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """Requirement by canonical name, of requirements.txt and of all extras."""
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    requirements = [
        *(line for line in lines if line and not line.startswith("#")),
        *(r for e in extras.values() for r in e),
    ]
    return {canonical(re.split(r"[<>=!\[ ]", requirement)[0]): requirement for requirement in requirements}


def imported() -> set[str]:
    """The first names of all third-party imports of the package, wherever they stand."""
    names = set()
    for path in SOURCES:
        if path.name == "setup.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"crossflow"}


def test_imported_libraries_are_declared() -> None:
    distributions, names = packages_distributions(), declared().keys()
    undeclared = set()
    for library in imported():
        candidates = distributions.get(library, [library])
        if names.isdisjoint(canonical(BROUGHT.get(candidate, candidate)) for candidate in candidates):
            undeclared.add(library)
    assert not undeclared, "imported by the package, and declared neither in requirements.txt nor by an extra"


def test_requirements_have_lower_bounds_only() -> None:
    assert {name: text for name, text in declared().items() if not re.fullmatch(r"[\w.\-\[\]]+>=[\d.]+", text)} == {}
