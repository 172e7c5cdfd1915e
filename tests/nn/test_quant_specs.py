"""Laws of QuantSpec, LayerRule and the layer families."""

import math

import pytest

from fraqat.errors import ConfigError
from fraqat.nn import ActivationSpec, LayerFamilies, LayerRule, QuantSpec, WeightSpec, granularity_label, spec_label
from fraqat.numerics import BlockLayout, Granularity, Grid, RangeMethod

# --- specifications


def test_default_is_the_papers_w4a8_per_channel_and_per_token() -> None:
    spec = QuantSpec()
    assert (spec.weight.bits, spec.weight.granularity, spec.weight.symmetric) == (4, Granularity.CHANNEL, True)
    assert spec.weight.range_method is RangeMethod.MAX_ABS
    assert spec.activation is not None
    assert (spec.activation.bits, spec.activation.granularity, spec.activation.static) == (8, Granularity.TOKEN, False)


def test_names_become_enums() -> None:
    spec = WeightSpec(granularity="group", group_size=32, range_method="mse")
    assert spec.granularity is Granularity.GROUP
    assert spec.range_method is RangeMethod.MSE
    assert spec == WeightSpec(granularity=Granularity.GROUP, group_size=32, range_method=RangeMethod.MSE)
    assert spec.layout() == BlockLayout(Granularity.GROUP, 32)


def test_spec_gives_its_grid_at_any_width() -> None:
    assert WeightSpec(4, narrow=True).grid(5.5) == Grid(5.5, narrow=True)
    assert WeightSpec(4, symmetric=False).grid(1) == Grid(1, symmetric=False)
    assert ActivationSpec(16, symmetric=False).grid() == Grid(16, symmetric=False)


@pytest.mark.parametrize("bits", [0.5, 1, 33, math.nan, True, "4"])
def test_impossible_width_is_refused_when_the_spec_is_made(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"^bits = "):
        WeightSpec(bits)
    with pytest.raises(ConfigError, match=r"^bits = "):
        ActivationSpec(bits)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_activation_granularity_is_refused_for_weights(granularity: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"weight.granularity = '{granularity}' .* allowed is tensor, channel, group\."
    ):
        WeightSpec(granularity=granularity)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_weight_granularity_is_refused_for_activations(granularity: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"activation.granularity = '{granularity}' .* allowed is tensor, sample, token\."
    ):
        ActivationSpec(granularity=granularity)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_static_activation_must_be_per_tensor(granularity: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{granularity}' .* 'tensor' when static. Fix: set granularity: tensor"):
        ActivationSpec(granularity=granularity, static=True)


def test_mse_is_refused_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"activation.range_method = 'mse' .* max_abs, min_max, three_sigma"):
        ActivationSpec(range_method="mse")


def test_unknown_scale_dtype_is_refused() -> None:
    for spec_type in (WeightSpec, ActivationSpec):
        with pytest.raises(ConfigError, match=r"scale_dtype = 'float8' .* float32, bfloat16, float16"):
            spec_type(scale_dtype="float8")


def test_group_size_and_group_go_together() -> None:
    with pytest.raises(ConfigError, match="set granularity: group"):
        WeightSpec(group_size=32)
    with pytest.raises(ConfigError, match="set group_size"):
        WeightSpec(granularity="group")


def test_narrow_asymmetric_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="narrow = True"):
        WeightSpec(symmetric=False, narrow=True)


@pytest.mark.parametrize(
    ("spec", "label", "granularity"),
    [
        (QuantSpec(), "W4A8", "channel / token"),
        (QuantSpec(WeightSpec(5.5), ActivationSpec(16)), "W5.5A16", "channel / token"),
        (QuantSpec(activation=None), "W4A-", "channel / -"),
        (
            QuantSpec(
                WeightSpec(granularity="group", group_size=32), ActivationSpec(granularity="tensor", static=True)
            ),
            "W4A8",
            "group 32 / static tensor",
        ),
    ],
)
def test_labels_read_like_the_papers(spec: QuantSpec, label: str, granularity: str) -> None:
    assert spec_label(spec) == label
    assert granularity_label(spec) == granularity


# --- rules


