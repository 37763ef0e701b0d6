"""A script for `accelerate launch --config_file`: nothing about DeepSpeed or FP8 in it."""

from accelerate import Accelerator
from accelerate.utils import set_seed
import torch
from torch import nn

set_seed(0)
accelerator = Accelerator()
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=8)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
dtype, losses = next(model.parameters()).dtype, []
for step, batch in enumerate(data):
    if step == 4:
        accelerator.save_state("state")
    loss = model(batch.to(dtype)).float().pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
accelerator.load_state("state")  # back to step 4: the same steps give the same losses
for batch in list(data)[4:]:
    loss = model(batch.to(dtype)).float().pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
names = sorted(accelerator.get_state_dict(model))
if accelerator.process_index == 0:  # on CPUs each process is its node's main one for accelerator.print
    print("\n".join(["LOSSES " + " ".join(map(str, losses)), f"NAMES {names}"]), flush=True)
accelerator.end_training()
