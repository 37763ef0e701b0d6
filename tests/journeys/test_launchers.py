"""From JSON to losses through the real launchers, by each way of activation, with a script that knows nothing of
FP8.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.journeys import clients
from tests.journeys.launching import PACKAGE_PARENT, command_of, free_port, hook_folder, launch

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).with_name("train_small.py")
BANNER = "ds_fp8: 2 of 3 Linear -> Fp8Linear"

BASELINE = {
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 1000000,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
FP8 = {**BASELINE, "fp8": {"enabled": True}}


@pytest.fixture
def folder(tmp_path):
    """The user's folder: his script and his JSON."""
    shutil.copy(SCRIPT, tmp_path / "train.py")
    (tmp_path / "ds.json").write_text(json.dumps(FP8))
    return tmp_path


def import_hook(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{hook_folder(folder / 'import_hook')}:{PACKAGE_PARENT}"}


def deepspeed_command(*script: str, ranks: int = 2) -> list[str]:
    program = command_of("deepspeed")
    return [program, "--num_accelerators", str(ranks), "--master_port", str(free_port()), *script]


def losses(said: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith("LOSSES")]
    return line.split()[1:]


CONFIG = ("--deepspeed_config", "ds.json")


def checked(folder: Path, launcher: str, command: list[str], **variables: str) -> None:
    """Two ranks, one banner, every planned layer in FP8, and a row of the table of docs/huggingface.md."""
    code, said = launch(command, folder, **import_hook(folder), **variables)
    assert code == 0 and said.count(BANNER) == 1 and losses(said)[0] == "2", said
    run = clients.Run(said)
    assert "all 2 planned layers ran in FP8 in step 1" in run.first_step, said
    first, last = (f"{float(losses(said)[at]):.4f}" for at in (1, -1))
    shown = {"hook": "yes", "banner": run.banner, "first_step": run.first_step.removeprefix("ds_fp8: ")}
    clients.record(f"launcher: {launcher}", **shown, first=first, last=last)


def test_deepspeed_launcher_by_the_installed_hook_and_by_run(folder):
    """`deepspeed train.py` with the .pth, `deepspeed --module ds_fp8.run train.py` without: the same losses."""
    code, by_hook = launch(deepspeed_command("train.py", *CONFIG), folder, **import_hook(folder))
    assert code == 0, by_hook
    assert by_hook.count(BANNER) == 1, "one banner, from rank 0"
    code, explicit = launch(deepspeed_command("--module", "ds_fp8.run", "train.py", *CONFIG), folder)
    assert code == 0, explicit
    assert explicit.count(BANNER) == 1 and losses(by_hook) == losses(explicit)
    assert losses(by_hook)[0] == "2"
    checked(folder, "deepspeed --module", deepspeed_command("--module", "train", *CONFIG))


def test_disable_gives_deepspeed_alone(folder):
    """DS_FP8_DISABLE=1 with the activation hook installed: no banner, and the losses of a JSON without our section."""
    code, disabled = launch(deepspeed_command("train.py", *CONFIG), folder, **import_hook(folder), DS_FP8_DISABLE="1")
    assert code == 0 and "ds_fp8" not in disabled, disabled
    (folder / "ds.json").write_text(json.dumps(BASELINE))
    code, baseline = launch(deepspeed_command("train.py", *CONFIG), folder, **import_hook(folder))
    assert code == 0 and losses(disabled) == losses(baseline)


@pytest.mark.parametrize("script", [("train.py",), ("-m", "train")], ids=" ".join)
def test_torchrun(folder, script):
    """The same job under torch's own launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    checked(folder, " ".join(["torchrun", *script[:-1]]), [*command, *script, *CONFIG])


def test_mpirun(folder):
    """Ranks found through mpi4py; neither RANK nor MASTER_ADDR is set by anybody."""
    pytest.importorskip("mpi4py", reason="needs mpi4py")
    program = command_of("mpirun")
    if program is None:
        pytest.skip("needs mpirun (Open MPI or MPICH)")
    command = [program, "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    checked(folder, "mpirun", [*command, "train.py", *CONFIG], MASTER_PORT=str(free_port()))


@pytest.mark.parametrize(
    ("section", "shown"),
    [
        ({"enabled": True, "margn": 1}, "did you mean 'margin'"),
        ({"enabled": True, "layers": {"exclude": ["no_such_layer"]}}, "no_such_layer"),
    ],
)
def test_bad_input_ends_the_launcher_with_an_error(folder, section, shown):
    """The reason is in the log of every rank, no step was taken, and the exit code is not 0."""
    (folder / "ds.json").write_text(json.dumps({**BASELINE, "fp8": section}))
    code, said = launch(deepspeed_command("train.py", *CONFIG), folder, **import_hook(folder))
    assert code != 0 and "LOSSES" not in said
    assert said.count(shown) >= 2, said


def test_a_json_that_differs_between_ranks_ends_the_job(folder):
    """Rank 1 reads a JSON without our section: without a word before the first collective both would wait for ever."""
    (folder / "unmodified.json").write_text(json.dumps(BASELINE))
    other = 'import os, sys\nsys.argv[-1] = "unmodified.json" if os.environ["RANK"] == "1" else sys.argv[-1]\n'
    script = (folder / "train.py").read_text()
    (folder / "train.py").write_text(script.replace("import argparse\n", f"import argparse\n{other}", 1))
    code, said = launch(deepspeed_command("train.py", *CONFIG), folder, **import_hook(folder))
    assert code != 0 and "LOSSES" not in said
    assert "rank 1 made a DeepSpeed engine without an fp8 or msamp section" in said, said


def test_a_script_that_imports_the_package_needs_no_hook(folder):
    """`import ds_fp8`, one line, for sites that read no .pth files."""
    script = (folder / "train.py").read_text()
    (folder / "train.py").write_text(script.replace("import deepspeed\n", "import deepspeed\nimport ds_fp8\n", 1))
    code, said = launch(deepspeed_command("train.py", *CONFIG, ranks=1), folder)
    assert code == 0 and said.count(BANNER) == 1, said
