"""Training samples of a diffusion task: encoded once and kept on disk, or encoded batch by batch while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fraqat.data.captioned import CaptionedData, DataSpec, open_captioned
from fraqat.data.encoded import EncodedRows, EncodedShard, EncodedStore
from fraqat.data.loader import ShuffledBatches
from fraqat.distill import Batch, BatchStream
from fraqat.errors import BatchSizeError, config_error
from fraqat.tasks.encoding import EMPTY, NOISE, SHARD_SAMPLES, Encoder, cache_key, model_content
from fraqat.tasks.spec import ModelSpec, SamplerSpec

_VALIDATION_SEED_OFFSET = 2**30


@dataclass(frozen=True)
class DiffusionSource:
    """Where a diffusion task gets its samples.

    Args:
        model: The pipeline; `zoo:` names are resolved.
        open_pipeline: Loads it; called only when something has to be encoded.
        data: Pictures and captions.
        sampler: Size, sequence length, distribution of noise levels.
        cache: Folder of all encoded data sets.
        close_pipeline: Called when everything is encoded, so that encoders can leave memory.
        on_encoded: Told the split, how many of its pictures or prompts are encoded and kept, and of how many: before the first
            one and after every shard.
    """

    model: ModelSpec
    open_pipeline: Callable[[], DiffusionPipeline]
    data: DataSpec
    sampler: SamplerSpec
    cache: Path
    close_pipeline: Callable[[], None] = lambda: None
    on_encoded: Callable[[str, int, int], None] = lambda split, done, total: None

    @property
    def of_paths(self) -> bool:
        """Whether samples are points on the teacher's sampling path."""
        return self.data.learn_from == "sampling_path"


