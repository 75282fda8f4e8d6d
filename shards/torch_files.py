"""Say why torch.load refused a file."""

from __future__ import annotations

import re

_GLOBAL = re.compile(r"GLOBAL (\S+)")


def explain_load_error(error: Exception) -> str:
    """Return in one line why torch.load, with weights_only, raised `error`.

    torch's own message recommends to load the file in a way that executes what it holds.
    """
    text = str(error)
    if "weights_only" not in text:
        return text.partition("\n")[0] or type(error).__name__
    found = _GLOBAL.search(text)
    return f"it holds {found[1]}; only tensors and plain values are read" if found else "it is damaged, or no file of tensors"
