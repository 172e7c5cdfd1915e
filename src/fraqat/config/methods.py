"""Methods by name: what each changes in a recipe, and nothing else, so that they can be compared on the same terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fraqat.errors import choice_error


@dataclass(frozen=True)
class Method:
    """One way to quantize a model.

    Args:
        name: On the command line and in tables.
        summary: One line.
        changes: Sections of a recipe that make it this method; what they leave out is the recipe's own.
        peer: Name of an outside program that trains instead of ours; see `fraqat.baselines`. Empty for our own.
        searches_scales: LAPQ's search of all layers' step sizes, instead of training.
    """

    name: str
    summary: str
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    peer: str = ""
    searches_scales: bool = False

    @property
    def is_recipe(self) -> bool:
        """Whether changes of a recipe are all there is to it."""
        return not self.peer and not self.searches_scales

    @property
    def is_trained(self) -> bool:
        """Whether it takes training steps."""
        return self.changes.get("train", {}).get("steps") != 0


_COSINE = {"learning_rate": {"kind": "cosine"}}
_DECAY_LAST = {"learning_rate": {"kind": "decay_last"}}
# The large gains over vanilla QAT that were found; why the first two gain is open (docs/log.md).
_LITTLE_MOMENTUM = {"betas": [0.5, 0.999]}
_ADAPTED = {"optimizer": "adamw_adapted"}
_IMPORTANCE = {"timestep_importance": "auto"}
_PRESET = _COSINE | _LITTLE_MOMENTUM | _ADAPTED | _IMPORTANCE
_UNTRAINED = {"schedule": {"kind": "constant"}, "train": {"steps": 0}}

_RANK = 16  # the paper's for Sana 600M and PixArt-Sigma
_SVDQUANT = {"smoothing": {"activation_only": True}, "branch": {"rank": _RANK, "iterations": 100}}
_DITAS_BRANCH = {"rank": _RANK, "start": "error", "iterations": 10}
# torchao has scales of its own; what ours would be is left at its default.
_PEER_GRID = {"quantization": {"weight": {"range_method": "max_abs", "scale_dtype": "float32"}}}
_PEER = _PEER_GRID | {"schedule": {"kind": "constant"}, "train": _COSINE}
_PEER_UNTRAINED = _PEER_GRID | _UNTRAINED

_ALONE = {
    "train-ff": ("FF", "feed-forward layers"),
    "train-attn": ("Attn", "attention layers"),
    "train-transformer": ("TF", "transformer blocks"),
    "train-all": ("All", "whole model"),
}


def _trained_alone(name: str, family: str, what: str) -> Method:
    """One row of the paper's Table 2: everything is quantized, one family is trained, by the recipe's own schedule."""
    return Method(name, f"{what} trained, all else quantized and frozen", {"quantization": {"train": family}})


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("dynamic", "weights rounded as they are, no training", _UNTRAINED),
            Method(
                "vanilla-qat",
                "trained at the final width, cosine learning rate",
                {"schedule": {"kind": "constant"}, "train": _COSINE},
            ),
            Method(
                "fraqat",
                "our default: learned scales, little momentum, adapted steps, noise levels drawn by error, cosine; "
                "no fractional widths, which did not help",
                {
                    "quantization": {"weight": {"range_method": "learned"}},
                    "schedule": {"kind": "constant"},
                    "train": _PRESET,
                },
            ),
            Method(
                "fraqat-guided",
                "the same on what the sampler's guidance makes of two outputs; the loss of single outputs is higher",
                {
                    "quantization": {"weight": {"range_method": "learned"}},
                    "schedule": {"kind": "constant"},
                    "train": _PRESET | {"guidance_scale": "auto"},
                },
            ),
            Method(
                "little-momentum",
                "vanilla QAT with the first beta of Adam at 0.5",
                {"schedule": {"kind": "constant"}, "train": _COSINE | _LITTLE_MOMENTUM},
            ),
            Method(
                "adapted-steps",
                "vanilla QAT with AdamW's steps adapted to the noise of gradients",
                {"schedule": {"kind": "constant"}, "train": _COSINE | _ADAPTED},
            ),
            Method(
                "timestep-importance",
                "vanilla QAT with noise levels drawn where the student errs most, losses weighted back",
                {"schedule": {"kind": "constant"}, "train": _COSINE | {"timestep_importance": {}}},
            ),
            Method(
                "final-grid",
                "Table 4's widths as shares of the final grid's error, cosine learning rate",
                {"schedule": {"kind": "fractional", "grid": "final"}, "train": _COSINE},
            ),
            Method(
                "paper",
                "FraQAT as published: Table 4, max-abs scales, constant learning rate",
                {
                    "quantization": {"weight": {"range_method": "max_abs"}},
                    "schedule": {"kind": "fractional"},
                    "train": {"learning_rate": {"kind": "constant"}},
                },
            ),
            Method(
                "fractional",
                "Table 4's widths, learning rate decays at the final width",
                {"schedule": {"kind": "fractional"}, "train": _DECAY_LAST},
            ),
            Method(
                "cooldown",
                "Table 4's widths, learning rate falls together with the width",
                {"schedule": {"kind": "fractional"}, "train": {"learning_rate": {"kind": "cooldown"}}},
            ),
            Method(
                "automatic",
                "training chooses of Table 4's widths where it goes and when, cosine learning rate",
                {"schedule": {"kind": "automatic"}, "train": _COSINE},
            ),
            Method(
                "integer",
                "8, 7, 6, 5, 4 bits, learning rate decays at the final width",
                {"schedule": {"kind": "integer"}, "train": _DECAY_LAST},
            ),
            Method(
                "simple",
                "16, 8, 4 bits, learning rate decays at the final width",
                {"schedule": {"kind": "simple"}, "train": _DECAY_LAST},
            ),
            *(_trained_alone(name, family, what) for name, (family, what) in _ALONE.items()),
            Method(
                "lsq",
                "LSQ: learned scales that train at the weights' own rate, final width, cosine",
                {
                    "quantization": {"weight": {"range_method": "learned"}},
                    "schedule": {"kind": "constant"},
                    "train": _COSINE | {"scale_rate": 1.0},
                },
            ),
            Method(
                "lapq",
                "LAPQ: step sizes of all layers searched together on the loss, no training",
                {"quantization": {"weight": {"range_method": "learned"}}, **_UNTRAINED},
                searches_scales=True,
            ),
            Method(
                "svdquant",
                "SVDQuant: smoothing, 16-bit low-rank branch, quantized residual; no training",
                {"quantization": _SVDQUANT, **_UNTRAINED},
            ),
            Method(
                "svdqat",
                "SVDQuant's residual and branch, both trained, cosine",
                {"quantization": _SVDQUANT, "schedule": {"kind": "constant"}, "train": _COSINE},
            ),
            Method(
                "rank-decay",
                "vanilla QAT from SVDQuant's branch, whose components are folded into the weights until none is left",
                {
                    "quantization": {"branch": {"rank": _RANK, "rank_schedule": {"kind": "linear"}}},
                    "schedule": {"kind": "constant"},
                    "train": _COSINE,
                },
            ),
            Method(
                "ditas",
                "DiTAS: smoothing gathered over the sampler's steps, branch fitted to the error; no training",
                {"quantization": {"smoothing": {"momentum": 0.9}, "branch": _DITAS_BRANCH}, **_UNTRAINED},
            ),
            Method(
                "torchao-dynamic", "torchao's dynamic quantization, no training", _PEER_UNTRAINED, "torchao-dynamic"
            ),
            Method("torchao-qat", "torchao's QATConfig, cosine", _PEER, "torchao-qat"),
            Method("torchao-parq", "torchao's PARQ, cosine", _PEER, "torchao-parq"),
        )
    }
)
"""Name -> method."""


def method_named(name: str, field: str = "methods") -> Method:
    """A method by name.

    Args:
        name: Of `METHODS`.
        field: What an error is about.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in METHODS:
        raise choice_error(field, name, METHODS)
    return METHODS[name]
