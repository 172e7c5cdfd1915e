"""What surrounds a diffusion transformer, as modules that can be exported: text encoders, decoder, and the sampler as numbers.

Nothing here knows an architecture: text encoders and sampler are what the pipeline itself does when it is called, with
tokenizers and transformer replaced.

Shape suffixes: N samples, S steps.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fraqat.errors import ModelError
from fraqat.tasks.conditioning import LATENTS, TIMESTEP, call_pipeline, record_calls
from fraqat.tasks.diffusion import computed_by
from fraqat.tasks.families import Guidance, architecture_of
from fraqat.tasks.spec import SamplerSpec
from fraqat.tasks.tokenizer_files import tokenizer_json

IDS, MASK = "input_ids", "attention_mask"
_PROBE = " A Picture "
_STANDING_FOR_ALL = ["prompts"]
_LINEAR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TokenizerFacts:
    """How a pipeline calls one of its tokenizers.

    Args:
        name: Component, such as `tokenizer_2`.
        json: Contents of its `tokenizer.json`.
        max_length: Prompts are padded and cut to so many tokens.
        pad_token_id, padding_side: Of the padding.
        strips, lowers: What happens to a prompt before.
        inputs: What its text encoder takes of it: `input_ids` and maybe `attention_mask`.
    """

    name: str
    json: str
    max_length: int
    pad_token_id: int
    padding_side: str
    strips: bool
    lowers: bool
    inputs: tuple[str, ...]

    def constants(self) -> dict[str, Any]:
        """As plain JSON values, without the file's contents."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("json", "name")}
        return {"file": self.file, **values, "inputs": list(self.inputs)}

    @property
    def file(self) -> str:
        """Where its JSON lies in an export."""
        return f"{self.name}/tokenizer.json"


@dataclass(frozen=True)
class SamplerSteps:
    """A sampler as numbers. Step i calls the transformer with `latents_i` and `timesteps[i]` and gets `prediction_i`;
    latents_i = coefficients[i][0] noise + sum over j < i of coefficients[i][j + 1] prediction_j, and latents_S is the result.

    Args:
        timesteps: [S], as the transformer takes them.
        coefficients: [S + 1, S + 1], zero above the diagonal.
        latent_shape: Of one sample.
        guidance_scale: prediction = empty + guidance_scale (prompt - empty); 1 where there is no second prediction.
    """

    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    latent_shape: tuple[int, ...]
    guidance_scale: float

    def constants(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "coefficients": [list(row) for row in self.coefficients]}


class TextEncoderCall(nn.Module):
    """Tokens to the transformer's conditioning, as the pipeline makes it from prompts.

    Args:
        pipeline: A whole pipeline, in float32.
        sampler: Sequence length.
        outputs: The conditioning arguments wanted, by dotted name.
        latent_shape: Of one sample.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, sampler: SamplerSpec, outputs: Sequence[str], latent_shape: Sequence[int]
    ):
        super().__init__()
        parts = cast(Any, pipeline)
        self.encoders = nn.ModuleDict(
            {name: part for name, part in parts.components.items() if _is_encoder(name, part)}
        )
        for encoder in self.encoders.values():
            if hasattr(encoder, "set_attn_implementation"):  # the fused one has strides that ONNX's exporter loses
                cast(Any, encoder).set_attn_implementation("eager")
        self._pipeline, self._sampler, self._outputs = pipeline, sampler, tuple(outputs)
        self._latents = torch.zeros(1, *latent_shape)

    def forward(self, **tokens: Tensor) -> tuple[Tensor, ...]:
        """Conditioning in the order of `outputs`, of inputs called `TOKENIZER.input_ids` and `TOKENIZER.attention_mask`."""
        num: Any = next(iter(tokens.values())).shape[0]
        is_guided = architecture_of(cast(Any, self._pipeline).transformer).guidance is Guidance.CLASSIFIER_FREE
        scale = 1.0 if is_guided else self._sampler.guidance_scale
        sampler = with_arguments(self._sampler, num_steps=1, latents=self._latents)
        with _given_tokens(self._pipeline, tokens), _counted_as(self._pipeline, num):
            found = record_calls(self._pipeline, _STANDING_FOR_ALL, sampler, guidance_scale=scale, num_calls=1)[
                0
            ].tensors
        return tuple(found[name].clone() for name in self._outputs)


class DecoderCall(nn.Module):
    """Latents as the sampler leaves them to pictures [N, 3, height, width] in [0, 1].

    Args:
        pipeline: Gives the autoencoder and how its latents are packed.
        sampler: Size.
    """

    def __init__(self, pipeline: DiffusionPipeline, sampler: SamplerSpec):
        super().__init__()
        parts = cast(Any, pipeline)
        self.vae = parts.vae
        self._unpack = parts._unpack_latents if architecture_of(parts.transformer).packs_latents else None
        self._size = (sampler.height, sampler.width, getattr(parts, "vae_scale_factor", 1))

    def forward(self, latents: Tensor) -> Tensor:
        """One call of the decoder."""
        config = self.vae.config
        if self._unpack is not None:
            latents = self._unpack(latents, *self._size)
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def has_image_decoder(pipeline: DiffusionPipeline) -> bool:
    """Whether the autoencoder makes single pictures with one scale and shift, and no videos."""
    return not hasattr(cast(Any, pipeline).vae.config, "z_dim")


@torch.no_grad()
def tokenizer_facts(pipeline: DiffusionPipeline, sampler: SamplerSpec) -> tuple[TokenizerFacts, ...]:
    """How the pipeline calls its tokenizers, found out by calling it."""
    with _watched_tokenizers(pipeline) as calls:
        record_calls(pipeline, [_PROBE], sampler, guidance_scale=1.0, num_calls=1)
    return tuple(_facts(name, cast(Any, pipeline).components[name], call) for name, call in calls.items())


def _facts(name: str, tokenizer: Any, call: _TokenizerCall) -> TokenizerFacts:
    text = call.text
    if text.strip().lower() != _PROBE.strip().lower():
        raise ModelError(
            f"the pipeline gives its {name} the text {text!r} for the prompt {_PROBE!r}: only spaces and case may change. Fix: "
            "export with --format packed."
        )
    return TokenizerFacts(
        name=name,
        json=tokenizer_json(tokenizer),
        max_length=call.max_length,
        pad_token_id=int(tokenizer.pad_token_id),
        padding_side=str(tokenizer.padding_side),
        strips=text == text.strip(),
        lowers=text == text.lower(),
        inputs=tuple(call.used),
    )


def tokenize(pipeline: DiffusionPipeline, facts: Sequence[TokenizerFacts], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of `TextEncoderCall` for prompts."""
    inputs = dict[str, Tensor]()
    for fact in facts:
        texts = [text.strip() if fact.strips else text for text in prompts]
        texts = [text.lower() if fact.lowers else text for text in texts]
        encoded = getattr(pipeline, fact.name)(
            texts, padding="max_length", max_length=fact.max_length, truncation=True, return_tensors="pt"
        )
        inputs |= {f"{fact.name}.{kind}": encoded[kind] for kind in fact.inputs}
    return inputs


