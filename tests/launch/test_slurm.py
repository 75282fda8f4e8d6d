"""Test jobs on a real Slurm with two nodes on this machine (start_slurm.sh): training, every disturbance, arrays, chains."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import psutil
import pytest
from submitted import TRAINING, Submitted, assert_same, wait_for

from launch import cancel, resubmit, status, submit
from launch.slurm import states
from vfi import report, train
from vfi.checkpoint import store
from vfi.evaluation.results import read_results

START = Path(__file__).with_name("start_slurm.sh")
SMALL = ["--gpus_per_node", "0", "--cpus_per_node", "1", "--time", "10", "--setup",
         "export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]  # fmt: skip
HELD = range(4, 10)  # steps of a run that was held at its 4th
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm", "one_thread")]


def call(*command: str, seconds: float = 20) -> str:
    """Return the output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    try:
        subprocess.run(["bash", str(START)], capture_output=True, text=True, check=True, timeout=240)
    except (OSError, subprocess.SubprocessError) as error:
        subprocess.run(["bash", str(START), "stop"], check=False, capture_output=True, timeout=60)
        said = [error, *(getattr(error, "stderr", None) or "").splitlines()]
        pytest.skip(f"no Slurm can be started here: {said[-1]}")
    call("scancel", "--user", "root")  # what a run of these tests that was killed has left
    yield
    call("scancel", "--user", "root")
    subprocess.run(["bash", str(START), "stop"], check=False, timeout=60)


