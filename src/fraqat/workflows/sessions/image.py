"""Text-to-image: a diffusers pipeline whose transformer is quantized."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.config import ORIGINAL, ImageRecipe, Recipe
from fraqat.data.captioned import held_out_prompts
from fraqat.data.prompts import choose_prompts
from fraqat.errors import ModelError
from fraqat.evaluation import ColorDigitsJudge, image_quality, paired_psnr_db
from fraqat.evaluation.bootstrap import frechet_interval, mean_interval, median_interval
from fraqat.export import ModelDescription, Part
from fraqat.nn import LayerFamilies, LayerRule
from fraqat.planning import Workload
from fraqat.tasks import SamplerSpec, architecture_named
from fraqat.tasks.guided import check_pairs, scale_in_training
from fraqat.workflows.images import to_png
from fraqat.workflows.progress import Progress
from fraqat.workflows.sessions.base import Measurement, QualityColumn, Session, StandIn, description_of, release_memory
from fraqat.workflows.sessions.image_metrics import Figures, ImageMetrics
from fraqat.zoo import zoo_path

NUM_SHOWN = 8


def encoded_root() -> Path:
    """Folder of encoded data: `$FRAQAT_CACHE`, else `fraqat` in the user's cache folder."""
    if root := os.environ.get("FRAQAT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fraqat"


class ImageSession(Session[ImageRecipe]):
    """A text-to-image recipe in memory."""

    sample_suffix = ".png"
    _pipeline: Any = None

    def load_model(self, dtype: torch.dtype) -> nn.Module:
        """The transformer alone."""
        from fraqat.tasks.pipelines import load_transformer

        return load_transformer(self.model_spec, dtype=dtype)

    def build_float(self, class_name: str, config: dict[str, Any]) -> nn.Module:
        """An untrained transformer."""
        from fraqat.tasks.pipelines import build_transformer

        return build_transformer(class_name, config)

    @property
    def families(self) -> LayerFamilies:
        """As the table of architectures says."""
        return architecture_named(self.known.class_name).families

    @property
    def family_rules(self) -> tuple[LayerRule, ...]:
        """As the table of architectures says."""
        return architecture_named(self.known.class_name).default_rules()

    def open_pipeline(self, transformer: nn.Module) -> Any:
        """The whole pipeline, loaded around `transformer` the first time; its own transformer is not loaded again."""
        from fraqat.tasks.pipelines import load_pipeline

        if self._pipeline is None:
            dtype = self.recipe.model.torch_encoder_dtype
            self._pipeline = load_pipeline(self.model_spec, dtype=dtype, transformer=transformer)
        return self._pipeline

    def close_pipeline(self) -> None:
        """Lets text encoders and autoencoder leave memory."""
        self._pipeline = None
        release_memory()

    @cached_property
    def task(self) -> Any:
        """Encoded samples and the prediction that is distilled."""
        from fraqat.tasks.diffusion import DiffusionTask
        from fraqat.tasks.image_samples import DiffusionSource

        source = DiffusionSource(
            model=self.model_spec,
            open_pipeline=lambda: self.open_pipeline(self.teacher),
            data=self.recipe.data,
            sampler=self.recipe.sampler,
            cache=encoded_root(),
            close_pipeline=self.close_pipeline,
            on_encoded=self._on_encoded,
        )
        return DiffusionTask(source)

    def _on_encoded(self, split: str, num_done: int, total: int) -> None:
        what = "prompts" if self.recipe.data.learn_from == "sampling_path" else "pictures"
        if num_done < total:
            self.progress.count(f"encoding {what} for {split}", num_done, total)
        else:
            self.progress.say(f"{total} {what} for {split} are encoded and kept in {encoded_root()}")

    def check(self, recipe: Recipe) -> None:
        """Parts of a batch have to be of pairs where guidance is learned, which with `auto` the transformer decides."""
        if self._guidance_scale(recipe) is not None:
            check_pairs(recipe.train.batch_size // recipe.train.accumulation)

    def workload(self, recipe: Recipe) -> Workload:
        """One step on latents and text of the recipe's sizes."""
        from fraqat.tasks.example_inputs import example_inputs, example_pairs, predict_example

        student = self.planned_student(recipe)
        sampler = self.recipe.sampler
        scale = self._guidance_scale(recipe)

        def make_inputs(num: int) -> dict[str, Tensor]:
            return example_inputs(student, self.known, sampler, num)

        return Workload(
            student,
            predict_example,
            make_inputs,
            teacher_dtype=recipe.model.dtype,
            make_pairs=None if scale is None else lambda num: example_pairs(make_inputs(num // 2), scale),
            draws_noise_levels=self.recipe.data.learn_from != "sampling_path",
        )

    def _guidance_scale(self, recipe: Recipe) -> float | None:
        """Of what training learns; None: outputs one by one. Read from the model's configuration alone."""
        scale = recipe.train.guidance_scale
        if scale is None:
            return None
        of_paths = self.recipe.data.learn_from == "sampling_path"
        return scale_in_training(scale, self.known.class_name, self.recipe.sampler, of_paths=of_paths)

    def evaluator(self, num_samples: int | None) -> ImageEvaluator:
        """Samples images from held-out prompts."""
        return ImageEvaluator(self, num_samples or self.recipe.evaluation.num_images)

    def generate(
        self,
        model: nn.Module,
        prompts: tuple[str, ...],
        *,
        seed: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> list[bytes]:
        """PNG files."""
        batch_size = self.recipe.evaluation.batch_size
        return [to_png(x) for x in self.sample(model, prompts, seed=seed, batch_size=batch_size, on_done=on_done)]

    def description(self) -> ModelDescription:
        """How to build the transformer again."""
        from fraqat.tasks.pipelines import transformer_description

        return description_of(self.recipe.model, *transformer_description(self.teacher))

    def export_parts(self, student: nn.Module) -> tuple[Part, ...]:
        """The transformer, the text encoders together, and the decoder; of a video pipeline the transformer alone."""
        from fraqat.workflows.sessions.image_parts import image_parts

        return image_parts(student, self.recipe, self.task)

    @property
    def stand_in(self) -> StandIn:
        """The transformer's calls in its pipeline."""
        from fraqat.tasks.diffusion import OUTPUT, computed_by

        return lambda student, run: computed_by(student, lambda inputs: run(inputs)[OUTPUT])

    def original_files(self) -> list[Path]:
        """The transformer's weight files."""
        from fraqat.tasks.loading import weight_files

        spec = self.model_spec
        if spec.single_file is not None:
            return [Path(spec.single_file)]
        folder = Path(spec.source)
        return weight_files(folder / "transformer", spec.variant) if folder.is_dir() else []

    def sample(
        self,
        transformer: nn.Module,
        prompts: tuple[str, ...],
        *,
        seed: int,
        batch_size: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] of a transformer in this session's pipeline."""
        from fraqat.tasks.sampling import sample_images

        return sample_images(
            self.open_pipeline(transformer),
            transformer,
            prompts,
            self.recipe.sampler,
            seed=seed,
            batch_size=batch_size,
            on_done=on_done,
        )


_PAIRED = (QualityColumn("psnr_db", "PSNR, dB"),)
_JUDGED = (
    QualityColumn("frechet", "Frechet"),
    *_PAIRED,
    QualityColumn("digit", "digit, %", 100, 1),
    QualityColumn("colors", "colours, %", 100, 1),
)
_JUDGED_NOTE = (
    "Frechet: distance to the original's images in the features of the colour-digits classifier. PSNR: median over pairs. "
    "Digit, colours: share of images that show what the prompt says, by the same classifier."
)


class ImageEvaluator:
    """Compares images of the same prompts and seeds with the original's.

    Args:
        session: Gives pipeline, prompts and sampler.
        num_images: Images per model.
    """

    sample_suffix = ".png"

    def __init__(self, session: ImageSession, num_images: int):
        recipe = session.recipe
        self._session, self._spec = session, recipe.evaluation
        listed = recipe.evaluation.prompts
        self._prompts = choose_prompts(listed, num_images) if listed else held_out_prompts(recipe.data, num_images)
        self._reference: Tensor | None = None
        is_judged = recipe.data.source == "color-digits" and listed is None
        self._judge = ColorDigitsJudge(zoo_path("color-digits-classifier")) if is_judged else None
        self.shown_prompts = self._prompts[:NUM_SHOWN]
        self._metrics = ImageMetrics(recipe.evaluation, self._prompts, recipe.model.torch_device)
        self.columns = (*(_JUDGED if is_judged else _PAIRED), *self._metrics.columns)
        sampler: SamplerSpec = recipe.sampler
        origin = listed.source if listed else "held-out"
        self.notes = (
            f"{num_images} images per model from {origin} prompts, {sampler.num_steps} sampler steps, "
            f"guidance {sampler.guidance_scale:g}, the same prompt and seed in every model.",
            _JUDGED_NOTE if is_judged else "PSNR: median over pairs.",
            *self._metrics.notes,
        )

    def measure(self, label: str, model: nn.Module, progress: Progress) -> Measurement:
        """Samples the images of one model."""
        images = self._session.sample(
            model,
            self._prompts,
            seed=self._spec.seed,
            batch_size=self._spec.batch_size,
            on_done=lambda num_done: progress.count(f"sampling {label}", num_done, len(self._prompts)),
        )
        if label == ORIGINAL:
            self._reference = images
        if self._reference is None:
            raise ModelError("the original has to be measured before its students. Fix: measure it first.")
        is_original = label == ORIGINAL
        paired = self._paired(images, self._reference, is_original=is_original)
        added = self._metrics.measure(images, self._reference, is_original=is_original)
        return Measurement(
            paired.quality | added.quality,
            tuple(to_png(image) for image in images[:NUM_SHOWN]),
            paired.intervals | added.intervals,
        )

    def _paired(self, images: Tensor, reference: Tensor, *, is_original: bool) -> Figures:
        """PSNR and, of the colour digits, the Frechet distance and the judge's shares."""
        spec, figures = self._spec.bootstrap, Figures()
        if self._judge is not None:
            quality = image_quality(images, reference, self._prompts, self._judge, self._judge)
            hits = self._judge.hits(images * 2 - 1, self._prompts)
            for name in ("digit", "colors", "all"):
                figures.add(name, getattr(quality, name), mean_interval(getattr(hits, name), spec))
            if not is_original:
                features, originals = (self._judge.features(x * 2 - 1) for x in (images, reference))
                figures.add("frechet", quality.frechet, frechet_interval(features, originals, spec, paired=True))
        if is_original:
            return Figures(figures.quality | {"frechet": None, "psnr_db": None}, figures.intervals)
        pairs_db = paired_psnr_db(images, reference)
        figures.add("psnr_db", statistics.median(pairs_db), median_interval(pairs_db, spec))
        return figures
