"""python -m examples.plain_pytorch    (after `make cache-teacher`)

Logit distillation in plain PyTorch, as the method `kd` of configs/student/digits-resnet8.yaml. On a
CPU the loss of every step equals that of `make train-student METHOD=kd` bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from teach_once import (
    DistillationDataset,
    EvaluationDataset,
    RunOrder,
    build,
    learning_rate_at,
    load_student,
    losses,
)
from teach_once.configs.schema import StudentConfig


def train(config: StudentConfig, caches: str | Path = "caches", seed: int = 0) -> list[float]:
    """Train a student and print its test error; returns the loss of each step."""
    recipe = config.training
    dataset = DistillationDataset(config, caches, taps=["logits"])
    loader = DataLoader(
        dataset,
        recipe.batch_size,
        sampler=RunOrder(dataset, seed),  # or shuffle=True
        num_workers=1,
        persistent_workers=True,
    )
    student = build(config.student.arch, num_classes=10, in_channels=1, seed=seed)
    student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=5e-4
    )
    step_losses = []
    for epoch in range(1, recipe.epochs + 1):
        dataset.set_epoch(epoch)
        for inputs, labels, rows in loader:
            optimizer.param_groups[0]["lr"] = learning_rate_at(
                recipe, len(step_losses), len(loader)
            )
            logits = student(inputs.contiguous(memory_format=torch.channels_last))
            loss = 0.1 * losses.ce(logits, labels) + 0.9 * losses.kd(logits, rows["logits"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_losses.append(loss.item())
    student.eval()
    with torch.inference_mode():
        tests = DataLoader(EvaluationDataset(config), 256)
        wrong = sum(int((student(x).argmax(1) != y).sum()) for x, y in tests)
    print(f"loss {step_losses[-1]:.4f}, {wrong} of {len(tests.dataset)} test images wrong")
    return step_losses


if __name__ == "__main__":
    train(load_student("digits-resnet8"))
