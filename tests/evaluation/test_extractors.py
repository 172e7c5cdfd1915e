"""Laws of the extractors that need no download: Inception from a file, torchmetrics' by a stand-in, the classifier."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fraqat.errors import ConfigError, ModelError
from fraqat.evaluation import ColorDigitsJudge, ExtractorSpec, ScoreSpec, lpips_like
from fraqat.evaluation.image import EvaluationSpec
from fraqat.evaluation.inception import (
    InceptionExtractor,
    InceptionV3,
    TorchmetricsExtractor,
    as_bytes,
    load_inception,
)
from fraqat.evaluation.perceptual import layer_distances
from fraqat.zoo import zoo_path

pytestmark = pytest.mark.xdist_group("inception")  # one worker makes the network


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """Random weights, with batch statistics that are not those of an untrained network."""
    torch.manual_seed(0)
    network = InceptionV3().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.05, 0.2)
            module.running_mean.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published(network: InceptionV3) -> dict[str, Tensor]:
    """The state dict as it is published: with a classifier, without counts of batches."""
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def test_inception_has_the_published_networks_parameters_and_stages(network: InceptionV3) -> None:
    # torchvision documents 27,161,264 with 1000 classes, of which 3,326,696 are of the auxiliary head
    num_classifier = 1008 * 2049
    assert sum(p.numel() for p in network.parameters()) + num_classifier == 27_161_264 - 3_326_696 + 8 * 2049
    with torch.no_grad():
        stages = network(torch.zeros(1, 3, 299, 299))
    assert [tuple(x.shape) for x in stages] == [(1, 64, 73, 73), (1, 192, 35, 35), (1, 768, 17, 17), (1, 2048, 8, 8)]


def test_poolings_leave_padding_out_and_the_last_one_takes_the_largest(network: InceptionV3) -> None:
    ones = torch.ones(1, 192, 6, 6)
    found = network.Mixed_5b(ones)[:, -32:]
    assert torch.allclose(found, network.Mixed_5b.branch_pool(ones))  # zeros of the padding would show at the border
    x = torch.randn(1, 2048, 4, 4)
    largest = network.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))
    assert torch.allclose(network.Mixed_7c(x)[:, -192:], largest)
    middle = torch.randn(1, 1280, 4, 4)
    average = network.Mixed_7b.branch_pool(F.avg_pool2d(middle, 3, 1, 1, count_include_pad=False))
    assert torch.allclose(network.Mixed_7b(middle)[:, -192:], average)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_inception_loads_the_published_names_from_both_kinds_of_file(
    network: InceptionV3, images: Tensor, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"inception{suffix}"
    state = published(network)
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    features = InceptionExtractor(load_inception(file)).features(images)
    assert features.shape == (2, 2048)
    assert torch.equal(features, InceptionExtractor(network).features(images))
    assert float((features[0] - features[1]).abs().max()) > 1e-4


def test_features_are_those_of_the_stored_picture(network: InceptionV3, images: Tensor) -> None:
    extractor = InceptionExtractor(network)
    stored = as_bytes(images).float() / 127.5 - 1
    assert torch.equal(extractor.features(images), extractor.features(stored))
    assert as_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm-was-done"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, protocol in (("whole.pth", None), ("plain.pt", 2)):
        if protocol is None:
            torch.save({"fc.weight": Harmful()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Harmful(), protocol=protocol))
        with pytest.raises(ModelError, match="cannot be read as tensors alone"):
            load_inception(tmp_path / name)
    assert not (tmp_path / "harm-was-done").exists()


def test_other_weights_and_missing_files_are_refused(network: InceptionV3, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no file"):
        load_inception(tmp_path / "nowhere.pth")
    state = published(network)
    del state["Mixed_6a.branch3x3.conv.weight"]
    save_file(state | {"AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="1 tensors are missing and 1 are others, such as AuxLogits"):
        load_inception(tmp_path / "other.safetensors")
    wrong = published(network) | {"Mixed_6a.branch3x3.bn.bias": torch.zeros(3)}
    save_file(wrong, tmp_path / "shape.safetensors")
    with pytest.raises(ModelError, match="other shapes"):
        load_inception(tmp_path / "shape.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="no state dict"):
        load_inception(tmp_path / "list.pth")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        load_inception(tmp_path / "empty.safetensors")


def test_without_torchmetrics_the_error_names_the_extra_and_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ConfigError, match=r"pip install 'fraqat\[metrics\]', or set source"):
        TorchmetricsExtractor()


def test_torchmetrics_is_given_bytes(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    class Network(nn.Module):
        def __init__(self, name: str, features_list: list[str]):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.uint8
            return x.double().flatten(1)[:, :2048]

    package: Any = ModuleType("torchmetrics.image.fid")
    package.NoTrainInceptionV3 = Network
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", package)
    features = TorchmetricsExtractor().features(images)
    assert features.dtype == torch.float32
    assert torch.equal(features, as_bytes(images).float().flatten(1)[:, :2048])


def test_layer_distances_equal_the_formula() -> None:
    x, y = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    flat_x, flat_y = torch.randn(3, 6, 7), torch.randn(3, 6, 7)
    wanted = []
    for n in range(3):
        each = []
        for left, right in ((x[n].flatten(1), y[n].flatten(1)), (flat_x[n], flat_y[n])):
            cosines = F.cosine_similarity(left, right, dim=0)
            each.append(float((2 - 2 * cosines).mean()))
        wanted.append(sum(each) / 2)
    assert layer_distances([x, flat_x], [y, flat_y]).tolist() == pytest.approx(wanted, rel=1e-5)
    assert layer_distances([5 * x], [x]).tolist() == pytest.approx([0, 0, 0], abs=1e-9)  # no scale
    assert layer_distances([-x], [x]).tolist() == pytest.approx([4, 4, 4])  # the largest
    with pytest.raises(ConfigError, match="same extractor"):
        layer_distances([x], [flat_x])


def test_lpips_like_grows_with_noise_and_does_not_depend_on_the_batch() -> None:
    judge = ColorDigitsJudge(zoo_path("color-digits-classifier"))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(6, 3, 32, 32, generator=generator)
    assert [tuple(x.shape[1:]) for x in judge.layers(images)] == [(24, 32, 32), (32, 16, 16), (48, 8, 8), (64, 4, 4)]
    features = judge.classifier.trunk[-3:](judge.layers(images)[-1])
    assert torch.allclose(features, judge.features(images))
    small, large = (lpips_like(images + s * noise, images, judge) for s in (0.05, 0.5))
    assert bool((large > small).all())
    assert bool((small > 0).all())
    assert lpips_like(images, images, judge).tolist() == [0.0] * 6
    split = lpips_like(images + 0.05 * noise, images, judge, batch_size=4)
    assert split.tolist() == pytest.approx(small.tolist(), rel=1e-4)
    with pytest.raises(ConfigError, match="pairs of the reference"):
        lpips_like(images[:5], images, judge)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vgg"}, r"evaluation\.extractors\.kind = 'vgg' .* inception, clip, classifier"),
        ({"kind": "clip"}, r"evaluation\.extractors\.source = None .* hub id"),
        ({"kind": "inception", "revision": "main"}, r"evaluation\.extractors\.revision = 'main'"),
        ({"kind": "classifier", "metrics": ("fid",)}, r"evaluation\.extractors\.metrics = 'fid' .* frechet, kid"),
        ({"kind": "classifier", "metrics": ("kid", "kid")}, "each once"),
        ({"kind": "inception", "metrics": ("lpips_like",)}, "from a file of the weights"),
    ],
)
def test_impossible_extractors_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtractorSpec(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hps"}, r"evaluation\.scores\.kind = 'hps' .* clip_score, clip_iqa"),
        ({"kind": "clip_iqa"}, r"evaluation\.scores\.source = None"),
        ({"kind": "vqa_score", "revision": "main"}, r"evaluation\.scores\.revision = 'main' .* null for vqa_score"),
        ({"kind": "clip_iqa", "source": "x", "antonyms": ("Good.",)}, r"evaluation\.scores\.antonyms"),
        ({"kind": "clip_score", "source": "x", "antonyms": ("Good.", "Bad.")}, "for clip_iqa only"),
    ],
)
def test_impossible_scores_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreSpec(**values)


def test_two_of_a_kind_need_names() -> None:
    one, other = ExtractorSpec("clip", "a"), ExtractorSpec("clip", "b", name="large")
    assert len(EvaluationSpec(extractors=(one, other)).extractors) == 2
    with pytest.raises(ConfigError, match=r"evaluation\.extractors\.name = 'clip'"):
        EvaluationSpec(extractors=(one, one))
    with pytest.raises(ConfigError, match=r"evaluation\.scores\.name = 'image_reward'"):
        EvaluationSpec(scores=(ScoreSpec("image_reward"),) * 2)
