"""What the site takes from outside docs/: the front page, the pages on results, the notebooks with their outputs.

Links are written for the repository, where they lead from file to file; on the site they are moved along.
"""

import os
import re
from functools import cache
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md")
RESULTS = ("*.md", "*.png")
LINK = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")  # the path of a link that stays in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    results = [path for pattern in RESULTS for path in (ROOT / "results").rglob(pattern)]
    for path in [*(ROOT / name for name in PAGES), *sorted(results)]:
        source = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place(source), abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in rendered(path, path.stat().st_mtime).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    origin = next((name for name in PAGES if place(name) == uri), uri)
    if page.file.generated_by is None:
        origin = f"docs/{uri}"
    home = Path(uri).parent

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(origin).parent / link.group())
        return Path(os.path.relpath(place(target), home)).as_posix()

    return LINK.sub(moved, markdown)


def place(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source == "README.md":
        return "index.md"
    return re.sub(r"\.ipynb$", ".md", source.removeprefix("docs/"))


@cache
def rendered(path: Path, changed: float) -> dict[str, str | bytes]:
    """A notebook as it runs now: its Markdown page and its images, by file name."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": path.parent}}).execute()
    resources = {"unique_key": path.stem, "output_files_dir": ""}
    markdown, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    return {f"{path.stem}.md": markdown, **resources["outputs"]}
