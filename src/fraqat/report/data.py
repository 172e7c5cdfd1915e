"""What a report shows, as plain values. Nothing here knows about HTML or plots."""

from __future__ import annotations

from dataclasses import dataclass

from fraqat.errors import config_error
from fraqat.table import Table

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageRow:
    """The images of one model.

    Args:
        label: Name of the model: "original", "dynamic", "vanilla QAT", "FraQAT".
        images: PNG files, one per prompt, all made with the seeds that the other rows use.

    Raises:
        ConfigError: An image that is not a PNG file.
    """

    label: str
    images: tuple[bytes, ...]

    def __post_init__(self) -> None:
        for index, image in enumerate(self.images):
            if not image.startswith(PNG_SIGNATURE):
                raise config_error(
                    f"images[{index}] of row {self.label!r}",
                    image[:8],
                    allowed="the bytes of a PNG file",
                    fix="encode it as PNG",
                )


@dataclass(frozen=True)
class StageSpan:
    """One bit width and the optimizer steps [first_step, first_step + num_steps) that train at it."""

    bits: float
    first_step: int
    num_steps: int

    @property
    def end_step(self) -> int:
        """First step after the stage."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class LossCurve:
    """The losses of one training run.

    Values that are not finite or not positive are kept here and left out of the plot, whose axis is logarithmic.

    Args:
        label: Name of the method.
        steps: Optimizer steps, counted from 0, ascending.
        losses: Training loss of each of `steps`.
        validation: (finished steps, held-out loss), ascending.
        stages: The bit widths that were trained, in order; empty when not known.

    Raises:
        ConfigError: `steps` and `losses` of different lengths.
    """

    label: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()
    stages: tuple[StageSpan, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise config_error(
                f"losses of curve {self.label!r}",
                f"{len(self.losses)} values",
                allowed=f"one value for each of the {len(self.steps)} steps",
                fix="pass steps and losses of the same length",
            )


@dataclass(frozen=True)
class ReportData:
    """Everything that one page shows.

    Args:
        title: Heading of the page.
        summary: The result in one sentence.
        quality: One row per model: original, dynamic, vanilla QAT, FraQAT. The row whose first value is the label of the
            first curve is set in bold.
        prompts: The prompts of the images.
        image_rows: One row of images per model, in the order to be read; empty when no images were made.
        curves: Training runs, the main method first; its stages are marked with their bits. Empty without training.
        layers: One row per layer in model order. Columns `layer`, `family`, `weight SQNR dB` and `output SQNR dB` feed the
            plot (each is optional); all columns are listed.
        sizes: Bytes on disk and in memory.
        settings: The resolved recipe as YAML text.
        versions: Software and hardware.

    Raises:
        ConfigError: A row that has not one image per prompt.
    """

    title: str
    summary: str
    quality: Table
    prompts: tuple[str, ...]
    image_rows: tuple[ImageRow, ...]
    curves: tuple[LossCurve, ...]
    layers: Table
    sizes: Table
    settings: str
    versions: Table

    def __post_init__(self) -> None:
        for row in self.image_rows:
            if len(row.images) != len(self.prompts):
                raise config_error(
                    f"image_rows[{row.label!r}].images",
                    f"{len(row.images)} images",
                    allowed=f"one image for each of the {len(self.prompts)} prompts",
                    fix="make the images of every model with the same prompts",
                )
