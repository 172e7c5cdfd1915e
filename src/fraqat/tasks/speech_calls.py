"""How the trainer talks to a text-to-speech class: four functions, and what they share.

Shape suffixes: N samples, T text tokens, L frames, M mel bands, S width of a speaker embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.distill import Batch, Prediction


@dataclass(frozen=True)
class SpeechCalls:
    """The four calls.

    Args:
        prepare: (teacher, columns) -> further columns, computed once before training. `columns` holds `input_ids` and
            `attention_mask` [N, T], `speaker` [N, S], and, with recordings, `log_mel` [N, L, M] and `num_frames` [N].
        draw: (teacher's configuration, batch, generator) -> further inputs that are drawn at random.
        predict: (model, inputs) -> outputs, each with the frames or tokens on the second axis.
        masks: (inputs) -> output -> [N, L] or [N, T] bool, where it counts.
        generate: (model, input_ids [N, T], attention_mask [N, T], speakers [N, S]) -> N spectrograms [L, M], spoken freely.
        needs_recordings: Whether `log_mel` must be there.
    """

    prepare: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]
    draw: Callable[[Any, Batch, torch.Generator], dict[str, Tensor]]
    predict: Callable[[nn.Module, Batch], Prediction]
    masks: Callable[[Batch], Mapping[str, Tensor]]
    generate: Callable[[nn.Module, Tensor, Tensor, Tensor], list[Tensor]]
    needs_recordings: bool


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Without dropout, layer dropping and running statistics, which would tell student and teacher apart."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in flags:
            module.training = was_training


@contextmanager
def captured_output(module: nn.Module) -> Generator[list[Any]]:
    """A list that receives what `module` returns, whatever the model makes of it."""
    outputs: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def valid_frames(num_frames: Tensor, length: int) -> Tensor:
    """Whether a frame lies within its utterance. [N, length] bool."""
    return torch.arange(length, device=num_frames.device)[None] < num_frames[:, None]
