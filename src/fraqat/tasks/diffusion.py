"""Text-to-image diffusion transformers as a task for the trainer.

Shape suffixes: N samples.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat.distill import Batch, BatchStream, LossSpec, Prediction, distillation_loss
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.distill.task import LOSS_WEIGHT, TIMESTEP_BIN
from fraqat.tasks.conditioning import LATENTS, TIMESTEP, compute_dtype, flattened, nested
from fraqat.tasks.guided import (
    GUIDED_BY,
    GuidedBatches,
    check_pairs,
    guided_output,
    scale_in_training,
    with_and_without_prompt,
)
from fraqat.tasks.image_samples import DiffusionSource, drop_captions, open_samples, split_constants
from fraqat.tasks.noise import NoiseProcess, noise_process
from fraqat.tasks.pipelines import transformer_class

OUTPUT = "output"
_COLUMNS = (LOSS_WEIGHT, TIMESTEP_BIN, GUIDED_BY)
_PLANES = 4  # axes of latents that are pictures


class DiffusionTask:
    """Distils what a diffusion transformer predicts: on noisy pictures, or along its own sampling path.

    Args:
        source: Model, data and sampler.
    """

    def __init__(self, source: DiffusionSource):
        self.data, self.sampler = source.data, source.sampler
        self._source, self._samples = source, open_samples(source)
        self._guidance_scale: float | None = None

    def guided(self, scale: float | Literal["auto"], part_size: int) -> DiffusionTask:
        """This task with training batches of half as many samples, each computed with its prompt and without.

        Held-out losses stay those of single predictions, so that runs can be compared.

        Args:
            scale: Of guidance, above 1; `auto`: the sampler's where it is guided by two predictions, else nothing changes.
            part_size: Rows of the transformer in a part of a batch.

        Raises:
            ConfigError: A scale for a transformer or samples without a second prediction, or parts of an odd size.
        """
        class_name = transformer_class(self._source.model)
        found = scale_in_training(scale, class_name, self.sampler, of_paths=self._source.of_paths)
        if found is None:
            return self
        check_pairs(part_size)
        task = copy.copy(self)
        task._guidance_scale = found
        return task

    @property
    def guidance_scale(self) -> float | None:
        """Whose output is learned in training; None: outputs one by one."""
        return self._guidance_scale

    @property
    def rows_per_sample(self) -> int:
        """Rows of the transformer that a sample of a training batch is."""
        return 1 if self._guidance_scale is None else 2

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches of samples for `batch_size` rows of the transformer.

        Raises:
            ConfigError: The batch is larger than the data.
        """
        stream = self._samples.train_stream(batch_size // self.rows_per_sample, seed)
        return stream if self._guidance_scale is None else GuidedBatches(stream, self._guidance_scale)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training data, each sample counted once."""
        return self._samples.steps_per_epoch(batch_size)

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out samples in order."""
        return self._samples.validation_batches(batch_size)

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training samples, at the noise levels of the sampler's own steps in turn, each as often as the others."""
        generator = torch.Generator().manual_seed(0)
        made: list[Batch] = []
        num_seen = 0
        for batch in self._samples.first_batches(num_samples, batch_size):
            if self._source.of_paths:
                made.append(self.make_inputs(batch, generator))
                continue
            encoded = self._samples.encoded(batch)
            levels = torch.tensor(self._process.sampler_sigmas)
            place_N = torch.arange(num_seen, num_seen + len(encoded["latents"])) % len(levels)
            made.append(self._noisy(encoded, levels[place_N], generator))
            num_seen += len(place_N)
        return made

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The transformer's arguments: noise is added and captions are dropped, unless the batch is of a sampling path."""
        encoded = self._samples.encoded(batch)
        if self._source.of_paths:
            return {**encoded, **self._constants[0]}
        sigma_N = self._process.draw(len(encoded["latents"]), generator)
        return self._noisy(encoded, sigma_N, generator, batch.get(GUIDED_BY))

    @property
    def draws_noise_levels(self) -> bool:
        """Not along sampling paths, whose levels belong to the samples."""
        return not self._source.of_paths

    def make_inputs_at(self, batch: Batch, place_N: Tensor, generator: torch.Generator) -> Batch:
        """`make_inputs` with noise levels at places [N] of their distribution, from the least noise (0) to the most (1)."""
        return self._noisy(self._samples.encoded(batch), self._process.at(place_N), generator, batch.get(GUIDED_BY))

    def _noisy(
        self, encoded: Batch, sigma_N: Tensor, generator: torch.Generator, scale_N: Tensor | None = None
    ) -> Batch:
        call, empty, _ = self._constants
        inputs = {name: value for name, value in encoded.items() if name not in ("latents", GUIDED_BY)}
        latents = encoded["latents"]
        noise = torch.randn(latents.shape, generator=generator)
        noisy, time_N = self._process.add(latents, noise, sigma_N)
        if scale_N is not None:  # learned without a caption too: none is dropped
            return {LATENTS: noisy, TIMESTEP: time_N, **inputs, GUIDED_BY: scale_N, **call}
        is_dropped_N = torch.rand(len(latents), generator=generator) < self.data.caption_dropout
        return {LATENTS: noisy, TIMESTEP: time_N, **drop_captions(inputs, empty, is_dropped_N), **call}

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """`output`: the predicted velocity or noise, in the shape of the latents; of marked batches as guided."""
        arguments = {name: value for name, value in inputs.items() if name not in _COLUMNS}
        if GUIDED_BY not in inputs:
            return predict_output(model, arguments)
        both = with_and_without_prompt(arguments, self.unprompted, self.shared_arguments)
        output = predict_output(model, both)[OUTPUT]
        return {OUTPUT: guided_output(output, inputs[GUIDED_BY].to(output.device))}

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Weighted distances of the outputs; of each sample times its `LOSS_WEIGHT` where the inputs have that column."""
        return distillation_loss(student[OUTPUT], teacher[OUTPUT], terms, inputs.get(LOSS_WEIGHT))

    def sample_errors(self, student: Prediction, teacher: Prediction) -> Tensor:
        """Mean squared difference of the outputs of each sample, [N] float32."""
        return (student[OUTPUT].float() - teacher[OUTPUT].float()).square().flatten(1).mean(1)

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Pieces with their share of the samples."""
        parts = split_batch(inputs, num_parts, self.shared_arguments)
        return list(zip(parts, shares_of([len(part[LATENTS]) for part in parts]), strict=True))

    @property
    def shared_arguments(self) -> frozenset[str]:
        """Arguments of the transformer that do not grow with the batch."""
        return frozenset(self._constants[0])

    @property
    def unprompted(self) -> dict[str, Tensor]:
        """Arguments of the prediction without a prompt, one row each."""
        return self._constants[1]

    @cached_property
    def _constants(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        return split_constants(self._samples.constants)

    @cached_property
    def _process(self) -> NoiseProcess:
        return noise_process(transformer_class(self._source.model), self.sampler, self._constants[2])


def predict_output(model: nn.Module, inputs: Batch) -> Prediction:
    """`output`: the predicted velocity or noise, in the shape of the latents."""
    device, dtype = next(model.parameters()).device, compute_dtype(model)
    moved = {name: value.to(device) for name, value in inputs.items()}
    cast = {
        name: value.to(dtype) if name != TIMESTEP and value.is_floating_point() else value
        for name, value in moved.items()
    }
    with _attention_kernel(device):
        output = model(**nested(cast), return_dict=False)[0]
    if inputs[LATENTS].ndim == _PLANES and output.shape[1] == 2 * inputs[LATENTS].shape[1]:
        output = output.chunk(2, dim=1)[0]  # the second half is a learned variance, which samplers leave out
    return {OUTPUT: output}


class NamedTransformer(nn.Module):
    """A transformer called by dotted argument names, for graphs: gives what samplers take, in the shape of the latents."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, **inputs: Tensor) -> Tensor:
        """The prediction for inputs as `DiffusionTask.make_inputs` gives them."""
        return predict_output(self.transformer, inputs)[OUTPUT]


@contextmanager
def computed_by(transformer: nn.Module, run: Callable[[Batch], Tensor]) -> Generator[None]:
    """Lets `run`, which takes and gives what `NamedTransformer` does, compute a transformer's forward pass in its pipeline."""
    signature = inspect.signature(transformer.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        inputs = flattened(given)
        output = run(inputs).to(inputs[LATENTS].dtype)
        if int(getattr(transformer.config, "out_channels", 0) or 0) == 2 * output.shape[1] and output.ndim == _PLANES:
            output = torch.cat([output, torch.zeros_like(output)], dim=1)  # the variance, which samplers leave out
        return (output,) if given.get("return_dict") is False else Transformer2DModelOutput(sample=output)

    transformer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del transformer.__dict__["forward"]


def _attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of the fused attention kernel is several times slower than plain products at small sizes."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
