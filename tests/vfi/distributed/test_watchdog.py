"""The watch over a run that hangs, and the signals that stop one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch

from vfi.distributed.watchdog import Heartbeat, Watchdog, find_stalled_ranks
from vfi.runtime.stop_signals import STOPPING, Agreement, StopSignals

CPU = torch.device("cpu")
SECONDS = 60.0
FAR = [Heartbeat(9, 30, 70.0, "the backward pass of step 8"), Heartbeat(9, 29, 70.0, "the forward pass of step 8")]


def test_the_process_that_is_behind_is_named():
    assert find_stalled_ranks(FAR, [0, 0], SECONDS) == ([1], "the others wait for rank 1 at the forward pass of step 8")


def test_a_silent_process_is_named_even_if_it_is_not_behind():
    named, text = find_stalled_ranks(FAR, [8, 0], SECONDS)
    assert named == [0]
    assert "no sign of life (stopped, killed, or its machine is gone) from rank 0 at the backward pass of step 8" in text


def test_nobody_is_named_while_one_still_moves():
    moving = [FAR[0], FAR[1]._replace(idle=1.0)]
    assert find_stalled_ranks(moving, [0, 0], SECONDS) is None
    assert find_stalled_ranks(moving, [0, 8], SECONDS) is not None  # its last word was of a time when it moved


def test_all_in_the_same_place_are_all_named():
    named, text = find_stalled_ranks([FAR[0]] * 3, [0] * 3, SECONDS)
    assert named == [0, 1, 2]
    assert "all processes stand at the backward pass of step 8" in text


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What a watch says in place of ending the process."""
    said: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, named, text: said.append(text))
    return said


def look_after(watch: Watchdog, acts: Iterable[Callable[[], object]]) -> None:
    """Let a watch look once after each act, as its thread does twice a second."""
    left = iter(acts)

    def wait(seconds: float) -> bool:
        """The time until the next look; True where there is none."""
        assert seconds == 0.5
        act = next(left, None)
        if act is not None:
            act()
        return act is None

    watch.done = SimpleNamespace(wait=wait)
    watch._look()


def test_a_run_that_stands_still_is_ended_with_its_place(ended):
    watch = Watchdog(CPU, 1.0)
    look_after(watch, [lambda: watch.at("the wait for data of step 3"), lambda: None])
    assert ended == []
    look_after(watch, [lambda: None] * 2)
    assert ended[0] == "this process hangs at the wait for data of step 3"


def test_a_run_that_moves_is_left_alone(ended):
    """It moves before every second look, and may pause for one."""
    watch = Watchdog(CPU, 1.0)
    moves = [lambda: watch.at("a step"), lambda: None, watch.should_continue, lambda: None]
    look_after(watch, moves * 10)
    assert ended == []


def test_the_end_is_said_with_the_place_in_the_code():
    code = (
        "import time, torch; from vfi.distributed.watchdog import Watchdog\n"
        "def stuck():\n    time.sleep(60)\n"
        "with Watchdog(torch.device('cpu'), 1.0) as watch:\n    watch.at('the save of step 7')\n    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert ", in stuck" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "error: nothing has moved for 1 s (--timeout_minutes 0.0166667): this process hangs at the save of step 7"


@pytest.mark.parametrize("number", STOPPING)
def test_a_first_signal_is_noted_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(each) for each in STOPPING]
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # passed on by a launcher: the same one
        assert signals.received == number
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert number.name in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    pid = os.fork()
    if not pid:
        with StopSignals():
            signal.raise_signal(number)
            time.sleep(1.1)
            signal.raise_signal(number)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number


def test_outside_the_main_thread_signals_stay_as_they_are():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_watch_wants_to_stop_once_it_got_a_signal():
    with Watchdog(CPU, 60.0) as watch:
        assert watch.should_continue()
        assert not watch.stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not watch.should_continue()
        assert watch.stop()
        assert watch.reason == "SIGUSR2"


def test_one_process_agrees_with_itself():
    assert [Agreement(CPU).any(mine) for mine in (True, False)] == [True, False]
