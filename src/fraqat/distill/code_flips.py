"""How many weight codes change during training, on the current grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fraqat.distill.log import RunLog, StepRecord
from fraqat.distill.spec import TrainSpec
from fraqat.nn import LayerFamilies, QuantizedLayer, quantized_layers
from fraqat.numerics import code_dtype, encode

CODES_EVENT = "codes"


@dataclass(frozen=True)
class FlipCount:
    """Weight codes, and how many of them are not what they were."""

    num_codes: int
    num_changed: int

    @property
    def share(self) -> float:
        """Of the codes, in [0, 1]."""
        return self.num_changed / self.num_codes if self.num_codes else 0.0


class CodeFlips:
    """Counts the weight codes that changed between two moments; a layer whose grid changed in between starts again.

    With `schedule.grid: final` the grid is the last one in every stage, and so are the codes.

    Keeps the codes of every quantized layer: one byte a weight up to 8 bits. Nothing of the model is changed, and no random
    number is drawn.

    Args:
        model: A quantized model.
        families: Layer families of the counts; None uses the usual names of diffusers and transformers.
    """

    def __init__(self, model: nn.Module, families: LayerFamilies | None = None):
        families = families or LayerFamilies()
        self._layers = [(families.family_of(name), layer) for name, layer in quantized_layers(model)]
        self._bits: list[float] = []
        self._codes: list[Tensor] = []

    @property
    def is_current(self) -> bool:
        """Whether codes are kept, and all of them at the width that their layer has now."""
        return self._bits == [layer.weight_quantizer.grid.bits for _, layer in self._layers]

    def start(self) -> None:
        """Keeps the codes as they are now; `count` compares with these."""
        self._bits = [layer.weight_quantizer.grid.bits for _, layer in self._layers]
        self._codes = [_codes(layer) for _, layer in self._layers]

    def count(self) -> dict[str, FlipCount]:
        """Codes and changes by family since the last `start` or `count`, over the layers whose width is still the same.

        Keeps the codes of now. Families in the order in which they first occur; none without such a layer.
        """
        found: dict[str, FlipCount] = {}
        if not self._codes:
            self.start()
            return found
        for index, (family, layer) in enumerate(self._layers):
            codes, bits = _codes(layer), layer.weight_quantizer.grid.bits
            if bits == self._bits[index]:
                before = found.get(family, FlipCount(0, 0))
                num_changed = int((codes != self._codes[index]).sum())
                found[family] = FlipCount(before.num_codes + codes.numel(), before.num_changed + num_changed)
            self._bits[index], self._codes[index] = bits, codes
        return found


class CodeFlipLog:
    """Writes the event `codes` to the log, and its shares as scalars, every `validate_every` steps.

    Where the width changes, and where an interrupted run goes on, counting starts at that step; `since_step` of an event says
    with what it compares. Does nothing unless `train.log_code_flips`.

    Args:
        model: The student.
        spec: `log_code_flips`, `validate_every`.
        log: Of the run.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec, log: RunLog):
        self._flips = CodeFlips(model) if spec.log_code_flips else None
        self._every, self._log = spec.validate_every, log
        self._since = 0

    def before_step(self, step: int) -> None:
        """Call it before every optimizer step, once the width is set. `step` counts from 0."""
        if self._flips is not None and not self._flips.is_current:
            self._flips.start()
            self._since = step

    def after_step(self, record: StepRecord) -> None:
        """Call it after every optimizer step."""
        num_done = record.step + 1
        if self._flips is None or (num_done % self._every and num_done != record.total_steps):
            return
        counts = self._flips.count()
        total = FlipCount(sum(c.num_codes for c in counts.values()), sum(c.num_changed for c in counts.values()))
        shares = {"all": total.share, **{family: count.share for family, count in counts.items()}}
        self._log.write_shares(
            CODES_EVENT,
            record.step,
            shares,
            bits=record.bits,
            since_step=self._since,
            num_codes=total.num_codes,
            num_changed=total.num_changed,
        )
        self._since = num_done


@torch.no_grad()
def _codes(layer: QuantizedLayer) -> Tensor:
    """Codes of the weight at its current width, one block a row, in the smallest integers that hold them.

    A weight that is NaN has no code and counts as 0: the trainer finds it at the next step, and says where.
    """
    quantizer, weight = layer.weight_quantizer, layer.whole_weight().detach()
    blocks = quantizer.layout.split(weight)
    blocks = blocks.to(torch.promote_types(blocks.dtype, quantizer.grid.compute_dtype))
    codes = encode(blocks, quantizer.qparams(weight), quantizer.grid)
    return torch.nan_to_num(codes, nan=0.0).to(code_dtype(quantizer.grid))
