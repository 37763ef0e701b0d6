"""Accelerate: `accelerate launch` with a JSON or with YAML alone, save and load, and its own FP8 backends."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

import pytest

from tests.journeys import clients
from tests.journeys.launching import free_port, launch

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("transformers", reason="Accelerate's DeepSpeed plugin asks for its version: needs transformers")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

BASELINE = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

WITH_JSON = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {deepspeed_config_file: ds.json, zero3_init_flag: false}
num_machines: 1
machine_rank: 0
use_cpu: true
"""

YAML_ALONE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: fp8
fp8_config: {backend: MSAMP, opt_level: O2}
deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 1, gradient_clipping: 1.0, zero3_init_flag: false}
num_machines: 1
machine_rank: 0
use_cpu: true
"""


def accelerate_launch(folder, yaml: str, ranks: int) -> str:
    (folder / "config.yaml").write_text(yaml)
    shutil.copy(clients.HERE / "natural" / "accelerate_config.py", folder / "train.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    command += ["--num_processes", str(ranks), "--main_process_port", str(free_port()), "train.py"]
    return launched(command, folder)


def launched(command: list[str], folder) -> str:
    """What was said by a launcher, which sets the variables of its ranks itself."""
    environment = clients.variables(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del environment[name]
    code, said = launch(command, folder, 800, **environment)
    assert code == 0, said
    return said


def test_a_config_with_the_json(tmp_path):
    """Two ranks; a state saved at step 4 and loaded after step 8 gives steps 4 to 7 again, to the bit."""
    clients.write(tmp_path, ds=BASELINE)
    bf16 = clients.Run(accelerate_launch(tmp_path, WITH_JSON, 2))
    clients.write(tmp_path, ds={**BASELINE, **clients.FP8})
    fp8 = clients.Run(accelerate_launch(tmp_path, WITH_JSON, 2))
    assert fp8.said.count("ds_fp8: 3 of 3 Linear -> Fp8Linear") == 1 and "ds_fp8:" not in bf16.said, fp8.said
    assert fp8.losses != bf16.losses and fp8.is_falling()
    assert fp8.losses[4:8] == fp8.losses[8:]
    assert "'0.weight', '1.bias'" in fp8.said, "the state dict has the model's own names"
    clients.record("Accelerate: YAML + JSON", save="save_state", resume="losses to the bit", **clients.cells(bf16, fp8))


def test_a_config_without_json(tmp_path):
    """Every word about FP8 stands in the YAML: Accelerate looks for `msamp`, and finds what ds_fp8 serves."""
    fp8 = clients.Run(accelerate_launch(tmp_path, YAML_ALONE, 1))
    assert "ds_fp8: 3 of 3 Linear -> Fp8Linear" in fp8.said and "ds_fp8: msamp O2: exp_avg int8" in fp8.said, fp8.said
    assert fp8.is_falling() and fp8.losses[4:8] == fp8.losses[8:]


def test_its_own_fp8_backends(tmp_path):
    """`mixed_precision="fp8"`: MS-AMP by three paths that do not know of us; the other two convert layers, and are not
    mixed with ours.
    """
    clients.write(tmp_path, baseline={**BASELINE, "gradient_accumulation_steps": 1})
    clients.write(tmp_path, fp8={**BASELINE, "gradient_accumulation_steps": 1, **clients.FP8})
    ways = [["msamp"], ["msamp without DeepSpeed"], ["msamp by its recipe", "baseline.json"]]
    *msamp, torchao, engine, found = clients.run(
        tmp_path,
        "accelerate_fp8",
        *ways,
        ["torchao", "fp8.json"],
        ["transformer_engine", "fp8.json"],
        ["nothing said", "fp8.json"],
        may_fail=True,
    )
    for run in msamp:
        assert run.code == 0 and run.fp8_layers == 4 and run.is_falling(), run.said
        assert "ds_fp8: msamp O2: exp_avg int8" in run.said, run.said
    has_torchao, has_engine = (find_spec(name) is not None for name in ("torchao", "transformer_engine"))
    refused = "computes in FP8 here already"
    assert torchao.code == 1 and (refused if has_torchao else "TorchAO is not available") in torchao.said, torchao.said
    assert engine.code == 1 and (refused if has_engine else "TransformerEngine is not available") in engine.said
    if has_torchao or has_engine:
        assert found.code == 1 and refused in found.said, found.said
    else:  # then Accelerate takes msamp, and finds ours
        assert found.code == 0 and "opt_level O2 of Accelerate's MSAMPRecipeKwargs is not used" in found.said, (
            found.said
        )


FLAGS = "--use_deepspeed --deepspeed_config_file ds.json --num_processes 1 --num_machines 1 --dynamo_backend no"


def test_flags_alone(tmp_path):
    """`accelerate launch --use_deepspeed`: no YAML, and a Trainer whose script does not speak of DeepSpeed."""
    for name in ("tiny", "trainer_told"):
        shutil.copy(clients.HERE / "natural" / f"{name}.py", tmp_path)
    runs = []
    for config in (clients.AUTO, {**clients.AUTO, **clients.FP8}):
        clients.write(tmp_path, ds=config)
        command = [sys.executable, "-m", "accelerate.commands.launch", *FLAGS.split()]
        command += ["--main_process_port", str(free_port()), "trainer_told.py"]
        runs.append(clients.Run(launched(command, tmp_path)))
    bf16, fp8 = runs
    assert "14 of 15 Linear -> Fp8Linear" in fp8.said and "ds_fp8:" not in bf16.said, fp8.said
    assert "all 14 planned layers ran in FP8 in step 1" in fp8.said
    assert fp8.losses != bf16.losses and fp8.is_falling()
    clients.record("Trainer: accelerate launch by flags", **clients.cells(bf16, fp8))
