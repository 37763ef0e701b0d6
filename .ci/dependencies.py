"""Write docs/dependencies.md: every package that a job or a CI run needs, with its version and licence.

    python .ci/dependencies.py    in an environment that venv.sh has made (`.ci/run` makes .venv-test)

Names and versions come from .ci/lock.txt and constraints.txt, licences from what the installed packages say of
themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "dependencies.md"
NOT_TOLD = "not told"
HEAD = """# Dependencies and their licences

Written by `.ci/dependencies.py`; do not edit. Versions are those of CI (`.ci/lock.txt`, with the SHA-256 of each file;
torch in `constraints.txt`); the ranges that are allowed stand in `ds_fp8/releases.py`. Licences are what the packages
say of themselves. Nothing of theirs is copied into ds_fp8, and none of it is shipped with it.

"""


def locked() -> dict[str, str]:
    """name -> version of everything in CI, torch included."""
    found = re.findall(r"^([a-z0-9.-]+)==(\S+) ", (ROOT / ".ci" / "lock.txt").read_text(), re.M)
    torch = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch is not None
    return dict(found) | {"torch": torch[1]}


def licence(name: str) -> str:
    """What the package says of itself, in a few words."""
    try:
        shown = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return NOT_TOLD
    if shown["License-Expression"]:
        return str(shown["License-Expression"])
    classifiers = [
        one.rpartition(" :: ")[2] for one in shown.get_all("Classifier") or () if one.startswith("License ::")
    ]
    classifiers = [one for one in classifiers if one != "OSI Approved"]
    if classifiers:
        return ", ".join(classifiers)
    first = (shown["License"] or "").strip().splitlines()
    return first[0][:60] if first and first[0] else NOT_TOLD


def needed_to_run(names: dict[str, str]) -> set[str]:
    """The closure of what ds_fp8 itself requires."""
    found: set[str] = set()
    waiting = ["ds_fp8"]
    while waiting:
        for name in _requires(waiting.pop()):
            if name in names and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _requires(name: str) -> Iterator[str]:
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for one in requirements:
        if "extra ==" not in one:
            match = re.match(r"[A-Za-z0-9._-]+", one)
            if match is not None:
                yield match[0].lower().replace("_", "-")


def page() -> str:
    """The page, from the lock and this environment."""
    names = locked()
    run = needed_to_run(names)
    lines = [HEAD.rstrip("\n"), ""]
    for title, chosen in (("To train", run), ("To test and to check the form", names.keys() - run)):
        lines += [f"## {title}", "", "| package | version | licence |", "|---|---|---|"]
        lines += [f"| {name} | {names[name]} | {licence(name).replace('|', '/')} |" for name in sorted(chosen)]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"{TARGET}: {page().count(NOT_TOLD)} without a licence")