class ImageSamples(Protocol):
    """Encoded samples, whenever they are encoded."""

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches without end."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training samples."""
        ...

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out samples in order, encoded."""
        ...

    def first_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training samples, encoded."""
        ...

    def encoded(self, batch: Batch) -> Batch:
        """A batch of `train_stream` with latents and conditioning."""
        ...

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Constants of `Encoder`."""
        ...


def open_samples(source: DiffusionSource) -> ImageSamples:
    """The samples as `data.cache` says.

    Raises:
        ConfigError: Sampling paths without the cache.
    """
    if source.data.cache:
        return CachedSamples(source)
    if source.of_paths:
        raise config_error("data.cache", False, allowed="true with learn_from: sampling_path", fix="remove data.cache")
    return StreamedSamples(source)


class CachedSamples:
    """Samples that are computed once, kept on disk, and found again by what they were computed from."""

    def __init__(self, source: DiffusionSource):
        self._source = source
        self._begun: EncodedRows | None = None

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches without end.

        Raises:
            BatchSizeError: The batch is larger than the data.
        """
        num = len(self._rows["train"])
        if batch_size > num:
            raise BatchSizeError(batch_size, num)
        return ShuffledBatches(self._rows["train"], batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training samples."""
        return max(1, len(self._rows["train"]) // batch_size)

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out samples in order."""
        return list(self._rows["validation"].batches(batch_size))

    def first_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training samples; an export, which takes no others, encodes no others."""
        return list(self._first_rows(num_samples).batches(batch_size, num_samples))

    def encoded(self, batch: Batch) -> Batch:
        """The batch itself."""
        return batch

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Constants of `Encoder`."""
        return self._first_rows(1).constants

    @cached_property
    def _rows(self) -> Mapping[str, EncodedRows]:
        self._begun = None  # its tensors are among those of all rows
        rows = {split: self._store(split).build(partial(self._shards, split)) for split in ("train", "validation")}
        self._let_go()
        return rows

    def _first_rows(self, num_rows: int) -> EncodedRows:
        """Training rows, at least so many of them where there are."""
        num_shards = -(-num_rows // SHARD_SAMPLES)
        if "_rows" in self.__dict__ or num_shards * SHARD_SAMPLES >= self._source.data.num_train:
            return self._rows["train"]
        if self._begun is None or len(self._begun) < num_rows:
            self._begun = self._store("train").build_first(partial(self._shards, "train", num_shards=num_shards))
            self._let_go()
        return self._begun if len(self._begun) >= num_rows else self._rows["train"]

    def _let_go(self) -> None:
        """Of what was needed to encode."""
        self.__dict__.pop("_data", None)
        self._source.close_pipeline()

    @cached_property
    def _data(self) -> CaptionedData:
        return open_captioned(self._source.data, self._source.sampler.height, self._source.sampler.width)

    @cached_property
    def _content(self) -> str:
        return model_content(self._source.model, with_transformer=self._source.of_paths)

    def _store(self, split: str) -> EncodedStore:
        source = self._source
        other = "num_validation" if split == "train" else "num_train"
        description = {name: value for name, value in self._data.description.items() if name != other}
        description |= {"split": split, "learn_from": source.data.learn_from}
        if source.of_paths:
            description["caption_dropout"] = source.data.caption_dropout
        key = cache_key(source.model, self._content, description, source.sampler, of_paths=source.of_paths)
        return EncodedStore(source.cache, key)

    def _shards(self, split: str, num_done: int, num_shards: int | None = None) -> Iterator[EncodedShard]:
        """The shards of a split after the first `num_done`; `num_shards` of them in all, None: all."""
        if num_shards is not None and num_done >= num_shards:
            return iter(())
        encoder = Encoder(self._source.open_pipeline(), self._source.sampler, self._source.data.encode_batch_size)
        samples = self._data.train_samples() if split == "train" else self._data.validation_samples()
        pairs = ((sample.image, sample.prompt) for sample in samples)
        if self._source.of_paths:
            seed = self._source.data.seed + (0 if split == "train" else _VALIDATION_SEED_OFFSET)
            share = self._source.data.caption_dropout
            shards = encoder.shards_of_paths(pairs, num_done, seed=seed, unguided_share=share)
        else:
            shards = encoder.shards_of_images(pairs, num_done)
        total = self._source.data.num_train if split == "train" else self._source.data.num_validation
        if num_shards is not None:
            shards, total = islice(shards, num_shards - num_done), min(total, num_shards * SHARD_SAMPLES)
        return self._counted(split, shards, num_done, total)

    def _counted(self, split: str, shards: Iterator[EncodedShard], num_done: int, total: int) -> Iterator[EncodedShard]:
        self._source.on_encoded(split, num_done * SHARD_SAMPLES, total)
        for number, shard in enumerate(shards, num_done + 1):
            yield shard
            self._source.on_encoded(split, min(number * SHARD_SAMPLES, total), total)


class StreamedSamples:
    """Samples that are encoded batch by batch: nothing is kept on disk, and the encoders stay in memory."""

    def __init__(self, source: DiffusionSource):
        self._source = source
        self._data = open_captioned(source.data, source.sampler.height, source.sampler.width).source()

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches of pictures and prompts without end.

        Raises:
            BatchSizeError: The batch is larger than the data.
        """
        return self._data.train_stream(batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training samples."""
        return self._data.steps_per_epoch(batch_size)

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out samples in order, encoded once."""
        if batch_size not in self._held:
            self._held[batch_size] = [self.encoded(batch) for batch in self._data.validation_batches(batch_size)]
        return self._held[batch_size]

    def first_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training samples, encoded."""
        return [self.encoded(batch) for batch in self._data.first_batches(num_samples, batch_size)]

    def encoded(self, batch: Batch) -> Batch:
        """Latents and conditioning of pictures and prompts; a batch that has them already is given back."""
        if "latents" in batch:
            return batch
        shard = self._encoder.encode(batch["image"], batch["prompt"])
        return {**shard.rows, **{name: value[shard.index] for name, value in shard.shared.items()}}

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Constants of `Encoder`."""
        return self._encoder.constants

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._source.open_pipeline(), self._source.sampler, self._source.data.encode_batch_size)

    @cached_property
    def _held(self) -> dict[int, list[Batch]]:
        return {}


def split_constants(constants: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Constants of the transformer's call, of the empty prompt, and of the noise process."""
    call: dict[str, Tensor] = {}
    empty: dict[str, Tensor] = {}
    noise: dict[str, Tensor] = {}
    for name, value in constants.items():
        if name.startswith(EMPTY):
            empty[name.removeprefix(EMPTY)] = value
        elif name.startswith(NOISE):
            noise[name.removeprefix(NOISE)] = value
        else:
            call[name] = value
    return call, empty, noise


@torch.no_grad()
def drop_captions(inputs: dict[str, Tensor], empty: Mapping[str, Tensor], is_dropped_N: Tensor) -> dict[str, Tensor]:
    """Conditioning with some rows replaced by the one without a prompt."""
    return {
        name: torch.where(is_dropped_N.view(-1, *(1,) * empty[name].ndim), empty[name], value)
        if name in empty
        else value
        for name, value in inputs.items()
    }
