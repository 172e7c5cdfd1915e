"""The recipes of the model families: what each adds to `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from fraqat.config.recipe import Recipe
from fraqat.data.captioned import IMAGE_SIZES, DataSpec
from fraqat.data.speech_source import SpeechDataSpec
from fraqat.data.text import TextDataSpec
from fraqat.distill import LANGUAGE_LOSSES, OUTPUT_LOSSES
from fraqat.errors import config_error
from fraqat.evaluation import EvaluationSpec, LanguageEvaluationSpec, SpeechEvaluationSpec
from fraqat.tasks import SamplerSpec
from fraqat.tasks.guided import check_pairs, paths_error
from fraqat.tasks.language_spec import LanguageSpec

# Of the sampler, what does not change the trained weights is left out of the fingerprint that a checkpoint must share.
_TRAINED_SAMPLER_FIELDS = ("timesteps", "timestep_shift", "max_sequence_length", "height", "width", "call_arguments")
_PATH_SAMPLER_FIELDS = ("num_steps", "guidance_scale")


class ImageRecipe(Recipe):
    """Text-to-image: a diffusers pipeline whose transformer is quantized."""

    LOSSES = tuple(OUTPUT_LOSSES)

    task: Literal["text-to-image"] = "text-to-image"
    data: DataSpec = Field(default_factory=DataSpec)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)

    @property
    def num_train(self) -> int:
        """Pictures, or with sampling paths prompts times steps."""
        return self.data.num_train * (self.sampler.num_steps if self._of_paths else 1)

    @property
    def num_validation(self) -> int:
        """As `num_train`."""
        return self.data.num_validation * (self.sampler.num_steps if self._of_paths else 1)

    @property
    def _of_paths(self) -> bool:
        return self.data.learn_from == "sampling_path"

    @property
    def _draws_noise_levels(self) -> bool:
        return not self._of_paths

    def _check_family(self) -> None:
        if self._of_paths:
            _refuse_timestep_importance(
                self, "data.learn_from: sampling_path, whose samples have timesteps of their own"
            )
        scale = self.train.guidance_scale
        if scale is not None and scale != "auto":  # what `auto` is depends on the transformer
            if self._of_paths:
                raise paths_error(scale)
            check_pairs(self.train.batch_size // self.train.accumulation)
        size = IMAGE_SIZES.get(self.data.source)
        wanted = (self.sampler.height, self.sampler.width)
        if size is not None and wanted != size:
            raise config_error(
                "sampler.height, width",
                list(wanted),
                allowed=f"{list(size)}, the size of {self.data.source}",
                fix="set sampler.height and sampler.width",
            )

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the trained weights."""
        values = super().fingerprint()
        uses_levels = self.sampler.timesteps in ("sampler", "auto")  # `auto` may stand for it
        kept = (*_TRAINED_SAMPLER_FIELDS, *(_PATH_SAMPLER_FIELDS if self._of_paths or uses_levels else ()))
        if self.train.guidance_scale == "auto" and "guidance_scale" not in kept:
            kept = (*kept, "guidance_scale")
        values["sampler"] = {name: values["sampler"][name] for name in kept}
        for name in ("num_workers", "worker_timeout_s", "encode_batch_size"):
            del values["data"][name]
        return values


class LanguageRecipe(Recipe):
    """Causal language model of transformers."""

    LOSSES = LANGUAGE_LOSSES

    task: Literal["language"] = "language"
    data: TextDataSpec = Field(default_factory=TextDataSpec)
    language: LanguageSpec = Field(default_factory=LanguageSpec)
    evaluation: LanguageEvaluationSpec = Field(default_factory=LanguageEvaluationSpec)

    def _check_family(self) -> None:
        _refuse_pipeline_settings(self)

    @model_validator(mode="before")
    @classmethod
    def _default_loss(cls, values: Any) -> Any:
        train = values.get("train") or {} if isinstance(values, dict) else None
        if isinstance(train, dict) and "losses" not in train:
            return {**values, "train": {**train, "losses": [{"name": "kl"}]}}
        return values

    @property
    def num_train(self) -> int | None:
        """Rows of tokens; None takes all that there are."""
        return self.data.num_train


class SpeechRecipe(Recipe):
    """Text-to-speech model of transformers."""

    LOSSES = tuple(OUTPUT_LOSSES)

    task: Literal["text-to-speech"] = "text-to-speech"
    data: SpeechDataSpec = Field(default_factory=SpeechDataSpec)
    evaluation: SpeechEvaluationSpec = Field(default_factory=SpeechEvaluationSpec)

    def _check_family(self) -> None:
        _refuse_pipeline_settings(self)

    @property
    def num_train(self) -> int:
        """Phrases."""
        return self.data.num_train


def _refuse_timestep_importance(recipe: Recipe, what: str) -> None:
    """Noise levels can be drawn by error only where training draws them."""
    if recipe.train.draws_by_error:
        raise config_error(
            "train.timestep_importance",
            "set",
            allowed=f"null or auto for {what}",
            fix="remove train.timestep_importance",
        )


def _refuse_pipeline_settings(recipe: Recipe) -> None:
    """A model of transformers has no noise levels, no guidance and no encoders apart, and is loaded from its own folder."""
    _refuse_timestep_importance(recipe, f"task {recipe.task}, which has no timesteps")
    if recipe.train.guidance_scale not in (None, "auto"):
        raise config_error(
            "train.guidance_scale",
            recipe.train.guidance_scale,
            allowed=f"null or auto for task {recipe.task}, which has no guidance",
            fix="remove train.guidance_scale",
        )
    if recipe.model.single_file is not None:
        raise config_error(
            "model.single_file", recipe.model.single_file, allowed="null for a model of transformers", fix="remove it"
        )
    if recipe.model.encoder_dtype != "float32":
        raise config_error(
            "model.encoder_dtype",
            recipe.model.encoder_dtype,
            allowed="not for a model of transformers",
            fix="remove it",
        )


DEFAULT_TASK = "text-to-image"

RECIPE_TYPES: Mapping[str, type[Recipe]] = MappingProxyType(
    {"text-to-image": ImageRecipe, "language": LanguageRecipe, "text-to-speech": SpeechRecipe}
)
"""The recipe's `task` -> its type."""
