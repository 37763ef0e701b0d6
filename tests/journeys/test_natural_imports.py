"""Scripts as their writers start them: each client in its own order of imports, and none says `import deepspeed`.

All clients ask `importlib.util.find_spec("deepspeed")` long before they import it. Each script here trains twice, with
a JSON that differs in our section alone; FP8 is on when the banner says so, the model's layers are ours, and the losses
differ from bf16's. A hook that was lost fails all three.
"""

from __future__ import annotations

import json
import sys

import pytest

from tests.journeys import clients
from tests.journeys.launching import launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BASELINE = {
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


@pytest.mark.parametrize("script", CLIENTS)
def test_fp8_is_on(tmp_path, script):
    client, layers = CLIENTS[script]
    pytest.importorskip(client, reason=f"needs {client}")
    clients.write(tmp_path, bf16=BASELINE, fp8={**BASELINE, **clients.FP8})
    bf16, fp8 = clients.run(tmp_path, script, ["bf16.json"], ["fp8.json"])
    assert "ds_fp8:" not in bf16.said and bf16.fp8_layers == 0, bf16.said
    assert "Linear -> Fp8Linear" in fp8.said and fp8.fp8_layers >= layers, fp8.said
    assert fp8.losses != bf16.losses
    assert abs(fp8.losses[0] - bf16.losses[0]) < 0.02 * bf16.losses[0], "the same model, rounded"
    if script == "lightning_strategy":
        clients.record("Lightning: DeepSpeedStrategy", **clients.cells(bf16, fp8))


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
    code, said = launch([sys.executable, "-c", f"ORDERS = {ORDERS!r}{CHECK}"], tmp_path, **clients.variables(tmp_path))
    assert code == 0 and said.count("ACTIVE") == len(ORDERS), said


def test_doctor_proves_it_for_a_client(tmp_path):
    """`ds_fp8 doctor ds.json --client trl`: TRL's imports, which bring those of PEFT, the Trainer and Accelerate."""
    pytest.importorskip("trl", reason="needs trl")
    (tmp_path / "ds.json").write_text(json.dumps({**BASELINE, **clients.FP8}))
    command = [sys.executable, "-m", "ds_fp8.cli.main", "doctor", "ds.json", "--client", "trl", "--json"]
    code, said = launch(command, tmp_path, **clients.variables(tmp_path))
    answer = json.loads(next(line for line in said.splitlines() if line.startswith('{"ok"')))
    (finding,) = [finding for finding in answer["findings"] if finding["what"] == "client trl"]
    assert code == 0 and finding["status"] == "ok" and "is hooked" in finding["found"], finding
