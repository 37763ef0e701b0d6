"""A script for Accelerate's MS-AMP backend, served by the shim: alone or through its DeepSpeed plugin (`plain`, `deepspeed`)."""

from __future__ import annotations

import sys

import ds_fp8.compat

ds_fp8.compat.install()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DeepSpeedPlugin, MSAMPRecipeKwargs  # noqa: E402
from torch import nn  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
if sys.argv[1] == "plain":
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[MSAMPRecipeKwargs(opt_level="O2")], cpu=True)
else:
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1, enable_msamp=True, msamp_opt_level="O2")
    accelerator = Accelerator(mixed_precision="fp8", deepspeed_plugin=plugin)
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=8)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
dtype = next(model.parameters()).dtype
losses = []
for batch in data:
    loss = model(batch.to(dtype)).float().pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
if torch.distributed.get_rank() == 0:
    print("LOSSES", torch.distributed.get_world_size(), *losses)
accelerator.end_training()
