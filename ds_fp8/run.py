"""Explicit activation: `deepspeed --module ds_fp8.run train.py ...`, for sites whose Python reads no .pth files.

The launcher starts `python -u -m ds_fp8.run --local_rank=0 train.py --deepspeed_config ds.json`: its own argument comes
before the script. So the first argument that is no option is the script; what the launcher put before it moves behind
it, where the script's parser expects it. Without a launcher (`python -m ds_fp8.run train.py`) it does the same.
`-m package.module` runs a module instead of a file.

`DS_FP8_DISABLE=1` turns this off too: the script runs as if started by itself.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import activate
from .import_hook import is_disabled

USAGE = "usage: python -m ds_fp8.run [-m] SCRIPT_OR_MODULE [arguments of the script]"


def split(arguments: list[str]) -> tuple[str, bool, list[str]]:
    """The script, whether it is a module, and its own arguments, the launcher's first."""
    launcher: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "-m":
            if position + 1 == len(arguments):
                break
            return arguments[position + 1], True, launcher + arguments[position + 2 :]
        if not argument.startswith("-"):
            return argument, False, launcher + arguments[position + 1 :]
        launcher.append(argument)
    raise SystemExit(USAGE)


def main(arguments: list[str] | None = None) -> None:
    target, is_module, rest = split(sys.argv[1:] if arguments is None else arguments)
    if not is_disabled():
        activate()
    if is_module:
        sys.argv = [target, *rest]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not Path(target).is_file():
        raise SystemExit(f"ds_fp8.run: no such script: {target}\n{USAGE}")
    sys.argv = [target, *rest]
    # As `python train.py` would: the script's own folder comes first.
    sys.path.insert(0, str(Path(target).resolve().parent))
    runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
