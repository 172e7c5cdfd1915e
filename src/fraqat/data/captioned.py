"""Pictures with captions, split in training and held-out data, by source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fraqat.data.bad_samples import BadSampleError
from fraqat.data.color_digits import IMAGE_SIZE, compose, held_out_combinations, sample_training_set
from fraqat.data.loader import SampleSource, SampleStream
from fraqat.data.pictures import decode_image, to_model_range
from fraqat.data.records import FOLDER, RecordsSpec, check_records, describe_records, get_field
from fraqat.data.samples import IndexedSamples, Sample, SampleSet, open_samples
from fraqat.data.worker_watch import WorkerSpec
from fraqat.errors import check_seed, config_error
from fraqat.nn import STRICT_KEYS

_PROMPT_STRIDE = 17
"""Prime, so that the first few prompts differ in digit, colour and ground, and all are used before one repeats."""

IMAGE_SIZES: dict[str, tuple[int, int]] = {"color-digits": (IMAGE_SIZE, IMAGE_SIZE)}
"""Source -> height and width of its pictures, where they are fixed."""

IMAGE_SOURCES = ("color-digits", "records")
"""Where pictures can come from: those of the package, or stored rows."""


@dataclass(frozen=True)
class DataSpec:
    """What the student learns from.

    Args:
        source: `color-digits`, or `records` for stored rows.
        num_train: Samples for training, the first that there are.
        num_validation: Held-out samples at most, with prompts that training never sees.
        seed: Decides which colour digits, and which of several captions.
        caption_dropout: Share of captions replaced by the empty one, so that the unconditional output, which
            classifier-free guidance uses, is distilled too.
        learn_from: `images`: latents of the pictures with noise; `sampling_path`: the teacher's own way from noise to a
            picture, for which only the captions are read.
        records: Where stored rows are, for `source: records`.
        image_column, caption_column: Of stored rows; `a.b` is a field of a column.
        caption_choice: Of a row with several captions: the `first`, or one that `seed` decides (`seeded`).
        min_image_side: Smallest side of a stored picture in pixels; None asks for half of the smaller side of the result.
        num_workers: Processes that read and decode stored rows; 0 does it in the main one.
        worker_timeout_s: A worker process that gives nothing for so long is ended, and another one begins at the same sample.
        encode_batch_size: Samples that autoencoder and text encoders compute at a time.
        cache: Encode everything once and keep it on disk; false encodes batch by batch and keeps the encoders in memory.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: str = "color-digits"
    num_train: int = 4096
    num_validation: int = 256
    seed: int = 1
    caption_dropout: float = 0.1
    learn_from: Literal["images", "sampling_path"] = "images"
    records: RecordsSpec | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    caption_choice: Literal["first", "seeded"] = "first"
    min_image_side: int | None = None
    num_workers: int = 0
    worker_timeout_s: float = 300.0
    encode_batch_size: int = 32
    cache: bool = True

    def __post_init__(self) -> None:
        if self.source not in IMAGE_SOURCES:
            raise config_error(
                "data.source",
                self.source,
                allowed=", ".join(IMAGE_SOURCES),
                fix="for pictures of your own set data.source: records, and data.records.path to their folder",
            )
        check_records("data", self.source, self.records)
        limits = {"num_train": 1, "num_validation": 1, "num_workers": 0, "encode_batch_size": 1, "min_image_side": 0}
        for name, lowest in limits.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise config_error(f"data.{name}", value, allowed=f"{lowest} or more", fix=f"correct data.{name}")
        if not 0 < self.worker_timeout_s < math.inf:
            raise config_error("data.worker_timeout_s", self.worker_timeout_s, allowed="more than 0", fix="use 300")
        check_seed("data.seed", self.seed)
        if not 0 <= self.caption_dropout < 1:
            raise config_error("data.caption_dropout", self.caption_dropout, allowed="[0, 1)", fix="use 0.1")


