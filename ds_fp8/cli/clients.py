"""`ds_fp8 doctor ds.json --client trainer`: does FP8 reach the engine that this client builds, in this environment?

The clients import DeepSpeed late and ask for it early, and each drags its own libraries along, some of which put import
hooks of their own in front of ours. So nothing is concluded from files that lie somewhere: a fresh Python, started as
the job's is, imports what the client imports, in its order, and then looks at DeepSpeed's engine class.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .probes import Finding, installed

PATIENCE_S = 600.0
"""Importing all of TRL from a cold network file system takes minutes."""


@dataclass(frozen=True)
class Client:
    """One way to call `deepspeed.initialize`.

    needs    distributions that must be installed
    imports  what the client's scripts import, in its order; the last line is where it imports DeepSpeed
    """

    needs: tuple[str, ...]
    imports: str


_TRAINER = """
from transformers import Trainer, TrainingArguments
import transformers.integrations.deepspeed
from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedPlugin
"""

CLIENTS = {
    "deepspeed": Client(("deepspeed",), "import torch"),
    "trainer": Client(("transformers", "accelerate"), _TRAINER),
    "accelerate": Client(
        ("accelerate",), "from accelerate import Accelerator\nfrom accelerate.utils import DeepSpeedPlugin"
    ),
    "peft": Client(("peft", "transformers", "accelerate"), f"from peft import LoraConfig, get_peft_model{_TRAINER}"),
    "trl": Client(("trl", "transformers", "accelerate"), f"from trl import DPOTrainer, SFTTrainer{_TRAINER}"),
    "lightning": Client(("lightning",), "import lightning\nfrom lightning.pytorch.strategies import DeepSpeedStrategy"),
}

LOOK = """
from deepspeed.runtime.engine import DeepSpeedEngine
print("HOOKED" if hasattr(DeepSpeedEngine._configure_distributed_model, "ds_fp8_original") else "NOT HOOKED")
"""


def client(name: str) -> Iterator[Finding]:
    """One finding: what the engine class looks like after this client's imports."""
    asked = CLIENTS[name]
    what = f"client {name}"
    missing = [need for need in asked.needs if installed(need) is None]
    if missing:
        yield Finding(what, f"not installed: {', '.join(missing)}", "fail", f"pip install {' '.join(missing)}")
        return
    versions = ", ".join(f"{need} {installed(need)}" for need in asked.needs)
    # As a script does it: the question first, DeepSpeed last.
    code = f'import importlib.util\nimportlib.util.find_spec("deepspeed")\n{asked.imports}\nimport deepspeed\n{LOOK}'
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding(what, f"{versions}: its imports took longer than {PATIENCE_S:.0f} s", "fail", "run it again")
        return
    answer = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    if answer == ["HOOKED"]:
        yield Finding(what, f"{versions}: DeepSpeed's engine is hooked when its imports are done")
    elif answer == ["NOT HOOKED"]:
        cure = (
            "`import ds_fp8` at the head of the script, or install ds_fp8 into this Python's site-packages; "
            "`python -c 'import sys; print(sys.meta_path)'` shows who else hooks imports"
        )
        yield Finding(
            what, f"{versions}: DeepSpeed is imported without ds_fp8; the job would train in 16 bits", "fail", cure
        )
    else:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        yield Finding(
            what, f"{versions}: its imports fail here: {reason}", "fail", "the job cannot start either; mend that first"
        )
