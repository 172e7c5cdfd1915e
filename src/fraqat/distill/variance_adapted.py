"""AdamW whose steps go where gradients agree: by the whole variance adaptation factor instead of its root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_STEP, _MEAN, _SQUARE = "step", "exp_avg", "exp_avg_sq"


class VarianceAdaptedAdamW(torch.optim.AdamW):
    """AdamW with the whole variance adaptation factor in place of its root, and steps as long as AdamW's.

    With m the mean and v the mean square of an element's gradients, Adam moves it by u = m / sqrt(v) = sign(m) sqrt(f), where
    f = m^2 / v = 1 / (1 + relative variance) is the factor by which a noisy direction should be shortened (Balles and Hennig,
    arXiv 1705.07774). Here it moves by sign(m) f = u |u|, times the number that gives the update of a tensor with two or more
    axes the norm of u, so that the learning rates of AdamW serve: elements whose gradients agree move more, and those whose
    gradients cancel less. Tensors with one axis (norms, biases) move as AdamW moves them.

    State and arguments are AdamW's, so that a checkpoint of one is read by the other. A step takes memory for two tensors of
    the largest parameter's size beside that.

    Args:
        params: As AdamW's: parameters, or groups of them.
        lr, betas, eps, weight_decay: As AdamW's; the gain was largest with a first beta of 0.5 (docs/log.md).
        sum_rows_: Where each process holds rows of the parameters: adds a tensor up over the processes that share them, in
            place. It is called once a step, with the squares of all norms.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        sum_rows_: Callable[[Tensor], None] | None = None,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._sum_rows_ = sum_rows_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the parameters in place from their gradients; one without a gradient stays as it is.

        Args:
            closure: None: gradients are there already.

        Raises:
            ValueError: There is a closure.
        """
        if closure is not None:
            raise ValueError("closure is given; allowed is None. Fix: compute the gradients, then call step().")
        in_rows: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self._gather_moments_(parameter, group)
                if parameter.ndim > 1 and self._sum_rows_ is not None:
                    in_rows.append((parameter, group))
                    continue
                update = self._update(parameter, group)
                if parameter.ndim > 1:
                    own = _squares(update)
                    update.mul_(update.abs())
                    update.mul_(_ratio(own, _squares(update)))
                _move_(parameter, update, group)
        if in_rows:
            self._step_rows_(in_rows)

    def _step_rows_(self, in_rows: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """All norms first, by one sum over the processes; updates are computed twice instead of being kept."""
        assert self._sum_rows_ is not None
        updates = (self._update(*pair) for pair in in_rows)
        squares = torch.stack([torch.stack((_squares(update), _squares(update.square()))) for update in updates])
        self._sum_rows_(squares)
        for (parameter, group), (own, powered) in zip(in_rows, squares.unbind(), strict=True):
            update = self._update(parameter, group)
            _move_(parameter, update.mul_(update.abs()).mul_(_ratio(own, powered)), group)

    def _gather_moments_(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = cast("dict[str, Tensor]", self.state[parameter])
        if not state:
            state[_STEP] = torch.zeros((), dtype=torch.float32)
            state[_MEAN] = torch.zeros_like(parameter)
            state[_SQUARE] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        beta1, beta2 = group["betas"]
        state[_STEP] += 1
        state[_MEAN].lerp_(gradient, 1 - beta1)
        state[_SQUARE].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """u."""
        state = cast("dict[str, Tensor]", self.state[parameter])
        step = state[_STEP].double()  # a tensor: the planner traces a step without values
        beta1, beta2 = group["betas"]
        divisor = (state[_SQUARE] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return torch.div(state[_MEAN], divisor, out=divisor).div_(1 - beta1**step)


def _move_(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    rate = group["lr"]
    parameter.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate)


def _squares(tensor: Tensor) -> Tensor:
    """Sum of squares in float64, so that the order of a sum, which is that of the processes, does not show in float32."""
    return tensor.square().sum(dtype=torch.float64)


def _ratio(own: Tensor, powered: Tensor) -> Tensor:
    """Norm of u over that of u |u|; 0 where there is no gradient."""
    return torch.where(powered > 0, (own / powered).sqrt(), 0.0).float()
