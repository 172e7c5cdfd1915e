"""Training on what classifier-free guidance makes of two outputs, instead of on each output alone.

A sampler that is guided by a scale s goes by o_u + s (o_c - o_u), the output o_c for the prompt moved away from o_u, the one
without (arXiv 2207.12598). The error of that is s e_c - (s - 1) e_u: it magnifies where the errors of the two differ, and the
loss of single outputs does not see it.

Shape suffixes: N pictures, R = 2N rows of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fraqat.distill import Batch, BatchStream
from fraqat.distill.workers import SkippingStream
from fraqat.errors import ConfigError, config_error
from fraqat.tasks.families import Guidance, architecture_named
from fraqat.tasks.spec import SamplerSpec

FIELD = "train.guidance_scale"
GUIDED_BY = "guided_by"
"""Column of a batch whose samples are learned as guided by that scale. No argument of a transformer."""


def scale_in_training(
    scale: float | Literal["auto"], class_name: str, sampler: SamplerSpec, *, of_paths: bool
) -> float | None:
    """The guidance scale whose output a student learns; None for outputs one by one.

    Args:
        scale: Of `TrainSpec.guidance_scale`.
        class_name: Of the transformer, a key of `ARCHITECTURES`.
        sampler: Its guidance scale is what `auto` takes.
        of_paths: Samples are points on the teacher's sampling path.

    Raises:
        ConfigError: A number where the transformer or the samples have no second prediction.
    """
    is_guided = architecture_named(class_name).guidance is Guidance.CLASSIFIER_FREE
    if scale == "auto":
        return sampler.guidance_scale if is_guided and not of_paths and sampler.guidance_scale > 1 else None
    if of_paths:
        raise paths_error(scale)
    if not is_guided:
        allowed = f"null or auto for {class_name}, which is sampled by one prediction"
        raise config_error(FIELD, scale, allowed=allowed, fix=f"remove {FIELD}")
    return scale


def paths_error(scale: float) -> ConfigError:
    """That sampling paths have no pairs."""
    return config_error(
        FIELD,
        scale,
        allowed="null or auto with data.learn_from: sampling_path, whose samples are single calls",
        fix=f"set data.learn_from: images, or remove {FIELD}",
    )


def check_pairs(part_size: int) -> None:
    """Refuses parts of a batch that cannot be of pairs.

    Raises:
        ConfigError: The number of rows is odd.
    """
    if part_size % 2:
        raise config_error(
            "train.batch_size / train.accumulation",
            part_size,
            allowed=f"an even number with {FIELD}, which computes every sample twice",
            fix=f"set a train.batch_size or accumulation that gives one, or {FIELD}: null",
        )


class GuidedBatches:
    """A stream whose batches are marked to be learned as guided; it skips batches if `stream` does.

    Args:
        stream: Batches of N pictures.
        scale: Of guidance.
    """

    def __init__(self, stream: BatchStream, scale: float):
        self._stream, self._scale = stream, scale
        if isinstance(stream, SkippingStream):
            self.skip = stream.skip

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            num = len(next(iter(batch.values())))
            yield {**batch, GUIDED_BY: torch.full((num,), self._scale)}

    def state_dict(self) -> dict[str, Any]:
        """The stream's."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the stream."""
        self._stream.load_state_dict(state)


def with_and_without_prompt(arguments: Batch, empty: Mapping[str, Tensor], shared: frozenset[str]) -> dict[str, Tensor]:
    """Arguments of R rows: the N given, then the same without a prompt.

    Args:
        arguments: Of N rows.
        empty: Those of the prediction without a prompt, one row each.
        shared: Names of those that do not grow with the batch.
    """
    doubled: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if name in shared:
            doubled[name] = value
        else:
            without = empty[name].to(value).expand_as(value) if name in empty else value
            doubled[name] = torch.cat([value, without])
    return doubled


def guided_output(output: Tensor, scale_N: Tensor) -> Tensor:
    """The output as guidance combines it, at the scale of a single one.

    Args:
        output: [R, ...], as of the arguments of `with_and_without_prompt`.
        scale_N: Of guidance.

    Returns:
        [N, ...] float32: (s o_c - (s - 1) o_u) / sqrt(s^2 + (s - 1)^2), whose error is as large as those of o_c and o_u if they
        are equally large and independent: losses, gradients and learning rates keep their sizes.
    """
    prompted, unprompted = output.float().chunk(2)
    scale = scale_N.float().view(-1, *(1,) * (output.ndim - 1))
    return (scale * prompted - (scale - 1) * unprompted) / (scale.square() + (scale - 1).square()).sqrt()
