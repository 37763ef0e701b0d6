"""A DeepSpeed that came after us: a job runs if all that it stands on is there, else it is refused with the whole list.

The newer release is the installed one under another version, put before it on the path; for the second test with names
changed as releases change them: a method that we override, an attribute that we read, one that we only write.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import deepspeed
import pytest

from ds_fp8.releases import DEEPSPEED
from tests.journeys.launching import PACKAGE_PARENT, free_port, hook_folder, launch

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).parents[1] / "journeys" / "train_small.py"
JOB = {
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 1000000,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "fp8": {"enabled": True},
}
MSAMP = {"msamp": {"enabled": True, "opt_level": "O3"}}
NEWER = DEEPSPEED[-1].rpartition(".")[0] + ".99"
RENAMED = {
    "_update_model_bit16_weights": "_update_model_16bit_weights",
    "averaged_gradients": "mean_gradients",
    "torch_autocast_z0_gradscaler": "autocast_gradscaler",
}


@pytest.fixture
def newer(tmp_path):
    """A folder with the user's script, and with `deepspeed` of the next release."""
    copy = tmp_path / "deepspeed"
    shutil.copytree(Path(deepspeed.__file__).parent, copy, copy_function=os.symlink)
    rewrite(copy / "git_version_info_installed.py", {f"version='{deepspeed.__version__}": f"version='{NEWER}"})
    shutil.copy(SCRIPT, tmp_path / "train.py")
    return tmp_path


def rewrite(file: Path, changes: dict[str, str]) -> None:
    before = text = file.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    if text != before:
        file.unlink()  # a link: the installed file stays as it is
        file.write_text(text)


def train(folder: Path, job: dict) -> tuple[int, str]:
    (folder / "ds.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    path = f"{folder}:{hook_folder(folder / 'import_hook')}:{PACKAGE_PARENT}"
    return launch([*command, "train.py", "--deepspeed_config", "ds.json"], folder, PYTHONPATH=path)


def test_it_runs_with_one_line_when_everything_is_there(newer):
    """Trained in FP8 at O3, and reported once, by rank 0, that nobody has tested this release."""
    code, said = train(newer, {**JOB, **MSAMP})
    assert code == 0 and "LOSSES 2" in said, said
    assert said.count(f"DeepSpeed {NEWER} was not tested with this ds_fp8") == 1, said
    assert "Linear -> Fp8Linear" in said


def test_it_is_refused_with_every_name_that_is_gone(newer):
    """No step is taken; the list says who needs what. With `fp8` alone none of these names is needed: the job runs."""
    for file in (newer / "deepspeed" / "runtime").rglob("*.py"):
        rewrite(file, RENAMED)
    code, said = train(newer, {**JOB, **MSAMP})
    assert code != 0 and "LOSSES" not in said, said
    assert f"DeepSpeed {NEWER} differs from the releases that ds_fp8 knows" in said
    assert "_update_model_bit16_weights: not there; needed because weights are gathered in quantized form" in said
    assert (
        "has no averaged_gradients, which zero/" in said and "has no torch_autocast_z0_gradscaler, which zero/" in said
    )
    assert "enabled: false" in said
    code, said = train(newer, JOB)
    assert code == 0 and "LOSSES 2" in said, said
    assert said.count(f"DeepSpeed {NEWER} was not tested") == 1
