"""Static HDR metadata of a video: the display it was mastered on (SMPTE ST 2086) and how bright it gets (CTA-861.3).

    metadata = read_hdr_metadata(frame)
    options |= metadata.encoder_options("libx265")

PyAV hands out the structures of libavutil as bytes and can't write any, so they reach a new video by the encoder's own
settings. The layout of the bytes is that of libavutil 60.
"""

from __future__ import annotations

import dataclasses
import struct
from fractions import Fraction
from typing import Any, cast

import av

_DISPLAY, _LIGHT = "MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"
_NAMES = {
    # encoder -> its option for settings, those for the display and the light, and units to a coordinate and to a cd/m²
    "libx265": ("x265-params", "master-display", "max-cll", 50_000, 10_000),
    "libx264": ("x264-params", "mastering-display", "cll", 50_000, 10_000),
    "libsvtav1": ("svtav1-params", "mastering-display", "content-light", 0, 0),  # decimals
}


@dataclasses.dataclass(frozen=True)
class HdrMetadata:
    """Static HDR metadata; None for what a video does not state."""

    display: tuple[Fraction, ...] | None = None
    """Chromaticity x, y of red, green, blue and white, then the least and the greatest luminance in cd/m²."""
    light: tuple[int, int] | None = None
    """Greatest luminance of a pixel (MaxCLL) and of the mean of a frame (MaxFALL), in cd/m²."""

    def encoder_options(self, codec: str) -> dict[str, str]:
        """Return the option that makes an encoder write the metadata; nothing for one that has no such option."""
        if codec not in _NAMES or self == HdrMetadata():
            return {}
        option, display, light, point, luminance = _NAMES[codec]
        settings = []
        if self.display:
            xy = [f"{round(one * point)}" if point else f"{float(one):.5f}" for one in self.display[:8]]
            least, most = (f"{round(one * luminance)}" if luminance else f"{float(one):.4f}" for one in self.display[8:])
            red, green, blue, white = (f"({x},{y})" for x, y in zip(xy[::2], xy[1::2], strict=True))
            settings.append(f"{display}=G{green}B{blue}R{red}WP{white}L({most},{least})")
        if self.light:
            settings.append(f"{light}={self.light[0]},{self.light[1]}")
        return {option: ":".join(settings)}


def read_hdr_metadata(frame: av.VideoFrame) -> HdrMetadata:
    """Return the metadata that a decoded frame carries."""
    found = {data.type.name: bytes(data) for data in cast(Any, frame.side_data)}
    display = light = None
    if _DISPLAY in found:
        *numbers, has_primaries, has_luminance = struct.unpack("=22i", found[_DISPLAY])
        if has_primaries and has_luminance and all(numbers[1::2]):
            display = tuple(Fraction(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    if _LIGHT in found:
        light = struct.unpack("=2I", found[_LIGHT][:8])
    return HdrMetadata(display, light)
