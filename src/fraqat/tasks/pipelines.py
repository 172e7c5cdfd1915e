"""Loads diffusers pipelines from a folder or the hub: safetensors only, no code from the model's repository."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from fraqat.errors import ModelError
from fraqat.tasks.families import ARCHITECTURES
from fraqat.tasks.spec import ModelSpec

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def load_pipeline(spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Loads a whole pipeline to the device that `spec` asks for.

    Args:
        spec: `source` must be a folder or a hub id (`zoo:` names are resolved by the caller).
        dtype: Precision of all weights.

    Raises:
        ModelError: Missing, truncated or pickled files, or a hub id that cannot be had; the message says what to do.
    """
    folder = Path(spec.source)
    if folder.is_dir():
        check_pipeline_folder(folder)
    elif folder.is_absolute() or spec.source.startswith((".", "~")) or spec.source.count("/") != 1:
        raise ModelError(
            f"model.source = {spec.source!r}: there is no such folder, and it is no hub id (owner/name). Fix: correct the path."
        )
    try:
        with _no_loading_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                spec.source,
                revision=spec.revision,
                variant=spec.variant,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model.source = {spec.source!r} cannot be loaded: {_first_line(error)}. Fix: check the name, your network, "
            "`hf auth login` for a gated model, and that the repository has safetensors files."
        ) from error
    _check_loaded(pipeline, spec.source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(spec.torch_device)


def check_pipeline_folder(folder: Path) -> None:
    """Checks that a local pipeline folder is whole and safe before anything of it is loaded.

    Raises:
        ModelError: No or broken `model_index.json`, a component that is missing, only pickled, or truncated.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} is no diffusers pipeline: model_index.json is missing. Fix: pass the folder that holds it."
        )
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{index} cannot be read: {_first_line(error)}. Fix: copy the model again.") from error
    if not isinstance(components, dict):
        raise ModelError(f"{index} cannot be read: it holds no mapping of components. Fix: copy the model again.")
    for name, value in components.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if not (folder / name).is_dir():
            raise ModelError(f"{folder}: component {name} is missing. Fix: copy the whole model folder.")
        _check_component(folder / name)


def _check_loaded(pipeline: DiffusionPipeline, source: str) -> None:
    """Weights that no file held stay without data: they are named instead of failing later."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            missing = [key for key, value in component.state_dict().items() if value.is_meta]
            if missing:
                raise ModelError(
                    f"{source}: {name} lacks {len(missing)} tensors, such as {missing[0]}. Fix: copy the model again."
                )


def _check_component(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    pickled = sorted(path for path in files if path.suffix in _PICKLE_SUFFIXES)
    weights = sorted(path for path in files if path.suffix == ".safetensors")
    if pickled and not weights:
        raise ModelError(
            f"{pickled[0]} is a pickle, which can run any code when it is read: it was not opened. Fix: save the model with "
            "safe_serialization=True, or use a repository with safetensors files."
        )
    config = folder / "config.json"
    if config.is_file() and not weights:
        raise ModelError(f"{folder} has a config.json but no .safetensors file. Fix: copy the model again.")
    for path in weights:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Reads the header of a safetensors file and compares it with the file's size.

    Raises:
        ModelError: The file is truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            stream.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or damaged: {_first_line(error)}. Fix: copy the file again.") from error


@contextmanager
def _no_loading_bars() -> Generator[None]:
    """The libraries' bars would break into our own progress line."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    were_on = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was_on in zip(logs, were_on, strict=True):
            if was_on:
                log.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def build_transformer(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained transformer of a supported class, float32 on the CPU.

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


def transformer_description(pipeline: DiffusionPipeline) -> tuple[str, dict[str, Any]]:
    """Class name and configuration of a pipeline's transformer, as plain JSON values."""
    config = {key: value for key, value in dict(pipeline.transformer.config).items() if not key.startswith("_")}
    return type(pipeline.transformer).__name__, json.loads(json.dumps(config))


def transformer_files(folder: Path, variant: str | None) -> list[Path]:
    """The transformer's safetensors files of one variant in a local pipeline folder."""
    found = sorted((folder / "transformer").glob("*.safetensors"))
    named = {path: path.name.removesuffix(".safetensors").split(".")[1:] for path in found}
    return [path for path, parts in named.items() if (parts[0].split("-")[0] if parts else None) == variant]


def stored_dtype(path: Path) -> str:
    """Precision of the first tensor of a safetensors file: `bf16`, `fp32`, ..."""
    with safe_open(path, framework="pt") as stream:
        name = next(iter(stream.keys()))
        return {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(stream.get_slice(name).get_dtype(), "float")