class Job(Submitted):
    """A run that was submitted to Slurm."""

    def facts(self) -> dict[str, str]:
        """Return what `scontrol show job` says about the job."""
        words = call("scontrol", "show", "job", "--oneliner", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def has_ended(self) -> bool:
        return self.facts()["JobState"] in ENDED

    def end(self) -> dict[str, str]:
        """Wait for the end of the job and return what Slurm says about it."""
        wait_for(self.has_ended, f"the end of job {self.id}: {self.log()}", seconds=150)
        # its accounts, which are what is known once it has left the queue, come a little later
        wait_for(lambda: states([self.id])[self.id].state in ENDED, f"the accounts of job {self.id}")
        return self.facts()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(runs, train_shards, slurm) -> Callable[..., Job]:
    """Return a function that submits a training with one process per node."""

    def start(name: str, *options: str) -> Job:
        submit.main([*SMALL, "--preset", "tiny", "--phase", "1", *options, "--", *TRAINING, "--data_path", str(train_shards),
                     "--output_dir", str(runs), "--exp_name", name])  # fmt: skip
        return Job(runs / name)

    return start


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> str:
    """Return an interpreter that trains nothing: it records its nodes and GPUs, waits while a file NAME.wait exists, and fails
    if a file NAME.fail exists."""
    path = tmp_path_factory.mktemp("fake") / "python"
    path.write_text(
        "#!/bin/bash\n"
        "name=$(sed 's/.*--exp_name \\([^ ]*\\).*/\\1/' <<< \"$*\")\n"
        f'echo "$SLURM_JOB_NODELIST $CUDA_VISIBLE_DEVICES" >> {path.parent}/$name.given\n'
        f"while [ -e {path.parent}/$name.wait ]; do sleep 0.1; done\n"
        f"[ -e {path.parent}/$name.fail ] && exit 3\n"
        "exit 0\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def late(start) -> Iterator[tuple[Job, Thread]]:
    """Start a job on n2 that is paused in a step until the signal before its time limit arrives, which takes up to a minute."""
    job = start("late", "--sbatch", "nodelist=n2", "--signal_seconds", "10")

    def disturb() -> None:
        job.hold_at(4)
        minutes, seconds = map(int, job.facts()["RunTime"].split(":")[1:])  # hours, of which there are none, come first
        call("scontrol", "update", f"jobid={job.id}", f"timelimit={minutes + (1 if seconds < 45 else 2)}")
        job.go_on_when_told("SIGUSR2")
        wait_for(lambda: job.facts()["Restarts"] == "1", "the requeue after the time limit")
        call("scontrol", "update", f"jobid={job.id}", "timelimit=10")

    thread = Thread(target=disturb)
    thread.start()
    yield job, thread
    thread.join()


@pytest.fixture(scope="module")
def alone(runs, train_shards, one_thread) -> Path:
    """Return the undisturbed run of one process, without Slurm."""
    train.main(["--preset", "tiny", "--phase", "1", *TRAINING, "--data_path", str(train_shards), "--output_dir", str(runs),
                "--exp_name", "alone"])  # fmt: skip
    return runs / "alone"


@pytest.fixture(scope="module")
def together(start) -> Job:
    """Start the undisturbed run on two nodes."""
    return start("together", "--nodes", "2")


@pytest.fixture(scope="module")
def stuck(start, fake) -> Job:
    """Start a run that never gets beyond its first step, and is requeued."""
    Path(fake).with_name("stuck.wait").touch()
    job = start("stuck", "--python", fake, "--requeues", "0", "--sbatch", "nodelist=n2")
    wait_for(lambda: job.begun_at() == [0], "the first attempt")
    call("scontrol", "requeue", job.id)
    return job


@pytest.fixture(scope="module")
def benchmark(together, val_shards, runs) -> Job:
    """Submit a benchmark of the run on two nodes."""
    submit.main([*SMALL, "--job", "benchmark", "--sbatch", "nodelist=n1", "--", "--model", str(together.folder), "--data",
                 str(val_shards), "--out", str(runs / "results.json"), "--device", "cpu", "--limit", "1", "--pictures", "0",
                 "--workers", "0"])  # fmt: skip
    return Job(runs / "results_job")


@pytest.fixture(scope="module")
def ablation(runs, train_shards, val_shards, slurm) -> list[Job]:
    """Submit two experiments of an ablation on n1."""
    size = ["--width", "8", "--depths", "1", "1", "--d_state", "16", "--head_dim", "16", "--lr_min", "0"]
    submit.main([*SMALL, "--ablation", "phase1", "--only", "Exp-1a", "Exp-1c", "--sbatch", "nodelist=n1", "--", *TRAINING,
                 *size, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(runs),
                 ])  # fmt: skip
    return [Job(runs / f"phase1_{row}_seed0") for row in ("Exp-1a", "Exp-1c")]


def test_preempted_it_saves_and_goes_on_bit_for_bit(late, start, request):
    job = start("preempted", "--sbatch", "nodelist=n1")
    request.getfixturevalue("stuck")
    job.hold_at(4)
    call("sbatch", "--partition", "urgent", "--nodelist", "n1", "--exclusive", "--wrap", "sleep 1", "--output", "/dev/null")
    job.go_on_when_told()
    alone = request.getfixturevalue("alone")  # meanwhile
    wait_for(lambda: job.facts()["Restarts"] == "1", "the requeue")
    request.getfixturevalue("together")  # for what follows; not earlier, or it would be preempted, too
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert job.begun_at()[0] == 0
    assert job.begun_at()[1] in HELD
    assert_same(job.folder, alone)


def test_two_nodes_train_to_the_end(together):
    facts = together.end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert "2 processes on cpu" in (together.folder / f"launch/attempts/{together.id}_0000/rank_0.log").read_text()
    assert (together.folder / f"launch/attempts/{together.id}_0000/rank_1.log").is_file()
    assert re.search(r"node 1 of 2, head n1: .*GLOO_SOCKET_IFNAME=lo .*OMP_NUM_THREADS=1", together.log())
    assert store.latest(together.folder).step == 10


def test_out_of_time_it_saves_and_goes_on_bit_for_bit(late, alone):
    job, thread = late
    thread.join()
    facts = job.end()
    assert facts["JobState"] == "COMPLETED"
    assert int(facts["Restarts"]) >= 1  # on a busy machine one more stretch may not be enough
    assert job.begun_at()[0] == 0
    assert job.begun_at()[1] in HELD
    assert_same(job.folder, alone)


def lose_second_node(job: Job) -> None:
    """Kill everything that runs on n2, as if its machine were lost."""
    rank = psutil.Process(job.pids()[1])
    step = next(parent for parent in rank.parents() if parent.name() == "slurmstepd")
    os.kill(int(Path("/run/slurmd-n2.pid").read_text()), signal.SIGKILL)
    for process in [step, *step.children(recursive=True)]:
        process.kill()


def test_requeued_by_hand_and_with_a_lost_node_it_goes_on_bit_for_bit(together, start, request):
    job = start("disturbed", "--nodes", "2", "--requeues", "1")
    job.hold_at(4)
    call("scontrol", "requeue", job.id)
    wait_for(lambda: len(job.begun_at()) == 2, "the second attempt")
    job.hold_at(7)
    lose_second_node(job)
    job.go_on()
    request.getfixturevalue("ablation")  # they have the other node meanwhile
    request.getfixturevalue("benchmark")
    wait_for(lambda: job.facts()["JobState"] != "RUNNING", "Slurm to miss the node")
    call("bash", str(START), seconds=60)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2")
    first, second, third = job.begun_at()
    assert first == 0
    assert second in (3, *HELD)  # told to stop, it saves if there is time for that
    assert third in (6, *HELD)
    assert_same(job.folder, together.folder)


def test_an_ablation_ends_in_one_report(ablation, runs, capsys):
    for job in ablation:
        assert job.end()["JobState"] == "COMPLETED"
    assert ablation[0].id.partition("_")[0] == ablation[1].id.partition("_")[0]
    report.main(["--ablation", "phase1", "--output_dir", str(runs)])
    printed = capsys.readouterr().out
    for job, row in zip(ablation, ("Exp-1a", "Exp-1c"), strict=True):
        scores = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        psnr = next(score["psnr"] for score in scores if score["event"] == "val" and score["step"] == 10)
        assert re.search(rf"\| {row} \|.*\| 1 of 1 \| {psnr:.2f} \|", printed), printed


def test_a_benchmark_is_a_job(benchmark, runs):
    assert benchmark.end()["JobState"] == "COMPLETED"
    assert read_results(runs / "results.json").models[0].step == 10


def test_a_type_of_gpu_is_chosen_and_one_that_is_not_there_refused(start, fake, runs, capsys):
    config = str(Path(submit.__file__).parents[1] / "accelerate_configs" / "single_gpu.yaml")
    gpus = ["--gpus_per_node", "2", "--accelerate_config", config, "--python", fake]
    job = start("typed", "--gpu", "h100", *gpus)
    assert job.end()["JobState"] == "COMPLETED"
    assert Path(fake).with_name("typed.given").read_text() == "n2 0,1\n"
    with pytest.raises(SystemExit) as stop:
        start("absent", "--gpu", "v100", *gpus)
    assert stop.value.code == 2
    assert "the cluster refused the job, nothing was queued: error: Batch job submission failed" in capsys.readouterr().err
    assert not (runs / "absent").exists()


def test_an_error_of_its_own_is_passed_on_and_ends_a_chain_which_goes_on_when_asked(fake, tmp_path, train_shards, capsys):
    flags = [*TRAINING, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--exp_name"]
    fails = Path(fake).with_name("chained_phase1.fail")
    fails.touch()
    submit.main([*SMALL, "--preset", "tiny", "--python", fake, "--", *flags, "fine"])
    submit.main([*SMALL, "--preset", "tiny", "--chain", "1,2", "--python", fake, "--", *flags, "chained"])
    first, second = (Job(tmp_path / f"chained_phase{phase}") for phase in (1, 2))
    facts = first.end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "3:0", "0")
    assert "exit code 3: not requeued: it failed by itself" in first.log()
    assert second.end()["JobState"] == "CANCELLED"
    assert not Path(fake).with_name("chained_phase2.given").exists()
    assert Job(tmp_path / "fine").end()["JobState"] == "COMPLETED"
    capsys.readouterr()
    status.main(["--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(rf"chained_phase1 +{first.id} +FAILED", printed), printed

    fails.unlink()
    resubmit.main(["--output_dir", str(tmp_path)])
    assert "fine" not in capsys.readouterr().out
    again = [Job(first.folder), Job(second.folder)]
    assert [job.newest.name for job in again] == ["2", "2"]
    assert [job.end()["JobState"] for job in again] == ["COMPLETED", "COMPLETED"]
    assert again[0].last_begin() < again[1].last_begin()


def test_of_an_ablation_only_what_failed_is_queued_again(fake, tmp_path, train_shards, capsys):
    fails = Path(fake).with_name("tried_Exp-1b_seed0.fail")
    fails.touch()
    rows = ("Exp-1a", "Exp-1b", "Exp-1c")
    submit.main([*SMALL, "--ablation", "phase1", "--only", *rows, "--python", fake, "--", *TRAINING, "--data_path",
                 str(train_shards), "--output_dir", str(tmp_path), "--exp_name", "tried"])  # fmt: skip
    jobs = [Job(tmp_path / f"tried_{row}_seed0") for row in rows]
    assert [job.end()["JobState"] for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    fails.unlink()
    capsys.readouterr()
    resubmit.main(["--output_dir", str(tmp_path), "--dry_run"])
    printed = capsys.readouterr().out
    assert re.fullmatch(
        rf"tried_Exp-1b_seed0: job {jobs[1].id} is FAILED, .*, at step 0\n1 of 3 runs ended without having finished\n", printed
    )
    assert [job.newest.name for job in jobs] == ["1", "1", "1"]
    resubmit.main(["--output_dir", str(tmp_path)])
    assert [Job(job.folder).newest.name for job in jobs] == ["1", "2", "1"]
    assert Job(jobs[1].folder).end()["JobState"] == "COMPLETED"
    assert (tmp_path / "tried" / "launch" / "2" / "code").is_dir()


def test_a_run_that_gets_no_further_is_not_requeued_for_ever(stuck):
    facts = stuck.end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "1")
    assert "1 attempts of this job began at step 0 and got no further: not tried again (--requeues 0)" in stuck.log()


def test_what_runs_is_cancelled_by_name(start, fake, runs, capsys):
    Path(fake).with_name("unwanted.wait").touch()
    job = start("unwanted", "--python", fake)
    wait_for(lambda: job.begun_at() == [0], "its begin")
    cancel.main(["unwanted", "--output_dir", str(runs)])
    assert f"cancelled: unwanted (job {job.id}, RUNNING)" in capsys.readouterr().out
    assert job.end()["JobState"] == "CANCELLED"


def test_hundreds_of_runs_are_queued_as_one_array_shown_and_cancelled(fake, train_shards, tmp_path, capsys):
    submit.main([*SMALL, "--ablation", "phase1", "--seeds", "25", "--concurrency", "2", "--python", fake, "--sbatch", "hold",
                 "--", *TRAINING, "--data_path", str(train_shards), "--output_dir", str(tmp_path)])  # fmt: skip
    assert "300 jobs" in capsys.readouterr().out
    job = Job(tmp_path / "phase1_Exp-1i-14_seed24")
    assert job.id.endswith("_299")
    assert "#SBATCH --array=0-299%2" in next((tmp_path / "phase1/launch/1/slurm").glob("*_submission.sh")).read_text()
    status.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("PENDING") == 300
    cancel.main(["--all", "--output_dir", str(tmp_path)])
    wait_for(lambda: not call("squeue", "--noheader", "--name", "phase1"), "an empty queue")


def test_submitted_from_inside_of_a_job_they_are_jobs_of_their_own(tmp_path, train_shards):
    """From a task of an array that asks for memory per core, with the variables of a rank: a chain and an array."""
    python, outer = tmp_path / "python", tmp_path / "outer.sh"
    python.write_text(f"#!/bin/bash\nenv > {tmp_path}/$SLURM_JOB_NAME.$SLURM_JOB_ID.env\n")
    python.chmod(0o755)
    command = [sys.executable, "-m", "launch.submit", *SMALL, "--mem", "100M", "--python", str(python)]
    flags = ["--", *TRAINING, "--data_path", str(train_shards), "--output_dir", str(tmp_path)]
    lines = (
        "#!/bin/bash",
        "env > $0.env",
        "export RANK=3 LOCAL_RANK=3 WORLD_SIZE=4 MASTER_ADDR=elsewhere PMI_RANK=3 SUBMITIT_EXECUTOR=local",
        shlex.join([*command, "--preset", "tiny", "--chain", "1,2", *flags]),
        shlex.join([*command, "--ablation", "phase1", "--only", "Exp-1a", "Exp-1c", *flags]),
    )
    outer.write_text("\n".join(lines))
    asked = ["--array=5", "--mem-per-cpu=50", "--wait", f"--output={outer}.out", f"--chdir={START.parents[2]}"]
    done = subprocess.run(["sbatch", *asked, f"--wrap=bash {outer}"], check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, Path(f"{outer}.out").read_text()
    names = ["tiny_phase1", "tiny_phase2", "phase1_Exp-1a_seed0", "phase1_Exp-1c_seed0"]
    for name in names:
        job = Job(tmp_path / name)
        assert job.end()["JobState"] == "COMPLETED", job.log()
    found = [
        dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) for path in tmp_path.glob("*.env")
    ]
    (around,) = (one for one in found if one.get("SLURM_MEM_PER_CPU") == "50")
    assert around["SLURM_ARRAY_TASK_ID"] == "5"
    inside = [one for one in found if one is not around]
    assert len(inside) == 4
    for one in inside:
        assert one["SLURM_CONF"] == around["SLURM_CONF"]
        assert one.get("SLURM_ARRAY_TASK_ID") in (None, "0", "1")
        assert {"WORLD_SIZE", "MASTER_ADDR", "SLURM_MEM_PER_CPU"}.isdisjoint(one)
        assert one["SUBMITIT_EXECUTOR"] == "slurm"
