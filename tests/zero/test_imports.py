"""The table of private names imports under any DeepSpeed, because it is what says that a DeepSpeed is another one."""

from __future__ import annotations

import subprocess
import sys

OLDER = """
import deepspeed.runtime.utils as utils, deepspeed.runtime.fp16.loss_scaler as loss_scaler
del utils.is_invalid_grad_norm, utils.is_optimized_parameter, loss_scaler.LossScaleConfig   # as in 0.19.7 and before
from ds_fp8.zero import private_names
import ds_fp8.checkpoint
from ds_fp8.zero import specialize, configure_optimizer
assert callable(specialize) and callable(configure_optimizer)
print(len(private_names.needed(False)), len(private_names.METHODS))
"""


def test_names_that_older_releases_lack_are_not_needed_to_import():
    """DeepSpeed's own modules have taken those names already; ours must not ask for them before a job needs them."""
    code = "import deepspeed, deepspeed.runtime.zero.stage3, deepspeed.runtime.fp16.unfused_optimizer\n" + OLDER
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    fp8, everything = map(int, done.stdout.split()[-2:])
    assert 0 < fp8 < everything
