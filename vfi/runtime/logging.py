"""Messages to the user."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Tell the user something that is no error; on stderr, since stdout is for results."""
    print(f"note: {text}", file=sys.stderr)
