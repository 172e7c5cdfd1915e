"""Turns pictures and prompts into what a diffusion transformer is trained on, once, and keeps it on disk.

Shape suffixes: N samples, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fraqat.data.encoded import EncodedShard
from fraqat.errors import ModelError
from fraqat.files import sha256_of
from fraqat.tasks.conditioning import LATENTS, TIMESTEP, PromptEncoder, TransformerCall, record_calls
from fraqat.tasks.families import Guidance, architecture_named, architecture_of
from fraqat.tasks.loading import hub_commit, is_folder
from fraqat.tasks.noise import noise_constants
from fraqat.tasks.pipelines import transformer_class
from fraqat.tasks.spec import ModelSpec, SamplerSpec

SHARD_SAMPLES = 256
EMPTY, NOISE = "empty.", "noise."
_HASHED_COMPONENTS = ("text_encoder", "tokenizer", "vae", "scheduler")

Sample = tuple[Tensor | None, str]
"""A picture [3, H, W] in [-1, 1], or None where only prompts are used, and its caption."""


@torch.no_grad()
def encode_images(pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
    """Latents as the transformer of a pipeline sees them.

    Args:
        pipeline: Gives the autoencoder, whose scale, shift, or mean and standard deviation are applied.
        images: [N, 3, height, width] in [-1, 1].

    Returns:
        [N, C, H, W] float32 on the CPU, [N, C, 1, H, W] for a video autoencoder, [N, H W / 4, 4 C] where tokens are packed.
    """
    parts = cast(Any, pipeline)
    vae = parts.vae
    pixels = images.to(vae.device, vae.dtype)
    is_video = getattr(vae.config, "latents_mean", None) is not None and hasattr(vae.config, "z_dim")
    encoded = vae.encode(pixels.unsqueeze(2) if is_video else pixels)
    latents = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent).float()
    if is_video:
        shape = (1, -1, *(1,) * (latents.ndim - 2))
        mean, std = (torch.tensor(v).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std))
        latents = (latents.cpu() - mean) / std
    else:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = (latents - shift) * vae.config.scaling_factor
    if architecture_of(parts.transformer).packs_latents:
        latents = parts._pack_latents(latents, *latents.shape)
    return latents.cpu()


class Encoder:
    """Encodes samples of a data set shard by shard.

    Args:
        pipeline: A whole pipeline.
        sampler: Size, sequence length, steps and guidance.
        batch_size: Samples computed at a time.
    """

    def __init__(self, pipeline: DiffusionPipeline, sampler: SamplerSpec, batch_size: int = 32):
        self.pipeline, self.sampler, self.batch_size = pipeline, sampler, batch_size
        self.prompts = PromptEncoder(pipeline, sampler)

    def shards_of_images(self, samples: Iterable[Sample], num_done: int) -> Iterator[EncodedShard]:
        """Latents and conditioning of pictures.

        Args:
            samples: All samples in order; the ones of shards that are done are passed over.
            num_done: Shards that are there already.
        """
        for _, part in _chunks(samples, num_done):
            images = torch.stack([cast(Tensor, image) for image, _ in part])
            yield self.encode(images, [prompt for _, prompt in part])

    def encode(self, images: Tensor, prompts: Sequence[str]) -> EncodedShard:
        """Latents of pictures, and conditioning of each distinct prompt.

        Raises:
            ModelError: The autoencoder gives latents of another shape than the pipeline starts from.
        """
        latents = torch.cat([encode_images(self.pipeline, part) for part in images.split(self.batch_size)])
        if latents.shape[1:] != self.prompts.latent_shape:
            raise ModelError(
                f"pictures of {list(images.shape[2:])} pixels become latents of shape {list(latents.shape[1:])}, but the "
                f"pipeline starts from {list(self.prompts.latent_shape)} at {self.sampler.height} x {self.sampler.width}. Fix: "
                "use a sampler.height and width that the autoencoder's and the transformer's patches divide."
            )
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return EncodedShard(
            rows={"latents": latents},
            shared=self._encode_prompts(distinct),
            index=torch.tensor([place[prompt] for prompt in prompts]),
            constants=self.constants,
        )

    def _encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        starts = range(0, len(prompts), self.batch_size)
        parts = [self.prompts.encode(prompts[i : i + self.batch_size]) for i in starts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def shards_of_paths(
        self, samples: Iterable[Sample], num_done: int, *, seed: int, unguided_share: float
    ) -> Iterator[EncodedShard]:
        """Inputs of the transformer along the teacher's own sampling path, one row per prompt and step.

        Args:
            samples: Prompts.
            num_done: Shards that are there already.
            seed: Prompt i starts from noise of seed `seed + i`.
            unguided_share: Share of rows taken from the prediction for the empty prompt, where there is one.
        """
        for number, part in _chunks(samples, num_done):
            first = number * SHARD_SAMPLES
            chance = torch.Generator().manual_seed(seed + first)
            starts = range(0, len(part), self.batch_size)
            yield _joined(
                [
                    self._paths(
                        [prompt for _, prompt in part[i : i + self.batch_size]],
                        seed + first + i,
                        chance,
                        unguided_share,
                    )
                    for i in starts
                ]
            )

    def _paths(self, prompts: list[str], seed: int, chance: torch.Generator, unguided_share: float) -> EncodedShard:
        calls = record_calls(
            self.pipeline,
            prompts,
            self.sampler,
            guidance_scale=self.sampler.guidance_scale,
            generators=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        )
        return self._path_shard(calls, len(prompts), chance, unguided_share)

    def _path_shard(
        self, calls: list[TransformerCall], num: int, chance: torch.Generator, unguided_share: float
    ) -> EncodedShard:
        """One row per prompt and step out of the recorded calls, which hold one or two rows per prompt."""
        if len(calls) % self.sampler.num_steps:
            raise ModelError(
                f"the sampler called the transformer {len(calls)} times in {self.sampler.num_steps} steps: data.learn_from = "
                "sampling_path needs the same number of calls in every step. Fix: use another scheduler or learn_from: images."
            )
        per_step = len(calls) // self.sampler.num_steps
        guided, unguided = _branches(calls[:per_step], self.prompts, num)
        rows: dict[str, list[Tensor]] = {LATENTS: [], TIMESTEP: []}
        index: list[int] = []
        for step in range(self.sampler.num_steps):
            for i in range(num):
                is_unguided = bool(unguided) and float(torch.rand((), generator=chance)) < unguided_share
                call, row = (unguided if is_unguided else guided)[i]
                tensors = calls[step * per_step + call].tensors
                for name, values in rows.items():
                    values.append(tensors[name][row].float().cpu())
                index.append(num if is_unguided else i)
        first = [calls[call].conditioning() for call, _ in guided]
        shared = {
            name: torch.cat([*(first[i][name][row : row + 1].cpu() for i, (_, row) in enumerate(guided)), empty])
            for name, empty in self.prompts.empty.items()
        }
        return EncodedShard({k: torch.stack(v) for k, v in rows.items()}, shared, torch.tensor(index), self.constants)

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Constants of the call, `empty.NAME` for the empty prompt, and `noise.NAME` of the noise process."""
        empty = {EMPTY + name: value[0] for name, value in self.prompts.empty.items()}
        noise = noise_constants(self.pipeline, self.sampler)
        return self.prompts.constants | empty | {NOISE + name: value for name, value in noise.items()}


