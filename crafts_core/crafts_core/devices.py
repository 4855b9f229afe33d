"""The device that a person named, or one line on why it cannot be had; its faster numbers."""

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


def autocast_where_faster(device: torch.device) -> torch.autocast:
    """bfloat16 on devices with units for it (GPUs, Intel's AMX); float32 on others.

    AVX-512 has instructions for it, too, and is slower with them (benchmarks/build_step.py).
    """
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older torch does not tell.
        told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        is_faster = bool(told.get("amx_bf16", False))
    return torch.autocast(device.type, torch.bfloat16, enabled=is_faster)
