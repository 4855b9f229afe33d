"""How images are drawn: settings that programs offer and provenance names. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

SchedulerName = Literal["unipc", "dpm++", "ddim", "euler"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
"""Samplers without noise of their own: an image follows from the noise that it starts from."""
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
MAX_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """Whatever is here changes pixels."""

    scheduler: SchedulerName = "unipc"
    num_inference_steps: int = 10
    guidance_scale: float = 3.0
    """1 follows the caption as trained; more exaggerates it."""

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"expected one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        if not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise ValueError(f"expected 1 to {MAX_STEPS} steps, got {self.num_inference_steps}")
        if not 1.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"expected guidance_scale from 1 up, got {self.guidance_scale}")
