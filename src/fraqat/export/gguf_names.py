"""Tensor names of GGUF files: a tensor of the file is one of the student's, or several stacked along the rows.

Data only, with the functions that read it. SD3 and FLUX have the names of their original checkpoints, which
stable-diffusion.cpp and ComfyUI-GGUF read; the correspondence is that of diffusers' conversion scripts
(scripts/convert_sd3_to_diffusers.py, scripts/convert_flux_to_diffusers.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fraqat.errors import config_error

PREFIX = "model.diffusion_model."
"""stable-diffusion.cpp recognises the model by names that begin so."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Args:
        name: In the file.
        sources: The student's tensors, stacked along the rows in this order.
        swaps_halves: The first half of the rows is the second in the file: shift and scale of a final modulation.
        shift: Added to every value: Gemma's norms multiply with 1 + weight.
    """

    name: str
    sources: tuple[str, ...]
    swaps_halves: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class NameTable:
    """Names of one class of models, without `.weight` and `.bias`; a name of the file that ends in `.scale` is a weight.

    Args:
        architecture: `general.architecture` of the file.
        top: File name -> the student's modules, outside of the blocks.
        blocks: Student's list -> list in the file and, for its members, file name -> the student's modules.
        swapped: File names whose halves are swapped.
        swapped_in_last: The same, in the last block of a list only.
        whole: File name -> the student's tensor, of tensors that are not a module's weight or bias.
    """

    architecture: str
    top: Mapping[str, Sequence[str]]
    blocks: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]]
    swapped: frozenset[str]
    swapped_in_last: frozenset[str]
    whole: Mapping[str, str]


def _attention(file: str, ours: str, names: Sequence[str], out: str) -> dict[str, Sequence[str]]:
    return {f"{file}.qkv": [f"{ours}.{name}" for name in names], f"{file}.proj": [f"{ours}.{out}"]}


_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

_SD3_BLOCK: Mapping[str, Sequence[str]] = {
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
    **_attention("x_block.attn", "attn", _IMAGE, "to_out.0"),
    **_attention("context_block.attn", "attn", _TEXT, "to_add_out"),
    **_attention("x_block.attn2", "attn2", _IMAGE, "to_out.0"),
    "x_block.attn.ln_q": ["attn.norm_q"],
    "x_block.attn.ln_k": ["attn.norm_k"],
    "context_block.attn.ln_q": ["attn.norm_added_q"],
    "context_block.attn.ln_k": ["attn.norm_added_k"],
    "x_block.attn2.ln_q": ["attn2.norm_q"],
    "x_block.attn2.ln_k": ["attn2.norm_k"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}

_FLUX_DOUBLE: Mapping[str, Sequence[str]] = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    **_attention("img_attn", "attn", _IMAGE, "to_out.0"),
    **_attention("txt_attn", "attn", _TEXT, "to_add_out"),
    "img_attn.norm.query_norm.scale": ["attn.norm_q"],
    "img_attn.norm.key_norm.scale": ["attn.norm_k"],
    "txt_attn.norm.query_norm.scale": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm.scale": ["attn.norm_added_k"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}

_FLUX_SINGLE: Mapping[str, Sequence[str]] = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm.scale": ["attn.norm_q"],
    "norm.key_norm.scale": ["attn.norm_k"],
}

_FINAL: Mapping[str, Sequence[str]] = {
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}


def _embedders(file: Mapping[str, str], first: str, second: str) -> dict[str, Sequence[str]]:
    return {
        f"{target}.{layer}": [f"time_text_embed.{ours}.linear_{i}"]
        for target, ours in file.items()
        for i, layer in ((1, first), (2, second))
    }


NAME_TABLES: Mapping[str, NameTable] = MappingProxyType(
    {
        "SD3Transformer2DModel": NameTable(
            "sd3",
            {
                **_embedders({"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}, "mlp.0", "mlp.2"),
                "context_embedder": ["context_embedder"],
                "x_embedder.proj": ["pos_embed.proj"],
                **_FINAL,
            },
            {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)},
            frozenset({"final_layer.adaLN_modulation.1"}),
            frozenset({"context_block.adaLN_modulation.1"}),
            {"pos_embed": "pos_embed.pos_embed"},
        ),
        "FluxTransformer2DModel": NameTable(
            "flux",
            {
                **_embedders(
                    {
                        "time_in": "timestep_embedder",
                        "vector_in": "text_embedder",
                        "guidance_in": "guidance_embedder",
                    },
                    "in_layer",
                    "out_layer",
                ),
                "txt_in": ["context_embedder"],
                "img_in": ["x_embedder"],
                **_FINAL,
            },
            {
                "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
                "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
            },
            frozenset({"final_layer.adaLN_modulation.1"}),
            frozenset(),
            {},
        ),
    }
)
"""Class of the student -> names."""


def diffusion_tensors(table: NameTable, names: Sequence[str]) -> list[FileTensor]:
    """What a diffusion transformer's file holds.

    Args:
        table: Of the student's class.
        names: The student's tensors.

    Raises:
        ConfigError: A tensor has no place, or one of those that are stacked is missing.
    """
    known = set(names)
    found = [FileTensor(PREFIX + file, (ours,)) for file, ours in table.whole.items() if ours in known]
    found += _tensors("", "", table.top, table.swapped, known)
    for ours, (file, entries) in table.blocks.items():
        indices = sorted({int(m[1]) for name in names if (m := re.match(rf"{ours}\.(\d+)\.", name))})
        for i in indices:
            swapped = table.swapped_in_last if i == indices[-1] else frozenset[str]()
            found += _tensors(f"{file}.{i}.", f"{ours}.{i}.", entries, swapped, known)
    check_complete(found, names)
    return found


def check_complete(found: Sequence[FileTensor], names: Sequence[str]) -> None:
    """Refuses a model with tensors that the file has no name for.

    Raises:
        ConfigError: There is one.
    """
    mapped = {source for tensor in found for source in tensor.sources}
    left = [name for name in names if name not in mapped]
    if left:
        raise config_error(
            "tensor", left[0], allowed="tensors that the runtime has a name for", fix="use another target"
        )


def _tensors(
    file: str, ours: str, entries: Mapping[str, Sequence[str]], swapped: frozenset[str], known: set[str]
) -> Iterator[FileTensor]:
    for target, modules in entries.items():
        is_scale = target.endswith(".scale")
        for kind in ("weight",) if is_scale else ("weight", "bias"):
            sources = tuple(f"{ours}{module}.{kind}" for module in modules)
            present = [source for source in sources if source in known]
            if not present:
                continue
            if len(present) < len(sources):
                missing = next(source for source in sources if source not in known)
                raise config_error("tensor", missing, allowed=f"all of {', '.join(sources)}", fix="use another target")
            name = f"{PREFIX}{file}{target}" + ("" if is_scale else f".{kind}")
            yield FileTensor(name, sources, swaps_halves=target in swapped)
