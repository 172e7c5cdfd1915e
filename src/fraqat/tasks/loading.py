"""What loading a pipeline, a language model and a speech model share: safe files only, and errors that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode, model_info, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn

from fraqat.data.hub import transport_errors, why_no_answer
from fraqat.errors import ModelError
from fraqat.tasks.spec import ModelSpec

_INDEX_FILES = ("model_index.json", "config.json")
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def is_folder(spec: ModelSpec) -> bool:
    """Whether `source` is a local folder; otherwise it is a hub id.

    Raises:
        ModelError: It is neither.
    """
    folder = Path(spec.source)
    if folder.is_dir():
        return True
    if folder.is_absolute() or spec.source.startswith((".", "~")) or spec.source.count("/") != 1:
        raise ModelError(
            f"model.source = {spec.source!r}: there is no such folder, and it is no hub id (owner/name). Fix: correct the path."
        )
    return False


def hub_commit(spec: ModelSpec) -> str:
    """Commit that a hub id means now, or without a network in the local cache.

    Raises:
        ModelError: Neither is known.
    """
    try:
        return str(model_info(spec.source, revision=spec.revision).sha)
    except RepositoryNotFoundError as error:  # a gated one is a kind of it
        raise ModelError(
            f"model.source = {spec.source!r} cannot be had: {first_line(error)}. Fix: {_advice(error, spec)}"
        ) from error
    except (OSError, OfflineModeIsEnabled, *transport_errors()) as error:
        if commit := _cached_commit(spec.source, spec.revision):
            return commit
        raise _not_here(spec, first_line(error)) from error


def _cached_commit(hub_id: str, revision: str | None) -> str | None:
    """Commit that the local cache has of a hub id."""
    for name in _INDEX_FILES:
        found = try_to_load_from_cache(hub_id, name, revision=revision or "main")
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _not_here(spec: ModelSpec, cause: str) -> ModelError:
    return ModelError(
        f"model.source = {spec.source!r} cannot be had: there is no such folder, it is not in the local cache, and "
        f"{constants.ENDPOINT} cannot be reached ({cause}). Fix: connect to the network and unset HF_HUB_OFFLINE, give a "
        f"local folder of the model, or download it first with `hf download {spec.source}`."
    )


def _is_hub_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not Path(source).exists()


def why_unreachable(hub_id: str, revision: str | None) -> str | None:
    """Why a model of the hub cannot be had at all; None where the hub answers, or where nobody needs to ask it.

    Args:
        hub_id: What is no hub id is left to those that look for it.
        revision: Branch, tag or commit.
    """
    if not _is_hub_id(hub_id) or is_offline_mode() or _cached_commit(hub_id, revision):
        return None
    return why_no_answer()


@contextmanager
def explain_loading(spec: ModelSpec) -> Generator[None]:
    """Turns what the libraries raise while loading into one `ModelError` that says what to do."""
    if cause := why_unreachable(spec.source, spec.revision):
        raise _not_here(spec, cause)
    try:
        with _no_loading_bars():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.source = {spec.source!r} cannot be loaded: {first_line(error)}. Fix: {_advice(error, spec)}"
        ) from error


def _advice(error: BaseException, spec: ModelSpec) -> str:
    """What to do, from the cause that the libraries wrapped."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(item) for item in causes)
    if any(isinstance(item, GatedRepoError) for item in causes) or "gated repo" in text:
        return f"accept the licence on https://huggingface.co/{spec.source} in your browser, then run `hf auth login` here."
    if any(isinstance(item, OfflineModeIsEnabled | LocalEntryNotFoundError) for item in causes) or "offline" in text:
        return (
            f"connect to the network and unset HF_HUB_OFFLINE, or download it first with `hf download {spec.source}`."
        )
    if spec.variant is not None and "variant" in text:
        return f"use a variant that the repository has instead of {spec.variant!r}, or leave model.variant out."
    return "check the name, your network, `hf auth login` for a gated model, and that the repository has safetensors files."


def check_component(folder: Path) -> None:
    """Checks that the weights of one model folder are safetensors and whole.

    Raises:
        ModelError: Only a pickle, no weights beside a config.json, or a truncated file.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    pickled = sorted(path for path in files if path.suffix in _PICKLE_SUFFIXES)
    weights = sorted(path for path in files if path.suffix == ".safetensors")
    if pickled and not weights:
        raise ModelError(
            f"{pickled[0]} is a pickle, which can run any code when it is read: it was not opened. Fix: save the model with "
            "safe_serialization=True, or use a repository with safetensors files."
        )
    if (folder / "config.json").is_file() and not weights:
        raise ModelError(f"{folder} has a config.json but no .safetensors file. Fix: copy the model again.")
    for path in weights:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Reads the header of a safetensors file and compares it with the file's size.

    Raises:
        ModelError: The file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            stream.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or damaged: {first_line(error)}. Fix: copy the file again.") from error


def check_complete(module: nn.Module, what: str) -> None:
    """Names weights that no file held, which would fail later.

    Raises:
        ModelError: A tensor has no data.
    """
    missing = [key for key, value in module.state_dict().items() if value.is_meta]
    if missing:
        raise ModelError(f"{what} lacks {len(missing)} tensors, such as {missing[0]}. Fix: copy the model again.")


def stored_dtype(path: Path) -> str:
    """Precision of the first tensor of a safetensors file: `bf16`, `fp32`, ..."""
    with safe_open(path, framework="pt") as stream:
        name = next(iter(stream.keys()))
        return {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(stream.get_slice(name).get_dtype(), "float")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one variant in a model folder."""
    found = sorted(folder.glob("*.safetensors"))
    named = {path: path.name.removesuffix(".safetensors").split(".")[1:] for path in found}
    return [path for path, parts in named.items() if (parts[0].split("-")[0] if parts else None) == variant]


@contextmanager
def _no_loading_bars() -> Generator[None]:
    """The libraries' bars would break into our own progress line."""
    logs: list[Any] = [sys.modules[name].utils.logging for name in ("diffusers", "transformers") if name in sys.modules]
    were_on = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was_on in zip(logs, were_on, strict=True):
            if was_on:
                log.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the full stop."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
