"""One flat float32 gradient over many parameters, filled by ordinary backward passes.

The ``grad`` of every float32 parameter is a view into the flat vector, so autograd writes it in
place and no copy is made; other dtypes are collected after each backward pass, so that sums run
in float32. Letters: D all coordinates of all parameters.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooks


class FlatGradient:
    """The gradient of one patient at a time.

    ``release`` takes every ``grad`` away again: what stays in a parameter's ``grad`` after a step
    would be one patient's unclipped gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        first = parameters[0]
        num_coordinates = sum(parameter.numel() for parameter in parameters)
        self.grad_D = torch.zeros(num_coordinates, dtype=torch.float32, device=first.device)
        self._views = views_of(self.grad_D, parameters)

    def compute(self, losses: Iterable[Tensor]) -> Tensor:
        """The gradient of the sum of ``losses``, one backward pass for each.

        No losses at all give a zero gradient: a patient without usable tiles.

        Returns:
            The flat vector; the next call overwrites it.
        """
        self.grad_D.zero_()
        for loss in losses:
            if loss.ndim != 0:
                raise ValueError(f"expected a scalar loss for a patient, got {loss.ndim} dims")
            self._attach()
            torch.autograd.backward([loss], inputs=list(self._parameters))
            self._collect()
        return self.grad_D

    def release(self) -> None:
        """Forget the gradient everywhere."""
        self.grad_D.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def _attach(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view if parameter.dtype == torch.float32 else None

    def _collect(self) -> None:
        """Add what autograd did not write into the views itself."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            grad = parameter.grad
            if grad is None or grad is view:
                continue
            if parameter.dtype == torch.float32:
                raise RuntimeError("autograd replaced a gradient view; is create_graph in use?")
            view.add_(grad)
            parameter.grad = None


class GroupGradients:
    """The gradients of several patients from one backward pass, by Opacus' per-sample hooks.

    Only while the context is open; memory is one gradient for each tile of the group, so it suits
    adapters, not full weights.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._module = module
        self._parameters = parameters
        self._hooks: GradSampleHooks | None = None

    def __enter__(self) -> Self:
        # Opacus imports much of torch; and its hooks fire in training mode only, which changes
        # nothing in the layers that have weights of their own.
        from opacus.grad_sample import GradSampleHooks

        trained = set(map(id, self._parameters))
        self._trained = [
            layer
            for layer in self._module.modules()
            if any(id(parameter) in trained for parameter in layer.parameters(recurse=False))
        ]
        self._were_training = [layer.training for layer in self._trained]
        for layer in self._trained:
            layer.training = True
        self._hooks = GradSampleHooks(self._module, loss_reduction="sum", strict=False)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hooks is not None
        self._hooks.remove_hooks()
        self._forget()
        for layer, was_training in zip(self._trained, self._were_training, strict=True):
            layer.training = was_training

    def compute(self, loss_B: Tensor, owner_B: Tensor, *, num_patients: int) -> Tensor:
        """Each patient's gradient, float32 (P, D).

        Args:
            loss_B: The losses of all tiles; a patient's add up to that patient's loss. Computed
                inside the context, in one forward pass whose first dimension is B.
            owner_B: Whose tile it is, 0 to ``num_patients`` - 1.
            num_patients: P; patients without a tile get zeros.
        """
        with warnings.catch_warnings():
            # The first layers' inputs need no gradient; the hooks do not use it.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward([loss_B.sum()])
        try:
            grad_PD = torch.cat([self._of(parameter, loss_B) for parameter in self._parameters], 1)
            zeros_PD = grad_PD.new_zeros(num_patients, grad_PD.shape[1])
            return zeros_PD.index_add_(0, owner_B.to(grad_PD.device), grad_PD)
        finally:
            self._forget()

    def _of(self, parameter: nn.Parameter, loss_B: Tensor) -> Tensor:
        per_tile = getattr(parameter, "grad_sample", None)
        if per_tile is None:  # the loss does not reach it
            return torch.zeros(len(loss_B), parameter.numel(), device=parameter.device)
        if len(per_tile) != len(loss_B):
            raise RuntimeError(
                "a layer ran on another batch than the loss; train patient by patient"
            )
        flat: Tensor = per_tile.flatten(1).float()
        return flat

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


def views_of(flat_D: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views into a flat vector, one of each parameter's shape, in order."""
    pieces = torch.split(flat_D, [parameter.numel() for parameter in parameters])
    return [
        piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)
    ]
