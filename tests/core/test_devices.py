"""Which numbers a device multiplies faster."""

import pytest
import torch

from crafts_core.devices import autocast_where_faster


@pytest.mark.parametrize("has_amx", [False, True])
def test_bfloat16_is_for_devices_with_units_for_it(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    with autocast_where_faster(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has_amx else torch.float32)


def test_a_torch_that_does_not_tell_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    with autocast_where_faster(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
