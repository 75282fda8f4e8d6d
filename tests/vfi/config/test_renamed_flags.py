"""Former spellings of flags and commands do what the present ones do."""

from __future__ import annotations

import pytest

from vfi.config.renamed_flags import with_new_names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--keep_it", "3"], ["--hold", "3"]),
        (["--keep-it=3", "x"], ["--hold=3", "x"]),
        (["--no-keep_it", "--no_keep-it"], ["--no-hold", "--no_hold"]),
        (["--keep_its", "keep_it", "--keep", "a=--keep_it"], ["--keep_its", "keep_it", "--keep", "a=--keep_it"]),
        (["--out=--keep_it"], ["--out=--keep_it"]),
    ],
)
def test_renamed_flags_are_recognised(given, expected):
    assert with_new_names(given, {"keep_it": "hold"}) == expected
