"""CLIP of transformers as a judge of images: embeddings of images and texts, and the layers of the image encoder."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fraqat.errors import ModelError
from fraqat.tasks.loading import check_component, explain_loading, is_folder
from fraqat.tasks.spec import ModelSpec

_FIELD = "source of a CLIP model"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImages:
    """The image half of CLIP (`CLIPVisionModelWithProjection`).

    Images are resized bicubically with antialiasing so that the shorter side is the model's, cut to their middle, and scaled
    by OpenAI's mean and deviation, which most CLIP models share. transformers' own preparation rounds to 8 bits in between.

    Args:
        model: In evaluation mode; also `CLIPModel`.
        device: Where it computes.
    """

    def __init__(self, model: Any, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        config = model.config
        self._size = int(getattr(config, "vision_config", config).image_size)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Projected embeddings [N, D], not normalized, of images [N, 3, H, W] in [-1, 1]; on the CPU."""
        return self._model.visual_projection(self._encoded(images).pooler_output).float().cpu()

    @torch.no_grad()
    def layers(self, images: Tensor) -> Sequence[Tensor]:
        """Outputs [N, C, tokens] of the encoder's layers for images [N, 3, H, W] in [-1, 1]."""
        return [states.transpose(1, 2).float() for states in self._encoded(images).hidden_states[1:]]

    def _encoded(self, images: Tensor) -> Any:
        return self._model.vision_model(pixel_values=self.prepared(images), output_hidden_states=True)

    def prepared(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] as the model takes them, [N, 3, S, S]."""
        height, width = images.shape[-2:]
        ratio = self._size / min(height, width)
        shape = (max(self._size, round(height * ratio)), max(self._size, round(width * ratio)))
        pixels = ((images.to(self._device).float() + 1) / 2).clamp(0, 1)
        if shape != (height, width):
            pixels = F.interpolate(pixels, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - self._size) // 2, (shape[1] - self._size) // 2
        middle = pixels[..., top : top + self._size, left : left + self._size]
        mean, std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (_MEAN, _STD))
        return (middle - mean) / std


class Clip(ClipImages):
    """Both halves of CLIP (`CLIPModel`).

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        device: Where it computes.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str = "cpu"):
        super().__init__(model, device)
        self._tokenizer = tokenizer
        self._num_tokens = int(model.config.text_config.max_position_embeddings)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Projected embeddings [N, D], not normalized, of texts, which are cut off at the model's length (77 tokens)."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._num_tokens, return_tensors="pt"
        ).to(self._device)
        encoded = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return self._model.text_projection(encoded.pooler_output).float().cpu()


def load_clip_images(source: str, *, revision: str | None = None, device: torch.device | str = "cpu") -> ClipImages:
    """Loads the image half of a CLIP model.

    Args:
        source: Folder or hub id, such as `openai/clip-vit-large-patch14-336`, with safetensors files.
        revision: Branch, tag or commit of the hub.
        device: Where it computes.

    Raises:
        ModelError: It cannot be loaded, is no CLIP, or lacks weights.
    """
    return ClipImages(_load("CLIPVisionModelWithProjection", source, revision), device)


def load_clip(source: str, *, revision: str | None = None, device: torch.device | str = "cpu") -> Clip:
    """Loads a CLIP model with its tokenizer; as `load_clip_images`."""
    model = _load("CLIPModel", source, revision)
    with _explained(ModelSpec(source, revision=revision)):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, revision=revision or "main")
    return Clip(model, tokenizer, device)


def _load(class_name: str, source: str, revision: str | None) -> Any:
    spec = ModelSpec(source, revision=revision)
    with _explained(spec):
        if is_folder(spec):
            _check_folder(Path(source))
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    allowed = ("clip",) if class_name == "CLIPModel" else ("clip", "clip_vision_model")
    if config.model_type not in allowed:
        raise ModelError(
            f"{_FIELD} = {source!r} is a model of type {config.model_type!r}: allowed is {' or '.join(allowed)}. Fix: name a "
            "CLIP model of transformers, such as openai/clip-vit-large-patch14."
        )
    with _explained(spec):
        model, found = getattr(transformers, class_name).from_pretrained(
            source, revision=revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{_FIELD} = {source!r} lacks {len(missing)} tensors of {class_name}, such as {missing[0]}. Fix: use a CLIP model "
            "with both halves and projections, or copy it again."
        )
    return model


@contextmanager
def _explained(spec: ModelSpec) -> Generator[None]:
    """`explain_loading` with the name that the field has here, and without transformers' list of the other half's tensors."""
    log: Any = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        with explain_loading(spec):
            yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.source", _FIELD)) from error
    finally:
        log.set_verbosity(level)


def _check_folder(folder: Path) -> None:
    """Checks that a folder holds a model's configuration and whole safetensors files."""
    path = folder / "config.json"
    try:
        json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or damaged ({error}). Fix: copy the model again.") from error
    check_component(folder)
