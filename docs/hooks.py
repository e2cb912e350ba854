"""Pages of the repository that live outside ``docs/`` become pages of the site, and links to them follow.

So that a link works both in the repository's own viewer and on the site, it is written as a path in the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
RESULTS = "experiments/results/"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None if it is not there."""
    if path in PAGES:
        return PAGES[path]
    for prefix, place in ((RESULTS, "results/"), ("docs/", "")):
        if path.startswith(prefix):
            return place + path.removeprefix(prefix)
    return None


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the measurements with their pictures."""
    results = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / RESULTS).rglob("*")) if path.is_file()]
    for path in (*PAGES, *(path for path in results if path.endswith((".md", ".png")))):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links from paths in the repository to paths on the site."""
    here = page.file.src_uri
    sources = {place: path for path, place in PAGES.items()}
    source = sources.get(
        here, f"{RESULTS}{here.removeprefix('results/')}" if here.startswith("results/") else f"docs/{here}"
    )

    def link(match: re.Match[str]) -> str:
        place = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2])))
        return match[0] if place is None else match[1] + posixpath.relpath(place, posixpath.dirname(here)) + match[3]

    return LINK.sub(link, markdown)
