"""Tables in plain text, their columns aligned."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Align columns: those with the numbers `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (text.ljust(widths[i]) if i in left else text.rjust(widths[i]) for i, text in enumerate(row))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
