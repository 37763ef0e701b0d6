"""Scripts as their writers start them: each client in its own order of imports, and none says `import deepspeed`.

All clients ask `importlib.util.find_spec("deepspeed")` long before they import it. Each script here trains twice, with a
JSON that differs in our section alone; FP8 is on when the banner says so, the model's layers are ours, and the losses
differ from bf16's. A hook that was lost fails all three.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.journeys.launching import PACKAGE_PARENT, door_folder, free_port, launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

HERE = Path(__file__).parent

PLAIN = {
    "train_micro_batch_size_per_gpu": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

CLIENTS = {
    "trainer": ("transformers", 14),
    "accelerate_plugin": ("accelerate", 2),
    "peft_lora": ("peft", 14),
    "trl_sft": ("trl", 14),
    "lightning_strategy": ("lightning", 2),
}
"""Script -> the client that it needs, and the least number of FP8 layers in its model."""


def one_rank(folder: Path) -> dict[str, str]:
    """The variables that a launcher would set, and a Python whose start reads our .pth."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    path = f"{door_folder(folder / 'door')}:{PACKAGE_PARENT}"
    return {**ranks, "MASTER_PORT": str(free_port()), "PYTHONPATH": path}


def runs_of(said: str) -> list[str]:
    return said.split("=== RUN ")[1:]


def losses_of(run: str) -> list[float]:
    (line,) = [line for line in run.splitlines() if line.startswith("LOSSES")]
    return [float(loss) for loss in line.split()[1:]]


def fp8_layers_of(run: str) -> int:
    return int(run.split("=== FP8 layers ")[1].split(maxsplit=1)[0])


@pytest.mark.parametrize("script", CLIENTS)
def test_fp8_is_on(tmp_path, script):
    client, layers = CLIENTS[script]
    pytest.importorskip(client, reason=f"needs {client}")
    (tmp_path / "bf16.json").write_text(json.dumps(PLAIN))
    (tmp_path / "fp8.json").write_text(json.dumps({**PLAIN, "fp8": {"enabled": True}}))
    command = [sys.executable, str(HERE / "run_forked.py"), str(HERE / "natural" / f"{script}.py")]
    code, said = launch([*command, "bf16.json", "--", "fp8.json"], tmp_path, **one_rank(tmp_path))
    assert code == 0, said
    bf16, fp8 = runs_of(said)
    assert "ds_fp8:" not in bf16 and fp8_layers_of(bf16) == 0, bf16
    assert "Linear -> Fp8Linear" in fp8 and fp8_layers_of(fp8) >= layers, fp8
    assert losses_of(fp8) != losses_of(bf16)
    assert abs(losses_of(fp8)[0] - losses_of(bf16)[0]) < 0.02 * losses_of(bf16)[0], "the same model, rounded"


ORDERS = (
    "import torch; from transformers import Trainer; import accelerate, peft",
    "from accelerate import Accelerator; import transformers; from trl import SFTTrainer",
    "import lightning.pytorch.strategies; from trl import DPOTrainer; from peft import LoraConfig; import transformers",
    "import transformers.integrations.deepspeed; from transformers import HfArgumentParser, AutoModel; import datasets",
)

CHECK = """
import os, sys
for order in ORDERS:
    if os.fork() == 0:
        exec(order)
        assert "ds_fp8.engine" not in sys.modules or "deepspeed" in sys.modules
        from accelerate.utils import DeepSpeedEngineWrapper
        from deepspeed import initialize
        import ds_fp8
        print("ACTIVE" if ds_fp8.is_active() else "LOST", order, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, order
"""


def test_whatever_is_imported_first(tmp_path):
    """Several clients in one process, in orders that scripts in the field have; the last import is DeepSpeed's own."""
    for client in ("accelerate", "transformers", "peft", "trl", "lightning", "datasets"):
        pytest.importorskip(client, reason=f"needs {client}")
    code, said = launch([sys.executable, "-c", f"ORDERS = {ORDERS!r}{CHECK}"], tmp_path, **one_rank(tmp_path))
    assert code == 0 and said.count("ACTIVE") == len(ORDERS), said


def test_doctor_proves_it_for_a_client(tmp_path):
    """`ds_fp8 doctor ds.json --client trl`: TRL's imports, which bring those of PEFT, the Trainer and Accelerate."""
    pytest.importorskip("trl", reason="needs trl")
    (tmp_path / "ds.json").write_text(json.dumps({**PLAIN, "fp8": {"enabled": True}}))
    command = [sys.executable, "-m", "ds_fp8.cli.main", "doctor", "ds.json", "--client", "trl", "--json"]
    code, said = launch(command, tmp_path, **one_rank(tmp_path))
    answer = json.loads(next(line for line in said.splitlines() if line.startswith('{"ok"')))
    (finding,) = [finding for finding in answer["findings"] if finding["what"] == "client trl"]
    assert code == 0 and finding["status"] == "ok" and "is hooked" in finding["found"], finding
