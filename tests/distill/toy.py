"""A toy family: a small network distilled on random vectors, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fraqat import QuantSpec, WeightSpec, quantize_
from fraqat.data.loader import ShuffledBatches, TensorRows
from fraqat.distill import Batch, LossSpec, Prediction, TrainSpec, distillation_loss
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.distill.task import LOSS_WEIGHT
from fraqat.schedules import LearningRateSpec


class ToyTask:
    """Vectors [N, 8] through a two-layer network, with input noise as the random part."""

    def __init__(self, num_rows: int = 20):
        generator = torch.Generator().manual_seed(0)
        self.train = TensorRows({"x": torch.randn(num_rows, 8, generator=generator)})
        self.validation = TensorRows({"x": torch.randn(6, 8, generator=generator)})

    def train_stream(self, batch_size: int, seed: int) -> ShuffledBatches:
        return ShuffledBatches(self.train, batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        return len(self.train) // batch_size

    def validation_batches(self, batch_size: int) -> list[Batch]:
        return list(self.validation.batches(batch_size))

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        return self.validation_batches(batch_size)

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        return {"x": batch["x"] + 0.1 * torch.randn(batch["x"].shape, generator=generator)}

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        return {"output": model(inputs["x"])}

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        return distillation_loss(student["output"], teacher["output"], terms)


class NoisyToy(ToyTask):
    """`ToyTask` with noise of a level that is drawn uniformly; errors grow with the level."""

    draws_noise_levels = True

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        return self.make_inputs_at(batch, torch.rand(len(batch["x"]), generator=generator), generator)

    def make_inputs_at(self, batch: Batch, place_N: Tensor, generator: torch.Generator) -> Batch:
        noise = torch.randn(batch["x"].shape, generator=generator)
        return {"x": batch["x"] + 4 * place_N.float().unsqueeze(1) * noise}

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        return distillation_loss(student["output"], teacher["output"], terms, inputs.get(LOSS_WEIGHT))

    def sample_errors(self, student: Prediction, teacher: Prediction) -> Tensor:
        return (student["output"] - teacher["output"]).float().square().mean(1)

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        parts = split_batch(inputs, num_parts)
        return list(zip(parts, shares_of([len(part["x"]) for part in parts]), strict=True))


def toy_teacher(dropout: float = 0.0, hidden: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, 4))


def toy_student(dropout: float = 0.0, hidden: int = 16) -> nn.Module:
    student = toy_teacher(dropout, hidden)
    quantize_(student, QuantSpec(weight=WeightSpec(range_method="mse")))
    return student


def toy_spec(**changes: Any) -> TrainSpec:
    values: dict[str, Any] = {
        "batch_size": 4,
        "learning_rate": LearningRateSpec(peak=1e-2),
        "checkpoint_every": 4,
        "validate_every": 5,
        "tensorboard": False,
    }
    return TrainSpec(**{**values, **changes})
