"""The small trained models that come with the package, and the scripts that made them."""

from fraqat.zoo.locate import zoo_path

__all__ = ["zoo_path"]
