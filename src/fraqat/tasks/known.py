"""Configurations of models without their weights: a table of published ones, local folders, and the hub.

With them a model is built on the meta device at full size before anything is downloaded: `KNOWN_MODELS` holds, per hub id,
what the hub's own `config.json` says about the part that is quantized. Importing this module loads neither diffusers nor
transformers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from fraqat.errors import ModelError

_DATA_FOLDER = "known_models"
_INDEX = "model_index.json"
_NOT_CACHED = "it is not in the local cache, and the hub cannot be reached"
_QUANTIZED_COMPONENTS = ("transformer", "unet")
_TEXT_LENGTH_KEYS = ("max_text_positions", "max_position_embeddings")
_LATENT_CHANNEL_KEYS = ("latent_channels", "z_dim")
_SCALE_FACTOR_KEYS = ("scale_factor_spatial", "spatial_compression_ratio")
_BLOCK_KEYS = ("encoder_block_out_channels", "block_out_channels", "dim_mult")

_Reader = Callable[[str], dict[str, Any] | None]
"""Relative file name -> its JSON object, None if the model has no such file."""


@dataclass(frozen=True)
class KnownModel:
    """What is needed to build the quantized part of a model and to know the shapes of its inputs.

    Args:
        source: Hub id or folder.
        library: Home of the class.
        component: Subfolder of a pipeline, empty for a model that is no pipeline.
        class_name: Class of the quantized part.
        config: Its configuration, as `config.json` has it.
        vae_scale_factor: Pixels per latent along one side; None without images.
        latent_channels: Channels of the latents before a transformer packs them; None without images.
        text_length: Tokens that prompts are padded to (all encoders together); for language and speech models the longest
            text. None if the configuration does not say.
    """

    source: str
    library: Literal["diffusers", "transformers"]
    component: str
    class_name: str
    config: Mapping[str, Any]
    vae_scale_factor: int | None = None
    latent_channels: int | None = None
    text_length: int | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model on the meta device; see `build_on_meta`."""
        return build_on_meta(self.class_name, self.config, dtype)


def _load_table() -> Mapping[str, KnownModel]:
    folder = resources.files("fraqat.tasks") / _DATA_FOLDER
    values = [json.loads(item.read_text(encoding="utf-8")) for item in folder.iterdir() if item.name.endswith(".json")]
    models = [KnownModel(source=value.pop("hub_id"), **value) for value in values]
    return MappingProxyType({model.source: model for model in sorted(models, key=lambda model: model.source.lower())})


KNOWN_MODELS: Mapping[str, KnownModel] = _load_table()
"""Hub id -> configuration, for dry runs without a network. One JSON file each in `known_models/`."""


def known_model(hub_id: str) -> KnownModel | None:
    """The table's entry for a hub id, or None."""
    return KNOWN_MODELS.get(hub_id)


def describe_model(source: str, revision: str | None = None) -> KnownModel:
    """The configuration of any model, without its weights.

    Args:
        source: Folder of a diffusers pipeline or of a transformers model, or a hub id. A hub id of `KNOWN_MODELS` is answered
            from the table unless a revision is asked for; of any other one the configuration files alone are downloaded.
        revision: Of a hub id.

    Raises:
        ModelError: No such folder or hub id, a damaged file, no network; the message says what to do.
    """
    folder = Path(source)
    if folder.is_dir():
        return _describe(source, lambda name: _read_json(folder / name))
    entry = known_model(source)
    if entry is not None and revision is None:
        return entry
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise ModelError(
            f"model.source = {source!r}: there is no such folder, and it is no hub id (owner/name). Fix: correct the path."
        )
    from fraqat.tasks.loading import why_unreachable

    if cause := why_unreachable(source, revision):
        raise _hub_error(source, _INDEX, f"{_NOT_CACHED} ({cause})")
    return _describe(source, lambda name: _download_json(source, name, revision))


