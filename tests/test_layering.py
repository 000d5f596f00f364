"""Rules that hold for every module, read off its syntax tree: who may import whom, and what is never written.

Arrows run only down,
``cli -> commands -> demo -> benchmarks -> released -> engine -> tasks -> data -> networks -> core``.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from crossflow.tasks import task_names

ROOT = Path(__file__).resolve().parents[1]
# A module imports from its own height or lower. `configs` holds recipes and no code: anyone may read it.
HEIGHT = {
    name: height
    for height, name in enumerate(
        ("configs", "core", "networks", "data", "tasks", "engine", "released", "benchmarks", "demo", "commands")
    )
}
TASKS = frozenset(task_names())
TOP = 10  # cli, __main__ and the root's public names
# Slow or optional libraries: imported where they are used, so that a command asks only for what it needs.
HEAVY = {
    *("datasets", "diffusers", "evaluate", "gradio", "h5py", "imageio_ffmpeg", "kornia", "matplotlib", "onnxruntime"),
    *(
        "onnxscript",
        "peft",
        "pycocoevalcap",
        "scipy",
        "skimage",
        "timm",
        "torch_fidelity",
        "torchdiffeq",
        "torchmetrics",
        "torchvision",
    ),
    "transformers",
}


def package_files() -> list[Path]:
    folders = [ROOT, *(ROOT / noun for noun in HEIGHT)]
    files = [p for f in folders for p in (f.glob("*.py") if f == ROOT else f.rglob("*.py"))]
    return sorted(p.relative_to(ROOT) for p in files if p.name != "setup.py")


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a module of the package, read once for all tests."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def root_names() -> set[str]:
    """What `import X` would find in the checkout though it is not installed under that name."""
    modules = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__", "setup"}
    return modules | {p.parent.name for p in ROOT.glob("*/__init__.py")} | {"tests"}


def height(part: str) -> int:
    return HEIGHT.get(part, TOP)


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, wherever it stands, also those by import_module("...")."""
    package = ["crossflow", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).split(".")[-1] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def called(node: ast.Call) -> str:
    """The dotted name a call is written with, as far as it is one: torch.load(...) -> "torch.load"."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Attribute | ast.Name) else ""


def at_import(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, first name) of the imports that run when the module is imported."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        pending.extend(ast.iter_child_nodes(node))


def catches_all(node: ast.ExceptHandler) -> bool:
    return node.type is None or "Exception" in ast.unparse(node.type).strip("()").split(", ")


def arguments(node: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}


# The web page: its modules are imported by its command alone, when it is used.
PAGE = {"demo": {"gradio"}}
# What only one place does: the names, and the files (or folders) that may use them.
ALONE = {
    "yaml": ("core/settings.py",),
    "safetensors": ("core/files.py", "released/files.py"),  # the latter streams files larger than the memory
    "os.replace": ("core/files.py",),
    "tempfile.mkstemp": ("core/files.py",),
}
# The environment of a launcher is read in one place.
LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
# Where any exception is meant: to forward it to the other processes; tokenizers raises nothing more precise.
CATCH_ALL = ("core/distributed.py", "networks/frozen.py")


def broken_rules(path: Path, tree: ast.Module, roots: set[str]) -> list[str]:
    """`LINE: what is wrong` for a module at `path` (relative to the root)."""
    part = path.parts[0] if len(path.parts) > 1 else path.stem
    slow = (HEAVY | {"torch", "numpy", "rich"} if part in ("cli", "commands") else HEAVY) - PAGE.get(part, set())
    return [
        *wrong_imports(tree, path, part, roots),
        *(
            f"{line}: imports {name} at import; do it where it is used"
            for line, name in at_import(tree)
            if name in slow
        ),
        *(f"{line}: names the task {name!r}" for line, name in named_tasks(tree, part)),
        *(broken for node in ast.walk(tree) for broken in wrong_code(node, path, tree)),
    ]


def wrong_imports(tree: ast.Module, path: Path, part: str, roots: set[str]) -> Iterator[str]:
    for line, name in imported(tree, path):
        words = name.split(".")
        if words[0] in roots:
            yield f"{line}: imports {name} by its bare name; write crossflow.{name}"
        if words[0] in ALONE and path.as_posix() not in ALONE[words[0]]:
            yield f"{line}: imports {words[0]}; only {', '.join(ALONE[words[0]])} does"
        if words[0] != "crossflow" or words[1:] in ([], ["__version__"]):
            continue
        if height(words[1]) > height(part):
            yield f"{line}: {part} is below {words[1]} and imports {name}"
        if words[1] == "tasks" and len(words) > 2 and words[2] in TASKS:
            if part in ("benchmarks", "demo", "commands"):
                yield f"{line}: imports {name}, a task; ask the registry"
            if part == "tasks" and len(path.parts) > 2 and path.parts[1] != words[2]:
                yield f"{line}: the task {path.parts[1]} imports its sibling {words[2]}"
        if path == Path("core/solvers.py") and words[2] == "guidance":
            yield f"{line}: a solver sees a velocity and knows nothing of guidance"


def named_tasks(tree: ast.Module, part: str) -> Iterator[tuple[int, str]]:
    """The names of tasks among the string literals of a part that must work for any task."""
    if part in ("benchmarks", "demo", "commands"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in TASKS:
                yield node.lineno, str(node.value)


def wrong_code(node: ast.AST, path: Path, tree: ast.Module) -> Iterator[str]:
    if isinstance(node, ast.ExceptHandler) and catches_all(node) and path.as_posix() not in CATCH_ALL:
        yield f"{node.lineno}: catches Exception; name the exceptions that are meant"
    if isinstance(node, ast.Constant) and node.value in LAUNCHER and path.as_posix() != "core/launcher.py":
        yield f"{node.lineno}: reads {node.value}; only core/launcher.py does"
    if not isinstance(node, ast.Call):
        return
    name, keywords = called(node), arguments(node)
    if "." in name and path.as_posix() not in ALONE.get(name, (path.as_posix(),)):
        yield f"{node.lineno}: calls {name}; only {', '.join(ALONE[name])} does"
    if name in ("print", "rich.print", "click.echo", "click.secho") and path.parts[0] not in ("cli.py", "commands"):
        yield f"{node.lineno}: prints; only cli.py and commands/ do"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield f"{node.lineno}: torch.load without weights_only=True runs any code in the file"
    if keywords.get("allow_pickle", "False") != "False":
        yield f"{node.lineno}: allow_pickle runs any code in the file"
    if name == "yaml.load" and (keywords.get("Loader") or ast.unparse(node.args[-1])) not in safe_loaders(tree):
        yield f"{node.lineno}: yaml.load without a safe loader runs any code in the file"
    if name in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load"):
        yield f"{node.lineno}: {name} runs any code in the file"


def safe_loaders(tree: ast.Module) -> set[str]:
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    derived = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    return safe | {n.name for n in derived if safe & {ast.unparse(base) for base in n.bases}}


@pytest.mark.parametrize("room", ["", *HEIGHT])
def test_modules_keep_the_rules(room: str):
    modules = [path for path in package_files() if (path.parts[0] if len(path.parts) > 1 else "") == room]
    broken = [f"{path}:{rule}" for path in modules for rule in broken_rules(path, parsed(path), root_names())]
    assert broken == []


def import_graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """module -> the modules it imports anywhere in its code; trees: path relative to the root -> its syntax tree."""
    modules = {module_name(path): path for path in trees}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for _, name in imported(trees[path], path)}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & modules.keys()) - {module}
    return graph


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(("crossflow", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reach = {module: reachable(graph, module) for module in graph}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return sorted(sorted(group) for group in groups if group)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    visited: set[str] = set()
    pending = [start]
    while pending:
        for module in graph[pending.pop()] - visited:
            visited.add(module)
            pending.append(module)
    return visited


def test_no_files_import_each_other():
    assert circles(import_graph({path: parsed(path) for path in package_files()})) == []


def test_circles_include_local_and_dynamic_imports():
    sources = {
        "core/a.py": "def f():\n    from crossflow.core import b",
        "core/b.py": "from importlib import import_module\nimport_module('crossflow.core.c')",
        "core/c.py": "import crossflow.core.a",
        "core/d.py": "from crossflow.core.a import f",
    }
    trees = {Path(path): ast.parse(source) for path, source in sources.items()}
    assert circles(import_graph(trees)) == [["crossflow.core.a", "crossflow.core.b", "crossflow.core.c"]]


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("core/a.py", "from crossflow.tasks.base import Task", "core is below tasks"),
        ("core/a.py", "from crossflow import tasks", "core is below tasks"),
        ("core/a.py", "def f():\n    import crossflow.benchmarks.speed.run", "core is below benchmarks"),
        ("core/training/a.py", "from ...tasks import base", "core is below tasks"),
        ("core/a.py", "from importlib import import_module\nimport_module('crossflow.cli')", "core is below cli"),
        ("core/a.py", "from crossflow import load", "core is below load"),
        ("tasks/a.py", "from crossflow.benchmarks import speed", "tasks is below benchmarks"),
        ("commands/a.py", "import numpy", "at import"),
        ("commands/a.py", "name = 't2i'", "names the task 't2i'"),
        ("benchmarks/a.py", "from crossflow.tasks.sr import metric", "a task"),
        ("demo/a.py", "import gradio\nfrom crossflow.commands import sample", "demo is below commands"),
        ("tasks/sr/a.py", "from crossflow.tasks.depth import metric", "sibling depth"),
        ("core/solvers.py", "from crossflow.core.guidance import Velocity", "nothing of guidance"),
        ("engine/a.py", "click.echo('step')", "prints"),
        ("benchmarks/a.py", "from crossflow import cli", "benchmarks is below cli"),
        ("core/a.py", "from core import b", "bare name"),
        ("cli.py", "import tasks.run", "bare name"),
        ("core/a.py", "import torchdiffeq", "at import"),
        ("core/a.py", "if True:\n    from transformers import CLIPTextModel", "at import"),
        ("core/a.py", "class A:\n    import timm", "at import"),
        ("core/a.py", "print('step')", "prints"),
        ("core/a.py", "torch.load(path)", "weights_only"),
        ("core/a.py", "torch.load(path, weights_only=False)", "weights_only"),
        ("core/a.py", "np.load(path, allow_pickle=True)", "allow_pickle"),
        ("core/a.py", "pickle.load(file)", "pickle.load"),
        ("core/a.py", "yaml.load(text)", "yaml.load"),
        ("tasks/a.py", "def f():\n    from safetensors.torch import save_file", "only core/files.py"),
        ("engine/a.py", "os.replace(part, path)", "calls os.replace"),
        ("data/a.py", "os.environ['RANK']", "only core/launcher.py"),
        ("data/a.py", "import yaml", "only core/settings.py"),
        ("data/a.py", "try:\n    read()\nexcept (OSError, Exception):\n    pass", "catches Exception"),
        ("data/a.py", "try:\n    read()\nexcept:\n    pass", "catches Exception"),
        ("core/a.py", "class Loader(yaml.Loader):\n    pass\nyaml.load(text, Loader)", "yaml.load"),
    ],
)
def test_broken_rules_are_reported(path: str, source: str, complaint: str):
    (broken,) = broken_rules(Path(path), ast.parse(source), {"core", "tasks", "benchmarks", "cli"})
    assert complaint in broken


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "core/a.py",
            "from crossflow import __version__\nfrom crossflow.core.paths import linear\nfrom .. import __version__",
        ),
        ("core/a.py", "def f():\n    import torchdiffeq\n    return torchdiffeq"),
        ("core/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kornia"),
        ("core/a.py", "torch.load(path, map_location='cpu', weights_only=True)\nyaml.safe_load(text)\nnp.load(path)"),
        ("tasks/t2i/a.py", "from crossflow.networks.text.trunk import T\nfrom crossflow.core import config"),
        ("core/a.py", "class Loader(yaml.SafeLoader):\n    pass\nyaml.load(text, Loader)"),
        ("cli.py", "print('done')\nfrom crossflow.benchmarks import speed"),
    ],
)
def test_allowed_code_passes(path: str, source: str):
    assert broken_rules(Path(path), ast.parse(source), {"core", "tasks", "benchmarks", "cli"}) == []


def test_every_folder_is_checked():
    assert {p.parts[0] for p in package_files() if len(p.parts) > 1} == {
        p.parent.name for p in ROOT.glob("*/__init__.py")
    }


def test_tasks_are_folders_beside_their_base():
    assert {path.name for path in (ROOT / "tasks").glob("*.py")} == {"__init__.py", "base.py"}
    assert {path.parent.name for path in (ROOT / "tasks").glob("*/*.py")} == {"caption", "depth", "sr", "t2i"}


def test_tests_are_not_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["sample", "--help"]], ids=" ".join
)
def test_help_imports_no_slow_library(arguments: list[str]):
    script = (
        f"import sys, crossflow\nfrom crossflow.cli import main\nassert main({arguments!r}) == 0\n"
        "assert not {'torch', 'numpy', 'transformers', 'evaluate'} & set(sys.modules), 'slow libraries were imported'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sampling_small_runs_imports_torch_and_little_else(tmp_path: Path):
    # Each of these takes from a quarter of a second to several seconds, for a picture that takes a third of one.
    slow = HEAVY | {"torch._dynamo", "torch._inductor", "sympy", "accelerate", "huggingface_hub"}
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    script = f"import sys\nfrom crossflow.cli import main\nslow = {slow!r}\n"
    for task in ("t2i", "caption", "sr", "depth"):
        inputs = ["--prompt", "a red cube"] if task == "t2i" else ["--input", str(tmp_path / "photo.png")]
        run = ROOT / "tests" / "golden" / "runs" / task
        arguments = ["sample", "--checkpoint", str(run), *inputs, "--output", str(tmp_path / task)]
        script += f"assert main({arguments!r}) == 0\nprint('imported for {task}:', *sorted(slow & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported for")]
    colours = "matplotlib"  # of a depth map
    assert lines == [*(f"imported for {task}:" for task in ("t2i", "caption", "sr")), f"imported for depth: {colours}"]
