"""What a recipe needs in memory: pipeline, encoded data, teacher, judge; loaded once and shared by all methods."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fraqat.config import Recipe
from fraqat.data.captioned import load_prompts
from fraqat.errors import ModelError
from fraqat.evaluation import ColorDigitsJudge
from fraqat.export import ModelDescription, load_packed_, read_packed
from fraqat.nn import QuantReport, quantize_
from fraqat.tasks import ModelSpec, SamplerSpec, architecture_of
from fraqat.zoo import zoo_path

_ZOO_PREFIX = "zoo:"


def resolve_source(spec: ModelSpec) -> ModelSpec:
    """Turns `zoo:NAME` into the folder of a model that comes with the package."""
    if not spec.source.startswith(_ZOO_PREFIX):
        return spec
    return dataclasses.replace(spec, source=str(zoo_path(spec.source.removeprefix(_ZOO_PREFIX))))


class Session:
    """The models and data of one recipe; every part is loaded when it is first asked for.

    Args:
        recipe: Decides model, data and sampler. Methods that share these (`Recipe.baseline`) share the session.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def pipeline(self) -> Any:
        """The pre-trained diffusers pipeline, float32."""
        from fraqat.tasks.pipelines import load_pipeline

        return load_pipeline(resolve_source(self.recipe.model))

    @cached_property
    def teacher(self) -> nn.Module:
        """The frozen transformer in the teacher's own precision."""
        transformer = cast(nn.Module, self.pipeline.transformer)
        dtype = self.recipe.model.dtype
        teacher = transformer if dtype == torch.float32 else copy.deepcopy(transformer).to(dtype)
        return teacher.eval().requires_grad_(False)

    @cached_property
    def task(self) -> Any:
        """Encoded data and the prediction that is distilled."""
        from fraqat.tasks.diffusion import DiffusionTask

        return DiffusionTask(self.pipeline, self.recipe.data, self.recipe.sampler)

    @cached_property
    def judge(self) -> ColorDigitsJudge:
        """Feature extractor and judge of prompt adherence."""
        return ColorDigitsJudge(zoo_path("color-digits-classifier"))

    def new_student(self, recipe: Recipe) -> tuple[nn.Module, QuantReport]:
        """A float32 copy of the transformer, quantized at its final width as `recipe` says, and the report."""
        student = copy.deepcopy(cast(nn.Module, self.pipeline.transformer)).float().requires_grad_(True)
        quantization = recipe.quantization
        report = quantize_(
            student,
            quantization.spec,
            rules=quantization.rules,
            families=architecture_of(student).families,
            train=quantization.train,
        )
        return student, report

    def load_student(self, recipe: Recipe, path: Path) -> nn.Module:
        """The student that a run left.

        Raises:
            ModelError: The file is missing or damaged, or does not fit the recipe.
        """
        student, _ = self.new_student(recipe)
        try:
            student.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be loaded: {error}. Fix: train again in a new folder.") from error
        return student.eval()

    def description(self) -> ModelDescription:
        """How to build the transformer again, for exports."""
        from fraqat.tasks.pipelines import transformer_description

        class_name, config = transformer_description(self.pipeline)
        model = self.recipe.model
        return ModelDescription(class_name, config, model.source, model.revision, model.variant)

    def held_out_prompts(self, num_prompts: int) -> tuple[str, ...]:
        """Prompts that training never saw."""
        return load_prompts(self.recipe.data, num_prompts)

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
        from fraqat.tasks.diffusion import sample_images

        return sample_images(
            self.pipeline,
            transformer,
            prompts,
            self.recipe.sampler,
            seed=seed,
            batch_size=batch_size,
            on_done=on_done,
        )


class PackedSession:
    """A packed export with the rest of its pipeline.

    Args:
        folder: Written by `fraqat export`.
    """

    def __init__(self, folder: Path):
        self.packed = read_packed(folder)

    @cached_property
    def transformer(self) -> nn.Module:
        """The student, from codes."""
        from fraqat.tasks.pipelines import build_transformer

        description = self.packed.description
        transformer = load_packed_(build_transformer(description.class_name, description.config), self.packed)
        return transformer.to(self._model.torch_device)

    @cached_property
    def pipeline(self) -> Any:
        """The base pipeline that the export names."""
        from fraqat.tasks.pipelines import load_pipeline

        return load_pipeline(resolve_source(self._model))

    @property
    def _model(self) -> ModelSpec:
        description = self.packed.description
        return ModelSpec(description.base_pipeline, description.base_revision, description.base_variant)

    def sample(
        self,
        prompts: tuple[str, ...],
        sampler: SamplerSpec,
        *,
        seed: int,
        batch_size: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        from fraqat.tasks.diffusion import sample_images

        return sample_images(
            self.pipeline, self.transformer, prompts, sampler, seed=seed, batch_size=batch_size, on_done=on_done
        )
