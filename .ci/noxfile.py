"""Other Pythons, and the oldest libraries: `nox -f .ci/noxfile.py`, or one session by `-s lowest` or `-s "quick-3.13"`.

Each session installs the wheel into an environment of its own and runs the quick tests against it. uv makes the
environments; UV_TORCH_BACKEND=cpu spares the gigabytes of CUDA where they are of no use.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
OLDEST = PYTHONS[0]

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["bare", "quick", "lowest"]
nox.options.error_on_missing_interpreters = False


def built_wheel(session: nox.Session) -> Path:
    """The wheel of the tree."""
    folder = Path(session.create_tmp())
    session.run("uv", "build", "--wheel", "--out-dir", str(folder), str(ROOT), external=True, silent=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def quick_tests(session: nox.Session) -> None:
    """The quick tests, and a training of two steps, with what is installed."""
    session.chdir(session.create_tmp())  # the root must not be found as a folder of modules
    session.run("python", "-m", "pytest", "-q", "-m", "not slow", "--rootdir", str(ROOT), str(ROOT / "tests"))
    session.run("crossflow", "train", "--task", "depth", "--output", "run", "train.steps=2", "data.num_train=64")
    session.run("crossflow", "sample", "--checkpoint", "run", "--input", str(ROOT / "docs" / "tasks.png"))


@nox.session(python=PYTHONS)
def bare(session: nox.Session) -> None:
    """The wheel and click alone: the command answers, and says what is missing."""
    session.install("--no-deps", str(built_wheel(session)))
    session.install("click")
    session.chdir(session.create_tmp())
    session.run("crossflow", "--help", silent=True)


@nox.session(python=PYTHONS)
def quick(session: nox.Session) -> None:
    """The newest libraries."""
    session.install(f"{built_wheel(session)}[test]")
    quick_tests(session)


@nox.session(python=OLDEST)
def lowest(session: nox.Session) -> None:
    """The lower bounds of requirements.txt and of the extra test."""
    session.install("--resolution", "lowest-direct", f"{built_wheel(session)}[test]")
    quick_tests(session)
