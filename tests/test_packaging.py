"""The root folder is the package: what is in the tree reaches the wheel, and the wheel works away from the tree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The build and the installed command must see neither the checkout nor a path set for these tests.
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pip") is None, reason="builds with pip, which this environment lacks"),
]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_tree(to: Path) -> Path:
    """The packages, the tests and the files at the root; not what runs, builds and environments left beside them."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        no_source = {n for n in names if n.startswith(".") or n == "__pycache__"}
        if Path(folder) == ROOT:
            kept = {"tests", *(p.parent.name for p in ROOT.glob("*/__init__.py"))}
            no_source |= {n for n in names if (ROOT / n).is_dir()} - kept
        return no_source

    return shutil.copytree(ROOT, to, ignore=unwanted)


def built_wheel(tree: Path, to: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", to, tree),
        cwd=to.parent,
    )
    (wheel,) = to.glob("crossflow_toolkit-*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that nothing is built in, since a build leaves its own folders behind."""
    return copy_of_tree(tmp_path_factory.mktemp("plain") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return built_wheel(shutil.copytree(tree, tree.parent / "built"), tree.parent / "wheel")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(path).decode())


@pytest.fixture(scope="module")
def clean_python(wheel: Path) -> Path:
    """The interpreter of a new environment that holds the wheel and click, and no other dependency."""
    home = wheel.parent.parent / "environment"
    venv.EnvBuilder(symlinks=os.name != "nt").create(home)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    click = find_spec("click")
    assert click is not None
    assert click.origin is not None
    shutil.copytree(Path(click.origin).parent, site / "click")
    return python


def test_every_module_and_recipe_of_the_tree_is_in_the_wheel(tree: Path, wheel: Path):
    folders = [
        p.parent.relative_to(tree) for p in tree.rglob("__init__.py") if "tests" not in p.relative_to(tree).parts
    ]
    modules = {p.relative_to(tree) for f in folders for p in (tree / f).glob("*.py")} - {Path("setup.py")}
    recipes = {
        p.relative_to(tree)
        for noun in ("core", "tasks", "configs", "benchmarks")
        for p in (tree / noun).rglob("*.yaml")
    }
    references = {p.relative_to(tree) for p in (tree / "configs").rglob("*.json")}
    others = {Path("py.typed"), Path("demo/style.css")}
    expected = {f"crossflow/{p.as_posix()}" for p in modules | recipes | references | others}
    shipped = {name for name in names_in(wheel) if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == expected  # equality: neither tests nor setup.py nor a result of a run is shipped


def test_a_new_folder_reaches_the_wheel(tmp_path: Path):
    tree = copy_of_tree(tmp_path / "tree")
    for package in ("core/new", "tasks/new", "tasks/new/deeper", "noun"):
        (tree / package).mkdir()
        (tree / package / "__init__.py").touch()
    (tree / "tasks/new/encoder.py").touch()
    (tree / "configs/new").mkdir()
    for data in (
        "configs/new.yaml",
        "configs/new/recipe.yaml",
        "configs/references/new.json",
        "tasks/new/words.yaml",
        "benchmarks/new.yaml",
    ):
        (tree / data).touch()
    (tree / "tests/new").mkdir()
    (tree / "tests/new/__init__.py").touch()
    names = names_in(built_wheel(tree, tmp_path / "wheel"))
    assert names >= {
        "crossflow/core/new/__init__.py",
        "crossflow/tasks/new/encoder.py",
        "crossflow/tasks/new/deeper/__init__.py",
        "crossflow/noun/__init__.py",
        "crossflow/configs/new.yaml",
        "crossflow/configs/new/recipe.yaml",
        "crossflow/configs/references/new.json",
        "crossflow/tasks/new/words.yaml",
        "crossflow/benchmarks/new.yaml",
    }
    assert not [name for name in names if "tests" in name.split("/")]


def test_the_source_archive_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path):
    source = copy_of_tree(tmp_path / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in(built_wheel(unpacked, tmp_path / "wheel")) == names_in(wheel)


def test_the_metadata_agrees_with_pyproject_and_requirements(metadata: Message):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    ]
    always = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert metadata["Name"] == "crossflow-toolkit"
    assert sorted(always) == sorted(listed)
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])


def test_dependencies_have_lower_bounds_only(metadata: Message):
    for requirement in metadata.get_all("Requires-Dist", []):
        assert re.fullmatch(r"[\w.-]+>=[\w.]+", requirement.split(";")[0].strip()), requirement


def test_the_command_runs_from_another_folder_without_the_dependencies(
    clean_python: Path, metadata: Message, tmp_path: Path
):
    where = run(clean_python, "-c", "import crossflow; print(crossflow.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(clean_python.parent.parent)
    command = clean_python.with_name("crossflow")
    assert metadata["Version"] in run(command, "--version", cwd=tmp_path)
    assert "train" in run(command, "--help", cwd=tmp_path)
    assert run(clean_python, "-m", "crossflow", "--help", cwd=tmp_path)
