"""Accelerate's own `mixed_precision="fp8"` by each backend: `python accelerate_fp8.py WAY [ds.json]`."""

import sys

from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, DeepSpeedPlugin, MSAMPRecipeKwargs, TERecipeKwargs
import torch
from torch import nn

way, *config = sys.argv[1:]
torch.manual_seed(0)
if way == "msamp without DeepSpeed":
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[MSAMPRecipeKwargs(opt_level="O2")], cpu=True)
elif way == "msamp":
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1, enable_msamp=True, msamp_opt_level="O2")
    accelerator = Accelerator(mixed_precision="fp8", deepspeed_plugin=plugin)
elif way == "nothing said":
    accelerator = Accelerator(mixed_precision="fp8", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config[0]))
else:
    recipe = {
        "msamp by its recipe": MSAMPRecipeKwargs,
        "torchao": AORecipeKwargs,
        "transformer_engine": TERecipeKwargs,
    }[way]()
    plugin = DeepSpeedPlugin(hf_ds_config=config[0])
    accelerator = Accelerator(mixed_precision="fp8", deepspeed_plugin=plugin, kwargs_handlers=[recipe])
model = nn.Sequential(
    nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.DataLoader(torch.randn(128, 32), batch_size=16)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
dtype = next(model.parameters()).dtype
losses = []
for batch in data:
    loss = model(batch.to(dtype)).float().pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
accelerator.print("LOSSES", *losses)
accelerator.end_training()
