"""One flat float32 gradient over many parameters, filled by ordinary backward passes.

The ``grad`` of every float32 parameter is a view into the flat vector, so autograd writes it in
place and no copy is made; other dtypes are collected after each backward pass, so that sums run
in float32. Letters: D all coordinates of all parameters.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


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


def views_of(flat_D: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views into a flat vector, one of each parameter's shape, in order."""
    pieces = torch.split(flat_D, [parameter.numel() for parameter in parameters])
    return [
        piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)
    ]
