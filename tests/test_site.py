"""What docs/hooks.py makes of pages; `./check.sh docs` builds the site itself, strictly."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crossflow_site_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt='a' src=//host/x.png>",
        '<link href="https://fonts.example/css" rel="stylesheet">',
        "@font-face { src: url(https://host/x.woff2) }",
        '@import "https://host/x.css";',
    ],
)
def test_what_is_loaded_from_another_host_ends_the_build(hooks: ModuleType, text: str) -> None:
    with pytest.raises(PluginError, match=r"page loads (https:)?//"):
        hooks.expect_local(text, "page")


def test_links_may_lead_anywhere(hooks: ModuleType) -> None:
    hooks.expect_local('<a href="https://arxiv.org"><img src="a.png"></a> <link rel="canonical" href="https://x">', "a")


def test_links_out_of_the_folder_become_pages_or_names(hooks: ModuleType) -> None:
    text = "[how](../CONTRIBUTING.md), [configs/a.yaml](../configs/a.yaml), [the files](../configs), [data](data.md)"
    assert hooks.inside(text) == "[how](contributing.md), `configs/a.yaml`, the files, [data](data.md)"
    assert hooks.inside("[a](notebooks/a.ipynb)") == "[a](notebooks/a.md)"


def test_notebooks_become_pages(hooks: ModuleType) -> None:
    cells = [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": ["print(1)"]}]
    expected = "# A\nb\n\n*The notebook is `docs/notebooks/a.ipynb`.*\n\n```python\nprint(1)\n```\n"
    assert hooks.notebook_page(cells, "a.ipynb") == expected


def test_reasons_stay_in_the_repository(hooks: ModuleType) -> None:
    page = 'a\n```bash skip="needs a GPU"\nx\n```\n  ```python\n'
    assert hooks.without_reasons(page) == "a\n```bash\nx\n```\n  ```python\n"


def test_the_navigation_holds_every_page_of_the_index() -> None:
    """The strict build asks it of every file; this answers sooner."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {page for entry in nav for value in entry.values() for page in ([value] if isinstance(value, str) else
             [path for item in value for path in item.values()])}  # fmt: skip
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert pages == written | notebooks | {"contributing.md", "changelog.md"}
