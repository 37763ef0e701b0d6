"""A script that never saves: it takes up what `latest` names, and prints every loss. STEPS, STEP_S, DIE, DATA_WORKERS.

DIE="rank step code" ends that rank with that exit code before that step, or by SIGKILL where the code is KILL;
HANG="rank step" makes it sleep there. With the file $MARK present neither happens: the second start lives.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--resume_from")
args = parser.parse_args()
environment = os.environ.get

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 5))
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
rank, folder = deepspeed.comm.get_rank(), args.resume_from or environment("CHECKPOINTS", "ckpt")
if environment("CALL"):
    import ds_fp8

    ds_fp8.checkpoint_on_signal(engine, folder)
if Path(folder, "latest").exists():
    engine.load_checkpoint(folder)
mark = Path(environment("MARK", "mark"))
wished = {name: environment(name, "").split() for name in ("DIE", "HANG")} if not mark.exists() else {}
DATA = TensorDataset(torch.randn(4096, 4, 32, generator=torch.Generator().manual_seed(7)))
batches = iter(DataLoader(DATA, batch_size=None, num_workers=int(environment("DATA_WORKERS", "0"))))
for _ in range(engine.global_steps):
    next(batches)


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one write: ranks may share the pipe


say(f"BEGIN {rank} {engine.global_steps} {os.uname().nodename} {environment('SLURMD_NODENAME', '-')}")
for step in range(engine.global_steps, int(environment("STEPS", "6"))):
    for name, wish in wished.items():
        if wish[:2] == [str(rank), str(step)]:
            mark.touch()
            if name == "HANG":
                time.sleep(3600)
            if wish[2] == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            say(f"DYING {rank} {step}")
            os._exit(int(wish[2]))
    (data,) = next(batches)
    loss = engine((data + rank).to(next(engine.module.parameters()).dtype)).float().pow(2).mean()
    engine.backward(loss)
    say(f"STEP {rank} {step} {loss.item()!r}")
    time.sleep(float(environment("STEP_S", "0")))
    engine.step()
say(f"DONE {rank}")
sys.stdout.flush()
deepspeed.comm.destroy_process_group()
