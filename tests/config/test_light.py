"""A check must answer before a node is spent, so `config` pays for no tensor library, and an unmodified job for no
validator.
"""

from __future__ import annotations

import resource
import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_load_and_check_import_neither_torch_nor_deepspeed_nor_pydantic():
    code = (
        "from ds_fp8 import config; import sys;"
        "d = {'train_batch_size': 1, 'fp8': {'enabled': True}, 'msamp': {'enabled': True}};"
        "config.load(d); config.check(d);"
        "print([m for m in ('torch', 'deepspeed', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_an_unmodified_job_does_not_even_import_jsonschema():
    code = (
        "from ds_fp8 import config; import sys; config.load({'train_batch_size': 1}); "
        "print('jsonschema' in sys.modules)"
    )
    assert run(code) == "False"


def test_the_whole_command_takes_less_than_half_a_second(tmp_path):
    """Processor time, start of Python included: a busy machine does not stretch it as it stretches the clock.

    benchmarks/bench_check.py has the clock: 0.18 s on a quiet machine.
    """
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 1, "fp8": {"enabled": true}, "msamp": {"enabled": true, "opt_level": "O2"}}')
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ds_fp8.cli.main", "check", str(file)], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5, seconds
