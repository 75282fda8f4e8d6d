"""Test exactly what launch.submit would queue, and everything that it refuses before it queues anything."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import resubmit, submit
from launch.node import agent
from launch.options import Options
from launch.plan import plan
from launch.submission import read_submission
from launch.submit import accelerate_config, split
from vfi.config import command_line, presets

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
pytest.importorskip("submitit")

SCRIPTS = {
    "one_gpu": ["--preset", "small", "--gpu", "a100-80gb", "--time", "2-12", "--", "--batch_size", "16"],
    "two_nodes": ["--preset", "base", "--phase", "2", "--nodes", "2", "--gpus_per_node", "8", "--gpu", "a100", "--time",
                  "24:00:00", "--partition", "long", "--account", "vision", "--qos", "high", "--constraint", "nvlink", "--mem",
                  "200G", "--sbatch", "exclude=n7", "exclusive", "--srun", "container-image=vfi", "--setup", "module load cuda",
                  "export NCCL_SOCKET_IFNAME=ib0", "--", "--global_batch", "256", "--batch_size", "16", "--num_workers", "6",
                  "--remainder", "pad"],
    "chain": ["--preset", "tiny", "--chain", "1,2", "--gpus_per_node", "0", "--", "--steps", "9", "--", "--lr", "0.001", "--",
              "--freeze_backbone", "2"],
    "ablation": ["--ablation", "phase1", "--only", "Exp-1a", "Exp-1c", "--seeds", "3", "--concurrency", "2", "--", "--crop",
                 "64", "--batch_size", "4"],
    "benchmark": ["--job", "benchmark", "--", "--pictures", "0"],
}  # fmt: skip


@pytest.fixture
def here(tmp_path, train_shards, monkeypatch) -> Path:
    """Return a folder to submit from, with shards and a finished run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(train_shards, tmp_path / "shards")
    (tmp_path / "runs" / "done" / "checkpoints" / "step_00000007").mkdir(parents=True)
    return tmp_path


def command(arguments: list[str]) -> list[str]:
    """Return the arguments completed with the shards, or with what a benchmark needs."""
    benchmark = ["--model", "runs/done", "--data", "shards", "--out", "results.json"]
    own = benchmark if "benchmark" in arguments else ["--data_path", "shards"]
    at = arguments.index("--") + 1
    return [*arguments[:at], *own, *arguments[at:]]


def refused(capsys, *arguments: str) -> str:
    """Return the error text of a refused submission, after checking that it left nothing behind."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        submit.main(list(arguments))
    assert stop.value.code == 2
    assert sorted(Path().rglob("*")) == before
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_prints_the_script(name, here, capsys):
    submit.main(["--dry_run", *command(SCRIPTS[name])])
    printed = capsys.readouterr().out.replace(str(here), "HERE").replace(sys.executable, "PYTHON")
    assert printed == (GOLDEN / f"{name}.txt").read_text()
    assert not (here / "runs" / "small_phase1").exists()


def test_a_benchmark_takes_models_that_are_no_path(here, capsys):
    flags = ["--data", "shards", "--out", "results.json", "--model", "shipped", "module:factory", "me/mine"]
    submit.main(["--dry_run", "--job", "benchmark", "--", *flags])
    assert "/results_job" in capsys.readouterr().out
    message = refused(capsys, "--job", "benchmark", "--", *flags, "runs/absent", "absent")
    assert message == "error: --model runs/absent absent is not there"


def test_flags_of_the_job_come_back_as_the_settings_that_were_asked_for(here):
    """Each run's command line is parsed as vfi.train parses it."""
    options = Options(ablation="phase1", seeds=2, gpus_per_node=0)
    groups = [["--data_path", "shards", "--crop", "64", "--batch_size", "2", "--exp_name", "a"]]
    runs, _ = plan(options, groups, accelerate_config(options, ROOT))
    rows = [row for row in presets.ABLATIONS if row.startswith("Exp-1")]
    assert [run.name for run in runs] == [f"a_{row}_seed{seed}" for row in rows for seed in (0, 1)]
    for run in runs:
        config = command_line.from_command_line(run.arguments)
        _, row, seed = run.name.split("_")
        flags = ["--preset", row, "--seed", seed[-1], "--exp_name", run.name, "--resume", "auto", "--data_path", "shards"]
        expected = command_line.from_command_line([*flags, "--crop", "64", "--batch_size", "2"])
        assert config == expected


