"""Loads diffusers pipelines from a folder or the hub: safetensors only, no code from the model's repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fraqat.errors import ModelError
from fraqat.tasks.families import ARCHITECTURES, architecture_named
from fraqat.tasks.loading import (
    check_complete,
    check_component,
    check_safetensors,
    explain_loading,
    first_line,
    is_folder,
)
from fraqat.tasks.spec import ModelSpec

_INDEX = "model_index.json"


def load_pipeline(
    spec: ModelSpec, *, dtype: torch.dtype = torch.float32, transformer: nn.Module | None = None
) -> DiffusionPipeline:
    """Loads a whole pipeline to the device that `spec` asks for.

    Args:
        spec: `source` must be a folder or a hub id (`zoo:` names are resolved by the caller).
        dtype: Precision of all weights.
        transformer: Use this one, in its own precision, instead of loading the pipeline's.

    Raises:
        ModelError: Missing, truncated or pickled files, or a hub id that cannot be had; the message says what to do.
    """
    if is_folder(spec):
        check_pipeline_folder(Path(spec.source))
    if transformer is None and spec.single_file is not None:
        transformer = load_transformer(spec, dtype=dtype)
    given = {} if transformer is None else {"transformer": transformer}
    with explain_loading(spec):
        pipeline = DiffusionPipeline.from_pretrained(
            spec.source,
            revision=spec.revision,
            variant=spec.variant,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **given,
        )
    if transformer is not None:
        pipeline.register_modules(
            transformer=transformer
        )  # where it is optional, from_pretrained loads its own all the same
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            check_complete(component, f"{spec.source}: {name}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(spec.torch_device)


def load_transformer(spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads the transformer of a pipeline alone, to the device that `spec` asks for.

    Args:
        spec: As in `load_pipeline`; with `single_file`, weights come from there and only the configuration from `source`.
        dtype: Precision of its weights.

    Raises:
        ModelError: As in `load_pipeline`, a class without an entry in the table, or a single file that diffusers cannot map
            to the class.
    """
    name = transformer_class(spec)
    architecture_named(name)
    model_class = getattr(diffusers, name)
    if is_folder(spec) and spec.single_file is None:
        check_component(Path(spec.source) / "transformer")
    with explain_loading(spec):
        if spec.single_file is None:
            model = model_class.from_pretrained(
                spec.source,
                subfolder="transformer",
                revision=spec.revision,
                variant=spec.variant,
                dtype=dtype,
                use_safetensors=True,
            )
        else:
            model = _load_single_file(model_class, spec, dtype)
    check_complete(model, f"{spec.source}: transformer")
    return model.to(spec.torch_device)


def _load_single_file(model_class: Any, spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    path = Path(cast(str, spec.single_file))
    if path.suffix != ".safetensors":
        raise ModelError(f"model.single_file = {str(path)!r}: allowed is a .safetensors file. Fix: convert it first.")
    if not hasattr(model_class, "from_single_file"):
        raise ModelError(
            f"model.single_file = {str(path)!r}: diffusers cannot read {model_class.__name__} from one file. Fix: use the "
            "diffusers folder of the model."
        )
    check_safetensors(path)
    return model_class.from_single_file(
        str(path), config=spec.source, subfolder="transformer", revision=spec.revision, torch_dtype=dtype
    )


def transformer_class(spec: ModelSpec) -> str:
    """Class name of a pipeline's transformer, from `model_index.json` alone.

    Raises:
        ModelError: There is no such file, or the pipeline has no transformer.
    """
    if is_folder(spec):
        check_pipeline_folder(Path(spec.source))
    with explain_loading(spec):
        index = cast(dict[str, Any], DiffusionPipeline.load_config(spec.source, revision=spec.revision))
    entry = index.get("transformer")
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and entry[1]):
        names = ", ".join(name for name in index if not name.startswith("_"))
        raise ModelError(
            f"model.source = {spec.source!r} has no transformer, only {names}. Fix: choose a diffusion transformer pipeline; "
            "U-Nets are not supported."
        )
    return str(entry[1])


def check_pipeline_folder(folder: Path) -> None:
    """Checks that a local pipeline folder is whole and safe before anything of it is loaded.

    Raises:
        ModelError: No or broken `model_index.json`, a component that is missing, only pickled, or truncated.
    """
    index = folder / _INDEX
    if not index.is_file():
        raise ModelError(f"{folder} is no diffusers pipeline: {_INDEX} is missing. Fix: pass the folder that holds it.")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}. Fix: copy the model again.") from error
    if not isinstance(components, dict):
        raise ModelError(f"{index} cannot be read: it holds no mapping of components. Fix: copy the model again.")
    for name, value in components.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if not (folder / name).is_dir():
            raise ModelError(f"{folder}: component {name} is missing. Fix: copy the whole model folder.")
        check_component(folder / name)


def build_transformer(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained transformer of a supported class, float32, on the device that is torch's default.

    Args:
        class_name: A key of `ARCHITECTURES`.
        config: The class's configuration, as diffusers saves it.

    Raises:
        ModelError: The class is not supported.
    """
    if class_name not in ARCHITECTURES:
        raise ModelError(f"transformer class {class_name} is not supported: allowed is {', '.join(ARCHITECTURES)}.")
    model_class = getattr(diffusers, class_name)
    return model_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def transformer_description(transformer: nn.Module) -> tuple[str, dict[str, Any]]:
    """Class name and configuration of a transformer, as plain JSON values; `_class_name` is in it, as diffusers saves it."""
    config = {key: value for key, value in dict(cast(Any, transformer).config).items() if not key.startswith("_")}
    name = type(transformer).__name__
    return name, {"_class_name": name, **json.loads(json.dumps(config))}
