"""Laws of packed files of modules that no recipe describes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fraqat import LayerRule, quantize_, set_bits_
from fraqat.errors import ConfigError, ModelError, OutputError
from fraqat.export import restore_packed_, save_packed
from fraqat.nn import IntegerLayers, packed_codes


class Net(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.first = nn.Linear(32, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


def quantized(model: nn.Module) -> nn.Module:
    student = copy.deepcopy(model)
    quantize_(student, rules=[LayerRule(pattern="last", weight_bits=8)])
    return student


def test_a_student_comes_back_bit_for_bit_from_its_folder(tmp_path: Path) -> None:
    student = quantized(Net()).eval()
    size = save_packed(student, tmp_path / "p")
    assert size.num_quantized_weights == 48 * 32 + 16 * 48
    assert size.num_file_bytes == (tmp_path / "p" / "model.safetensors").stat().st_size
    restored = restore_packed_(Net(), str(tmp_path / "p"))
    codes = packed_codes(restored)
    assert codes["first"].abs().max() <= 8 < codes["last"].abs().max()
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(restored(x), student(x))
        IntegerLayers(student)
        IntegerLayers(restored, counts_preparation=False)
        assert torch.equal(restored(x), student(x))


def test_what_does_not_fit_is_refused_with_the_fix(tmp_path: Path) -> None:
    save_packed(quantized(Net()), tmp_path / "p")
    before = json.loads((tmp_path / "p" / "manifest.json").read_text())
    with pytest.raises(ModelError, match=r"holds a Net, the model is a Linear. Fix: build the class"):
        restore_packed_(nn.Linear(3, 4), tmp_path / "p")
    with pytest.raises(ModelError, match=r"does not fit Net|has the shape"):
        restore_packed_(Net(width=40), tmp_path / "p")
    with pytest.raises(ModelError, match=r"Net has no quantized layer. Fix: call fraqat.quantize_ first."):
        save_packed(Net(), tmp_path / "q")
    wide = quantized(Net())
    set_bits_(wide, 6)
    with pytest.raises(ConfigError, match=r"first.bits = 6.* Fix: call set_bits_ first"):
        save_packed(wide, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    with pytest.raises(OutputError, match="exists"):
        save_packed(quantized(Net()), tmp_path / "p")
    assert json.loads((tmp_path / "p" / "manifest.json").read_text()) == before
    save_packed(quantized(Net()), tmp_path / "p", overwrite=True)
