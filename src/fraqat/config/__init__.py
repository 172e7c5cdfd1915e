"""The recipe: one frozen, validated description of a run, made of each part's own section."""

from fraqat.config.reading import load_recipe, load_values, recipe_names
from fraqat.config.recipe import ORIGINAL, QuantizationSpec, Recipe, merged
from fraqat.config.tasks import ImageRecipe, LanguageRecipe, SpeechRecipe

__all__ = [
    "ORIGINAL",
    "ImageRecipe",
    "LanguageRecipe",
    "QuantizationSpec",
    "Recipe",
    "SpeechRecipe",
    "load_recipe",
    "load_values",
    "merged",
    "recipe_names",
]