class CaptionedSample(NamedTuple):
    """One picture and its caption.

    Args:
        key: Name in the data set.
        image: [3, H, W] float32 in [-1, 1], or None where only captions are read.
        prompt: The caption.
        place: Number of the stored row; rising.
    """

    key: str
    image: Tensor | None
    prompt: str
    place: int


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures [N, 3, H, W] in [-1, 1] and their N captions."""

    images: Tensor
    prompts: tuple[str, ...]


class CaptionedData:
    """Training and held-out samples of a source, read when they are asked for.

    Args:
        spec: The source.
        height, width: Pixels of the pictures.

    Raises:
        ConfigError: The data is missing, has no such column or too few samples.
    """

    def __init__(self, spec: DataSpec, height: int, width: int):
        self.spec, self._size = spec, (height, width)
        if spec.records is None:
            self._train, self._validation = _digits(spec)
        else:
            self._train, self._validation = _stored(spec, spec.records, height, width)

    @property
    def _workers(self) -> WorkerSpec:
        return WorkerSpec(self.spec.num_workers, self.spec.worker_timeout_s)

    @property
    def num_train(self) -> int:
        """Training samples, with those that will turn out to be bad."""
        return self.spec.num_train

    def train_samples(self, *, after: int = -1) -> Iterator[CaptionedSample]:
        """Training samples in stored order, one pass.

        Args:
            after: Begin after the sample with this `place`, to go on where an earlier pass was stopped.
        """
        return self._pass(self._train, after)

    def validation_samples(self, *, after: int = -1) -> Iterator[CaptionedSample]:
        """Held-out samples in stored order, one pass; see `train_samples`."""
        return self._pass(self._validation, after)

    def source(self) -> SampleSource:
        """Batches that are read while training: `image` [N, 3, H, W] float32 in [-1, 1] (not for sampling paths),
        `prompt` and `key` as lists of N texts."""
        return SampleSource(self._train, self._validation, collate_captioned, workers=self._workers)

    def prompts(self, num_prompts: int) -> tuple[str, ...]:
        """Held-out prompts for sampling; see `held_out_prompts`."""
        return held_out_prompts(self.spec, num_prompts)

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that identify the samples."""
        spec = self.spec
        values: dict[str, Any] = {"source": spec.source, "num_train": spec.num_train, "seed": spec.seed}
        values |= {"num_validation": spec.num_validation, "height": self._size[0], "width": self._size[1]}
        if spec.records is not None:
            names = ("caption_column", "caption_choice")
            names += ("image_column", "min_image_side") if spec.learn_from == "images" else ()
            values |= {name: getattr(spec, name) for name in names}
            values["records"] = describe_records(spec.records)
        return values

    def _pass(self, samples: SampleSet, after: int) -> Iterator[CaptionedSample]:
        stream = SampleStream(samples, None, num_epochs=1, workers=self._workers, after=after)
        for sample in stream:
            image = None if sample["image"] is None else _as_float(sample["image"])
            yield CaptionedSample(sample["key"], image, sample["prompt"], sample["place"])


def open_captioned(spec: DataSpec, height: int, width: int) -> CaptionedData:
    """Opens a source of pictures and captions.

    Args:
        spec: The source.
        height, width: Pixels that stored pictures are scaled and cut to.

    Raises:
        ConfigError: The data is missing, has no such column or too few samples.
    """
    return CaptionedData(spec, height, width)


def load_training_images(spec: DataSpec) -> CaptionedImages:
    """The training pictures of the colour digits, in memory."""
    images, combinations = sample_training_set(spec.num_train, spec.seed)
    return CaptionedImages(images, tuple(item.prompt for item in combinations))


def load_validation_images(spec: DataSpec) -> CaptionedImages:
    """The held-out pictures of the colour digits, in memory."""
    held_out = held_out_combinations()
    chosen = [held_out[i % len(held_out)] for i in range(spec.num_validation)]
    return CaptionedImages(compose(chosen, seed=spec.seed, split="test"), tuple(item.prompt for item in chosen))


