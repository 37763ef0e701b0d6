"""The `ds_fp8` command: a table of subcommands, each in a module of its own that is imported when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import sys
from collections.abc import Sequence

COMMANDS = {
    "check": ("ds_fp8.cli.check", "find every problem in a DeepSpeed JSON before nodes are spent"),
    "explain": ("ds_fp8.cli.explain", "show the effective settings, and with a model what will happen to each module"),
    "estimate": ("ds_fp8.cli.estimate", "bytes per rank and on the wire, for every level and ZeRO stage"),
    "doctor": (
        "ds_fp8.cli.doctor",
        "look at this machine: versions, hardware, DeepSpeed, Transformer Engine, the activation hook",
    ),
    "report": (
        "ds_fp8.cli.report",
        "a page with plots of what telemetry wrote: loss, ranges, underflow, bytes, alarms",
    ),
    "schema": ("ds_fp8.cli.schema", "where the JSON Schema lies, for editors and validators"),
    "verify": ("ds_fp8.cli.verify", "whether checkpoints are whole, to the last bit"),
    "latest": ("ds_fp8.cli.latest", "the newest complete checkpoint in a folder, and why newer ones are not"),
    "convert": ("ds_fp8.cli.convert", "a checkpoint as safetensors, or for another level"),
}
"""Name -> module with `main(argv) -> int`, and one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal still shows keys in other letters
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    if arguments[0] not in COMMANDS:
        parser.parse_args(arguments[:1])  # --help, --version, or an error that lists the commands; all of them exit
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        code = int(module.main(arguments[1:]))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("ds_fp8: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ds_fp8 explain ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        print(f"ds_fp8: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.stdout = io.StringIO()  # what is left in its buffer would fail again at the end
        return 2


def _parser() -> argparse.ArgumentParser:
    from ds_fp8 import __version__

    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ds_fp8",
        description="FP8 training for DeepSpeed, by editing JSON.",
        epilog=f"commands:\n{commands}\n\nds_fp8 COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ds_fp8 {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
