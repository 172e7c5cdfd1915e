"""Laws of layers that are made for a saved state: nothing is searched, and the state makes them the layers that were saved."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fraqat.nn import QuantSpec, WeightSpec, quantize_, serve_widths_, set_bits_, without_search
from fraqat.nn import quantizers as quantizers_module


@pytest.mark.parametrize("widths", [(), (8, 4)])
@pytest.mark.parametrize("method", ["mse", "learned"])
def test_a_saved_state_needs_no_search(
    method: Any, widths: tuple[int, ...], tiny: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantSpec(weight=WeightSpec(range_method=method))
    other = type(tiny)()
    quantize_(tiny, spec)
    if widths:
        serve_widths_(tiny, widths)
    found: list[Any] = []
    for name in ("mse_clip_ratio", "choose_qparams"):
        monkeypatch.setattr(quantizers_module, name, lambda *args, **kwargs: found.append(args))
    with without_search():
        quantize_(other, spec)
        if widths:
            serve_widths_(other, widths)
    monkeypatch.undo()
    assert not found
    other.load_state_dict(tiny.state_dict())
    assert torch.equal(other(images), tiny(images))
    for model in (tiny, other):  # from here on it is searched
        set_bits_(model, widths[0] if widths else 6)
    assert torch.equal(other(images), tiny(images))
