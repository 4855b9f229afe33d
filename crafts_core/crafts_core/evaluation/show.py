"""Which pictures a page of an evaluation has; read by programs before anything heavy is loaded."""

from typing import Literal

Pictured = Literal["generated", "real", "nearest"]
"""Generated images alone, beside random real tiles, or each beside the nearest real tile."""
Show = Literal["auto", "generated", "real", "nearest"]
"""``auto``: real tiles only where images and real tiles are both folders of somebody's."""
