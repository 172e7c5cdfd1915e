"""Layer families of the paper's Table 2 (FF, Attn, TF, All) as patterns on qualified names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

from fraqat.errors import config_error

ALL = "All"
TRANSFORMER = "TF"
OUTSIDE = "-"
"""Shown for a layer that belongs to no family but All."""


def _common_patterns() -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType(
        {
            "FF": ("*.ff.*", "*.ff_context.*", "*.mlp.*", "*.feed_forward.*", "*.ffn.*"),
            "Attn": ("*.attn.*", "*.attn1.*", "*.attn2.*", "*.self_attn.*", "*.attention.*"),
            TRANSFORMER: ("*blocks.*", "*layers.*", "*.h.*"),
        }
    )


@dataclass(frozen=True)
class LayerFamilies:
    """Names of families and the layers that belong to them.

    The default covers the usual names of diffusers and transformers. `All` always exists and holds every layer.

    Args:
        patterns: Family -> shell-style patterns on qualified names; the first family that matches is the one shown in
            tables, so the narrow families come before TF.
    """

    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=_common_patterns)

    def names(self) -> tuple[str, ...]:
        """All family names, `All` last."""
        return (*self.patterns, ALL)

    def contains(self, family: str, name: str) -> bool:
        """Whether the layer or parameter `name` belongs to `family`.

        Raises:
            ConfigError: An unknown family.
        """
        if family == ALL:
            return True
        if family not in self.patterns:
            known = ", ".join(self.names())
            raise config_error("family", family, allowed=known, fix="use one of these, or match by pattern")
        return any(fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern) for pattern in self.patterns[family])

    def family_of(self, name: str) -> str:
        """The first family that holds the layer, or `-`."""
        return next((family for family in self.patterns if self.contains(family, name)), OUTSIDE)
