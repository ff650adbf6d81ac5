"""python -m examples.lightning_module

The loop of examples/plain_pytorch.py as a LightningModule. Lightning starts the first epoch's
loader before `on_train_epoch_start`, so the epoch is set in `train_dataloader` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from teach_once import DistillationDataset, RunOrder, build, learning_rate_at, load_student, losses
from teach_once.configs.schema import StudentConfig


class Distillation(pl.LightningModule):
    """A student with its data; `step_losses` contains the loss of each step."""

    def __init__(self, config: StudentConfig, caches: str | Path, seed: int = 0) -> None:
        super().__init__()
        self.recipe, self.seed = config.training, seed
        self.dataset = DistillationDataset(config, caches, taps=["logits"])
        self.student = build(config.student.arch, num_classes=10, in_channels=1, seed=seed)
        self.step_losses: list[float] = []

    def train_dataloader(self) -> DataLoader[Any]:
        self.dataset.set_epoch(self.current_epoch + 1)
        order = RunOrder(self.dataset, self.seed)
        return DataLoader(
            self.dataset,
            self.recipe.batch_size,
            sampler=order,
            num_workers=1,
            persistent_workers=True,
        )

    def on_train_epoch_start(self) -> None:
        self.dataset.set_epoch(self.current_epoch + 1)

    def training_step(self, batch: tuple[Tensor, Tensor, dict[str, Tensor]], index: int) -> Tensor:
        inputs, labels, rows = batch
        logits = self.student(inputs)
        loss = 0.1 * losses.ce(logits, labels) + 0.9 * losses.kd(logits, rows["logits"])
        self.log("loss", loss, prog_bar=True)
        self.step_losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        recipe, num_steps = self.recipe, -(-len(self.dataset) // self.recipe.batch_size)
        optimizer = torch.optim.SGD(
            self.student.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_at(recipe, step, num_steps) / recipe.learning_rate
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(
    config: StudentConfig, caches: str | Path = "caches", seed: int = 0, **trainer: Any
) -> list[float]:
    """Train a student; returns the loss of each step."""
    module = Distillation(config, caches, seed)
    pl.Trainer(max_epochs=config.training.epochs, **trainer).fit(module)
    return module.step_losses


if __name__ == "__main__":
    train(load_student("digits-resnet8"))
