"""Laws of quantize_ and unquantize_: what they change, what they keep, and that a failure changes nothing."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    ActivationSpec,
    LayerFamilies,
    LayerRule,
    QuantizedLayer,
    QuantLinear,
    QuantPointwiseConv,
    QuantSpec,
    WeightSpec,
    describe,
    quantize_,
    quantized_layers,
    unquantize_,
)


def specs_of(model: nn.Module) -> dict[str, QuantSpec]:
    return {name: layer.spec for name, layer in quantized_layers(model)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what is changed


def test_every_linear_and_pointwise_convolution_becomes_its_twin(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny)
    assert tuple(specs_of(tiny)) == twin_names
    assert set(specs_of(tiny).values()) == {QuantSpec()}
    assert type(tiny.proj_out) is QuantLinear
    assert type(tiny.transformer_blocks[0].ff.conv_point) is QuantPointwiseConv
    assert isinstance(tiny.proj_out, nn.Linear)


def test_other_layers_are_left_alone(tiny: Any) -> None:
    quantize_(tiny)
    assert type(tiny.patch_embed) is nn.Conv2d
    assert type(tiny.transformer_blocks[0].ff.conv_depth) is nn.Conv2d
    assert type(tiny.transformer_blocks[0].norm) is nn.LayerNorm


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Conv2d(8, 8, (1, 3)),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, padding=1),
    ],
    ids=str,
)
def test_convolution_that_is_no_matrix_product_is_left_alone(conv: nn.Conv2d) -> None:
    model = nn.Sequential(nn.Linear(4, 4), conv)
    report = quantize_(model)
    assert type(model[1]) is nn.Conv2d
    assert report.rows[1].reason == "not a matrix product"


def test_subclass_of_linear_is_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    quantize_(model)
    assert type(model[1]) is Special
    assert tuple(specs_of(model)) == ("0",)


def test_output_projection_of_multihead_attention_is_left_alone() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)})
    x = torch.randn(3, 2, 8)
    before = model["attention"](x, x, x)[0]
    quantize_(model)
    assert tuple(specs_of(model)) == ("head",)
    assert torch.equal(model["attention"](x, x, x)[0], before)


def test_model_that_is_itself_a_layer_is_quantized() -> None:
    model = nn.Linear(8, 4)
    report = quantize_(model, rules=[LayerRule(module_type="Linear", weight_bits=6)])
    assert type(model) is QuantLinear
    assert report.rows[0].spec == QuantSpec(WeightSpec(6))


def test_layer_used_twice_is_quantized_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize_(model)
    assert len(report.rows) == 1
    assert type(model[0]) is QuantLinear
    assert unquantize_(model) == 1
    assert type(model[2]) is nn.Linear


# --- what is kept


def test_state_dict_keys_and_values_are_kept(tiny: Any) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    quantize_(tiny)
    after = tiny.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_parameters_are_the_same_objects(tiny: Any) -> None:
    before = {name: id(parameter) for name, parameter in tiny.named_parameters()}
    quantize_(tiny)
    assert {name: id(parameter) for name, parameter in tiny.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(tiny: Any, images: Tensor, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    quantize_(tiny)
    assert {parameter.dtype for parameter in tiny.parameters()} == {dtype}
    with torch.no_grad():
        assert tiny(images.to(dtype)).dtype is dtype


def test_meta_device_is_kept() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 4, 1))
    quantize_(model, QuantSpec(WeightSpec(range_method="mse"), ActivationSpec(granularity="tensor", static=True)))
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_meta_model_gets_its_levels_when_it_becomes_real() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    quantize_(model)
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(8, 4))
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    quantize_(source)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("is_training", [True, False])
def test_training_flag_is_kept_in_every_module(tiny: Any, is_training: bool) -> None:
    tiny.train(is_training)
    quantize_(tiny)
    assert {module.training for module in tiny.modules()} == {is_training}


def test_hooks_are_kept_and_called(tiny: Any, images: Tensor) -> None:
    seen: list[str] = []
    tiny.proj_out.register_forward_hook(lambda *_: seen.append("forward"))
    tiny.proj_out.register_forward_pre_hook(lambda *_: seen.append("pre"))
    tiny.proj_out.weight.register_hook(lambda _: seen.append("gradient"))
    quantize_(tiny)
    tiny(images).sum().backward()
    assert sorted(seen) == ["forward", "gradient", "pre"]
    unquantize_(tiny)
    seen.clear()
    tiny(images)
    assert sorted(seen) == ["forward", "pre"]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.embedding(tokens)))

    model = Tied()
    quantize_(model)
    assert model.head.weight is model.embedding.weight
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.embedding.weight.grad is model.head.weight.grad
    unquantize_(model)
    assert model.head.weight is model.embedding.weight
    assert type(model.head) is nn.Linear


def test_requires_grad_is_kept(tiny: Any) -> None:
    tiny.proj_out.weight.requires_grad_(False)
    before = trainable(tiny)
    quantize_(tiny)
    assert trainable(tiny) == before
    unquantize_(tiny)
    assert trainable(tiny) == before


def test_float_state_dict_loads_strictly_into_the_quantized_model(tiny: Any) -> None:
    state = {name: torch.randn_like(value) for name, value in tiny.state_dict().items()}
    quantize_(tiny)
    tiny.load_state_dict(state)
    assert torch.equal(tiny.proj_out.weight, state["proj_out.weight"])


# --- report


def test_report_has_a_row_for_every_linear_layer_and_convolution(tiny: Any, twin_names: tuple[str, ...]) -> None:
    report = quantize_(tiny, rules=[LayerRule("*.attn1.to_k", skip=True), LayerRule("proj_out", trainable=False)])
    rows = {row.name: row for row in report.rows}
    assert set(rows) - set(twin_names) == {
        "patch_embed",
        "transformer_blocks.0.ff.conv_depth",
        "transformer_blocks.1.ff.conv_depth",
    }
    assert [row.name for row in report.quantized] == [name for name in twin_names if not name.endswith("to_k")]
    assert rows["patch_embed"].reason == "not a matrix product"
    skipped = rows["transformer_blocks.0.attn1.to_k"]
    assert (skipped.type_name, skipped.family, skipped.spec, skipped.reason) == ("Linear", "Attn", None, "skipped")
    pointwise = rows["transformer_blocks.1.ff.conv_point"]
    assert (pointwise.type_name, pointwise.family, pointwise.shape) == ("PointwiseConv", "FF", (16, 32, 1, 1))
    assert (pointwise.num_parameters, pointwise.is_trainable, pointwise.reason) == (512, True, "")
    head = rows["proj_out"]
    assert (head.family, head.shape, head.num_parameters, head.is_trainable) == ("-", (8, 16), 8 * 16 + 8, False)
    assert report.num_model_parameters == sum(p.numel() for p in tiny.parameters())
    assert report.num_quantized_weights == 2 * (3 * 256 + 2 * 512) + 128


def test_report_reads_as_a_table(tiny: Any) -> None:
    report = quantize_(tiny, rules=[LayerRule("proj_out", activation_bits=16), LayerRule("*.to_k", skip=True)])
    lines = {line.split()[0]: line.split() for line in str(report).splitlines() if line}
    assert str(report).splitlines()[0] == "Layers"
    assert str(report).splitlines()[1].split() == [
        "layer", "type", "family", "shape", "bits", "granularity", "trainable", "parameters",
    ]  # fmt: skip
    assert lines["proj_out"] == ["proj_out", "Linear", "-", "8x16", "W4A16", "channel", "/", "token", "yes", "136"]
    assert lines["transformer_blocks.0.attn1.to_k"][4:6] == ["float", "(skipped)"]
    num_weights = 2 * (3 * 256 + 2 * 512) + 128
    share = 100 * num_weights / report.num_model_parameters
    assert str(report).splitlines()[-1] == (
        f"11 layers quantized, {num_weights:,} weights, {share:.1f} % of the model's {report.num_model_parameters:,} "
        "parameters"
    )


def test_describe_gives_the_report_again(tiny: Any) -> None:
    before = describe(tiny)
    assert before.quantized == ()
    assert {row.reason for row in before.rows} == {""}  # nobody left anything out: nothing is quantized
    assert str(before).splitlines()[-1].startswith(f"the model is not quantized; {len(before.rows)} layers, ")
    report = quantize_(tiny)
    assert describe(tiny) == report
    unquantize_(tiny)
    assert describe(tiny) == before


# --- rules


def test_later_rule_wins(tiny: Any) -> None:
    rules = [
        LayerRule(family="TF", weight_bits=8),
        LayerRule("*.attn1.*", weight_bits=6),
        LayerRule("*.1.*", weight_bits=5),
    ]
    quantize_(tiny, rules=rules)
    bits = {name: spec.weight.bits for name, spec in specs_of(tiny).items()}
    assert bits["transformer_blocks.0.ff.conv_point"] == 8
    assert bits["transformer_blocks.0.attn1.to_q"] == 6
    assert bits["transformer_blocks.1.attn1.to_q"] == 5
    assert bits["transformer_blocks.1.ff.conv_point"] == 5
    assert bits["proj_out"] == 4


def test_later_rules_add_to_earlier_ones(tiny: Any) -> None:
    quantize_(tiny, rules=[LayerRule("proj_out", weight_bits=8), LayerRule("proj_out", activation_bits=16)])
    assert specs_of(tiny)["proj_out"] == QuantSpec(WeightSpec(8), ActivationSpec(16))


def test_last_layer_may_be_w4a16_while_all_others_are_w4a8(tiny: Any) -> None:
    quantize_(tiny, rules=[LayerRule("proj_out", activation_bits=16)])
    specs = specs_of(tiny)
    assert specs.pop("proj_out") == QuantSpec(WeightSpec(4), ActivationSpec(16))
    assert set(specs.values()) == {QuantSpec()}


def test_skipped_layer_stays_the_float_layer(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny, rules=[LayerRule("proj_out", skip=True)])
    assert type(tiny.proj_out) is nn.Linear
    assert tuple(specs_of(tiny)) == twin_names[:-1]


def test_module_type_rule_chooses_by_kind(tiny: Any) -> None:
    quantize_(tiny, rules=[LayerRule(module_type="PointwiseConv", weight_bits=8)])
    for layer in dict(quantized_layers(tiny)).values():
        assert layer.spec.weight.bits == (8 if isinstance(layer, nn.Conv2d) else 4)


def test_conditions_of_a_rule_must_all_hold(tiny: Any) -> None:
    quantize_(tiny, rules=[LayerRule("*.0.*", module_type="PointwiseConv", family="FF", weight_bits=8)])
    changed = {name for name, spec in specs_of(tiny).items() if spec.weight.bits == 8}
    assert changed == {"transformer_blocks.0.ff.conv_inverted", "transformer_blocks.0.ff.conv_point"}


# --- selective training


@pytest.mark.parametrize(
    ("family", "belongs"),
    [
        ("FF", lambda name: ".ff." in name),
        ("Attn", lambda name: ".attn1." in name),
        ("TF", lambda name: name.startswith("transformer_blocks.")),
        ("All", lambda name: True),
    ],
)
def test_only_the_chosen_family_trains_and_everything_is_quantized(
    tiny: Any, images: Tensor, twin_names: tuple[str, ...], family: str, belongs: Callable[[str], bool]
) -> None:
    names = trainable(tiny)
    report = quantize_(tiny, train=family)
    assert trainable(tiny) == {name for name in names if belongs(name)}
    assert tuple(specs_of(tiny)) == twin_names
    assert {row.name for row in report.quantized if row.is_trainable} == {
        n for n in twin_names if belongs(n + ".weight")
    }
    tiny(images).sum().backward()
    assert {name for name, p in tiny.named_parameters() if p.grad is not None} == trainable(tiny)
    unquantize_(tiny)
    assert trainable(tiny) == names


def test_frozen_layer_is_still_quantized(tiny: Any, images: Tensor) -> None:
    names = trainable(tiny)
    quantize_(tiny, rules=[LayerRule("proj_out", trainable=False), LayerRule("*.attn1.*", trainable=False)])
    assert trainable(tiny) == {name for name in names if not name.startswith("proj_out") and ".attn1." not in name}
    assert isinstance(tiny.proj_out, QuantizedLayer)
    tiny(images).sum().backward()
    assert tiny.proj_out.weight.grad is None
    assert tiny.transformer_blocks[0].ff.conv_inverted.weight.grad is not None


def test_later_rule_may_thaw_a_layer(tiny: Any) -> None:
    quantize_(tiny, rules=[LayerRule(family="All", trainable=False), LayerRule("proj_out", trainable=True)])
    assert {"proj_out.weight", "proj_out.bias"} <= trainable(tiny)
    assert "transformer_blocks.0.attn1.to_q.weight" not in trainable(tiny)


def test_rule_may_freeze_a_model_that_is_itself_a_layer() -> None:
    model = nn.Linear(4, 4)
    quantize_(model, rules=[LayerRule("*", trainable=False)])
    assert trainable(model) == set()


def test_unquantize_does_not_thaw_what_was_frozen_before(tiny: Any) -> None:
    tiny.patch_embed.requires_grad_(False)
    tiny.transformer_blocks[0].attn1.to_q.requires_grad_(False)
    before = trainable(tiny)
    quantize_(tiny, train="FF")
    unquantize_(tiny)
    assert trainable(tiny) == before


# --- undo


@pytest.mark.parametrize("train", ["All", "FF"])
def test_unquantize_gives_back_the_same_model_bitwise(
    tiny: Any, images: Tensor, photograph: Callable, twin_names: tuple[str, ...], train: str
) -> None:
    before, output = photograph(tiny), tiny(images)
    quantize_(tiny, QuantSpec(WeightSpec(3, range_method="mse")), train=train)
    assert not torch.equal(tiny(images), output)
    assert unquantize_(tiny) == len(twin_names)
    assert photograph(tiny) == before
    assert torch.equal(tiny(images), output)


def test_unquantize_keeps_trained_weights(tiny: Any, images: Tensor) -> None:
    quantize_(tiny)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    tiny(images).square().sum().backward()
    optimizer.step()
    trained = copy.deepcopy(tiny.state_dict())
    unquantize_(tiny)
    assert all(torch.equal(value, trained[name]) for name, value in tiny.state_dict().items())


def test_unquantize_of_a_float_model_does_nothing(tiny: Any, photograph: Callable) -> None:
    before = photograph(tiny)
    assert unquantize_(tiny) == 0
    assert photograph(tiny) == before


def test_model_may_be_quantized_again_after_unquantize(tiny: Any, images: Tensor) -> None:
    quantize_(tiny, train="FF")
    with torch.no_grad():  # with gradients, torch's own Linear adds in another order where its weight wants none (AVX2)
        first = tiny(images)
    unquantize_(tiny)
    quantize_(tiny)
    with torch.no_grad():
        assert torch.equal(tiny(images), first)
    assert len(trainable(tiny)) == len(list(tiny.parameters()))


# --- failures change nothing


def nan_weight(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        model.proj_out.weight[1, 2] = float("nan")
    return {}


def infinite_weight(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        model.transformer_blocks[1].ff.conv_point.weight[1, 2] = float("inf")
    return {}


FAILURES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "NaN weight": (nan_weight, r"proj_out\.weight = 'nan or inf' .* finite weights.*load a sound checkpoint"),
    "infinite weight": (infinite_weight, r"transformer_blocks\.1\.ff\.conv_point\.weight = 'nan or inf'"),
    "bits for a specification": (
        lambda _: {"spec": 4},
        r"spec = 4 is not possible: allowed is a QuantSpec.*Fix: write QuantSpec\(weight=WeightSpec\(bits=4\)\)",
    ),
    "bad group": (
        lambda _: {"spec": QuantSpec(WeightSpec(granularity="group", group_size=32))},
        r"layer transformer_blocks\.0\.attn1\.to_q: group_size = 32 .* input width 16\. Fix: choose one of \[16\]",
    ),
    "bad group in a rule": (
        lambda _: {"rules": [LayerRule("proj_out", group_size=5)]},
        r"layer proj_out: group_size = 5 ",
    ),
    "unmatched pattern": (
        lambda _: {"rules": [LayerRule("proj_in", weight_bits=8)]},
        r"rule = \"pattern='proj_in', weight_bits=8\" .* names here are transformer_blocks\.0\.attn1\.to_q.*Fix: correct",
    ),
    "unmatched conditions": (
        lambda _: {"rules": [LayerRule("proj_out", module_type="PointwiseConv", skip=True)]},
        r"rule = .*pattern='proj_out', module_type='PointwiseConv', skip=True.* a rule that matches a layer",
    ),
    "pattern of a layer that stays float": (
        lambda _: {"rules": [LayerRule("patch_embed", weight_bits=8)]},
        "a rule that matches a layer",
    ),
    "unmatched family": (
        lambda _: {"rules": [LayerRule(family="Head")], "families": LayerFamilies({"Head": ("head.*",)})},
        r"rule = \"family='Head'\" .* a rule that matches a layer",
    ),
    "unknown family": (lambda _: {"rules": [LayerRule(family="Nope")]}, r"family = 'Nope' .* FF, Attn, TF, All"),
    "unknown family to train": (lambda _: {"train": "Nope"}, r"family = 'Nope' .* FF, Attn, TF, All"),
    "family to train without layers": (
        lambda _: {"train": "Head", "families": LayerFamilies({"Head": ("head.*",)})},
        r"train = 'Head' .* a family that this model has. Fix: use All",
    ),
    "everything skipped": (lambda _: {"rules": [LayerRule("*", skip=True)]}, r"rules = 'skip everything' "),
    "impossible width in the last rule": (
        lambda _: {"rules": [LayerRule("*", weight_bits=8), LayerRule("proj_out", weight_bits=40)]},
        "bits = 40 is not possible",
    ),
    "activation rule on float inputs": (
        lambda _: {"spec": QuantSpec(activation=None), "rules": [LayerRule("proj_out", activation_bits=8)]},
        "layers with quantized inputs",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_quantize_changes_nothing(tiny: Any, photograph: Callable, failure: str) -> None:
    prepare, message = FAILURES[failure]
    arguments = prepare(tiny)
    before = photograph(tiny)
    with pytest.raises(ConfigError, match=message):
        quantize_(tiny, arguments.pop("spec", None), **arguments)
    assert photograph(tiny) == before
    if "weight" not in failure:
        quantize_(tiny)


def test_second_quantize_is_refused_and_changes_nothing(tiny: Any, photograph: Callable) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(6)), train="FF")
    before = photograph(tiny)
    with pytest.raises(
        ConfigError, match=r"model = 'TinyTransformer' .* not quantized yet. Fix: call unquantize_ first"
    ):
        quantize_(tiny)
    assert photograph(tiny) == before
    assert {spec.weight.bits for spec in specs_of(tiny).values()} == {6}


def test_model_without_a_layer_to_quantize_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model = 'Sequential' .* nn.Linear or 1x1 nn.Conv2d layers"):
        quantize_(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def test_nan_in_a_skipped_layer_is_allowed(tiny: Any) -> None:
    nan_weight(tiny)
    quantize_(tiny, rules=[LayerRule("proj_out", skip=True)])


# --- copies


@torch.no_grad()
def test_deep_copy_is_equal_and_independent(tiny: Any, images: Tensor) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(range_method="mse")), train="FF")
    output = tiny(images)
    twin = copy.deepcopy(tiny)
    assert torch.equal(twin(images), output)
    assert trainable(twin) == trainable(tiny)

    for _, layer in quantized_layers(twin):
        layer.weight_quantizer.set_bits_(2, layer.weight)
    assert not torch.equal(twin(images), output)
    assert torch.equal(tiny(images), output)

    unquantize_(twin)
    assert type(twin.proj_out) is nn.Linear
    assert type(tiny.proj_out) is QuantLinear
    twin.proj_out.weight.zero_()
    assert torch.equal(tiny(images), output)


@torch.no_grad()
def test_pickled_layer_computes_the_same() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize_(model, rules=[LayerRule("2", weight_bits=5.5)])
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))
    assert specs_of(again) == specs_of(model)


def test_fused_encoder_layers_do_not_skip_quantization() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        original = encoder(x)
    quantize_(encoder, QuantSpec(weight=WeightSpec(bits=2)))
    slow = encoder(x).detach()
    with torch.no_grad():
        assert torch.allclose(encoder(x), slow, atol=1e-5)
        assert not torch.allclose(slow, original, atol=1e-2)
        unquantize_(encoder)
        assert torch.allclose(encoder(x), original, atol=1e-5)


def test_a_rule_about_training_leaves_skipped_layers_in_float() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    report = quantize_(model, rules=[LayerRule(pattern="0", skip=True), LayerRule(pattern="*", trainable=False)])
    assert [row.spec is None for row in report.rows] == [True, False]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_weight_is_frozen_by_either_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    quantize_(model, rules=[LayerRule(pattern="1", trainable=False)])
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    unquantize_(model)
    assert model[0].weight.requires_grad
