"""What all tests share: the GPU mark, and a small shard folder."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and what they start, would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so it is in the background of a script; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from shards import synthetic

settings.register_profile("untimed", deadline=None)  # on a busy machine any example may take long
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False"))


def pytest_collection_finish() -> None:
    """What torch and others keep for good is not gone over again by each collection of garbage that is asked for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training samples of 72x80 in 3 shards."""
    return _synthetic(tmp_path_factory.mktemp("shards") / "train", samples=22, seed=1, split="train")


@pytest.fixture(scope="session")
def train_shards_without_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 training samples of 72x80 in one shard."""
    return _synthetic(tmp_path_factory.mktemp("shards") / "plain", samples=4, seed=3, split="train", flow=False)


@pytest.fixture(scope="session")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 validation samples of 72x80 in one shard."""
    return _synthetic(tmp_path_factory.mktemp("shards") / "val", samples=5, seed=2, split="val")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: small models are faster so, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _synthetic(out: Path, samples: int, seed: int, split: str, flow: bool = True) -> Path:
    options = synthetic.Options(out=out, samples=samples, size="72x80", seed=seed, split=split, samples_per_shard=8, flow=flow)
    synthetic.make(options)
    return out
