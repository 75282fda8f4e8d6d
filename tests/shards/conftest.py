"""What several tests of the shard jobs need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a job that must fail as bad input does: exit code 2 and one line on stderr, which is returned."""

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
