"""Accelerate with its DeepSpeed plugin; torch comes after it."""

import sys

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, set_seed
import torch
from torch import nn

set_seed(0)
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=sys.argv[1]))
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16))
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
accelerator.print("LOSSES", *losses)
accelerator.end_training()