def _joined(shards: list[EncodedShard]) -> EncodedShard:
    """Several shards as one."""
    sizes = [len(next(iter(shard.shared.values()))) for shard in shards]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    return EncodedShard(
        rows={name: torch.cat([shard.rows[name] for shard in shards]) for name in shards[0].rows},
        shared={name: torch.cat([shard.shared[name] for shard in shards]) for name in shards[0].shared},
        index=torch.cat([shard.index + offset for shard, offset in zip(shards, offsets, strict=True)]),
        constants=shards[0].constants,
    )


def _branches(
    calls: list[TransformerCall], encoder: PromptEncoder, num: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where in the calls of one step each prompt's guided and unguided row is: (call, row) by prompt."""
    places = [(c, r) for c, call in enumerate(calls) for r in range(len(call.tensors[LATENTS]))]
    if len(places) not in (num, 2 * num):
        raise ModelError(
            f"the pipeline gave the transformer {len(places)} rows for {num} prompts in one step: allowed is one or two for "
            "each. Fix: use learn_from: images."
        )
    if len(places) == num:
        return places, []
    halves = places[:num], places[num:]
    columns = [encoder.per_sample(call.conditioning()) for call in calls]
    distances = [sum(encoder.distance_from_empty(columns[c], r) for c, r in half) for half in halves]
    return halves if distances[0] > distances[1] else (halves[1], halves[0])


def cache_key(
    spec: ModelSpec, content: str, description: Mapping[str, Any], sampler: SamplerSpec, *, of_paths: bool
) -> dict[str, Any]:
    """What encoded samples depend on, for `EncodedStore`.

    Args:
        spec: The model.
        content: Of `model_content`.
        description: What identifies the data, and how it is used.
        sampler: Size and sequence length; steps and guidance where the samples depend on them.
        of_paths: The samples are sampling paths, which depend on transformer, steps and guidance.
    """
    architecture = architecture_named(transformer_class(spec))
    uses_levels = of_paths or "sampler" in (sampler.timesteps, architecture.timesteps)
    uses_guidance = of_paths or architecture.guidance is Guidance.DISTILLED
    return {
        "model": {
            "variant": spec.variant,
            "dtype": spec.encoder_dtype,
            "content": content,
            "teacher_dtype": spec.teacher_dtype if of_paths else None,
        },
        "data": dict(description),
        "size": [sampler.height, sampler.width],
        "max_sequence_length": sampler.max_sequence_length,
        "num_steps": sampler.num_steps if uses_levels else None,
        "guidance_scale": sampler.guidance_scale if uses_guidance else None,
        "call_arguments": {name: repr(value) for name, value in sorted(sampler.call_arguments.items())},
    }


def model_content(spec: ModelSpec, *, with_transformer: bool) -> str:
    """SHA-256 of what encodes, in hexadecimal: the files of a local pipeline, or the commit of a hub id.

    Args:
        spec: The model; every file that counts is read once.
        with_transformer: Also its weights, or the single file in their place.
    """
    digest = hashlib.sha256()
    if spec.single_file is not None and with_transformer:
        digest.update(sha256_of(Path(spec.single_file)).encode())
    if not is_folder(spec):
        digest.update(f"{spec.source}@{hub_commit(spec)}".encode())
        return digest.hexdigest()
    root = Path(spec.source)
    components = (*_HASHED_COMPONENTS, "transformer") if with_transformer else _HASHED_COMPONENTS
    folders = sorted(p for p in root.iterdir() if p.name.startswith(components) and p.is_dir())
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    # The pipeline's class and the transformer's configuration decide sizes and arguments, even without its weights.
    for path in [root / "model_index.json", root / "transformer" / "config.json", *paths]:
        digest.update(f"{path.parent.name}/{path.name}:{sha256_of(path)};".encode())
    return digest.hexdigest()


def _chunks(samples: Iterable[Sample], num_done: int) -> Iterator[tuple[int, list[Sample]]]:
    """Parts of `SHARD_SAMPLES` samples with their number, without the first `num_done`."""
    iterator = iter(samples)
    for _ in islice(iterator, num_done * SHARD_SAMPLES):
        pass
    number = num_done
    while part := list(islice(iterator, SHARD_SAMPLES)):
        yield number, part
        number += 1
