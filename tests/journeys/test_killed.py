"""A rank that dies takes the job with it, and nothing else: the next start goes on from the checkpoint, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.journeys.launching import PACKAGE_PARENT, command_of, free_port, hook_folder, launch

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]  # three launches

SCRIPT = Path(__file__).with_name("train_killed.py")
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 1000000,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "fp8": {"enabled": True, "amax_history_len": 4},
    "msamp": {"enabled": True, "opt_level": "O2"},
}


def losses(said: str) -> dict[tuple[int, int], str]:
    """(rank, step) -> the loss to its last digit."""
    # Anywhere in a line: what another process has written without a newline may stand before it.
    return {(int(rank), int(step)): loss for rank, step, loss in re.findall(r"STEP (\d) (\d) (\S+)", said)}


def test_a_killed_rank_ends_the_job_and_the_next_one_goes_on_from_the_checkpoint(tmp_path):
    """SIGKILL to rank 1 in step 4, between forward and backward; steps 4 and 5 again, as in a run that lived."""
    shutil.copy(SCRIPT, tmp_path / "train.py")
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))

    def train(name: str, **variables: str) -> tuple[int, dict[tuple[int, int], str], str]:
        command = [command_of("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), "train.py"]
        path = f"{hook_folder(tmp_path / 'import_hook')}:{PACKAGE_PARENT}"
        environment = {"PYTHONPATH": path, "CHECKPOINTS": str(tmp_path / name), **variables}
        code, said = launch([*command, "--deepspeed_config", "ds.json"], tmp_path, **environment)
        return code, losses(said), said

    code, whole, said = train("whole")
    assert code == 0 and len(whole) == 2 * 6, said
    code, first, said = train("parts", KILL="1 4")
    assert code != 0, said
    assert first == {key: loss for key, loss in whole.items() if key[1] < 4}
    code, second, said = train("parts")
    assert code == 0, said
    assert second == {key: loss for key, loss in whole.items() if key[1] >= 4}
