"""Published numbers by protocol, from the papers or from re-measurements by others.

They are listed below the measured rows of a report, with the protocol that they were measured by: numbers of another profile,
or with another TTA setting, are not comparable.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One model on one protocol."""

    model: str
    psnr: float | None
    """PSNR in dB."""
    ssim: float | None
    ie: float | None
    note: str
    """TTA, and who measured, if it was not the paper itself."""


_RIFE, _IFRNET, _EMA_S, _EMA, _VFIMAMBA = "RIFE", "IFRNet", "EMA-VFI-S", "EMA-VFI", "VFIMamba"
_TTA, _BY_EMA, _TTA_ELSEWHERE = "TTA", "re-measured by the authors of EMA-VFI", "TTA; quoted by others"
_READ_OFF = "TTA; read off a figure, ±0.05"


def _row(model: str, psnr: float | None, note: str = "", ssim: float | None = None, ie: float | None = None) -> Published:
    return Published(model, psnr, ssim, ie, note)


def _snu(rife: float, ifrnet: float, small: float, ema: float, vfimamba: float) -> tuple[Published, ...]:
    return (
        _row(_RIFE, rife, _BY_EMA), _row(_IFRNET, ifrnet), _row(_EMA_S, small), _row(_EMA, ema, _TTA),
        _row(_VFIMAMBA, vfimamba, _TTA_ELSEWHERE),
    )  # fmt: skip


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "vimeo90k": (
        _row(_RIFE, 35.61, ssim=0.9779), _row(_IFRNET, 35.80, ssim=0.9794), _row(_EMA_S, 36.07, ssim=0.9797),
        _row(_EMA, 36.64, _TTA, 0.9819), _row(_VFIMAMBA, 36.64, _TTA_ELSEWHERE), _row("AMT-G", 36.53, "quoted by others"),
        _row("FILM-L1", 36.06),
    ),
    "ucf101": (
        _row(_RIFE, 35.28, ssim=0.9690), _row(_IFRNET, 35.29, ssim=0.9693), _row(_EMA_S, 35.34, ssim=0.9696),
        _row(_EMA, 35.48, _TTA, 0.9701), _row(_VFIMAMBA, 35.45, _TTA_ELSEWHERE), _row("FILM-L1", 35.32),
    ),
    "snu_film_easy": _snu(39.80, 40.03, 39.81, 39.98, 40.51),
    "snu_film_medium": _snu(35.76, 35.94, 35.88, 36.09, 36.40),
    "snu_film_hard": _snu(30.36, 30.41, 30.69, 30.94, 30.99),
    "snu_film_extreme": _snu(25.27, 25.05, 25.47, 25.69, 25.79),
    "middlebury": (
        _row(_RIFE, None, ie=1.96), _row(_IFRNET, None, ie=1.95), _row(_EMA_S, None, ie=1.94), _row(_EMA, None, _TTA, ie=1.81),
        _row("FILM-L1", 37.52),
    ),
    "xiph_2k": (
        _row(_RIFE, 36.19, _BY_EMA), _row(_IFRNET, 36.00, _BY_EMA), _row(_EMA_S, 36.55), _row(_EMA, 36.90, _TTA),
        _row(_VFIMAMBA, 37.1, _READ_OFF), _row("FILM-L1", 36.66),
    ),
    "xiph_4k": (
        _row(_RIFE, 33.76, _BY_EMA), _row(_IFRNET, 33.99, _BY_EMA), _row(_EMA_S, 34.25), _row(_EMA, 34.67, _TTA),
        _row("FILM-L1", 33.78),
    ),
    "xtest_2k": (
        _row(_RIFE, 31.43, _BY_EMA), _row(_IFRNET, 31.53, _BY_EMA), _row(_EMA_S, 31.89), _row(_EMA, 32.85, _TTA),
        _row(_VFIMAMBA, 33.33, _READ_OFF), _row("FILM-L1", 31.61),
    ),
    "xtest_4k": (
        _row(_RIFE, 30.58), _row(_IFRNET, 30.46, _BY_EMA), _row(_EMA_S, 30.89), _row(_EMA, 31.46, _TTA),
        _row(_VFIMAMBA, 32.1, _READ_OFF), _row("FILM-L1", 26.98),
    ),
}  # fmt: skip


def published_cells(protocol: str) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of a table: model, PSNR, SSIM, IE, note; none for a protocol without published numbers."""
    return [
        (row.model, _cell(row.psnr, 2), _cell(row.ssim, 4), _cell(row.ie, 2), row.note) for row in PUBLISHED.get(protocol, ())
    ]


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
