"""`ds_fp8 schema`: where the JSON Schema of the installed version lies, for editors and other validators.

The file is whole: DeepSpeed's own keys and our two sections, without a reference to another file. In VS Code, for
example, `"json.schemas": [{"fileMatch": ["ds*.json"], "url": "<the printed path>"}]` gives completion and checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..config import contract

NAME = "ds_fp8.bundled.schema.json"


def main(argv: Sequence[str]) -> int:
    """Print the path, or the text."""
    parser = argparse.ArgumentParser(prog="ds_fp8 schema", description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", dest="text", help="print the schema instead of its path")
    path = contract.folder() / NAME
    if parser.parse_args(list(argv)).text:
        sys.stdout.write(path.read_text(encoding="utf-8"))
    else:
        print(path)
    return 0
