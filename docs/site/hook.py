"""Makes the site of the repository's pages as they lie: README is its front page.

Pages link to files beside docs/ as readers of the repository need it. Those files come with the
site, under their own path, and what is linked and is not there fails the build. A notebook is a
page of its cells; the file itself comes with it.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_ROOT = Path(__file__).parents[2]
_FRONT = "README.md"
_CHANGES = "CHANGELOG.md"
_NOTEBOOK = ".ipynb"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every decision is in the navigation by being in its folder."""
    assert config.nav is not None
    decisions = sorted(path.name for path in Path(config.docs_dir, "adr").glob("*.md"))
    config.nav.insert(-1, {"Decisions": [f"adr/{name}" for name in decisions]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those link to in turn."""
    files.append(_from_repository(config, _FRONT, "index.md"))
    files.append(_from_repository(config, _CHANGES, _CHANGES))
    for notebook in [file for file in files if file.src_uri.endswith(_NOTEBOOK)]:
        name = notebook.src_uri.removesuffix(_NOTEBOOK) + ".md"
        files.append(File.generated(config, name, content=_cells(notebook)))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in _outside(file, file.content_string):
            if files.get_file_from_path(target) is None:
                found = _from_repository(config, target, target)
                files.append(found)
                waiting += [found] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links at where the site has what the repository has elsewhere."""

    def moved(match: re.Match[str]) -> str:
        target = _in_site(page.file, match.group(1))
        if target is None or files.get_file_from_path(target) is None:
            return match.group(0)
        here = posixpath.dirname(page.file.src_uri)
        return posixpath.relpath(target, here or ".") + (match.group(2) or "")

    return _LINK.sub(moved, markdown)


def _cells(notebook: File) -> str:
    """The cells of a notebook as a page, and where to get it."""
    told = {"markdown": "{}", "code": "```python\n{}\n```"}
    cells = json.loads(notebook.content_string)["cells"]
    first, *others = [told[cell["cell_type"]].format("".join(cell["source"])) for cell in cells]
    file = f'<a href="../{notebook.name}{_NOTEBOOK}" download>The notebook as a file</a>.'
    return "\n\n".join([first, file, *others])


def _outside(file: File, markdown: str) -> list[str]:
    """Files beside docs/ that a page links to."""
    targets = (_in_site(file, match.group(1)) for match in _LINK.finditer(markdown))
    return [target for target in targets if target and (_ROOT / target).is_file()]


def _in_site(file: File, link: str) -> str | None:
    """Where in the site a link of the repository leads; None for addresses and lone anchors."""
    if "://" in link or link.startswith(("mailto:", "#")):
        return None
    source = _repository_path(file)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if (_ROOT / target).is_dir():
        target = posixpath.join(target, "README.md")
    if target.endswith(_NOTEBOOK):
        target = target.removesuffix(_NOTEBOOK) + ".md"
    return "index.md" if target == _FRONT else target.removeprefix("docs/")


def _repository_path(file: File) -> str:
    if file.abs_src_path is None:  # made here, of a notebook beside it
        return f"docs/{file.src_uri}"
    return str(Path(file.abs_src_path).relative_to(_ROOT)).replace("\\", "/")


def _from_repository(config: MkDocsConfig, path: str, name: str) -> File:
    made: Any = File(name, str(_ROOT), config.site_dir, config.use_directory_urls)
    made.abs_src_path = str(_ROOT / path)
    return made
