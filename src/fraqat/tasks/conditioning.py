"""Learns what a transformer is called with by watching its own pipeline call it.

Whatever a pipeline does to prompts (several encoders, pooled embeddings, masks, position ids, sizes), its transformer gets the
result as keyword arguments. Recording them makes training inputs that are the ones of inference, for any architecture.

Names of nested arguments are joined by dots: `added_cond_kwargs.resolution`.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.tasks.families import Guidance, architecture_of
from fraqat.tasks.spec import SamplerSpec

LATENTS, TIMESTEP = "hidden_states", "timestep"

_AS_GIVEN: Mapping[str, Any] = {
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    "clean_caption": False,
}
"""Passed to every pipeline that takes them: the size that was asked for, and the prompt as it was given."""

_SET_HERE = frozenset(
    {
        "prompt",
        "generator",
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "max_sequence_length",
        "output_type",
    }
)


_PROBE = "a picture"


class _StopSamplingError(Exception):
    """Ends a pipeline's call from within."""


@dataclass(frozen=True)
class TransformerCall:
    """One recorded call: tensors among the keyword arguments, by dotted name."""

    tensors: dict[str, Tensor]

    def conditioning(self) -> dict[str, Tensor]:
        """All but the latents and the time."""
        return {name: value for name, value in self.tensors.items() if name not in (LATENTS, TIMESTEP)}


