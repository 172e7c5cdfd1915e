"""Layer families and exceptions as the tables of architectures write them."""

from __future__ import annotations

from types import MappingProxyType

from fraqat.nn import LayerFamilies, LayerRule


def named_families(**patterns: tuple[str, ...]) -> LayerFamilies:
    """Families by name: `FF=("*.ff.*",)`."""
    return LayerFamilies(MappingProxyType(patterns))


def exceptions(last_layers: tuple[str, ...], skipped: tuple[str, ...]) -> tuple[LayerRule, ...]:
    """Rules that keep the inputs of `last_layers` at 16 bits and leave `skipped` in floating point."""
    kept = tuple(LayerRule(pattern=pattern, activation_bits=16) for pattern in last_layers)
    return (*kept, *(LayerRule(pattern=pattern, skip=True) for pattern in skipped))
