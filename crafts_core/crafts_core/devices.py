"""The device that a person named, or one line on why it cannot be had."""

import torch

from crafts_core.errors import CraftsError


def open_device(name: str) -> torch.device:
    """Make sure that tensors can be put on a device.

    Raises:
        CraftsError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        has = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise CraftsError(
            f"device {name} cannot be used here; this machine has {', '.join(has)}"
        ) from error
    if device.type == "meta":
        raise CraftsError("device meta holds no numbers; use cpu or cuda")
    return device
