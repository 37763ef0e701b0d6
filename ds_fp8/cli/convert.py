"""`ds_fp8 convert CKPT OUT`: a checkpoint as safetensors, at another level, or without ds_fp8.

Reads its arguments before torch and DeepSpeed are imported; the work is `checkpoint/convert.py`. Exit code 0: written;
2: the reason is on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import DsFp8Error, printable
from ..levels import LEVELS


def main(argv: Sequence[str]) -> int:
    """Convert one checkpoint."""
    options = _options(argv)
    if not options.checkpoint.is_dir():
        what = "a file" if options.checkpoint.exists() else "no such folder"
        print(f"ds_fp8 convert: {options.checkpoint}: {what}; give what save_checkpoint was given", file=sys.stderr)
        return 2
    from ..checkpoint.convert import convert

    try:
        written = convert(options)
    except DsFp8Error as error:
        print(printable(f"ds_fp8 convert: {error}"), file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that cannot be made
        print(f"ds_fp8 convert: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001 - a damaged checkpoint may raise anything in DeepSpeed's own reader
        reason = f"cannot be converted ({type(error).__name__}: {error})"
        print(printable(f"ds_fp8 convert: {options.checkpoint}: {reason}"), file=sys.stderr)
        return 2
    print(f"ds_fp8 convert: {written}")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_fp8 convert", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder that save_checkpoint was given")
    parser.add_argument("out", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--tag", help="which checkpoint; default: the one named in `latest`")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the weights (default fp32)")
    parser.add_argument(
        "--level", choices=[*LEVELS, "plain"], help="write a DeepSpeed checkpoint of this level instead"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="run whatever objects the files hold: only for checkpoints of your own that are refused without it",
    )
    parser.add_argument(
        "--shard-gb", type=_size, default=5.0, metavar="GB", help="largest safetensors file, in GB (default 5)"
    )
    options = parser.parse_args(argv)
    if options.level and options.dtype:
        parser.error("--dtype is for safetensors; a checkpoint of a level keeps its dtypes")
    return options


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GB, e.g. 5")
    return size
