"""`ds_fp8 doctor --deepspeed PATH`: what in a DeepSpeed that is not installed is not as our code expects it.

Its source is read, never imported. Exit code 0: nothing differs; 1: a job would be refused with this list; 2: no
DeepSpeed there. docs/porting.md says what to do with each line.
"""

from __future__ import annotations

import json
import sys

from .. import releases
from ..errors import PrivateNameError
from ..releases import numbers


def report(path: str, *, as_json: bool) -> int:
    """Print the differences of the DeepSpeed at `path`."""
    from ..zero import private_names
    from ..zero.adapters import LINES
    from ..zero.deepspeed_source import DeepSpeedSource

    try:
        source = DeepSpeedSource.at(path)
    except PrivateNameError as error:
        print(f"ds_fp8 doctor: {error}", file=sys.stderr)
        return 2
    version = source.version
    of_fp8 = list(private_names.differences(source, msamp=False))
    everything = [*of_fp8, *(text for text in private_names.differences(source) if text not in of_fp8)]
    lines = [line for line in LINES if numbers(version) <= numbers(line)]
    if as_json:
        print(
            json.dumps(
                {
                    "deepspeed": version,
                    "adapters": lines,
                    "fp8": of_fp8,
                    "all": everything,
                    "faults": releases.faults(version),
                }
            )
        )
        return int(bool(everything))
    known = "tested" if version in releases.DEEPSPEED else "not tested"
    print(
        f"DeepSpeed {version or 'of unknown version'} in {path} ({known}); adapters: "
        f"{', '.join(lines) or 'none needed'}"
    )
    for text in releases.faults(version):
        print(f"  by itself: {text}")
    for text in everything:
        print(f"  {'fp8 and msamp' if text in of_fp8 else 'msamp'}: {text}")
    print(f"{len(everything)} thing(s) differ: docs/porting.md has the steps" if everything else "nothing differs")
    return int(bool(everything))