@torch.no_grad()
def sampler_steps(pipeline: DiffusionPipeline, sampler: SamplerSpec, latent_shape: Sequence[int]) -> SamplerSteps:
    """The sampler's steps as numbers: the pipeline is run with unit vectors in place of noise and predictions.

    Args:
        pipeline: A whole pipeline; its transformer does not run.
        sampler: Steps, guidance.
        latent_shape: Of one sample.

    Raises:
        ModelError: The sampler is random, or no linear function of noise and predictions.
    """
    size = sampler.num_steps + 1
    timesteps, rows = _sampled(pipeline, sampler, latent_shape, torch.eye(size))
    coefficients = torch.stack([row[:size] for row in rows])
    given = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    _, found = _sampled(pipeline, sampler, latent_shape, given)
    difference = (torch.stack([row[:size] for row in found]) - coefficients @ given).abs().max()
    if len(timesteps) != sampler.num_steps or difference > _LINEAR_TOLERANCE * coefficients.abs().max():
        name = type(cast(Any, pipeline).scheduler).__name__
        raise ModelError(
            f"{name} cannot be written down as numbers: it is random, of a higher order, or clips. Fix: use a scheduler "
            "such as FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler without thresholding."
        )
    is_guided = architecture_of(cast(Any, pipeline).transformer).guidance is Guidance.CLASSIFIER_FREE
    return SamplerSteps(
        timesteps=tuple(timesteps),
        coefficients=tuple(tuple(row) for row in coefficients.tolist()),
        latent_shape=tuple(latent_shape),
        guidance_scale=max(1.0, sampler.guidance_scale) if is_guided else 1.0,
    )


def _sampled(
    pipeline: DiffusionPipeline, sampler: SamplerSpec, latent_shape: Sequence[int], given_SS: Tensor
) -> tuple[list[float], list[Tensor]]:
    """Timesteps, and latents before each step and at the end, flat, for the noise given_SS[0] and predictions given_SS[1:]."""
    timesteps, rows = list[float](), list[Tensor]()

    def shaped(row: Tensor) -> Tensor:
        flat = torch.zeros(torch.Size(latent_shape).numel())
        flat[: len(row)] = row
        return flat.reshape(1, *latent_shape)

    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        timesteps.append(float(inputs[TIMESTEP].flatten()[0]))
        rows.append(inputs[LATENTS][0].flatten().float())
        given = given_SS[min(len(timesteps), len(given_SS) - 1)]
        return shaped(given).expand(len(inputs[LATENTS]), *latent_shape)

    with computed_by(cast(Any, pipeline).transformer, predict):
        latents = call_pipeline(
            pipeline,
            [""],
            with_arguments(sampler, latents=shaped(given_SS[0])),
            guidance_scale=sampler.guidance_scale,
            generators=[torch.Generator().manual_seed(0)],
            output_type="latent",
        ).images
    return timesteps, [*rows, latents[0].flatten().float()]


