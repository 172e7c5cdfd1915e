"""AdamW whose steps go where gradients agree: by the whole variance adaptation factor instead of its root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_STEP, _MEAN, _SQUARE = "step", "exp_avg", "exp_avg_sq"


class VarianceAdaptedAdamW(torch.optim.AdamW):
    """AdamW with the whole variance adaptation factor in place of its root, and steps as long as AdamW's.

    With m the mean and v the mean square of an element's gradients, Adam moves it by u = m / sqrt(v) = sign(m) sqrt(f), where
    f = m^2 / v = 1 / (1 + relative variance) is the factor by which a noisy direction should be shortened (Balles and Hennig,
    arXiv 1705.07774). Here it moves by sign(m) f = u |u|, times the number that gives the update of a tensor with two or more
    axes the norm of u, so that the learning rates of AdamW serve: elements whose gradients agree move more, and those whose
    gradients cancel, which a rounded weight should not follow over a boundary, less. Tensors with one axis (norms, biases)
    move as AdamW moves them.

    State and arguments are AdamW's, so that a checkpoint of one is read by the other. A step takes memory for two tensors of
    the largest parameter's size beside that. Where processes hold rows of a parameter (FSDP2), one sum over them in each step
    gives all norms.

    Args:
        params: As AdamW's: parameters, or groups of them.
        lr, betas, eps, weight_decay: As AdamW's.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

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
        sharded: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self._gather_moments_(parameter, group)
                if parameter.ndim < 2:
                    _move_(parameter, self._update(parameter, group), group)
                elif isinstance(parameter, DTensor):
                    sharded.append((parameter, group))
                else:
                    update = self._update(parameter, group)
                    powered = update.abs().mul_(update)
                    _move_(parameter, powered.mul_(_ratio(_squares(update), _squares(powered))), group)
        if sharded:
            self._step_sharded_(sharded)

    def _step_sharded_(self, sharded: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """All norms first, by one sum over the processes; updates are computed twice instead of being kept."""
        updates = (self._update(*pair) for pair in sharded)
        found = [torch.stack((_squares(update), _squares(update.square()))) for update in updates]
        squares = torch.stack(found)
        dist.all_reduce(squares, group=_group_of_rows(cast(DTensor, sharded[0][0])))
        for (parameter, group), (own, powered) in zip(sharded, squares.unbind(), strict=True):
            update = self._update(parameter, group)
            _move_(parameter, update.mul_(update.abs()).mul_(_ratio(own, powered)), group)

    def _gather_moments_(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = cast("dict[str, Tensor]", self.state[parameter])
        if not state:
            state[_STEP] = torch.zeros((), dtype=torch.float32)
            state[_MEAN] = torch.zeros_like(parameter)
            state[_SQUARE] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        gradient = _rows(parameter.grad)
        state[_STEP] += 1
        _rows(state[_MEAN]).lerp_(gradient, 1 - beta1)
        _rows(state[_SQUARE]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """u, of the rows of this process."""
        state = cast("dict[str, Tensor]", self.state[parameter])
        step = state[_STEP].item()
        beta1, beta2 = group["betas"]
        divisor = (_rows(state[_SQUARE]) / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return torch.div(_rows(state[_MEAN]), divisor, out=divisor).div_(1 - beta1**step)


def _move_(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    rate = group["lr"]
    _rows(parameter).mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate)


def _rows(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _squares(tensor: Tensor) -> Tensor:
    """Sum of squares in float64, so that the order of a sum, which is that of the processes, does not show in float32."""
    return tensor.square().sum(dtype=torch.float64)


def _ratio(own: Tensor, powered: Tensor) -> Tensor:
    """Norm of u over that of u |u|; 0 where there is no gradient."""
    return torch.where(powered > 0, (own / powered).sqrt(), 0.0).float()


def _group_of_rows(parameter: DTensor) -> dist.ProcessGroup:
    mesh = parameter.device_mesh
    return next(mesh.get_group(i) for i, place in enumerate(parameter.placements) if place.is_shard())