def test_no_torch_is_needed_on_a_login_node():
    jobs = ("submit", "status", "cancel", "resubmit", "executors", "node.agent")
    code = f"import sys, {', '.join(f'launch.{job}' for job in jobs)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_each_phase_of_a_chain_starts_from_the_one_before(here):
    options = Options(preset="tiny", chain="1,2,3", gpus_per_node=0)
    groups = split(["--", "--data_path", "shards", "--crop", "64", "--", "--", "--freeze_backbone", "5", "--", "--lr", "3e-5"])[
        1:
    ]
    runs, _ = plan(options, groups, accelerate_config(options, ROOT))
    configs = [command_line.from_command_line(run.arguments) for run in runs]
    assert [config.model.phase for config in configs] == [1, 2, 3]
    assert [config.run.start_from for config in configs] == ["", "tiny_phase1", "tiny_phase2"]
    assert {config.run.resume for config in configs} == {"auto"}
    assert [config.optim.freeze_backbone for config in configs] == [0, 5, 0]
    assert [config.optim.lr for config in configs] == [1e-3, 1e-3, 3e-5]
    assert [run.after for run in runs] == ["", str(runs[0].folder), str(runs[1].folder)]


def test_a_run_that_starts_from_another_one_may_be_given_again(here):
    options = Options(preset="tiny", phase=1, gpus_per_node=0)
    flags = ["--data_path", "shards", "--crop", "64", "--resume", "done"]
    (run,), _ = plan(options, [flags], accelerate_config(options, ROOT))
    config = command_line.from_command_line(run.arguments)
    assert (config.run.resume, config.run.start_from) == ("auto", "done")


