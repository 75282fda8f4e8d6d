"""Files of published weights: what is read, and that nothing else is."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from vfi.errors import JobError
from vfi.io.published_weights import read_published

ORIGIN = "https://host/weights.pth"

ADVICE = re.compile(r"weights_only|safe_globals|still be loaded|Re-running|\x1b")
"""What torch recommends where a file holds code."""


@pytest.fixture
def file(tmp_path) -> Path:
    """The path of a file that a test writes."""
    return tmp_path / "weights.pth"


def weights() -> dict[str, torch.Tensor]:
    """Two layers, one of which is used."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}


EXPECTED = {"features.0.weight": (8, 3, 3, 3), "features.0.bias": (8,), "features.2.weight": (4, 8, 3, 3)}
META = {name: torch.empty(shape, device="meta") for name, shape in EXPECTED.items()}


def test_only_what_is_expected_is_returned_in_either_format(file):
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(weights() | {"classifier": torch.zeros(9)}, buffer, _use_new_zipfile_serialization=zipped)
        file.write_bytes(buffer.getvalue())
        found = read_published(file, META, ORIGIN)
        assert found.keys() == EXPECTED.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_missing_file(file):
    with pytest.raises(JobError, match=rf"^{file} is missing: it is published as {ORIGIN}$"):
        read_published(file, META, ORIGIN)


def test_files_of_something_else(file):
    torch.save(torch.zeros(3), file)
    with pytest.raises(
        JobError, match=r"something else: missing: features\.0\.weight, features\.0\.bias, features\.2\.weight\."
    ):
        read_published(file, META, ORIGIN)
    changed = weights()
    changed["features.0.weight"] = changed["features.0.weight"][:, :2]
    torch.save(changed | {"features.0.bias": 3}, file)
    wrong = r"missing: features.0.bias; of another shape: features.0.weight \[8, 2, 3, 3\] instead of \[8, 3, 3, 3\]\. The"
    with pytest.raises(JobError, match=wrong):
        read_published(file, META, ORIGIN)


def test_damaged_files(file):
    torch.save(weights(), file)
    intact = file.read_bytes()
    rng = random.Random(0)
    # lengths and places at random, and none of the bytes
    for cut in (0, 1, 100, *(rng.randrange(len(intact)) for _ in range(20))):
        file.write_bytes(intact[:cut])
        with pytest.raises(JobError, match=rf"^{file} cannot be loaded: .*\. Fetch it again from {ORIGIN}$"):
            read_published(file, META, ORIGIN)
    for content in (pickle.dumps({"a": [1]}, protocol=4), pickle.dumps([{1, 2}, frozenset([1])], protocol=5)):
        file.write_bytes(content)
        with pytest.raises(JobError) as refused:
            read_published(file, META, ORIGIN)
        assert not ADVICE.search(str(refused.value))
    for _ in range(40):
        damaged = bytearray(intact)
        for _ in range(10):
            damaged[rng.randrange(1500)] = rng.randrange(256)
        file.write_bytes(bytes(damaged))
        with suppress(JobError):  # where the change does no harm it is read; there is no other kind of error
            read_published(file, META, ORIGIN)


class Command:
    """Would run when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_executes_nothing(file):
    torch.save({"features.0.weight": Command(file.parent / "made")}, file)
    with pytest.raises(
        JobError, match=r"cannot be loaded: it holds posix\.mkdir; only tensors and plain values are read"
    ) as refused:
        read_published(file, META, ORIGIN)
    assert not ADVICE.search(str(refused.value))
    assert not (file.parent / "made").exists()
