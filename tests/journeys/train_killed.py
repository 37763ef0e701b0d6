"""A script that saves after every second step and resumes; the rank named in KILL dies in the middle of a step,
once.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import deepspeed
import torch
from torch import nn

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int, default=-1)
args = parser.parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 5))
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
rank, folder = deepspeed.comm.get_rank(), os.environ["CHECKPOINTS"]
if Path(folder, "latest").exists():
    engine.load_checkpoint(folder)
for step in range(engine.global_steps, 6):
    data = torch.randn(8, 32, generator=torch.Generator().manual_seed(step * 100 + rank))
    loss = engine(data.to(next(engine.module.parameters()).dtype)).float().pow(2).mean()
    if os.environ.get("KILL") == f"{rank} {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    engine.backward(loss)
    engine.step()
    os.write(1, f"STEP {rank} {step} {loss.item()!r}\n".encode())  # one write: two ranks share the pipe
    if step % 2:
        engine.save_checkpoint(folder)
deepspeed.comm.destroy_process_group()
