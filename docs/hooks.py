"""What the site makes of the pages, which are written to be read in the repository too.

CONTRIBUTING.md, CHANGELOG.md and the notebooks become pages; links to other files outside docs/ become their names; the
reason why a block does not run in the tests is left out. A page that loads anything from another host ends the build.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?((?:https?:)?//[^"' >]+)"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*\bhref=["']?((?:https?:)?//[^"' >]+)"""
    r"""|url\(["']?((?:https?:)?//[^"')]+)|@import\s+["']((?:https?:)?//[^"']+)""",
    re.IGNORECASE,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie at the root, and those of the notebooks."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        content = notebook_page(json.loads(path.read_text(encoding="utf-8"))["cells"], path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page as the site shows it."""
    return inside(without_reasons(markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises PluginError for a page that is not whole without a network."""
    expect_local(output, page.file.src_uri)
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """The same for the style sheets."""
    for path in Path(config.site_dir).rglob("*.css"):
        expect_local(path.read_text(encoding="utf-8"), path.name)


def notebook_page(cells: list[dict[str, Any]], name: str) -> str:
    """The cells of a notebook as a page, without outputs."""
    texts = ["".join(cell["source"]) for cell in cells]
    blocks = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([blocks[0], f"*The notebook is `docs/notebooks/{name}`.*", *blocks[1:]]) + "\n"


def without_reasons(markdown: str) -> str:
    """Fences without what stands behind their language."""
    return re.sub(r"^( *```\w+) +[^\n]+$", r"\1", markdown, flags=re.MULTILINE)


def inside(markdown: str) -> str:
    """Links that leave docs/ lead to the page made of the file, or are its name."""

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        return f"[{text}]({FROM_ROOT[target]})" if target in FROM_ROOT else f"`{target}`" if text in target else text

    markdown = re.sub(r"(\]\(notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", replaced, markdown)


def expect_local(text: str, name: str) -> None:
    """Raises PluginError where HTML or CSS loads something from another host; links for readers may lead anywhere."""
    hosts = [next(filter(None, match)) for match in _LOADS.findall(text)]
    if hosts:
        raise PluginError(f"{name} loads {hosts[0]}: the site must be whole without a network.")
