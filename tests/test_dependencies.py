"""The lock file and the page of licences name the same packages, each with all that is promised."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / ".ci" / "lock.txt").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    return {match[1]: match[2] for match in map(LINE.fullmatch, LOCK.splitlines()) if match}


def test_every_line_has_a_name_a_version_and_a_hash():
    """Nothing else: no index, no address."""
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert len(locked()) == len(lines) > 50
    assert "://" not in LOCK


def test_the_lock_has_the_versions_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==([^;\s]+)", constraints, re.M)
    }
    for name, version in locked().items():
        assert pinned.get(name, version) == version, f"{name}: write .ci/lock.txt anew (python .ci/lock.py)"
    assert {"deepspeed", "transformers", "pytest", "numpy"} <= locked().keys() & pinned.keys()


def test_every_package_has_a_licence():
    """`python .ci/dependencies.py` writes the page."""
    rows = {
        name: (version, licence) for name, version, licence in re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", PAGE, re.M)
    }
    assert {name: version for name, (version, _) in rows.items() if name not in ("torch", "package")} == locked()
    assert all(licence not in ("", "not told") for _, licence in rows.values())
    trained_with = PAGE.partition("## To test")[0]
    assert all(f"| {name} |" in trained_with for name in ("torch", "deepspeed", "jsonschema", "rich"))
