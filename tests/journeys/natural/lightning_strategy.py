"""Lightning's Trainer with its DeepSpeedStrategy, which refuses CPUs: its checks of the device are left out, the
rest is its own.
"""

import sys

import lightning
from lightning.pytorch.strategies import DeepSpeedStrategy
import torch
from torch import nn


class OnCPU(DeepSpeedStrategy):
    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16))
        self.losses = []

    def training_step(self, batch):
        loss = self.model(batch).float().pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
model = Module()
data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=8)
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1,
    strategy=OnCPU(config=sys.argv[1]),
    precision="bf16-true",
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(model, data)
print("LOSSES", *model.losses)
