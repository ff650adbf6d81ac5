"""python -m examples.accelerate_loop, or: accelerate launch -m examples.accelerate_loop

The loop of examples/plain_pytorch.py with Hugging Face Accelerate. Accelerate numbers epochs from 0
and passes the number to the dataset, hence `first_epoch=0`. With several processes that call does
not reach the dataset, so `set_epoch` is called below. With `split_batches` the processes share each
batch, as in this project's multi-process runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from teach_once import DistillationDataset, RunOrder, build, learning_rate_at, load_student, losses
from teach_once.configs.schema import StudentConfig


def train(config: StudentConfig, caches: str | Path = "caches", seed: int = 0) -> list[float]:
    """Train a student; returns this process's loss of each step."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    recipe = config.training
    dataset = DistillationDataset(config, caches, taps=["logits"], first_epoch=0)
    student = build(config.student.arch, num_classes=10, in_channels=1, seed=seed)
    optimizer = torch.optim.SGD(
        student.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=5e-4
    )
    loader = DataLoader(dataset, recipe.batch_size, sampler=RunOrder(dataset, seed), num_workers=1)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    step_losses = []
    for epoch in range(recipe.epochs):
        dataset.set_epoch(epoch)
        for inputs, labels, rows in loader:
            rate = learning_rate_at(recipe, len(step_losses), len(loader))
            optimizer.param_groups[0]["lr"] = rate
            logits = student(inputs)
            loss = 0.1 * losses.ce(logits, labels) + 0.9 * losses.kd(logits, rows["logits"])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step_losses.append(loss.item())
    accelerator.print(f"loss {step_losses[-1]:.4f}")
    return step_losses


if __name__ == "__main__":
    train(load_student("digits-resnet8"))
