"""`quantize_`, `set_bits_`, `unquantize_`, `calibrate_`: change any `nn.Module` in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError, config_error
from fraqat.nn.families import ALL, LayerFamilies
from fraqat.nn.layers import QuantizedLayer, has_finite_weight, to_float_, to_quantized_, twin_type
from fraqat.nn.packed import PackedLayer
from fraqat.nn.spec import LayerRule, QuantSpec
from fraqat.table import Table

Fit = Callable[[str, str, tuple[int, ...], QuantSpec], QuantSpec | None]
_FUSED_ATTRIBUTE = "_fraqat_fused_activation"
_FROZEN_ATTRIBUTE = "_fraqat_frozen_parameters"


@dataclass(frozen=True)
class LayerRow:
    """One layer in the report of `quantize_`. `spec` is None for a layer in floating point, and `reason` says why it stayed so
    while others were quantized; `extras` names what stands beside the quantized product: `smoothed`, `rank 32`."""

    name: str
    type_name: str
    family: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    is_trainable: bool
    num_parameters: int
    reason: str = ""
    extras: str = ""


@dataclass(frozen=True)
class QuantReport:
    """What `quantize_` did: a row for every linear layer and convolution, quantized or not. `str()` is a table."""

    rows: tuple[LayerRow, ...]
    num_model_parameters: int

    @property
    def quantized(self) -> tuple[LayerRow, ...]:
        """The rows of the quantized layers."""
        return tuple(row for row in self.rows if row.spec is not None)

    @property
    def num_quantized_weights(self) -> int:
        """Weights held by quantized layers (biases are not counted)."""
        return sum(_num_elements(row.shape) for row in self.quantized)

    def to_table(self) -> Table:
        """The report as a table."""
        columns = ("layer", "type", "family", "shape", "bits", "granularity", "trainable", "parameters")
        return Table("Layers", columns, tuple(self._cells(row) for row in self.rows), (self._summary(),))

    def _summary(self) -> str:
        if not self.quantized and not any(row.reason for row in self.rows):
            return f"the model is not quantized; {len(self.rows)} layers, {self.num_model_parameters:,} parameters"
        share = self.num_quantized_weights / max(1, self.num_model_parameters)
        return (
            f"{len(self.quantized)} layers quantized, {self.num_quantized_weights:,} weights, "
            f"{100 * share:.1f} % of the model's {self.num_model_parameters:,} parameters"
        )

    def __str__(self) -> str:
        return str(self.to_table())

    def _cells(self, row: LayerRow) -> tuple[object, ...]:
        in_float = f"float ({row.reason})" if row.reason else "float"
        bits = spec_label(row.spec) + row.extras if row.spec else in_float
        granularity = granularity_label(row.spec) if row.spec else None
        shape = "x".join(map(str, row.shape))
        return (row.name, row.type_name, row.family, shape, bits, granularity, row.is_trainable, row.num_parameters)


def quantize_(
    model: nn.Module,
    spec: QuantSpec | None = None,
    *,
    rules: Sequence[LayerRule] = (),
    families: LayerFamilies | None = None,
    train: str = ALL,
    fit: Fit | None = None,
) -> QuantReport:
    """Quantizes the linear layers and pointwise convolutions of `model` in place, at their final width.

    Nothing is changed unless everything is possible. Parameters stay the full-precision master weights, and state-dict keys,
    hooks, tied weights, dtype, device and training flag stay as they are; range method `learned` adds one parameter to a layer,
    its scale, which is trained where the weight is. Use `set_bits_` to raise the width for the first stages of a schedule.

    Args:
        model: Any module.
        spec: What every layer is quantized to; None is W4A8, per output channel and per token.
        rules: Exceptions, in order, a later one wins.
        families: Layer families of the model; None uses the usual names of diffusers and transformers.
        train: Family to train alone (FF, Attn, TF; the paper's Table 2): every parameter outside it is frozen, and its
            layers stay quantized. `All` freezes nothing.
        fit: Has the last word on every layer that the rules leave quantized: name, type name, shape of the weight and
            specification -> specification, or None to leave it in floating point.

    Returns:
        The report, one row per layer.

    Raises:
        ConfigError: `spec` is something else, the model is quantized already or holds no layer to quantize, a rule or family
            matches nothing, a width is not a multiple of the group size, or a weight is NaN or infinite.
    """
    families = families or LayerFamilies()
    if not isinstance(cast(object, spec), QuantSpec | None):
        fix = "write QuantSpec(weight=WeightSpec(bits=4))"
        raise config_error("spec", spec, allowed="a QuantSpec, or None for W4A8", fix=fix)
    if any(True for _ in quantized_layers(model)):
        raise config_error(
            "model", type(model).__name__, allowed="a model not quantized yet", fix="call unquantize_ first"
        )
    plan = _plan(model, spec or QuantSpec(), rules, families)
    if fit is not None:
        plan = {name: (_fitted(model, name, s, fit), is_trainable) for name, (s, is_trainable) in plan.items()}
    _check_plan(model, plan)
    frozen_layers = [name for name, (_, is_trainable) in plan.items() if not is_trainable]
    frozen = _parameters_to_freeze(model, families, train, frozen_layers)
    for name, (layer_spec, _) in plan.items():
        module = model.get_submodule(name)
        twin = twin_type(module)
        if layer_spec is not None and twin is not None:
            to_quantized_(module, twin, layer_spec)
    _disable_fused_encoders_(model)
    _set_requires_grad_(model, frozen, False)
    for _, layer in quantized_layers(model):
        if (scale := layer.weight_quantizer.scale) is not None:
            scale.requires_grad_(layer.weight.requires_grad)
    model.__dict__[_FROZEN_ATTRIBUTE] = frozen
    return describe(model, families)


def describe(model: nn.Module, families: LayerFamilies | None = None) -> QuantReport:
    """The report of a model as it is now, whether or not it is quantized; learned scales are not counted as parameters."""
    families = families or LayerFamilies()
    is_changed = any(isinstance(module, QuantizedLayer | PackedLayer) for module in model.modules())
    listed = [(name, module) for name, module in model.named_modules() if _is_listed(module)]
    rows = tuple(_row(name, module, families, is_changed=is_changed) for name, module in listed)
    num_scales = sum(scale.numel() for scale in scale_parameters(model))
    return QuantReport(rows, sum(p.numel() for p in model.parameters()) - num_scales)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Qualified name and layer of every quantized layer."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of the quantized layers (range method `learned`), in their order, of all widths; frozen ones too.

    They belong in a parameter group of their own: weight decay must not pull them to zero. Adam's step does not shrink with
    the gradient, and a scale is small against the weights (largest weight / 127 at 8 bits), so that it needs a smaller rate.
    """
    found: list[nn.Parameter] = []
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer.scale is not None:
            found.append(quantizer.scale)
            found += quantizer.others.scales().values() if quantizer.others is not None else ()
    return found


def set_bits_(
    model: nn.Module, bits: float, *, where: str | None = None, on_final_grid: bool = False, below_final: bool = False
) -> int:
    """Sets the weight width during training.

    Args:
        model: A quantized model.
        bits: New width.
        where: None: every layer, but no layer goes below its own final width (a layer that a rule keeps at 8 bits stays at
            8 while the others fall to 4). A pattern: exactly the matching layers, to exactly this width.
        on_final_grid: A width above a layer's final one is a share of the final grid's error instead of a grid of its own; see
            `WeightQuantizer.set_bits_`.
        below_final: Without `where`, layers with the lowest final width may go below it; the others stay at theirs.

    Returns:
        How many layers changed.

    Raises:
        ConfigError: The model is not quantized, nothing matches, or the width is impossible.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise config_error("model", type(model).__name__, allowed="a quantized model", fix="call quantize_ first")
    chosen = [(name, layer) for name, layer in layers if where is None or fnmatchcase(name, where)]
    if not chosen:
        raise config_error("where", where, allowed=_name_hint([n for n, _ in layers]), fix="correct the pattern")
    finals = {name: layer.weight_quantizer.spec.bits for name, layer in chosen}
    lowest = min(finals.values())
    targets = {
        name: bits if where is not None or (below_final and final == lowest) else max(bits, final)
        for name, final in finals.items()
    }
    if where is None and bits < lowest and not below_final:
        raise config_error(
            "bits",
            bits,
            allowed=f"{lowest:g}, the final width, or more",
            fix="pass below_final=True or where='*' to go below it on purpose",
        )
    for name, layer in chosen:
        layer.weight_quantizer.spec.grid(targets[name])
    num_changed = 0
    for name, layer in chosen:
        if not layer.weight_quantizer.is_at(targets[name], on_final_grid=on_final_grid):
            layer.weight_quantizer.set_bits_(targets[name], layer.whole_weight(), on_final_grid=on_final_grid)
            num_changed += 1
    return num_changed


def unquantize_(model: nn.Module) -> int:
    """Undoes `quantize_`: float layers again, with the weights as they are now, and gradients allowed as before.

    Returns:
        How many layers were turned back.
    """
    layers = list(quantized_layers(model))
    for _, layer in layers:
        to_float_(layer)
    _restore_fused_encoders_(model)
    frozen: set[str] = model.__dict__.pop(_FROZEN_ATTRIBUTE, set())
    _set_requires_grad_(model, frozen, True)
    return len(layers)


@torch.no_grad()
def calibrate_(model: nn.Module, forward: Callable[[object], object], batches: Iterable[object]) -> int:
    """Fixes the static activation scales from data; weights and static inputs are not quantized while they are observed.

    Args:
        model: A quantized model with at least one static activation.
        forward: Runs the model on one batch, for example `lambda batch: model(batch)`.
        batches: Calibration data; the paper uses 100 samples.

    Returns:
        How many layers were calibrated; 0 if the model has no static activation.

    Raises:
        ConfigError: The data is empty, or a layer was never reached by it.
    """
    layers = dict(quantized_layers(model))
    observed = {
        name: layer.activation_quantizer
        for name, layer in layers.items()
        if layer.activation_quantizer is not None and layer.activation_quantizer.spec.static
    }
    if not observed:
        return 0
    for quantizer in observed.values():
        quantizer.start_observing()
    set_bypassed_(layers.values(), weights=True, inputs=True)
    try:
        for batch in batches:
            forward(batch)
        silent = [name for name, q in observed.items() if q.statistics is None or not q.statistics.count]
        if silent:
            raise config_error(
                "calibration",
                silent[:3],
                allowed="data that reaches every static layer",
                fix="skip these layers by a rule",
            )
        for quantizer in observed.values():
            quantizer.finish_observing_()
    finally:
        for quantizer in observed.values():
            quantizer.statistics = None
        set_bypassed_(layers.values(), weights=False, inputs=False)
    return len(observed)


def spec_label(spec: QuantSpec) -> str:
    """`W4A8`, `W5.5A16`, `W4A-` (float inputs)."""
    activation = f"{spec.activation.bits:g}" if spec.activation else "-"
    return f"W{spec.weight.bits:g}A{activation}"


def granularity_label(spec: QuantSpec) -> str:
    """`channel / token`, `group 32 / static tensor`, `integer group 32 / token`, `channel / -`."""
    weight = spec.weight.granularity.value + (f" {spec.weight.group_size}" if spec.weight.group_size else "")
    weight = f"integer {weight}" if spec.weight.group_scale == "integer" else weight
    if spec.activation is None:
        return f"{weight} / -"
    return f"{weight} / {'static ' if spec.activation.static else ''}{spec.activation.granularity.value}"


def _plan(
    model: nn.Module, spec: QuantSpec, rules: Sequence[LayerRule], families: LayerFamilies
) -> dict[str, tuple[QuantSpec | None, bool]]:
    """Layer name -> (specification or None to skip, trainable)."""
    twins = {name: twin for name, module in model.named_modules() if (twin := twin_type(module)) is not None}
    if not twins:
        raise config_error(
            "model",
            type(model).__name__,
            allowed="a model with nn.Linear or 1x1 nn.Conv2d layers",
            fix="pass another model",
        )
    plan: dict[str, tuple[QuantSpec | None, bool]] = dict.fromkeys(twins, (spec, True))
    for rule in rules:
        matched = [name for name, twin in twins.items() if _matches(rule, name, twin.type_name, families)]
        if not matched:
            raise config_error(
                "rule",
                rule.to_text(),
                allowed=f"a rule that matches a layer; {_name_hint(list(twins))}",
                fix="correct it",
            )
        for name in matched:
            current, is_trainable = plan[name]
            changed = None if rule.skip or (current is None and rule.keeps_spec) else rule.apply(current or spec)
            plan[name] = (changed, is_trainable if rule.trainable is None else rule.trainable)
    return plan


def _fitted(model: nn.Module, name: str, spec: QuantSpec | None, fit: Fit) -> QuantSpec | None:
    module = model.get_submodule(name)
    twin = twin_type(module)
    if spec is None or twin is None:
        return None
    return fit(name, twin.type_name, tuple(cast(Tensor, module.weight).shape), spec)


def _check_plan(model: nn.Module, plan: dict[str, tuple[QuantSpec | None, bool]]) -> None:
    if all(spec is None for spec, _ in plan.values()):
        raise config_error("rules", "skip everything", allowed="at least one quantized layer", fix="remove a skip rule")
    for name, (spec, _) in plan.items():
        if spec is None:
            continue
        module = model.get_submodule(name)
        if not has_finite_weight(module):
            raise config_error(f"{name}.weight", "nan or inf", allowed="finite weights", fix="load a sound checkpoint")
        try:
            spec.weight.layout().split(module.weight)  # pyright: ignore[reportArgumentType]
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None


def _parameters_to_freeze(model: nn.Module, families: LayerFamilies, train: str, frozen_layers: list[str]) -> set[str]:
    """Names of trainable parameters outside the family `train` or in a frozen layer.

    A tied parameter has several names: it trains if one of them is in the family, and is frozen if one is in a frozen layer.
    """
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    trained = {id(parameter) for name, parameter in named if families.contains(train, name)}
    if named and not trained:
        raise config_error("train", train, allowed="a family that this model has", fix="use All, or give its families")
    prefixes = tuple(f"{layer}." if layer else "" for layer in frozen_layers)
    return {name for name, parameter in named if id(parameter) not in trained or name.startswith(prefixes)}


def _set_requires_grad_(model: nn.Module, names: set[str], requires_grad: bool) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(requires_grad)


def _disable_fused_encoders_(model: nn.Module) -> None:
    """`nn.TransformerEncoderLayer` in evaluation has a fused path that reads the weights of its linear layers directly.

    It would skip quantization in silence. Its own switch is an attribute that says which activation can be fused.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(True for _ in quantized_layers(module)):
            module.__dict__.setdefault(_FUSED_ATTRIBUTE, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0


def _restore_fused_encoders_(model: nn.Module) -> None:
    for module in model.modules():
        if _FUSED_ATTRIBUTE in module.__dict__:
            cast(nn.TransformerEncoderLayer, module).activation_relu_or_gelu = module.__dict__.pop(_FUSED_ATTRIBUTE)


def set_bypassed_(layers: Iterable[QuantizedLayer], *, weights: bool, inputs: bool) -> None:
    """Leaves weights and inputs of layers in floating point (True), or quantizes them (False)."""
    for layer in layers:
        layer.weight_quantizer.is_bypassed = weights
        if layer.activation_quantizer is not None:
            layer.activation_quantizer.is_bypassed = inputs


def _matches(rule: LayerRule, name: str, type_name: str, families: LayerFamilies) -> bool:
    return (
        (rule.pattern is None or fnmatchcase(name, rule.pattern))
        and (rule.module_type is None or rule.module_type == type_name)
        and (rule.family is None or families.contains(rule.family, name))
    )


def _is_listed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _row(name: str, module: nn.Module, families: LayerFamilies, *, is_changed: bool) -> LayerRow:
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    is_quantized = isinstance(module, QuantizedLayer)
    return LayerRow(
        name=name,
        type_name=module.type_name if is_quantized else type(module).__name__,
        family=families.family_of(name),
        shape=tuple(weight.shape) if weight is not None else (),
        spec=module.spec if is_quantized else None,
        is_trainable=any(p.requires_grad for p in parameters.values()),
        num_parameters=sum(p.numel() for p in parameters.values()),
        reason=_reason(module) if is_changed and not is_quantized else "",
        extras=_extras(module) if is_quantized else "",
    )


def _extras(layer: QuantizedLayer) -> str:
    smoothed = "" if layer.smoothing is None else ", smoothed"
    if layer.branch is None:
        return smoothed
    leaves = " to 0" if layer.branch.spec.rank_schedule.decays else ""
    return f"{smoothed}, rank {layer.branch.up.shape[1]}{leaves}"


def _reason(module: nn.Module) -> str:
    if isinstance(module, PackedLayer):
        return "packed"
    if twin_type(module) is not None:
        return "skipped"
    return "subclass" if isinstance(module, nn.Linear) else "not a matrix product"


def _name_hint(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"names here are {shown}{', ...' if len(names) > 4 else ''}"


def _num_elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
