"""python -m examples.timm_task

A hook for timm's own training script, whose step is `result = task(input, target)`: a loader whose
targets include the teacher's outputs, and a task that reads them. In timm's train.py replace the
loader by `loader_of(...)` and the task by `CachedDistillation(model)`; everything else (autocast,
gradient clipping, averaging, checkpoints) stays the same. timm numbers epochs from 0 and passes the
number to its dataset. Turn off timm's own mixup and set `views.augment.mix` instead, so that the
teacher gets the same mixed images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from teach_once import DistillationDataset, RunOrder, build, learning_rate_at, load_student, losses
from teach_once.configs.schema import StudentConfig


class CachedTarget:
    """Labels and teacher outputs, which timm's loop moves to the device together."""

    def __init__(self, labels: Tensor, rows: dict[str, Tensor]) -> None:
        self.labels, self.rows = labels, rows

    def to(self, *args: Any, **options: Any) -> CachedTarget:
        rows = {tap: values.to(*args, **options) for tap, values in self.rows.items()}
        return CachedTarget(self.labels.to(*args, **options), rows)


def with_target(items: Sequence[Any]) -> tuple[Tensor, CachedTarget]:
    """Collate items for timm's loop: images, and labels with teacher outputs."""
    inputs, labels, rows = default_collate(list(items))
    return inputs, CachedTarget(labels, rows)


class CachedDistillation(TrainingTask):
    """timm's LogitDistillationTask with cached outputs in place of the teacher."""

    def __init__(self, model: nn.Module, task_loss_weight: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.trainable_module, self.task_loss_weight = model, task_loss_weight

    def forward(self, input: Tensor, target: CachedTarget) -> dict[str, Tensor]:
        output = self.trainable_module(input)
        task_loss = losses.ce(output, target.labels)
        kd_loss = losses.kd(output, target.rows["logits"])
        loss = self.task_loss_weight * task_loss + (1 - self.task_loss_weight) * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


def loader_of(dataset: DistillationDataset, batch_size: int, seed: int) -> DataLoader[Any]:
    order = RunOrder(dataset, seed)  # or a DistributedSampler
    return DataLoader(dataset, batch_size, sampler=order, num_workers=1, collate_fn=with_target)


def train(config: StudentConfig, caches: str | Path = "caches", seed: int = 0) -> list[float]:
    """Run the steps of timm's train_one_epoch; returns the loss of each step."""
    recipe, device = config.training, torch.device("cpu")
    dataset = DistillationDataset(config, caches, taps=["logits"], first_epoch=0)
    loader = loader_of(dataset, recipe.batch_size, seed)
    task = CachedDistillation(build(config.student.arch, num_classes=10, in_channels=1, seed=seed))
    optimizer = create_optimizer_v2(
        task.trainable_module,
        opt="momentum",
        lr=recipe.learning_rate,
        weight_decay=5e-4,
        filter_bias_and_bn=False,
    )
    step_losses = []
    for epoch in range(recipe.epochs):
        dataset.set_epoch(epoch)
        for input, target in loader:
            rate = learning_rate_at(recipe, len(step_losses), len(loader))
            optimizer.param_groups[0]["lr"] = rate
            result = task(input.to(device), target.to(device))
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            step_losses.append(result["loss"].item())
    print(f"loss {step_losses[-1]:.4f}")
    return step_losses


if __name__ == "__main__":
    train(load_student("digits-resnet8"))
