"""The table of docs/huggingface.md, from what the journeys recorded:   python tests/journeys/client_table.py rows.jsonl

DS_FP8_CLIENT_TABLE=rows.jsonl python -m pytest -q tests/journeys
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"

COLUMNS = {
    "client": "client",
    "hook": "hook met",
    "banner": "banner",
    "first_step": "after the first step",
    "first": "first loss",
    "last": "last loss",
    "save": "save and load",
    "resume": "resume",
}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown; a client that was recorded twice is shown as it was last."""
    latest = {row["client"]: row for row in rows}
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for name in sorted(latest):
        lines.append("| " + " | ".join(latest[name].get(key, "") for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main(file: str) -> None:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
