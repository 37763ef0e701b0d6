"""A script for Hugging Face Accelerate with its DeepSpeed plugin; FP8 comes from the JSON that the plugin is given."""

from __future__ import annotations

import sys

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=sys.argv[1]))
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=8)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
losses = []
for batch in data:
    loss = model(batch.to(torch.bfloat16)).float().pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
# On a CPU Accelerate itself counts one process; DeepSpeed knows them all.
if deepspeed.comm.get_rank() == 0:
    print("LOSSES", deepspeed.comm.get_world_size(), *losses)
accelerator.end_training()