def test_the_batch_follows_from_the_type_of_gpu(here):
    """The global batch is unchanged; the device's share of it is what the stated profile allows."""
    groups = [["--data_path", "shards", "--global_batch", "64", "--mixing", "hc", "--remainder", "pad"]]
    for gpu, gb, batch, precision in (("a100-80gb", None, 16, "bf16"), ("a100", 80, 16, "bf16"), ("v100", None, 2, "fp16")):
        options = Options(preset="base", phase=1, gpus_per_node=2, gpu=gpu, gpu_gb=gb)
        (run,), notes = plan(options, groups, accelerate_config(options, ROOT))
        config = command_line.from_command_line(run.arguments)
        assert (config.data.global_batch, config.data.batch_size) == (64, batch)
        assert f"batch: global batch 64 = {batch} * 2 processes * {32 // batch} accumulated" in notes[0]
        assert submit.draft(options, run, "x").precision == precision
    options = Options(preset="base", phase=1, gpus_per_node=2, gpu="v100")
    (run,), notes = plan(options, [[*groups[0], "--batch_size", "8"]], accelerate_config(options, ROOT))
    assert command_line.from_command_line(run.arguments).data.batch_size == 8
    (note,) = notes
    assert "a torch up to 2.14 from https://download.pytorch.org/whl/cu126" in note
    (run,), notes = plan(
        dataclasses.replace(options, gpu="a100"), [[*groups[0], "--batch_size", "8"]], accelerate_config(options, ROOT)
    )
    assert notes == []


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ([], ["--learning_rate", "1"], "--learning_rate"),
        ([], ["--warp", "image"], "--warp image has no effect without --phase 2 or 3"),
        ([], ["--phase", "2"], "--phase stands after the --: give it before"),
        (["--nodes", "3"], ["--global_batch", "64"], "--global_batch 64 is not a multiple of --batch_size 2 * 3 processes"),
        (["--gpus_per_node", "8"], ["--batch_size", "32"], "22 samples, a global batch 256"),
        ([], ["--resume", "absent"], "no run or checkpoint 'absent' to start from"),
        ([], ["--exp_name", "done"], "already holds a run at step 7: resume it by --resume auto"),
        ([], ["--dry_run"], "--dry_run after the -- would be a job that leaves nothing"),
        (["--time", "soon"], [], "--time 'soon' is not a time limit"),
        (["--time", "2"], [], "--time 2 must be longer than --signal_seconds 180"),
        (["--gpus_per_node", "0", "--gpu", "a100"], [], "--gpu a100 with --gpus_per_node 0"),
        (["--gpu", "a100", "--gpu_gb", "80"], [], "--gpu_gb 80 has no effect with --batch_size"),
        (["--sbatch=-hold"], [], "'-hold' is not an option: give NAME=VALUE without dashes"),
        (["--chain", "1,2", "--sbatch", "dependency=after:7"], [], "--chain sets the dependencies itself"),
        (["--gpu", "v100", "--accelerate_config", str(ROOT / "accelerate_configs/fsdp2.yaml")], [], "not supported in fp16"),
        (["--accelerate_config", "absent.yaml"], [], "--accelerate_config absent.yaml is not a file"),
        (["--seeds", "3"], [], "--seeds without --ablation has no effect: drop it"),
        (["--ablation", "phase1", "--preset", "base"], [], "--preset with --ablation phase1"),
        (["--ablation", "phase1", "--only", "Exp-2b"], [], "--only Exp-2b: --ablation phase1 has Exp-1a, Exp-1b"),
        (["--ablation", "phase1"], ["--seed", "4"], "give --seeds before it"),
        (["--ablation", "phase1"], ["--gate", "elementwise"], "error: Exp-1a: --gate elementwise has no effect without"),
        (["--seeds", "0"], [], "--seeds is 0; it must be at least 1"),
        (["--chain", "2,1"], [], "--chain '2,1': give two or three phases in their order"),
        (["--chain", "1,2"], ["--", "--lr", "1e-3"], "there are 2 times --"),
        (["--chain", "1,2", "--ablation", "phase1"], [], "--chain and --ablation: give one of them"),
        (["--cluster", "local", "--dry_run"], [], "--dry_run shows the batch script for Slurm, and --cluster local has none"),
        (["--cluster", "local", "--nodes", "2"], [], "--cluster local has one machine, --nodes is 2"),
        (["--cluster", "local", "--partition", "long"], [], "--partition with --cluster local has no effect"),
        (["--cluster", "local", "--ablation", "phase1"], [], "--ablation with --cluster local would start all runs at once"),
        (["--cluster", "debug", "--setup", "module load cuda"], [], "--setup with --cluster debug has no effect"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_queued(options, flags, message, here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert message in refused(capsys, *options, "--", "--data_path", "shards", "--crop", "64", "--batch_size", "2", *flags)


def test_a_card_of_unknown_memory_needs_a_batch_size(here, capsys):
    said = refused(capsys, "--gpu", "gtx", "--", "--data_path", "shards", "--global_batch", "2")
    assert "the memory of a GPU named 'gtx' is not known" in said


def test_missing_and_damaged_shards_are_named(here, capsys):
    flags = ["--gpus_per_node", "0", "--", "--crop", "64", "--batch_size", "2", "--data_path"]
    assert "error: " in refused(capsys, *flags, "absent")
    tar = sorted(Path("shards").glob("*.tar"))[1]
    with tar.open("ab") as file:
        file.write(b"x")
    assert f"{tar} has {tar.stat().st_size} bytes, its index says {tar.stat().st_size - 1}" in refused(capsys, *flags, "shards")
    tar.unlink()
    assert f"{tar} is missing: run `python -m shards.verify shards`" in refused(capsys, *flags, "shards")
    assert "--data_path is missing" in refused(capsys, "--gpus_per_node", "0")


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> None:
    """Create fake Slurm commands, of which sbatch runs the script `sbatch`."""
    (folder / "bin").mkdir()
    for name, text in (
        *((name, "") for name in ("srun", "squeue", "sacct")),
        ("sbatch", sbatch),
        ("scancel", f'echo "$@" > {folder}/cancelled\n'),
    ):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_a_refusal_of_slurm_leaves_nothing_behind(here, capsys, monkeypatch):
    """The jobs of a chain that were queued before the refusal are cancelled."""
    refusal = 'if grep -q afterok "$1"; then echo "sbatch: error: Invalid qos" >&2; exit 1; fi\n'
    fake_slurm(here, monkeypatch, refusal + "echo Submitted batch job 4711\n")
    (here / "cancelled").touch()
    chain = ["--chain", "1,2", "--gpus_per_node", "0", "--preset", "tiny", "--", "--data_path", "shards", "--crop", "64"]
    assert "the cluster refused the job, nothing was queued: error: Invalid qos" in refused(capsys, *chain)
    assert (here / "cancelled").read_text().split() == ["4711"]


@pytest.mark.parametrize("inside", [True, False])
def test_variables_of_an_outer_job_are_not_passed_on(inside, here, monkeypatch):
    """Neither to a job, an array, a benchmark or a resubmission, nor to a process of this machine."""
    fake_slurm(here, monkeypatch, f"env > $(mktemp {here}/seen.XXXX)\necho Submitted batch job 4711\n")
    python = here / "python"
    python.write_text((here / "bin" / "sbatch").read_text())
    python.chmod(0o755)
    monkeypatch.setattr(agent.Signals, "__init__", lambda self: setattr(self, "received", []))  # handlers would stay
    ranks = dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK",
                           "PMIX_RANK", "SUBMITIT_FOLDER", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"], "3")  # fmt: skip
    job = dict.fromkeys(["SLURM_NTASKS", "SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "SRUN_DEBUG",
                         "SBATCH_CPU_BIND", "SLURM_HINT"], "3")  # fmt: skip
    kept = {"SLURM_CONF": "/etc/x", "SLURM_CLUSTERS": "a", "SBATCH_ACCOUNT": "b", "RANKING": "c", "NCCL_DEBUG": "INFO"}
    for name, value in (ranks | job | kept | ({"SLURM_JOB_ID": "9"} if inside else {})).items():
        monkeypatch.setenv(name, value)
    flags = ["--gpus_per_node", "0", "--", "--data_path", "shards", "--crop", "64", "--batch_size", "4", "--exp_name", "x"]
    submit.main(["--preset", "tiny", *flags])
    submit.main(["--ablation", "phase1", "--only", "Exp-1a", "Exp-1c", *flags])
    submit.main(["--job", "benchmark", "--", "--model", "runs/done", "--data", "shards", "--out", "results.json"])
    resubmit.main(["x"])
    submit.main(["--preset", "tiny", "--cluster", "debug", "--python", str(python), *flags[:-1], "y"])
    seen = [dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) for path in here.glob("seen.*")]
    assert len(seen) == 5
    for one in seen:
        assert kept.items() <= one.items()
        assert {name for name in ranks if one.get(name) == "3"} == set()
        assert {name for name in job if name in one} == (set() if inside else set(job))
    assert os.environ["RANK"] == os.environ["SLURM_NTASKS"] == "3"


def test_what_is_submitted_is_written_down(here, capsys, monkeypatch):
    """Code, parameters, git state and environment are written before the job is queued."""
    fake_slurm(here, monkeypatch, "echo Submitted batch job 4711\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    submit.main(["--gpus_per_node", "0", "--preset", "tiny", "--", "--data_path", "shards", "--crop", "64", "--exp_name", "x"])
    assert "job 4711: x, 1 x 1 processes (slurm)" in capsys.readouterr().out
    folder = here / "runs" / "x" / "launch" / "1"
    assert submit.status_command(Path("a b/it's"), "x") == "python -m launch.status --output_dir 'a b/it'\"'\"'s' x"
    submission = read_submission(folder / "submission.json")
    assert (submission.name, submission.parameters["time"], submission.precision) == ("x", 1440, "fp32")
    assert (folder / "code" / "vfi" / "train.py").read_bytes() == (ROOT / "vfi" / "train.py").read_bytes()
    assert (folder / "accelerate.yaml").read_bytes() == (ROOT / "accelerate_configs" / "cpu.yaml").read_bytes()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["variables"]["NCCL_DEBUG"] == "INFO"
    assert environment["packages"]["torch"]
    assert "python -m launch.submit --gpus_per_node 0" in environment["command"]
    assert json.loads((folder / "queued.json").read_text())["job_id"] == "4711"
