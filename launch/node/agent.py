"""Supervise one node of a job and decide whether the job is requeued. Each node runs one task.

Node 0 begins the attempt. Every node starts `accelerate launch` with its machine rank and the head's address, forwards the
signals that tell training to stop, and finally reports to the others what happened (rendezvous_files.py). All nodes then draw
the same conclusion:

    done                  exit code 0
    failed by itself      its exit code, as sacct shows it; never requeued
    stopped by SIGUSR2    training has saved; `scontrol requeue`: the time limit is near, or a more urgent job needs the node
    stopped by SIGTERM    training has saved; Slurm decides: scancel ends the job, preemption requeues it
    a node is lost        `scontrol requeue`, unless Slurm has already done it

A requeued job resumes from the newest checkpoint as often as needed, unless more than `requeues` attempts in a row made no
progress.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import submitit

from launch.node.rendezvous_files import Attempt, Outcome, together
from launch.preflight import newest_step
from launch.submission import Submission, read_submission
from vfi.errors import STOPPED

_PERIOD = 0.3  # seconds between polls; a signal must be forwarded within a second (vfi/runtime/stop_signals.py)
_BEGINNING = 300.0  # seconds that node 0 has to begin
_SILENCE = 60.0  # seconds after which a node that has not reported counts as lost
_GRACE = 45.0  # seconds that processes have to notice and report that others have failed
_UNTIL_KILLED = 600.0  # seconds within which Slurm must end a job that waits to be ended
_SHOWN = 15  # last lines of a failed process that are copied into the job's log
_LOCAL_REQUEUE = 144  # exit code that makes submitit's local executor restart a job
_STATED = ("NCCL_", "TORCH_NCCL", "GLOO_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_USER_MISTAKE = 2


class Place(NamedTuple):
    """Location of this task in the cluster."""

    cluster: str
    job_id: str
    """Id of this very job: a plain number for a task of an array, too."""
    restart: int
    node: int
    hosts: tuple[str, ...]


def here(run_folder: Path) -> Place:
    """Return this task's location, read from the environment variables of the cluster."""
    around = submitit.JobEnvironment()
    job_id = around.raw_job_id
    if around.name() == "slurm":
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    else:
        restart = len(list(Attempt(run_folder, job_id, 0).all.glob(f"{job_id}_*")))
    return Place(around.name(), job_id, restart, around.node, tuple(around.hostnames))


