"""Links of the documentation lead to files and headings that exist, and its lines are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT, without_blocks

RECORDING = ROOT / "docs" / "recording.svg"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = without_blocks(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        there = page if not path else (page.parent / path).resolve()
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(link)
    assert broken == []


@pages
def test_lines_of_text_are_short(page: Path) -> None:
    """Rows of tables cannot be broken, nor can links, drawings and what `make docs` writes."""
    text = re.sub(r"<!-- keys: .*<!-- end of keys -->", "", without_blocks(page), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "<", "!["))]
    assert long == []


def test_the_recording_is_small() -> None:
    assert RECORDING.stat().st_size < 300_000


def test_the_recording_shows_every_act_of_the_demo() -> None:
    said = re.findall(r'_say\(\s*f?"([^"{]{8,})', (ROOT / "upcall" / "cli" / "demo.py").read_text())
    shown = re.sub(r"<[^>]+>", "", RECORDING.read_text())
    assert said
    assert [text for text in said if text.strip() not in shown] == []