@torch.no_grad()
def record_calls(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    sampler: SamplerSpec,
    *,
    guidance_scale: float,
    num_calls: int | None = None,
    generators: list[torch.Generator] | None = None,
) -> list[TransformerCall]:
    """Samples latents and records every call of the transformer.

    Args:
        pipeline: A whole pipeline.
        prompts: N prompts.
        sampler: Steps, size, sequence length.
        guidance_scale: Instead of the sampler's.
        num_calls: Stop after so many; None samples to the end.
        generators: Noise, one per prompt; None is a fixed one.
    """
    transformer, calls = cast(Any, pipeline).transformer, list[TransformerCall]()
    signature = inspect.signature(transformer.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(TransformerCall(flattened(signature.bind(*args, **kwargs).arguments)))
        if len(calls) == num_calls:
            raise _StopSamplingError

    handle = transformer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        call_pipeline(
            pipeline,
            prompts,
            sampler,
            guidance_scale=guidance_scale,
            generators=generators or [torch.Generator().manual_seed(0) for _ in prompts],
            output_type="latent",
        )
    except _StopSamplingError:
        pass
    finally:
        handle.remove()
    return calls


def call_pipeline(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    sampler: SamplerSpec,
    *,
    guidance_scale: float,
    generators: list[torch.Generator],
    output_type: str,
) -> Any:
    """Calls any text-to-image pipeline; settings that its call does not take are left out."""
    reserved = sorted(_SET_HERE & set(sampler.call_arguments))
    if reserved:
        raise config_error(
            "sampler.call_arguments",
            reserved,
            allowed="names without a setting of their own",
            fix="use the fields of sampler, or leave them out",
        )
    arguments = {
        "prompt": list(prompts),
        "generator": generators,
        "num_inference_steps": sampler.num_steps,
        "guidance_scale": guidance_scale,
        "height": sampler.height,
        "width": sampler.width,
        "max_sequence_length": sampler.max_sequence_length,
        "output_type": output_type,
        **_AS_GIVEN,
        **sampler.call_arguments,
    }
    allowed = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(set(sampler.call_arguments) - set(allowed))
    if unknown:
        raise ModelError(
            f"sampler.call_arguments = {unknown} is not possible: {type(pipeline).__name__} takes "
            f"{', '.join(name for name in allowed if name != 'self')}. Fix: correct the names."
        )
    with own_precision(cast(Any, pipeline).transformer):
        try:
            return cast(Any, pipeline)(**{name: value for name, value in arguments.items() if name in allowed})
        except ValueError as error:
            raise ModelError(
                f"{type(pipeline).__name__} refuses the settings of the sampler: {error} Fix: correct sampler.height, width, "
                "max_sequence_length or call_arguments."
            ) from error


@contextmanager
def own_precision(transformer: nn.Module) -> Generator[None]:
    """Lets a transformer run in its own dtype inside a pipeline of another: inputs are cast to it, outputs back."""
    dtype = compute_dtype(transformer)
    wanted = [dtype]

    def cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        latents = kwargs[LATENTS] if LATENTS in kwargs else args[0]
        wanted[0] = latents.dtype
        return tuple(_cast(a, dtype) for a in args), {
            n: v if n == TIMESTEP else _cast(v, dtype) for n, v in kwargs.items()
        }

    def cast_outputs(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(_cast(part, wanted[0]) for part in output) if isinstance(output, tuple) else output

    handles = [
        transformer.register_forward_pre_hook(cast_inputs, with_kwargs=True),
        transformer.register_forward_hook(cast_outputs),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most parameters; some classes keep norms and time embeddings in float32."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {name: _cast(part, dtype) for name, part in value.items()} if isinstance(value, dict) else value


class PromptEncoder:
    """Turns prompts into the transformer's conditioning arguments.

    Args:
        pipeline: A whole pipeline; its text encoders run, its transformer does not.
        sampler: Size and sequence length.

    Attributes:
        constants: Arguments that are the same for every sample, without a batch axis (position ids).
        empty: The conditioning of the prediction without a prompt, one row: what the pipeline's own guidance uses, or the
            empty prompt where it has none.
        latent_shape: Shape of one sample's latents as the pipeline makes them.
    """

    def __init__(self, pipeline: DiffusionPipeline, sampler: SamplerSpec):
        self._pipeline, self._sampler = pipeline, sampler
        is_guided = architecture_of(cast(Any, pipeline).transformer).guidance is Guidance.CLASSIFIER_FREE
        self._guidance_scale = 1.0 if is_guided else sampler.guidance_scale
        first, two = self._record([""])[0], self._call(["", ""])
        self.latent_shape = tuple(first.tensors[LATENTS].shape[1:])
        one = {name: value.cpu() for name, value in first.conditioning().items()}
        self._names = tuple(name for name in one if one[name].ndim and len(two[name]) == 2 * len(one[name]))
        self.constants = {name: value for name, value in one.items() if name not in self._names}
        self.empty = {name: one[name] for name in self._names}
        if is_guided:
            self.empty = self._unguided()

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning columns [N, ...] of N prompts, on the CPU, in the dtype that the pipeline gives."""
        return self.per_sample(self._call(prompts))

    def per_sample(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The columns with a batch axis among recorded arguments.

        Raises:
            ModelError: The pipeline pads prompts to different lengths, so that they do not fit in one batch.
        """
        columns = {name: conditioning[name] for name in self._names}
        for name, value in columns.items():
            if value.shape[1:] != self.empty[name].shape[1:]:
                raise ModelError(
                    f"{type(self._pipeline).__name__} gave {name} of shape {list(value.shape)} for some prompts and "
                    f"{list(self.empty[name].shape)} for the empty one: prompts must be padded to one length. Fix: set "
                    "sampler.max_sequence_length so that the tokenizer pads to it."
                )
        return columns

    def distance_from_empty(self, columns: Mapping[str, Tensor], row: int) -> float:
        """Summed squared difference of one row of conditioning from the one without a prompt."""
        pairs = ((columns[name][row].cpu().double(), empty[0].double()) for name, empty in self.empty.items())
        return sum(float((value - empty).square().sum()) for value, empty in pairs)

    def _unguided(self) -> dict[str, Tensor]:
        """What the pipeline's guidance calls the transformer with beside a prompt: the row that is not the prompt's own."""
        calls = self._record([_PROBE], guidance_scale=2.0, num_calls=2)
        first = self.per_sample(calls[0].conditioning())
        is_joined = len(next(iter(first.values()))) == 2
        others = [first] if is_joined else [self.per_sample(call.conditioning()) for call in calls]
        rows = [
            {n: v[i : i + 1].cpu() for n, v in part.items()} for part in others for i in range(2 if is_joined else 1)
        ]
        own = self.encode([_PROBE])
        differences = [sum(float((row[n].double() - own[n].double()).square().sum()) for n in own) for row in rows]
        return rows[differences.index(max(differences))]

    def _call(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._record(prompts)[0].conditioning().items()}

    def _record(
        self, prompts: Sequence[str], *, guidance_scale: float | None = None, num_calls: int = 1
    ) -> list[TransformerCall]:
        scale = self._guidance_scale if guidance_scale is None else guidance_scale
        return record_calls(self._pipeline, prompts, self._sampler, guidance_scale=scale, num_calls=num_calls)


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from dotted names."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *path, last = name.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors among keyword arguments by dotted names; undoes `nested`."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, dict):
            found |= flattened(value, f"{prefix}{name}.")
    return found
