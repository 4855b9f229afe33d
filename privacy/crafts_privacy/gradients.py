"""One flat float32 gradient over many parameters, filled by ordinary backward passes.

The ``grad`` of every float32 parameter is a view into the flat vector, so autograd writes it in
place and no copy is made; other dtypes are collected after each backward pass, so that sums run
in float32. Letters: D all coordinates of all parameters.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.hooks import RemovableHandle


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


_THIN = 64
"""Rank of a factor up to which a gradient for each tile costs next to nothing."""


class GroupGradients:
    """The gradients of several patients from one forward and one backward pass.

    A weight's gradient is a product of what went into its layer and what came back at its output.
    The tiles of a patient are neighbours there, so folding them into one long batch gives that
    patient's gradient in one product: memory is one row of the result for each patient. Linear
    and convolution layers are folded here; for other layers Opacus' per-sample rules are summed
    over each patient's tiles.

    Every pass has one shape. Which order a processor adds numbers in depends on the shape of what
    it multiplies, so in a pass of another shape a patient's gradient would round differently; and
    how many patients are left for a step's last pass depends on who was drawn.
    ``crafts_privacy.isolation`` checks that nothing else in a pass matters.

    Only while the context is open, from as many threads as there are: a pass belongs to the thread
    that runs its forward and calls ``compute``. Right where no layer mixes tiles, which
    ``crafts_core.stages.objective.assert_per_tile`` checks.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        num_patients: int,
        num_tiles: int,
    ) -> None:
        """Find the layers that own ``parameters``.

        Args:
            module: What runs in a pass.
            parameters: What trains.
            num_patients: Places in every pass.
            num_tiles: Rows of each place.

        Raises:
            ValueError: a layer that neither folds nor has a rule; train patient by patient.
        """
        if num_patients < 1 or num_tiles < 1:
            raise ValueError(f"expected at least one row, got {num_patients} x {num_tiles}")
        self.num_patients, self.num_tiles = num_patients, num_tiles
        self._parameters = parameters
        trained = set(map(id, parameters))
        self._layers = [
            layer
            for layer in module.modules()
            if any(id(parameter) in trained for parameter in layer.parameters(recurse=False))
        ]
        for layer in self._layers:
            if not _folds(layer) and _opacus_rule(layer) is None:
                raise ValueError(
                    f"no rule splits the gradient of {type(layer).__name__} by patient; "
                    "train patient by patient"
                )
        self._folded = [
            parameter
            for layer in filter(_folds, self._layers)
            for parameter in layer.parameters(recurse=False)
            if id(parameter) in trained
        ]
        self._root = torch.zeros((), device=parameters[0].device, requires_grad=True)
        self._handles: list[RemovableHandle] = []
        self._own = _OfThread()

    def __enter__(self) -> Self:
        # Else autograd keeps every layer's input a second time, for gradients nobody asks for.
        for parameter in self._folded:
            parameter.requires_grad_(False)
        self._handles = [layer.register_forward_hook(self._tap) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._folded:
            parameter.requires_grad_(True)

    def _tap(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In the output's type, which is what the layer computed with under autocast.
        input_B = inputs[0].detach().to(output.dtype)
        tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
            output, input_B, self._root, partial(self._add, layer, self._own.rows_of)
        )
        return tapped

    def compute(self, loss_B: Tensor) -> Tensor:
        """The gradient at each place, float32 (P, D).

        Args:
            loss_B: The losses of all rows, a patient's next to each other, adding up to that
                patient's loss; a row that only fills its place weighs nothing in it. Computed
                inside the context, in one forward pass whose first dimension is B.

        Raises:
            RuntimeError: a pass of another shape.
        """
        self._check_shape(len(loss_B))
        size = sum(parameter.numel() for parameter in self._parameters)
        grad_PD = torch.zeros(self.num_patients, size, device=self._parameters[0].device)
        rows = _rows_of(grad_PD, self._parameters)
        rows_of = self._own.rows_of
        rows_of.update(zip(map(id, self._parameters), rows, strict=True))
        try:
            torch.autograd.grad([loss_B.sum()], [self._root], allow_unused=True)
        finally:
            rows_of.clear()
        return grad_PD

    def _add(
        self,
        layer: nn.Module,
        rows_of: Mapping[int, Tensor],
        input_B: Tensor,
        backprop_B: Tensor,
    ) -> None:
        """One call's share of the rows of its layer's parameters."""
        if not rows_of:
            raise RuntimeError("a pass goes backward in another thread than its forward ran in")
        self._check_shape(len(input_B))
        self._check_shape(len(backprop_B))
        _add_by_patient(layer, input_B.float(), backprop_B.float(), self.num_tiles, rows_of)

    def _check_shape(self, num_rows: int) -> None:
        expected = self.num_patients * self.num_tiles
        if num_rows != expected:
            raise RuntimeError(
                f"expected {expected} rows in every pass, in losses and layers, got {num_rows}; "
                "train patient by patient"
            )


class _OfThread(threading.local):
    """What a thread's own pass writes into: parameter (by ``id``) to its rows."""

    def __init__(self) -> None:
        self.rows_of: dict[int, Tensor] = {}


class _Tap(torch.autograd.Function):
    """Passes a layer's output on; on the way back, hands out what arrives there.

    The backward pass folds one layer at a time and forgets it, instead of keeping what came back
    at every layer. All taps hang on one root, so that differentiating by the root visits each of
    them and computes no gradient of a weight. Autograd keeps the input as any layer's: under
    checkpointing it is computed again, and one that was changed in place is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input_B: Tensor,
        root: Tensor,  # noqa: ARG004, it makes the tap a part of the graph
        add: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(input_B)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, backprop_B: Tensor) -> tuple[Tensor | None, ...]:
        (input_B,) = ctx.saved_tensors
        ctx.add(input_B, backprop_B)
        return backprop_B, None, None, None


def _rows_of(grad_PD: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views (P, *shape) into the rows, one for each parameter in order."""
    pieces = torch.split(grad_PD, [parameter.numel() for parameter in parameters], dim=1)
    return [
        piece.unflatten(1, parameter.shape)
        for piece, parameter in zip(pieces, parameters, strict=True)
    ]


def _folds(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _opacus_rule(layer: nn.Module) -> Callable[..., dict[nn.Parameter, Tensor]] | None:
    """(layer, [input], backprop) to the gradient of each tile, for each parameter."""
    from opacus.grad_sample import GradSampleModule  # it imports much of torch

    rule: Callable[..., dict[nn.Parameter, Tensor]] | None
    rule = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
    return rule


def _add_by_patient(
    layer: nn.Module,
    input_B: Tensor,
    backprop_B: Tensor,
    num_tiles: int,
    rows_of: Mapping[int, Tensor],
) -> None:
    """Add one call's share, in float32, to the rows of its layer's parameters."""
    if not _folds(layer):
        rule = _opacus_rule(layer)
        assert rule is not None
        for parameter, grad_B in rule(layer, [input_B], backprop_B).items():
            if id(parameter) in rows_of:
                rows_of[id(parameter)] += grad_B.unflatten(0, (-1, num_tiles)).sum(1)
        return
    weight, bias = rows_of.get(id(layer.weight)), rows_of.get(id(layer.bias))
    if isinstance(layer, nn.Linear):
        # One product for all patients. A LoRA factor's is so thin that a GPU is idle unless there
        # is one for each tile.
        thin = backprop_B.is_cuda and min(layer.in_features, layer.out_features) <= _THIN
        by_patient = (-1, num_tiles if thin else 1)
        num_products = len(backprop_B) // (1 if thin else num_tiles)
        input_GNI = input_B.reshape(num_products, -1, layer.in_features)
        backprop_GNO = backprop_B.reshape(num_products, -1, layer.out_features)
        if weight is not None:
            product_GOI = backprop_GNO.mT @ input_GNI
            weight += product_GOI.unflatten(0, by_patient).sum(1) if thin else product_GOI
        if bias is not None:
            bias += backprop_GNO.unflatten(0, by_patient).sum((1, 2))
        return
    assert isinstance(layer, nn.Conv2d)  # ``_folds`` knows no third
    split = zip(input_B.split(num_tiles), backprop_B.split(num_tiles), strict=True)
    for patient, (input_T, backprop_T) in enumerate(split):
        if weight is not None:
            weight[patient] += _weight_gradient(layer, input_T, backprop_T)
        if bias is not None:
            bias[patient] += backprop_T.sum((0, 2, 3))


def _weight_gradient(layer: nn.Conv2d, input_T: Tensor, backprop_T: Tensor) -> Tensor:
    """Of one patient's tiles together."""
    gradient: Tensor = conv2d_weight(
        input_T,
        layer.weight.shape,
        backprop_T,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return gradient


def views_of(flat_D: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views into a flat vector, one of each parameter's shape, in order."""
    pieces = torch.split(flat_D, [parameter.numel() for parameter in parameters])
    return [
        piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)
    ]