def test_rule_without_a_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule = 'weight_bits=8' .* at least one of pattern, module_type, family"):
        LayerRule(weight_bits=8)
    with pytest.raises(ConfigError, match=r"rule = 'empty' "):
        LayerRule()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LayerRule("*", weight_bits=8), QuantSpec(WeightSpec(8), ActivationSpec(8))),
        (LayerRule("*", activation_bits=16), QuantSpec(WeightSpec(4), ActivationSpec(16))),
        (LayerRule("*", group_size=32), QuantSpec(WeightSpec(granularity="group", group_size=32))),
        (LayerRule("*", weight_granularity="tensor"), QuantSpec(WeightSpec(granularity="tensor"))),
        (
            LayerRule("*", activation_granularity="sample"),
            QuantSpec(WeightSpec(), ActivationSpec(granularity="sample")),
        ),
        (LayerRule("*", trainable=False), QuantSpec()),
        (LayerRule("*", spec=QuantSpec(activation=None)), QuantSpec(activation=None)),
        (
            LayerRule("*", spec=QuantSpec(WeightSpec(6), None), weight_bits=5),
            QuantSpec(WeightSpec(5), None),
        ),
    ],
)
def test_rule_changes_only_what_it_names(rule: LayerRule, expected: QuantSpec) -> None:
    assert rule.apply(QuantSpec()) == expected


def test_rule_keeps_other_fields_of_the_spec() -> None:
    spec = QuantSpec(WeightSpec(4, symmetric=False, scale_dtype="bfloat16"), ActivationSpec(symmetric=False))
    changed = LayerRule("*", weight_bits=6, activation_bits=16).apply(spec)
    assert changed.weight == WeightSpec(6, symmetric=False, scale_dtype="bfloat16")
    assert changed.activation == ActivationSpec(16, symmetric=False)


def test_rule_from_group_to_channel_drops_the_group_size() -> None:
    spec = QuantSpec(WeightSpec(granularity="group", group_size=32))
    assert LayerRule("*", weight_granularity="channel").apply(spec) == QuantSpec()


def test_activation_rule_on_float_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule.activation_bits = 16 .* layers with quantized inputs"):
        LayerRule("*", activation_bits=16).apply(QuantSpec(activation=None))


def test_rule_that_makes_an_impossible_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="bits = 1 is not possible"):
        LayerRule("*", weight_bits=1).apply(QuantSpec())


# --- families


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer_blocks.0.ff.conv_inverted", "FF"),
        ("transformer_blocks.11.ff.net.0.proj", "FF"),
        ("transformer_blocks.3.ff_context.net.2", "FF"),
        ("model.layers.3.mlp.gate_proj", "FF"),
        ("transformer_blocks.0.attn1.to_q", "Attn"),
        ("transformer_blocks.0.attn2.to_out.0", "Attn"),
        ("transformer_blocks.0.attn.add_q_proj", "Attn"),
        ("model.layers.3.self_attn.q_proj", "Attn"),
        ("transformer_blocks.0.norm1.linear", "TF"),
        ("single_transformer_blocks.7.proj_mlp", "TF"),
        ("proj_out", "-"),
        ("time_embed.linear", "-"),
        ("x_embedder", "-"),
    ],
)
def test_usual_names_fall_into_the_papers_families(name: str, family: str) -> None:
    families = LayerFamilies()
    assert families.family_of(name) == family
    assert families.contains("All", name)
    assert families.contains("TF", name) == (family != "-")


@pytest.mark.parametrize(("name", "family"), [("ff.net.0", "FF"), ("attn.to_q", "Attn"), ("mlp.gate_proj", "FF")])
def test_pattern_also_matches_at_the_start_of_the_name(name: str, family: str) -> None:
    assert LayerFamilies().family_of(name) == family


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"family = 'Nope' .* allowed is FF, Attn, TF, All\. Fix: use one of these"):
        LayerFamilies().contains("Nope", "proj_out")


def test_own_families_replace_the_usual_ones() -> None:
    families = LayerFamilies({"Head": ("proj_out*",)})
    assert families.names() == ("Head", "All")
    assert families.family_of("proj_out") == "Head"
    assert families.family_of("transformer_blocks.0.attn1.to_q") == "-"
