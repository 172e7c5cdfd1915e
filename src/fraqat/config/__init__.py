"""The recipe: one frozen, validated description of a run, made of each part's own section."""

from fraqat.config.layer_widths import LayerWidthsSpec, read_layer_choices, rise_column
from fraqat.config.methods import METHODS, Method, method_named
from fraqat.config.reading import load_recipe, load_values, recipe_names
from fraqat.config.recipe import ORIGINAL, QuantizationSpec, Recipe, merged, plain
from fraqat.config.tasks import ImageRecipe, LanguageRecipe, SpeechRecipe

__all__ = [
    "METHODS",
    "ORIGINAL",
    "ImageRecipe",
    "LanguageRecipe",
    "LayerWidthsSpec",
    "Method",
    "QuantizationSpec",
    "Recipe",
    "SpeechRecipe",
    "load_recipe",
    "load_values",
    "merged",
    "method_named",
    "plain",
    "read_layer_choices",
    "recipe_names",
    "rise_column",
]