class Signals:
    """Record the signals that tell a job to stop."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({one.name for one in self.received}))


def run(submission_path: str) -> None:
    """Execute one task of a submission; exit with the code of the failed process, or with 75 when stopped."""
    submission = read_submission(Path(submission_path))
    NodeAgent(submission, here(Path(submission.run_folder))).run()


class NodeAgent:
    """Agent of one node during one attempt."""

    def __init__(self, submission: Submission, place: Place) -> None:
        self.submission, self.place = submission, place
        self.run_folder = Path(submission.run_folder)
        self.attempt = Attempt(self.run_folder, place.job_id, place.restart)
        self.signals = Signals()
        self.ranks = range(place.node * submission.processes, (place.node + 1) * submission.processes)
        self.signalled: set[int] = set()

    def run(self) -> None:
        """Run the attempt on this node from beginning to end."""
        self.begin()
        command, environment = self.command(), self.environment()
        with self.launcher_log.open("ab") as log:
            launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=_ignore_signals,
                                        start_new_session=True)  # fmt: skip
        try:
            code = self.watch(launcher)
        finally:
            _kill_group(launcher.pid)
        if not self.attempt.is_current():
            self.leave()
        self.attempt.write(self.place.node, self.judge(code))
        told = self.attempt.wait_for_all(self.submission.nodes, _SILENCE)
        if not self.attempt.is_current():
            self.leave()
        self.end(together(told, self.submission.nodes))

    def begin(self) -> None:
        """Begin the attempt on node 0, unless too many attempts made no progress; on the other nodes, wait for node 0."""
        if self.place.node:
            if not self.attempt.wait_to_begin(_BEGINNING):
                self.exit(1, f"node 0 ({self.place.hosts[0]}) has not begun within {_BEGINNING:.0f} s")
            return
        step = newest_step(self.run_folder)
        stuck = self.attempt.without_progress(step)
        if stuck > self.submission.requeues:
            self.exit(1, f"{stuck} attempts of this job began at step {step} and got no further: not tried again "
                         f"(--requeues {self.submission.requeues}); their logs are in {self.attempt.all}")  # fmt: skip
        self.attempt.begin(step, self.place.hosts)
        self.say(f"attempt {self.attempt.name} begins at step {step}; logs: {self.attempt.folder}")

    def command(self) -> list[str]:
        """Return the command that starts the training processes of this node."""
        job, processes = self.submission, self.submission.nodes * self.submission.processes
        command = [*shlex.split(job.python), "-m", "accelerate.commands.launch", "--config_file", job.accelerate_config,
                   "--num_processes", str(processes), "--num_machines", str(job.nodes),
                   "--machine_rank", str(self.place.node)]  # fmt: skip
        if processes > 1:
            command += ["--main_process_ip", self.head(), "--main_process_port", str(self.port())]
        command += ["--mixed_precision", {"fp32": "no"}.get(job.precision, job.precision)]
        return [*command, "--module", "launch.node.rank", str(self.attempt.folder), f"vfi.{job.job}", *job.arguments]

    def head(self) -> str:
        """Return the address at which the other nodes reach node 0."""
        return self.place.hosts[0] if self.submission.nodes > 1 else "127.0.0.1"

    def port(self) -> int:
        """Return the rendezvous port: the same on all nodes, and different from that of the job's previous attempt."""
        if self.submission.nodes > 1:
            return 10000 + (int(self.place.job_id) + 1009 * self.place.restart) % 20000
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    def environment(self) -> dict[str, str]:
        """Return the environment of the training processes; it keeps the user's settings and logs the relevant ones."""
        job, around = self.submission, dict(os.environ)
        around["PYTHONPATH"] = os.pathsep.join(filter(None, (job.code, around.get("PYTHONPATH"))))
        around["PYTHONSAFEPATH"] = "1"  # import nothing from the folder that the job was submitted from
        around["PET_SIGNALS_TO_HANDLE"] = "SIGINT"  # torchrun would forward others, and kill after 30 s what is still saving
        around.setdefault("NCCL_DEBUG", "WARN")
        around.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // job.processes)))
        if not job.gpus:
            around |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        stated = [f"{name}={value}" for name, value in sorted(around.items()) if name.startswith(_STATED)]
        self.say(f"node {self.place.node} of {job.nodes}, head {self.head()}: {' '.join(stated)}")
        return around

    def watch(self, launcher: subprocess.Popen[bytes]) -> int:
        """Wait for the launcher, forwarding signals; give up when the job fails elsewhere or another attempt has begun.

        Return the launcher's exit code, or 1 when given up.
        """
        deadline = None
        while True:
            try:
                return launcher.wait(_PERIOD)
            except subprocess.TimeoutExpired:
                self.forward_signals()
            if deadline is None and any(told.kind == "failed" for told in self.attempt.read(self.submission.nodes).values()):
                deadline = time.monotonic() + _GRACE
            if not self.attempt.is_current() or (deadline and time.monotonic() > deadline):
                return 1

    def forward_signals(self) -> None:
        """Forward the first stop signal to each training process of this node, once, as soon as the process exists."""
        if not self.signals.received:
            return
        for rank in self.ranks:
            if rank not in self.signalled and (pid := self.attempt.number_of("pid", rank)):
                self.signalled.add(rank)
                if _is_rank(pid, self.attempt.folder):
                    os.kill(pid, self.signals.received[0])
                    self.say(f"{self.signals.received[0].name}: process {rank} is to save and stop")

    def judge(self, code: int) -> Outcome:
        """Return this node's outcome, derived from the exit codes of the launcher and of the training processes."""
        codes = [self.attempt.number_of("exit", rank) for rank in self.ranks]
        bad = [rank for rank, ended in zip(self.ranks, codes, strict=True) if ended not in (0, STOPPED)]
        if code == 0:
            return Outcome("done", signals=self.signals.names)
        if _USER_MISTAKE not in codes and (self.signals.received or STOPPED in codes):
            return Outcome("stopped", STOPPED, self.signals.names)
        telling = [rank for rank in bad if self.attempt.number_of("exit", rank) is not None]
        first = (telling or bad or [self.ranks[0]])[0]
        ended = self.attempt.number_of("exit", first)
        self.show(first)
        how = "was killed or exited without an exit code" if ended is None else f"ended with exit code {ended}"
        return Outcome("failed", ended or code or 1, self.signals.names, f"process {first} {how}")

    def show(self, rank: int) -> None:
        """Copy the last lines of a rank's log, or of the launcher's if the rank never began, into the job's own log."""
        log = self.attempt.folder / f"rank_{rank}.log"
        log = log if log.is_file() else self.launcher_log
        lines = log.read_text(errors="replace").splitlines()[-_SHOWN:]
        print("\n".join([f"--- the end of {log}", *lines, "---"]), file=sys.stderr, flush=True)

    @property
    def launcher_log(self) -> Path:
        """Path of the launcher's log, which is usually short."""
        return self.attempt.folder / f"launcher_{self.place.node}.log"

    def end(self, outcome: Outcome) -> None:
        """Exit, or arrange for the job to be resumed later; all nodes decide alike."""
        self.say(f"{outcome.kind}{' by ' + ', '.join(outcome.signals) if outcome.signals else ''}"
                 f"{': ' if outcome.why else ''}{outcome.why}")  # fmt: skip
        if outcome.kind == "done":
            return
        if outcome.kind == "failed":
            self.exit(outcome.code, "not requeued: it failed by itself")
        if self.place.cluster == "slurm" and (outcome.signals or outcome.kind == "lost"):
            if "SIGUSR2" in outcome.signals or outcome.kind == "lost":
                self.requeue()
            self.wait_to_be_killed()
        if self.place.cluster == "local" and "SIGUSR2" in outcome.signals:
            self.exit(_LOCAL_REQUEUE, "to be started again by submitit")
        self.exit(STOPPED, "stopped; a new submission with --resume auto continues from there")

    def requeue(self) -> None:
        """Ask Slurm to requeue this job; only the lowest-numbered node that has reported does so."""
        if self.place.node != min(self.attempt.read(self.submission.nodes)):
            return
        command = ["scontrol", "requeue", self.place.job_id]
        self.say(shlex.join(command))
        try:
            subprocess.run(command, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            self.exit(STOPPED, f"could not be requeued ({error}): submit it again with --resume auto")

    def wait_to_be_killed(self) -> None:
        """Wait for Slurm to end this task: exiting now would end the job before Slurm has requeued it."""
        end = time.monotonic() + _UNTIL_KILLED
        while time.monotonic() < end:
            time.sleep(1)

    def leave(self) -> NoReturn:
        """Exit because another attempt owns the run folder: this node was presumed dead."""
        self.exit(1, f"another attempt of this run has begun: this one ({self.attempt.name}) ends")

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%F %T')} node {self.place.node}] {text}", flush=True)

    def exit(self, code: int, why: str) -> NoReturn:
        self.say(f"exit code {code}: {why}")
        sys.exit(code)


def _ignore_signals() -> None:
    """Make the launcher ignore stop signals: training decides when to end, and the launcher ends after it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _kill_group(pid: int) -> None:
    """Kill all remaining processes of the launcher's group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _is_rank(pid: int, folder: Path) -> bool:
    """Return whether this process belongs to the attempt, rather than being a later process with a reused id."""
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
