"""The user's script of the journeys: PyTorch and DeepSpeed, not a word about FP8. Prints its losses on rank 0."""

from __future__ import annotations

import argparse

import deepspeed
import torch
from torch import nn

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 5))
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
rank, losses = deepspeed.comm.get_rank(), []
for step in range(args.steps):
    data = torch.randn(8, 32, generator=torch.Generator().manual_seed(step * 100 + rank))
    loss = engine(data.to(next(engine.module.parameters()).dtype)).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if rank == 0:
    print("LOSSES", deepspeed.comm.get_world_size(), *losses)
deepspeed.comm.destroy_process_group()
