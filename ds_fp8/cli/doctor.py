"""`ds_fp8 doctor [FILE]`: can this machine run the job, and if not, what to do.

It looks, it changes nothing: versions, DeepSpeed's private names, the device, Transformer Engine, the kernels, the
activation hook, and the `msamp` package if one is installed. Exit code 0: a job can run; 1:
it cannot.

With the job's DeepSpeed JSON a missing activation hook is a failure, if the JSON has our sections: DeepSpeed ignores
sections that it does not know, so without the plugin such a job trains in 16 bits without a message: no code
of ours runs in it. Run it with the Python of the job: `python -m ds_fp8.cli.main doctor ds.json`.
`--client trainer` proves it for a job that never writes `import deepspeed`: what that client imports is imported, and
the engine class looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from .. import config
from ..errors import DsFp8Error
from .check import brief, line
from .clients import CLIENTS, client
from .given import document_of
from .probes import MSAMP_NAMES, PROBES, Finding
from .tables import print_table

MARKS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def main(argv: Sequence[str]) -> int:
    """Run all probes and print what they found."""
    parser = argparse.ArgumentParser(prog="ds_fp8 doctor", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", metavar="FILE", help="the job's DeepSpeed JSON: does this machine fit *it*")
    parser.add_argument(
        "--other-activation",
        "--other-door",
        action="store_true",
        help="the script imports ds_fp8, or is started by ds_fp8.run: it needs no ds_fp8.pth",
    )
    parser.add_argument(
        "--client",
        choices=CLIENTS,
        help="import what this client imports, in a process of its own, and look whether FP8 reaches its engine",
    )
    parser.add_argument(
        "--every-rank",
        action="store_true",
        help="started by the job's launcher in place of the script: look on every node, and reduce over all ranks",
    )
    parser.add_argument("--within", type=float, metavar="S", help="with --every-rank: seconds it may take (300)")
    parser.add_argument(
        "--deepspeed",
        metavar="PATH",
        help="a DeepSpeed that is not installed (source tree, sdist or wheel): what differs there, and nothing else",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    # DeepSpeed's launcher puts its own argument before those of the script.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.within is not None and not options.every_rank:
        parser.error("--within bounds --every-rank; without that there is nothing to wait for")
    if options.deepspeed is not None:
        from .other_deepspeed import report

        return report(options.deepspeed, as_json=options.json)
    if options.every_rank:
        from .every_rank import meet

        return meet(lambda: _look(options), 300.0 if options.within is None else options.within)
    findings = _look(options)
    failed = [finding for finding in findings if finding.status == "fail"]
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
        return int(bool(failed))
    rows = [[MARKS[finding.status], finding.what, finding.found] for finding in findings]
    print_table("ds_fp8 doctor", ["", "what", "found"], rows)
    for finding in findings:
        if finding.cure:
            print(f"{MARKS[finding.status]}: {finding.what}: {finding.cure}")
    print(f"{len(failed)} thing(s) to repair before a job can run" if failed else "a job can run here")
    return int(bool(failed))


def _look(options: argparse.Namespace) -> list[Finding]:
    # DeepSpeed logs to stdout when it is imported; stdout is for the answer.
    with contextlib.redirect_stdout(sys.stderr):
        findings = [finding for probe in PROBES for finding in _run(probe)]
    client_findings = list(client(options.client)) if options.client else []
    if options.file is not None:
        proven = bool(client_findings) and all(finding.status == "ok" for finding in client_findings)
        findings = list(_fit(findings, options.file, options.other_activation or proven))
    return [*findings, *client_findings]


def _fit(findings: Sequence[Finding], file: str, other_hook: bool) -> Iterator[Finding]:
    """The same findings, as one job sees them, and what its file asks for.

    other_hook  the job is hooked without the .pth file: it says so, or its client's imports have shown it
    """
    document = document_of(file)
    errors = [problem for problem in config.check_document(document) if problem.severity == "error"]
    settings = None if errors else config.load_document(document)
    for finding in findings:
        failed = False
        if settings is not None and finding.status == "note":
            is_missed = finding.what == "activation hook" and settings.enabled and not other_hook
            failed = is_missed or (finding.what == MSAMP_NAMES and settings.msamp.enabled)
        yield replace(finding, status="fail") if failed else finding
    if settings is None:
        listed = "".join(f"\n  {line(file, error)}" for error in errors)
        yield Finding(file, f"errors: {len(errors)}", "fail", f"what `ds_fp8 check` finds:{listed}")
        return
    refusal = _refused_here(settings) if settings.enabled else None
    if refusal is None:
        yield Finding(file, brief(settings), "ok" if settings.enabled else "note")
    else:
        yield Finding(file, f"{brief(settings)}: refused on this machine", "fail", refusal)


def _refused_here(settings: config.Settings) -> str | None:
    """What `deepspeed.initialize` would say to these settings on this machine, before it looks at a model."""
    import torch

    from ..capabilities import host
    from ..engine.on_signal import check_can_arm
    from ..plan.effective import decide_settings

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    try:
        decide_settings(settings, host("cuda" if on_gpu else "cpu"))
        if settings.checkpoint_on_signal is not None:
            check_can_arm(settings.checkpoint_on_signal)
    except DsFp8Error as error:
        return str(error)
    return None


def _run(probe) -> list[Finding]:
    """A probe that breaks is itself a finding; the others still run."""
    try:
        return list(probe())
    except Exception as error:  # noqa: BLE001  # a diagnosis must survive whatever is broken here
        name = probe.__name__.replace("_", " ")
        return [Finding(name, f"{type(error).__name__}: {error}", "fail", "this probe broke; see the error beside it")]


if __name__ == "__main__":  # DeepSpeed's launcher starts a module, and puts an argument of its own first
    raise SystemExit(main(sys.argv[1:]))
