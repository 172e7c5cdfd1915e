"""CLIP as a judge, on random weights: against transformers' own calls, and the scores against their formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fraqat.errors import ConfigError, ModelError
from fraqat.evaluation import lpips_like
from fraqat.evaluation.clip_scores import clip_iqa_scores, clip_scores
from fraqat.tasks.clip import load_clip, load_clip_images

PROMPTS = ("a red one", "good photo.", "b")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_embeddings_equal_transformers_own(tiny_clip: Path, images: Tensor) -> None:
    clip = load_clip(str(tiny_clip))
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(tiny_clip)(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=clip.prepared(images), **tokens)
    for found, wanted in (
        (clip.features(images), output.image_embeds),
        (clip.text_features(PROMPTS), output.text_embeds),
    ):
        assert torch.allclose(found / found.norm(dim=1, keepdim=True), wanted, atol=1e-6)
    cosines = clip_scores(images, PROMPTS, clip) / 100
    scale = float(model.logit_scale.detach().exp())
    logits = output.logits_per_image.diagonal() / scale
    assert torch.allclose(cosines.float(), logits.clamp(min=0), atol=1e-6)
    assert float(cosines.max()) > 0.01
    assert clip.logit_scale == pytest.approx(scale)


def test_images_are_prepared_as_transformers_prepares_them(tiny_clip: Path) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.avg_pool2d(image, 9, 1, 4)  # smooth, as pictures are
    image = ((image - 0.5) * 3).clamp(0, 1)
    image = (image * 255).round() / 255
    size = {"shortest_edge": 32}
    processor = transformers.CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    wanted = processor(images=[pixels], return_tensors="pt")["pixel_values"]
    found = load_clip_images(str(tiny_clip)).prepared(image * 2 - 1)
    assert found.shape == wanted.shape == (1, 3, 32, 32)
    assert float((found - wanted).abs().max()) < 0.02  # a step of 8 bits is 0.015


def test_oblong_images_lose_their_ends(tiny_clip: Path) -> None:
    clip = load_clip_images(str(tiny_clip))
    image = torch.zeros(1, 3, 32, 64)
    marked = image.clone()
    marked[..., :16] = marked[..., 48:] = 1
    assert torch.equal(clip.prepared(image), clip.prepared(marked))
    assert clip.prepared(torch.zeros(1, 3, 20, 33)).shape == (1, 3, 32, 32)


def test_the_image_half_alone_gives_the_same_and_its_layers(tiny_clip: Path, images: Tensor) -> None:
    half, whole = load_clip_images(str(tiny_clip)), load_clip(str(tiny_clip))
    assert torch.equal(half.features(images), whole.features(images))
    assert [tuple(x.shape) for x in half.layers(images)] == [(3, 16, 17)] * 3
    distances = lpips_like(images, images.flip(0), half)
    assert float(distances[1]) == 0.0
    assert float(distances[0]) == pytest.approx(float(distances[2]))
    assert 0 < float(distances[0]) < 4


def test_clip_iqa_is_the_softmax_of_two_prompts(tiny_clip: Path, images: Tensor) -> None:
    clip = load_clip(str(tiny_clip))
    good, bad = "good photo.", "bad photo."
    found = clip_iqa_scores(images, (good, bad), clip)
    x, texts = clip.features(images).double(), clip.text_features((good, bad)).double()
    for i in range(3):
        logits = [clip.logit_scale * float(torch.cosine_similarity(x[i], text, dim=0)) for text in texts]
        assert float(found[i]) == pytest.approx(1 / (1 + 2.718281828459045 ** (logits[1] - logits[0])), rel=1e-5)
    assert torch.allclose(clip_iqa_scores(images, (bad, good), clip), 1 - found)


def test_scores_need_a_prompt_per_image(tiny_clip: Path, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"prompts = 2 .* 3, one per image"):
        clip_scores(images, PROMPTS[:2], load_clip(str(tiny_clip)))


def test_long_prompts_are_cut_off(tiny_clip: Path) -> None:
    clip = load_clip(str(tiny_clip))
    assert torch.equal(clip.text_features(["a " * 100]), clip.text_features(["a " * 50]))


def test_what_is_no_clip_or_lacks_weights_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"source of a CLIP model = '\./nowhere': there is no such folder"):
        load_clip("./nowhere")
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ModelError, match="type 'bert': allowed is clip"):
        load_clip(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is missing or damaged"):
        load_clip(str(other))
    half = tmp_path / "half"
    transformers.CLIPVisionModelWithProjection.from_pretrained(tiny_clip).save_pretrained(half)
    assert load_clip_images(str(half)).features(torch.zeros(1, 3, 32, 32)).shape == (1, 12)
    with pytest.raises(ModelError, match="type 'clip_vision_model': allowed is clip"):
        load_clip(str(half))
    lacking = tmp_path / "lacking"
    shutil.copytree(tiny_clip, lacking)
    state = load_file(lacking / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of CLIPModel, such as text_projection\.weight"):
        load_clip(str(lacking))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_clip / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a pickle"):
        load_clip_images(str(pickled))