def held_out_prompts(spec: DataSpec, num_prompts: int) -> tuple[str, ...]:
    """Held-out prompts for sampling, repeated in order when more are asked for than there are.

    Raises:
        ConfigError: The data is missing, or has no held-out caption.
    """
    if spec.records is None:
        held_out = held_out_combinations()
        assert len(held_out) % _PROMPT_STRIDE
        return tuple(held_out[i * _PROMPT_STRIDE % len(held_out)].prompt for i in range(num_prompts))
    reader = _CaptionedReader.of(spec, 0, 0, with_images=False)
    _, validation = open_samples(
        spec.records,
        reader,
        [spec.caption_column],
        image_column=None,
        num_train=1,
        num_validation=max(num_prompts, spec.num_validation),
    )
    stream = SampleStream(validation, None, num_epochs=1)
    prompts = [sample["prompt"] for sample in islice(stream, num_prompts)]
    if not prompts:
        raise config_error(
            "data.records.validation_share",
            spec.records.validation_share,
            allowed="what holds out a row with a caption",
            fix="hold out more, or set data.records.validation_split",
        )
    return tuple(prompts[i % len(prompts)] for i in range(num_prompts))


def collate_captioned(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch of samples: pictures stacked, texts in lists."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in ("key", "prompt")}
    if samples[0]["image"] is not None:
        batch["image"] = torch.stack([_as_float(sample["image"]) for sample in samples])
    return batch


@dataclass(frozen=True)
class _CaptionedReader:
    """Makes samples of stored rows, in worker processes too."""

    height: int
    width: int
    image_column: str | None
    caption_column: str
    caption_choice: str
    min_side: int
    seed: int

    @classmethod
    def of(cls, spec: DataSpec, height: int, width: int, *, with_images: bool) -> _CaptionedReader:
        min_side = min(height, width) // 2 if spec.min_image_side is None else spec.min_image_side
        column = spec.image_column if with_images else None
        return cls(height, width, column, spec.caption_column, spec.caption_choice, min_side, spec.seed)

    def __call__(self, key: str, row: Mapping[str, Any]) -> Sample:
        sample: Sample = {"prompt": self._caption(key, get_field(row, self.caption_column)), "image": None}
        if self.image_column is not None:
            value = get_field(row, self.image_column)
            folder = row.get(FOLDER)
            sample["image"] = decode_image(value, self.height, self.width, min_side=self.min_side, folder=folder)
        return sample

    def _caption(self, key: str, value: Any) -> str:
        captions = value if isinstance(value, list | tuple) else [value]
        texts = [text.strip() for text in captions if isinstance(text, str) and text.strip()]
        if not texts:
            raise BadSampleError("caption is missing" if value is None or value == [] else "caption is empty")
        if self.caption_choice == "first":
            return texts[0]
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        return texts[int.from_bytes(digest, "big") % len(texts)]


def _stored(spec: DataSpec, records: RecordsSpec, height: int, width: int) -> tuple[SampleSet, SampleSet]:
    with_images = spec.learn_from == "images"
    return open_samples(
        records,
        _CaptionedReader.of(spec, height, width, with_images=with_images),
        [spec.caption_column, *([spec.image_column] if with_images else [])],
        image_column=spec.image_column if with_images else None,
        num_train=spec.num_train,
        num_validation=spec.num_validation,
    )


def _digits(spec: DataSpec) -> tuple[SampleSet, SampleSet]:
    with_images = spec.learn_from == "images"
    sides = [_MemoryRows(load(spec), with_images) for load in (load_training_images, load_validation_images)]
    train, validation = (IndexedSamples(rows, range(len(rows)), _as_stored) for rows in sides)
    return train, validation


class _MemoryRows:
    def __init__(self, data: CaptionedImages, with_images: bool):
        self._data, self._with_images = data, with_images

    def __len__(self) -> int:
        return len(self._data.prompts)

    def __getitem__(self, index: int) -> Sample:
        image = self._data.images[index] if self._with_images else None
        return {"image": image, "prompt": self._data.prompts[index]}


def _as_stored(key: str, row: Mapping[str, Any]) -> Sample:
    return dict(row)


def _as_float(image: Any) -> Tensor:
    """Pictures in memory are in the model's range already; stored ones are 8 bits."""
    return image if isinstance(image, Tensor) else to_model_range(image)
