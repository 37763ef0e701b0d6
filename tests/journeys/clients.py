"""Start a client's script once for several JSON files, and read what it said; `record` fills the table of
docs/huggingface.md.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.journeys.launching import PACKAGE_PARENT, command_of, free_port, hook_folder, launch

HERE = Path(__file__).parent

AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
}
"""What the Trainer's documentation tells people to write."""

FP8 = {"fp8": {"enabled": True}}


@dataclass(frozen=True)
class Run:
    """What one run of a script said; with several ranks all of them."""

    said: str

    @property
    def losses(self) -> list[float]:
        return [float(word) for word in self.words("LOSSES")]

    @property
    def code(self) -> int:
        return int(self.words("=== EXIT")[0])

    @property
    def fp8_layers(self) -> int:
        return int(self.words("=== FP8 layers")[0])

    @property
    def banner(self) -> str:
        """`14 of 15 Linear`: what the plan says."""
        lines = [line for line in self.said.splitlines() if line.startswith("ds_fp8: ") and "->" in line]
        return lines[0].removeprefix("ds_fp8: ").partition(" ->")[0] if lines else ""

    @property
    def first_step(self) -> str:
        """What was said after the first step."""
        return next(
            (line for line in self.said.splitlines() if line.startswith("ds_fp8: ") and "in step 1" in line), ""
        )

    def words(self, start: str) -> list[str]:
        lines = [line for line in self.said.splitlines() if line.startswith(start)]
        assert lines, f"no line {start}:\n{self.said}"
        return lines[0][len(start) :].split()

    def is_falling(self) -> bool:
        return self.losses[-1] < self.losses[0]


def variables(folder: Path, **more: str) -> dict[str, str]:
    """A Python whose start reads our .pth, and the variables of a launcher of one rank."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    path = f"{hook_folder(folder / 'import_hook')}:{PACKAGE_PARENT}"
    return {**ranks, "MASTER_PORT": str(free_port()), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def write(folder: Path, **configs: dict) -> None:
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def run(
    folder: Path, script: str, *arguments: list[str], ranks: int = 1, timeout_s: float = 800, may_fail: bool = False
) -> list[Run]:
    """The runs of a script of `natural/`, one for each list of arguments; all must end well if not said otherwise."""
    words = [word for one in arguments for word in ("--", *one)][1:]
    forked = [str(HERE / "run_forked.py"), str(HERE / "natural" / f"{script}.py"), *words]
    if ranks == 1:
        code, said = launch([sys.executable, *forked], folder, timeout_s, **variables(folder))
    else:
        launcher = [command_of("deepspeed"), "--no_local_rank", "--num_accelerators", str(ranks)]
        launcher += ["--master_port", str(free_port())]
        path = variables(folder)["PYTHONPATH"]
        code, said = launch([*launcher, *forked], folder, timeout_s, PYTHONPATH=path, HF_HUB_OFFLINE="1")
    assert code == 0 or may_fail, said
    if ranks == 1:
        return [Run(part) for part in said.split("=== RUN ")[1:]]
    return [Run(said)]


def cells(bf16: Run, fp8: Run) -> dict[str, str]:
    """The columns that every comparison fills."""
    first, last = (f"{bf16.losses[at]:.4f} / {fp8.losses[at]:.4f}" for at in (0, -1))
    shown = fp8.first_step.removeprefix("ds_fp8: ") or "not said"
    return {"hook": "yes", "banner": fp8.banner, "first_step": shown, "first": first, "last": last}


def record(client: str, **cells: str) -> None:
    """A row of the table, if somebody asked for it: DS_FP8_CLIENT_TABLE names the file (`client_table.py`)."""
    target = os.environ.get("DS_FP8_CLIENT_TABLE")
    if target:
        with Path(target).open("a") as file:
            file.write(json.dumps({"client": client, **cells}) + "\n")
