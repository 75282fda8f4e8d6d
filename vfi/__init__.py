"""Training stack for video frame interpolation: the model, its training, benchmarks and inference.

from vfi import FrameInterpolator
model = FrameInterpolator.from_pretrained()
imgt = model(img0, img1)
"""

from typing import TYPE_CHECKING, Any

from shards import end_imports_quietly

end_imports_quietly(__name__)

if TYPE_CHECKING:
    from vfi.pretrained import FrameInterpolator

__all__ = ["FrameInterpolator"]


def __getattr__(name: str) -> Any:
    """Import `FrameInterpolator` on first access, since torch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vfi.pretrained

    return vfi.pretrained.FrameInterpolator
