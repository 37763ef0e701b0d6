"""The documentation is what the code says: generated pages are fresh, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_api_reference_is_generated():
    """`make api` after a change of a public signature or docstring."""
    script = ROOT / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == module.reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Files and pictures that a page names are there; `make docs` looks at the anchors too."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [
        target
        for target in targets
        if "://" not in target and not (page.parent / (target.partition("#")[0] or page.name)).exists()
    ]
    assert missing == []


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name not in nav] == []


def test_the_tests_that_hold_the_table_of_faults_are_there():
    named = set(re.findall(r"`([a-z_]+/test_[a-z_]+\.py)`", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")))
    assert len(named) > 10 and [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []
