"""A stopped run resumes as if it had not stopped: averages, random numbers, damaged checkpoints, full disks, chains of runs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from warm import TRAIN, Process, finish, start_ranks

from vfi import checkpoints, runs, train
from vfi.checkpoint import store
from vfi.checkpoint.store import latest, list_checkpoints
from vfi.io.verified_folder import MANIFEST, write_folder
from vfi.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2",
         "--batch_size", "2", "--lr", "2e-4", "--ema", "0.9", "--save_every", "2"]  # fmt: skip


def run(out: Path, name: str, *flags: object) -> Path:
    """Train in this process and return the run folder."""
    train.main([*FLAGS, "--output_dir", str(out), "--exp_name", name, *map(str, flags)])
    return out / name


def refused(capsys, *arguments: object) -> str:
    """Return the message with which the job ends."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether both runs have the same newest weights and averages, bit for bit."""
    pairs = [(load_file(latest(one).path / n), load_file(latest(other).path / n)) for n in (store.MODEL, store.EMA)]
    return all(torch.equal(tensor, theirs[name]) for mine, theirs in pairs for name, tensor in mine.items())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rows(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def noisy():
    """Training whose loss depends on the random numbers of torch, numpy and Python."""
    plain = trainer.training_losses

    def noisy_losses(*arguments):
        factor = 1 + 0.3 * torch.rand(()) + 0.3 * random.random() + 0.3 * float(np.random.rand())
        return {name: factor * loss for name, loss in plain(*arguments).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_losses", noisy_losses)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread, noisy, train_shards, val_shards) -> Path:
    """A run of six steps, saved and validated every two, without a stop; not to be changed."""
    seed_everything(1)
    out = tmp_path_factory.mktemp("runs")
    return run(out, "whole", "--data_path", train_shards, "--val_path", val_shards, "--val_every", 2, "--keep_last", 9,
               "--steps", 6)  # fmt: skip


@pytest.fixture
def again(whole, tmp_path) -> Path:
    """A copy of the run folder as it was after step 4."""
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    return folder


def go_on(folder: Path, train_shards: Path, val_shards: Path, *flags: object) -> None:
    seed_everything(99)  # another process starts with other random numbers
    run(folder.parent, folder.name, "--data_path", train_shards, "--val_path", val_shards, "--val_every", 2, "--keep_last", 9,
        "--steps", 6, "--resume", "auto", *flags)  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_averages_and_random_numbers_go_on_bit_for_bit(whole, again, noisy, train_shards, val_shards, workers):
    go_on(again, train_shards, val_shards, "--num_workers", workers)
    assert same_tensors(whole, again)
    assert rows(whole, "val") == rows(again, "val")
    assert store.read_state(latest(again).path).ema_updates == 6
    assert store.read_random(latest(again).path) == store.read_random(latest(whole).path)


def test_the_average_is_that_of_the_weights_of_each_step(tmp_path, train_shards):
    """The weights that are saved after each step give the average by its recurrence."""
    folder = run(tmp_path, "each", "--data_path", train_shards, "--steps", 3, "--save_every", 1)
    name = "refine.head.weight"
    saved = [(load_file(found.path / store.MODEL)[name], load_file(found.path / store.EMA)[name])
             for found in list_checkpoints(folder)]  # fmt: skip
    (_, average), *later = saved
    for n, (weight, expected) in enumerate(later, start=2):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
        assert torch.allclose(average, expected, atol=1e-7, rtol=0)
        assert (expected - weight).abs().max() > 1e-5


def test_validation_measures_the_average(whole, train_shards, val_shards, tmp_path, capsys):
    """The PSNR of a step is that of the EMA weights of its checkpoint, not of those that train."""
    for file, alike in ((store.EMA, True), (store.MODEL, False)):
        alone = tmp_path / file
        shutil.copytree(latest(whole).path, alone / "checkpoints" / "step_00000006")
        (alone / "checkpoints" / "step_00000006" / file).rename(tmp_path / "kept")
        files = {path.name: path.read_bytes() for path in (alone / "checkpoints" / "step_00000006").iterdir()
                 if path.name not in (MANIFEST, store.EMA, store.MODEL)}  # fmt: skip
        files[store.MODEL] = (tmp_path / "kept").read_bytes()
        write_folder(alone / "checkpoints" / "step_00000006", files.items())
        measured = run(tmp_path, f"from_{file}", "--data_path", train_shards, "--val_path", val_shards, "--steps", 1, "--lr", 0,
                       "--lr_min", 0, "--ema", 0, "--resume", alone)  # fmt: skip
        psnr = store.read_state(latest(whole).path).psnr
        assert psnr == rows(whole, "val")[-1]["psnr"]
        assert (abs(rows(measured, "val")[-1]["psnr"] - psnr) < 1e-9) == alike
    assert "EMA weights" not in capsys.readouterr().out


def test_ema_may_begin_and_end_with_a_resume(again, train_shards, val_shards, capsys):
    go_on(again, train_shards, val_shards, "--ema", 0)
    assert not (latest(again).path / store.EMA).exists()
    assert "--ema is 0: the EMA weights of" in capsys.readouterr().out
    go_on(again, train_shards, val_shards, "--steps", 8, "--schedule", "extend")
    assert "has no EMA weights: the average starts from its weights" in capsys.readouterr().out
    assert store.read_state(latest(again).path).ema_updates == 2


def test_the_newest_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    whole, tmp_path, noisy, train_shards, val_shards, capsys
):
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    damaged = latest(folder).path / store.OPTIMIZER
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        checkpoints.main([str(folder)])
    assert stop.value.code == 1
    go_on(folder, train_shards, val_shards)
    printed = capsys.readouterr().out
    assert f"DAMAGED and not used: {damaged.parent}: optimizer.pt is not what was written" in printed
    assert f"resuming from the weights of {folder / 'checkpoints' / 'step_00000004'} (step 4)" in printed
    assert same_tensors(whole, folder)
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 7))
    checkpoints.main([str(folder)])


def test_when_none_is_whole_the_run_neither_goes_on_nor_starts_anew(again, train_shards, capsys):
    for found in list_checkpoints(again):
        (found.path / store.MODEL).write_bytes(b"")
    before = (again / "metrics.jsonl").read_bytes()
    message = refused(capsys, again.parent, "again", "--data_path", train_shards, "--steps", 6, "--resume", "auto")
    assert f"no checkpoint of {again} is whole: " in message
    assert all(found.path.name in message for found in list_checkpoints(again))
    assert (again / "metrics.jsonl").read_bytes() == before


def test_a_hostile_checkpoint_with_a_good_manifest_executes_nothing(again, train_shards, tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state": Hostile(), "param_groups": []}, tmp_path / "hostile.pt")
    newest = latest(again).path
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != MANIFEST}
    write_folder(newest, (files | {store.OPTIMIZER: (tmp_path / "hostile.pt").read_bytes()}).items())
    message = refused(capsys, again.parent, "again", "--data_path", train_shards, "--steps", 6, "--resume", "auto")
    assert "optimizer.pt cannot be loaded" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state.json", {"scaler": {"scale": 2.0}}, None),
        ("state.json", {"guard": {"step": "x"}}, "no usable state of the guard"),
        ("random.json", [{"torch": "zz"}], "random.json is not usable"),
        ("random.json", [{"torch": "00", "python": [3, [1], None], "numpy": []}], "random.json is not usable"),
        ("random.json", [5], "random.json is not usable"),
    ],
)
def test_states_that_make_no_sense_are_refused_by_name(again, train_shards, capsys, name, change, message):
    newest = latest(again).path
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != MANIFEST}
    changed = json.loads(files[name]) | change if isinstance(change, dict) else change
    write_folder(newest, (files | {name: json.dumps(changed).encode()}).items())
    flags = (again.parent, "again", "--data_path", train_shards, "--steps", 6, "--resume", "auto")
    if message is None:  # a loss scale is of no interest in fp32
        run(*flags)
    else:
        assert message in refused(capsys, *flags)


def test_other_numbers_of_processes_have_no_random_states_to_take(again, train_shards, val_shards, capsys):
    newest = latest(again).path
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != MANIFEST}
    files[store.RANDOM] = json.dumps(store.read_random(newest) * 2).encode()
    write_folder(newest, files.items())
    go_on(again, train_shards, val_shards)
    assert "has the random states of 2 processes, now there are 1: they start from --seed" in capsys.readouterr().out


def test_checkpoints_of_an_older_program_are_resumed(again, train_shards, val_shards, capsys):
    """Their settings lack what came later, and a program before EMA wrote none."""
    newest = latest(again).path
    config = json.loads((newest / store.CONFIG).read_text())
    del config["run"]["start_from"], config["optim"]["ema"]
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name not in (MANIFEST, store.EMA)}
    write_folder(newest, (files | {store.CONFIG: json.dumps(config).encode()}).items())
    go_on(again, train_shards, val_shards)
    printed = "".join(capsys.readouterr())
    assert "is older than these settings, which have their defaults: start_from, ema" in printed
    assert store.check(latest(again).path) == []
    assert latest(again).step == 6


# chains of runs


def test_a_chained_run_may_be_started_again_with_the_same_command(whole, tmp_path, train_shards, val_shards, capsys):
    flags = ("--data_path", train_shards, "--phase", 2, "--save_every", 1, "--resume", "auto", "--start_from", whole)
    second = run(tmp_path, "second", *flags, "--steps", 2)
    printed = capsys.readouterr().out
    best = store.best(whole)
    assert best is not None
    rank = "the newest and best" if best.step == 6 else "the newest"
    assert f"starting from the weights of {latest(whole).path} (step 6, {rank} of its run" in printed
    assert "they are the EMA weights" in printed
    assert "from scratch" not in printed
    run(tmp_path, "second", *flags, "--steps", 3, "--schedule", "extend")
    assert f"resuming from the weights of {second / 'checkpoints' / 'step_00000002'} (step 2)" in capsys.readouterr().out
    straight = run(tmp_path, "straight", *flags, "--steps", 3)
    assert same_tensors(second, straight)


def test_start_from_is_resume_with_a_name(whole, tmp_path, train_shards):
    flags = ("--data_path", train_shards, "--steps", 1)
    runs_ = [run(tmp_path, flag.strip("-"), *flags, flag, whole) for flag in ("--resume", "--start_from")]
    assert same_tensors(*runs_)


def test_two_sources_of_first_weights_are_refused(whole, tmp_path, train_shards, capsys):
    message = refused(capsys, tmp_path, "x", "--data_path", train_shards, "--steps", 1, "--resume", "a", "--start_from", "b")
    assert "--resume a and --start_from b both give the initial weights: remove one" in message


def test_a_damaged_start_is_refused(whole, tmp_path, train_shards, capsys):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    (latest(other).path / store.MODEL).write_bytes(b"")
    flags = (tmp_path, "next", "--data_path", train_shards, "--steps", 1, "--start_from")
    assert "step_00000006 is damaged: model.safetensors has 0 bytes" in refused(capsys, *flags, latest(other).path)
    run(*flags, other)
    printed = capsys.readouterr().out
    assert "step_00000006: model.safetensors has 0 bytes" in printed
    assert "starting from the weights of" in printed
    assert "step_00000004" in printed


# what is kept


def test_the_best_checkpoint_is_kept_and_listed(tmp_path, train_shards, val_shards, monkeypatch, capsys):
    scores = iter([31.0, 33.0, 32.0, 29.0, float("nan")])

    def score(self, network, accelerator, tracker, watch, step, in_step):
        found = trainer.Score(step, next(scores), 30.0)
        tracker.log(found.step, "val", psnr=found.psnr, average_psnr=30.0, samples=1)
        return found

    monkeypatch.setattr(trainer.Validation, "run", score)
    folder = run(tmp_path, "best", "--data_path", train_shards, "--val_path", val_shards, "--steps", 5, "--save_every", 1,
                 "--val_every", 1, "--keep_last", 2)  # fmt: skip
    assert {found.step: store.read_state(found.path).psnr for found in list_checkpoints(folder)} == {
        2: 33.0,
        4: 29.0,
        5: None,
    }
    assert store.newest_whole(folder)[0] == folder / "checkpoints" / "step_00000005"
    capsys.readouterr()
    runs.main(["--output_dir", str(tmp_path), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["total"], found["best_psnr"], found["gain"]) == ("finished", 5, 5, 33.0, 3.0)


def test_remains_of_a_run_killed_after_its_last_save_are_removed(tmp_path, train_shards):
    flags = (tmp_path, "done", "--data_path", train_shards, "--steps", 2, "--save_every", 1, "--resume", "auto")
    checkpoints = run(*flags) / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    for name in (".step_00000001.old", ".step_00000002.new"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"half")
    run(*flags)
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_a_step_without_validation_has_no_score(tmp_path, train_shards, val_shards):
    folder = run(tmp_path, "rare", "--data_path", train_shards, "--val_path", val_shards, "--steps", 4, "--save_every", 1,
                 "--val_every", 2, "--val_samples", 1, "--keep_last", 9)  # fmt: skip
    assert [store.read_state(found.path).psnr is None for found in list_checkpoints(folder)] == [True, False, True, False]


# disks that are full


def start(*flags: object, limit: int = 0) -> tuple[int | None, str]:
    """Return exit code and output of the job as a process of its own, whose files may grow to `limit` bytes."""
    process = Process(TRAIN, *FLAGS, *flags, limit=limit)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def assert_ended_by_the_disk(code: int | None, output: str, folder: Path, why: str) -> None:
    """Assert a clear error, the last good checkpoint, nothing half-written, and a status that says so."""
    assert code not in (0, None), output
    assert "Traceback" not in output
    assert f"{why} (optimizer.pt: " in output
    assert "bytes needed, " in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    assert store.check(latest(folder).path) == []


def test_a_limit_on_files_ends_the_run_and_keeps_the_last_checkpoint(again, train_shards, capsys):
    shutil.rmtree(again / "checkpoints" / "step_00000002")
    flags = ("--data_path", train_shards, "--steps", 6, "--exp_name", "again", "--output_dir", again.parent, "--resume", "auto")
    assert_ended_by_the_disk(*start(*flags, limit=8_000_000), again, "step_00000006 could not be written: File too large")
    runs.main(["--output_dir", str(again.parent), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed"
    assert "File too large" in found["why"]


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(again, tmp_path, train_shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"no file system of its own can be mounted here: {mount.stderr.decode().strip()}")
    try:
        shutil.rmtree(again / "checkpoints" / "step_00000002")  # one checkpoint has 21 MB
        shutil.copytree(again, disk / "again")
        flags = ("--data_path", train_shards, "--steps", 6, "--exp_name", "again", "--output_dir", disk, "--resume", "auto")
        assert_ended_by_the_disk(*start(*flags), disk / "again", "step_00000006 could not be written: No space left on device")
    finally:
        subprocess.run(["umount", disk], check=True)


# several processes

RANKS = """
import os, random, sys
from vfi import train
from vfi.training import trainer
plain, rank = trainer.training_losses, int(os.environ["RANK"])
draw = lambda: [random.random() for _ in range(1 + rank)][-1]
trainer.training_losses = lambda *a: {name: (1 + draw()) * loss for name, loss in plain(*a).items()}
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_each_process_gets_its_own_random_state_back(tmp_path, train_shards):
    flags = (*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--resume", "auto", "--steps", 4)
    finish(start_ranks(2, RANKS, *flags, "--exp_name", "whole"))
    states = [store.read_random(found.path) for found in list_checkpoints(tmp_path / "whole")]
    assert [len(state) for state in states] == [2, 2]
    assert states[0][0]["python"] != states[0][1]["python"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(latest(tmp_path / "again").path)
    finish(start_ranks(2, RANKS, *flags, "--exp_name", "again"))
    assert latest(tmp_path / "again").step == 4
    assert same_tensors(tmp_path / "whole", tmp_path / "again")
    assert store.read_random(latest(tmp_path / "again").path) == states[1]


@pytest.mark.slow
def test_all_processes_end_where_the_main_one_cannot_write(tmp_path, train_shards):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("in the way")
    processes = start_ranks(
        2, TRAIN, *FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--exp_name", "blocked", "--steps", 2
    )
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2
        assert output.count("error: ") == output.count("step_00000002 could not be written: File exists") == 1, output
