"""Fixtures that several tests of the shard commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command on bad input, expects exit code 2 and one line on stderr, and returns the line."""

    def run(main: Callable[[Sequence[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1
        assert "Traceback" not in err
        return lines[0]

    return run
