"""The results of tests/matrix.sh as a table:   python tests/releases/table.py [--note TEXT] [--write PAGE] RESULT.json ...

PAGE is nothing but the result: it is written from scratch, and what is wrong is in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def read(files: list[str]) -> list[dict[str, Any]]:
    found = []
    for file in files:
        try:
            found.append(json.loads(Path(file).read_text()))
        except ValueError:
            found.append({"deepspeed": Path(file).parent.name, "features": {}, "error": "did not finish"})
    return found


def page(results: list[dict[str, Any]], meanings: dict[str, str], note: str = "") -> str:
    """Markdown: release x feature, then every failure in words."""
    from ds_fp8.releases import RELEASED

    names = list(dict.fromkeys([*meanings, *(name for result in results for name in result["features"])]))
    lines = [
        "# Compatibility",
        "",
        "Written by `tests/matrix.sh`; do not edit. Two CPU ranks over gloo, each release of DeepSpeed in an environment of its own.",
        "",
    ]
    if note:
        lines += [note, ""]
    for versions in dict.fromkeys(result.get("versions", "") for result in results):
        if versions:
            lines += [f"With {versions}.", ""]
    lines += [f"| DeepSpeed | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    failures = []
    for result in results:
        cells = []
        for name in names:
            text = result["features"].get(name)
            cells.append("not run" if text is None else "FAILS" if text else "ok")
            if text:
                failures.append(f"- {result['deepspeed']}, {name}: {text.splitlines()[0][:200]}")
        if result.get("error"):
            failures.append(f"- {result['deepspeed']}: {result['error']}")
        lines.append(f"| {result['deepspeed']} | {' | '.join(cells)} |")
    ran = {result["deepspeed"] for result in results}
    absent = [release for release in RELEASED if release not in ran]
    if absent:
        lines += ["", f"Releases in this range that were not run: {', '.join(absent)}."]
    lines += ["", "What a column means:", "", *(f"- **{name}**: {text}" for name, text in meanings.items()), ""]
    if failures:
        lines += ["What failed:", "", *failures, ""]
    uncalled = sorted({name for result in results for name in result.get("uncalled") or ()})
    if uncalled:
        lines += ["Overridden methods of DeepSpeed that no column has called, on at least one release:", ""]
        lines += [", ".join(f"`{name}`" for name in uncalled), ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    from features import FEATURES

    target, note = None, ""
    if arguments[:1] == ["--note"]:
        note, arguments = arguments[1], arguments[2:]
    if arguments[:1] == ["--write"]:
        target, arguments = Path(arguments[1]), arguments[2:]
    results = read(arguments)
    meanings = {name: " ".join((feature.__doc__ or name).split()) for name, feature in FEATURES.items()}
    text = page(results, meanings, note)
    print(text)
    if target is not None:
        target.write_text(text)
    return int(any(result.get("error") or any(result["features"].values()) for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