def with_arguments(sampler: SamplerSpec, num_steps: int | None = None, **arguments: Any) -> SamplerSpec:
    """A sampler with further arguments of the pipeline's call, such as `latents`."""
    return dataclasses.replace(
        sampler,
        num_steps=num_steps or sampler.num_steps,
        call_arguments={**sampler.call_arguments, **arguments},
    )


def _is_encoder(name: str, part: Any) -> bool:
    return name.startswith("text_encoder") and isinstance(part, nn.Module)


class _TokenizerCall:
    """What a tokenizer was called with, and which of its results were used."""

    def __init__(self, text: str, max_length: int):
        self.text, self.max_length, self.used = text, max_length, dict[str, None]()


class _Tokens(SimpleNamespace):
    """A tokenizer's result that takes note of what is read of it."""

    def __init__(self, values: Mapping[str, Any], used: dict[str, None]):
        super().__init__()
        self._values, self._used = values, used

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__["_values"]:
            raise AttributeError(name)
        self._used[name] = None
        return self._values[name]

    __getitem__ = __getattr__


class _Stand:
    """Stands for a part of the pipeline; attributes are that part's own."""

    def __init__(self, own: Any):
        self.__dict__["_own"] = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._own, name, value)


class _WatchedTokenizer(_Stand):
    def __init__(self, own: Any, name: str, calls: dict[str, _TokenizerCall]):
        super().__init__(own)
        self.__dict__.update(_name=name, _calls=calls)

    def __call__(self, text: Any, **arguments: Any) -> Any:
        encoded = self._own(text, **arguments)
        if arguments.get("padding") == "longest":  # asked only whether the prompt was cut
            return encoded
        first = text if isinstance(text, str) else text[0]
        call = self._calls.setdefault(self._name, _TokenizerCall(first, encoded[IDS].shape[1]))
        return _Tokens({name: encoded[name] for name in (IDS, MASK) if name in encoded}, call.used)


class _GivenTokenizer(_Stand):
    def __init__(self, own: Any, tokens: Mapping[str, Tensor]):
        super().__init__(own)
        self.__dict__.update(_tokens=tokens)

    def __call__(self, text: Any, **arguments: Any) -> Any:
        if arguments.get("padding") == "longest":
            return SimpleNamespace(input_ids=torch.zeros(1, 0, dtype=torch.int64))
        return SimpleNamespace(**self._tokens)


class _NoScheduler(_Stand):
    """One step without arithmetic, which a graph has no place for."""

    timesteps, order, init_noise_sigma = torch.ones(1), 1, 1.0

    def set_timesteps(self, num: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:
        """As pipelines call it."""

    def scale_model_input(self, latents: Tensor, time: Any) -> Tensor:
        """As pipelines call it."""
        return latents

    def step(self) -> None:
        """Never called; pipelines look at its arguments."""


@contextmanager
def _replaced(pipeline: DiffusionPipeline, parts: Mapping[str, Any]) -> Generator[None]:
    own = {name: getattr(pipeline, name) for name in parts}
    try:
        pipeline.__dict__.update(parts)
        yield
    finally:
        pipeline.__dict__.update(own)


@contextmanager
def _watched_tokenizers(pipeline: DiffusionPipeline) -> Generator[dict[str, _TokenizerCall]]:
    calls = dict[str, _TokenizerCall]()
    found = {n: part for n, part in pipeline.components.items() if n.startswith("tokenizer") and part is not None}
    with _replaced(pipeline, {name: _WatchedTokenizer(part, name, calls) for name, part in found.items()}):
        yield calls


@contextmanager
def _given_tokens(pipeline: DiffusionPipeline, tokens: Mapping[str, Tensor]) -> Generator[None]:
    given = dict[str, dict[str, Tensor]]()
    for key, value in tokens.items():
        name, kind = key.rsplit(".", 1)
        given.setdefault(name, {})[kind] = value
    tokenizers = {name: _GivenTokenizer(getattr(pipeline, name), values) for name, values in given.items()}
    with _replaced(pipeline, {**tokenizers, "scheduler": _NoScheduler(cast(Any, pipeline).scheduler)}):
        yield


@contextmanager
def _counted_as(pipeline: DiffusionPipeline, num: Any) -> Generator[None]:
    """Lets the pipeline's code count `num` prompts, which may be the name of a size in a graph; `len` must give an int."""
    module = sys.modules[type(pipeline).__module__]

    def count(value: Any) -> Any:
        stands_for_all = isinstance(value, list) and (
            value == _STANDING_FOR_ALL or isinstance(cast(list[Any], value)[0], torch.Generator)
        )
        return num if stands_for_all else len(value)

    module.__dict__["len"] = count
    try:
        yield
    finally:
        del module.__dict__["len"]
