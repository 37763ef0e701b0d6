"""The results of tests/matrix.sh as a table:   python tests/releases/table.py [--write PAGE] RESULT.json ...

One line for each release is printed. PAGE is nothing but the results: it is written from scratch, and what is wrong is
in it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).resolve().parents[2] / "ds_fp8" / "zero" / "adapters"
ALONE = "DeepSpeed alone"
UNCALLED_BEFORE = {
    "StatesBF16.": ("0.18.5", "DeepSpeed builds no BF16_Optimizer"),
    "Stage0Optimizer.": ("0.18.5", "DeepSpeed saves no optimizer state of stage 0"),
}
"""Beginning of a method's name -> the first release where somebody calls it, and why not before."""


def read(files: list[str]) -> list[dict[str, Any]]:
    found = []
    for file in files:
        try:
            found.append(json.loads(Path(file).read_text()))
        except (OSError, ValueError):
            found.append({"deepspeed": Path(file).stem, "features": {}, "error": "did not finish"})
    return found


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Feature -> what went wrong; what DeepSpeed does wrong by itself and we know of is no failure of ours."""
    from ds_fp8.releases import faults

    found = {name: text for name, text in result["features"].items() if text}
    if faults(result["deepspeed"]):
        found.pop(ALONE, None)
    return {"run": result["error"], **found} if result.get("error") else found


def line(result: dict[str, Any]) -> str:
    """The outcome of a release in one line."""
    wrong, ran = failures(result), len(result["features"])
    versions = result.get("versions", "not run")
    shown = f"== DeepSpeed {result['deepspeed']} ({versions}): {ran - len(wrong)} of {ran} features ok"
    return shown + "".join(f"; {name} FAILS: {text.splitlines()[0][:200]}" for name, text in wrong.items())


def cell(result: dict[str, Any], name: str) -> str:
    text = result["features"].get(name)
    if text is None:
        return "not run"
    if not text:
        return "ok"
    return "FAILS" if name in failures(result) else "fails by itself"


def adapter_lines() -> dict[str, tuple[int, str]]:
    """Last release of a line -> lines of its adapter, and what it holds, in its own words."""
    from ds_fp8.zero.adapters import LINES

    found = {}
    for last in LINES:
        text = (ADAPTERS / f"until_{last.replace('.', '_')}.py").read_text(encoding="utf-8")
        held = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        found[last] = (len(text.splitlines()), " ".join(held.partition(": ")[2].split()))
    return found


def page(results: list[dict[str, Any]], meanings: dict[str, str]) -> str:
    """Markdown: release x feature for each set of versions, then every failure in words."""
    from ds_fp8.releases import FAULTS, RELEASED, numbers

    names = list(dict.fromkeys([*meanings, *(name for result in results for name in result["features"])]))
    lines = [
        "# Compatibility",
        "",
        "Written by `tests/matrix.sh`; do not edit. Two CPU ranks over gloo, each release of",
    ]
    lines += ["DeepSpeed in an environment of its own.", ""]
    for versions in dict.fromkeys(result.get("versions", "") for result in results):
        lines += [f"With {versions or 'versions unknown'}:", ""]
        lines += ["| DeepSpeed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for result in results:
            if result.get("versions", "") == versions:
                lines.append(f"| {result['deepspeed']} | " + " | ".join(cell(result, name) for name in names) + " |")
        lines.append("")
    for fault in FAULTS:
        lines += [
            (
                f"DeepSpeed {fault.first} to {fault.last} by themselves: {fault.what}. "
                "The other columns were run with that mended."
            ),
            "",
        ]
    absent = [release for release in RELEASED if release not in {result["deepspeed"] for result in results}]
    if absent:
        lines += [f"Releases in this range that were not run: {', '.join(absent)}.", ""]
    wrong = [
        f"- {r['deepspeed']}, {name}: {text.splitlines()[0][:200]}"
        for r in results
        for name, text in failures(r).items()
    ]
    if wrong:
        lines += ["What failed:", "", *wrong, ""]
    lines += ["What a column means:", "", *(f"- **{name}**: {text}" for name, text in meanings.items()), ""]
    uncalled: dict[str, list[str]] = {}
    for result in results:
        for name in result.get("uncalled") or ():
            uncalled.setdefault(name, []).append(result["deepspeed"])
    lines += ["Overridden methods of DeepSpeed that no column has called:" + ("" if uncalled else " none."), ""]
    for name, where in sorted(uncalled.items()):
        reasons = (
            f": before {first} {why}"
            for begin, (first, why) in UNCALLED_BEFORE.items()
            if name.startswith(begin) and all(numbers(one) < numbers(first) for one in where)
        )
        lines.append(f"- `{name}` ({', '.join(sorted(set(where)))})" + next(reasons, ""))
    lines += [""] * bool(uncalled)
    lines += ["Where releases differ, an adapter stands in (`ds_fp8/zero/adapters`); its file, comments and all:", ""]
    lines += ["| release | lines | what it holds |", "|---|---|---|"]
    lines += [f"| {last} and before | {count} | {held} |" for last, (count, held) in adapter_lines().items()]
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> int:
    target = None
    if arguments[:1] == ["--write"]:
        target, arguments = Path(arguments[1]), arguments[2:]
    results = read(arguments)
    print(*map(line, results), sep="\n")
    if target is not None:
        from features import FEATURES

        meanings = {name: " ".join((feature.__doc__ or name).split()) for name, feature in FEATURES.items()}
        target.write_text(page(results, meanings), encoding="utf-8")
    return int(not results or any(map(failures, results)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
