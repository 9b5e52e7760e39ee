"""The site builds without a warning, needs no network to be read and searched, and has every public name."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtlkernels as mk

for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(package, reason="what builds the site belongs to the extra 'docs'")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")
ASSET = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]*)\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built pages are."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(folder / "doctrees")]
    result = subprocess.run(
        [*command, "-b", "html", str(DOCS), str(folder / "html")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder / "html"


def test_pages_need_no_network(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(pages) > 30
    assert not {path.name: found for path, text in pages.items() if (found := ASSET.findall(text))}
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", styles)


def test_search_finds_words(site: Path) -> None:
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    for word, page in (("fuxictr", "recipes/fuxictr"), ("scaler", "pcgrad"), ("fork", "reliability")):
        found = [index[part].get(word, []) for part in ("terms", "titleterms")]
        numbers = [i for some in found for i in ([some] if isinstance(some, int) else some)]
        assert page in [index["docnames"][i] for i in numbers], word


def test_pictures_are_drawn(site: Path) -> None:
    wanted = re.findall(r"```\{picture\} (\S+)", (DOCS / "concepts.md").read_text())
    assert len(wanted) == (site / "concepts.html").read_text().count('<svg class="picture"') > 0


def test_every_public_name_is_in_the_api() -> None:
    listed = set(re.findall(r"auto\w+:: (\S+)", "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))))
    names = {f"mtlkernels.{name}" for name in mk.__all__ if not inspect.ismodule(getattr(mk, name))}
    names |= {
        f"mtlkernels.{part.__name__.rpartition('.')[2]}.{name}" for part in (mk.nn, mk.optim) for name in part.__all__
    }
    assert names <= listed


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    """Those that a reader follows in the repository, where no site is built."""
    for target in LINK.findall(page.read_text()):
        path = target.partition("#")[0]
        if not path or path.startswith("http"):
            continue
        assert (page.parent / path).exists(), f"{page.name}: {target}"
