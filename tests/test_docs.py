"""The documentation is what the code says: generated pages are fresh, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from test_architecture import FLOORS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_reference_is_generated():
    """`make api` after a change of a public signature or docstring."""
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == script("generate_api").reference()


def test_the_list_of_files_is_generated():
    """`make api` after a new file, or a new first sentence of one."""
    assert (ROOT / "docs" / "files.md").read_text(encoding="utf-8") == script("generate_files").page()


def test_the_floors_of_the_page_are_those_that_the_tests_hold():
    """docs/architecture.md and tests/test_architecture.py; `schemas` is no Python of the package's."""
    held = {name: floor for name, floor in FLOORS.items() if name != "schemas"}
    assert {name: floor for floor, name in script("generate_files").floors()} == held


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