def build_on_meta(class_name: str, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Builds a model on the meta device: shapes and names without memory.

    Args:
        class_name: A model class of diffusers or transformers.
        config: Its configuration, as `config.json` has it.
        dtype: Precision of parameters and floating buffers.

    Raises:
        ModelError: Neither library is installed or has the class, or the configuration does not fit it.
    """
    model_class = _model_class(class_name)
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            if hasattr(model_class, "config_class") and model_class.config_class is not None:
                model = model_class(model_class.config_class.from_dict(values))
            else:
                model = model_class.from_config(values)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{class_name} cannot be built from its configuration: {_first_line(error)}. Fix: check config.json, and that "
            "diffusers and transformers are new enough for it."
        ) from error
    return nn.Module.to(model, dtype=dtype)  # diffusers' own `to` warns about parts it would keep in float32


def _model_class(class_name: str) -> Any:
    for library in ("diffusers", "transformers"):
        try:
            found = getattr(importlib.import_module(library), class_name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    raise ModelError(
        f"model class {class_name} is in neither diffusers nor transformers as they are installed here. Fix: "
        "pip install 'fraqat[diffusion]', or a newer version that has the class."
    )


def _describe(source: str, read: _Reader) -> KnownModel:
    index = read(_INDEX)
    if index is not None:
        return _describe_pipeline(source, index, read)
    config = read("config.json")
    if config is None:
        raise ModelError(
            f"{source} has neither model_index.json nor config.json. Fix: pass a diffusers pipeline or a transformers model."
        )
    if "_class_name" in config:
        return KnownModel(source, "diffusers", "", config["_class_name"], config)
    names = config.get("architectures")
    if not names:
        raise ModelError(f"{source}/config.json names no class under `architectures`. Fix: add the model's class name.")
    text_length = _first_value(config, _TEXT_LENGTH_KEYS)
    return KnownModel(source, "transformers", "", names[0], config, text_length=text_length)


def _describe_pipeline(source: str, index: dict[str, Any], read: _Reader) -> KnownModel:
    component = next((name for name in _QUANTIZED_COMPONENTS if index.get(name)), None)
    if component is None:
        raise ModelError(
            f"{source}/model_index.json names no {' or '.join(_QUANTIZED_COMPONENTS)}. Fix: pass a pipeline that has one."
        )
    config = read(f"{component}/config.json")
    if config is None:
        raise ModelError(f"{source}: {component}/config.json is missing. Fix: copy the whole model folder.")
    vae = (read("vae/config.json") if index.get("vae") else None) or {}
    return KnownModel(
        source,
        "diffusers",
        component,
        index[component][1],
        config,
        vae_scale_factor=_scale_factor(vae),
        latent_channels=_first_value(vae, _LATENT_CHANNEL_KEYS),
    )


def _scale_factor(vae: Mapping[str, Any]) -> int | None:
    """Pixels per latent: as the configuration says, or one halving between every two of its blocks."""
    stated = _first_value(vae, _SCALE_FACTOR_KEYS)
    blocks = next((vae[key] for key in _BLOCK_KEYS if isinstance(vae.get(key), list | tuple)), None)
    return stated if stated is not None or blocks is None else 2 ** (len(blocks) - 1)


def _first_value(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {_first_line(error)}. Fix: copy the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} cannot be read: it holds no mapping. Fix: copy the model again.")
    return value


def _download_json(hub_id: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """One small file of the hub, from the local cache where it lies already."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(hub_id, name, revision=revision)
    except LocalEntryNotFoundError as error:
        raise _hub_error(hub_id, name, _NOT_CACHED) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _hub_error(hub_id, name, _first_line(error)) from error
    return _read_json(Path(path))


def _hub_error(hub_id: str, name: str, cause: str) -> ModelError:
    known = ", ".join(KNOWN_MODELS)
    return ModelError(
        f"model.source = {hub_id!r}: {hub_id}/{name} cannot be had: {cause}. Fix: check the name and your network, "
        "unset HF_HUB_OFFLINE, `hf auth login` for a gated model; "
        f"without a network give a local folder that holds the configuration files, or one of {known}."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
