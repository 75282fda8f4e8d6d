"""The `vfi` command, how errors reach the user, and the demo's path."""

import os
import signal
import subprocess
import sys

import pytest
from warm import Process

from vfi import cli, demo, shipped
from vfi.cli import JOBS, main
from vfi.errors import JobError, clear_errors, message_of
from vfi.evaluation.results import BASELINES, Results, Row, read_results


def test_help_lists_every_job_and_loads_none() -> None:
    code = "import sys, vfi.cli; vfi.cli.main(['--help']); print({'torch', 'tyro', 'av'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, what in JOBS.items():
        assert f"{name} " in done.stdout
        assert what in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("name", ["model", "operators", "tune"])
def test_former_names_of_commands_stay_valid(name, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: vfi {cli._FORMER[name]}" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys) -> None:
    main([])
    assert "usage: vfi COMMAND" in capsys.readouterr().out


def test_an_unknown_job_is_refused_with_the_list(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian", "--steps", "1"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: 'trian' is not a command")
    assert all(name in line for name in JOBS)
    assert "Did you mean `vfi train`?" in line


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_help_and_refuses_unknown_flags(name, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (0, None)
    assert "--" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([name, "--no_such_flag", "1"])
    assert stop.value.code == 2
    assert "no_such_flag" in capsys.readouterr().err.replace("-", "_")


def test_arguments_reach_the_job(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: results file {tmp_path / 'none.json'} does not exist")


@pytest.mark.parametrize("separator", ["_", "-"])
def test_flags_may_be_written_with_both_signs(separator, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"--data{separator}path", str(tmp_path / "none"), "--preset", "tiny"])
    assert f"shard folder {tmp_path / 'none'} does not exist" in capsys.readouterr().err


class _KnownError(ValueError):
    pass


def test_named_errors_become_one_line_and_others_stay(capsys) -> None:
    @clear_errors(_KnownError)
    def job(error: BaseException) -> None:
        raise error

    for error in (_KnownError("first\n  second"), JobError("first second")):
        with pytest.raises(SystemExit) as stop:
            job(error)
        assert stop.value.code == 2
        assert capsys.readouterr().err == "error: first second\n"
    with pytest.raises(ValueError, match="a bug"):
        job(ValueError("a bug"))
    with pytest.raises(SystemExit) as stop:
        job(KeyboardInterrupt())
    assert stop.value.code == 130


def test_the_message_of_a_loader_process_is_its_last_line() -> None:
    text = (
        "Caught ShardError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ShardError()\nshards.schema.ShardError: sample a: im2.png: broken\n'
    )
    assert message_of(_KnownError(text)) == "sample a: im2.png: broken"


def _results(gain: float) -> Results:
    rows = [Row(name, None, None, None, None, None, None, 30.0, 0.9, 1.0, ()) for name in BASELINES]
    rows.append(Row("tiny", "runs/tiny", "runs/tiny", 9, 1, "tiny", 1, 30.0 + gain, 0.91, 1.0, ()))
    return Results("val", "0", 0, 0, {}, {}, tuple(rows), ())


def test_the_demo_says_plainly_whether_the_model_is_good_enough(tmp_path) -> None:
    good, bad, worse = (demo.summary(tmp_path, _results(gain)) for gain in (3.25, 0.75, -0.5))
    assert "3.25 dB better than the frame average" in good
    assert "less than" not in good
    assert "0.75 dB better" in bad
    assert "less than the 3 dB" in bad
    assert "0.50 dB worse" in worse
    assert "33.250" in good
    assert str(tmp_path / "clip.mp4") in good


def test_the_demo_shows_commands_as_one_would_type_them() -> None:
    assert demo.as_typed(["vfi.train", "--steps", "3"]) == "vfi train --steps 3"
    assert demo.as_typed(["shards.synthetic", "--out", "a b"]) == "python -m shards.synthetic --out 'a b'"


def test_the_demo_ends_with_the_shipped_model_where_there_is_one(tmp_path, monkeypatch) -> None:
    options, clip = demo.Options(tmp_path / "out"), str(tmp_path / "out" / "clip_shipped.mp4")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    *others, last = demo.commands(options)
    assert last == ["vfi.interpolate", str(tmp_path / "out" / "frames"), "--out", clip]
    assert clip in demo.summary(options.out, _results(3.25))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "none")
    assert demo.commands(options) == others
    assert clip not in demo.summary(options.out, _results(3.25))


def test_a_failing_step_stops_the_demo(tmp_path, capfd) -> None:
    (tmp_path / "shards").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path)])
    assert stop.value.code == 2
    captured = capfd.readouterr()
    assert "error: the demo stops here: `python -m shards.synthetic" in captured.err
    assert "vfi train" not in captured.out


RUN_MODULE = "import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


def run_warm(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess:
    """`subprocess.run` for a module."""
    python, option, *arguments = command
    assert (python, option, check) == (sys.executable, "-m", False)
    process = Process(RUN_MODULE, *arguments, **env)
    print(process.communicate(300)[0])
    return subprocess.CompletedProcess(command, process.returncode)


@pytest.mark.slow
def test_the_demo_runs_through_and_again(tmp_path, monkeypatch, capfd) -> None:
    """With too little data and training to be any good: every step runs, and the exit code says that it is not."""
    monkeypatch.setattr(demo.subprocess, "run", run_warm)
    monkeypatch.setattr(demo, "TRAIN_SAMPLES", 16)
    monkeypatch.setattr(demo, "VAL_SAMPLES", 4)
    monkeypatch.setattr(demo, "CLIP_FRAMES", 3)
    monkeypatch.setattr(demo, "CLIP_MOTION", "8")
    out = tmp_path / "demo"
    for steps in (2, 3):
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--out", str(out), "--steps", str(steps)])
        assert stop.value.code == 1
        shown = capfd.readouterr().out
        assert "$ vfi train --preset tiny" in shown
        assert "less than the 3 dB" in shown
        results = read_results(out / "results.json")
        assert (results.models[0].step, results.samples) == (steps, 4)
        clips = ["clip.mp4", demo.SHIPPED_CLIP] if shipped.has_shipped_model() else ["clip.mp4"]
        for name in ("report/report.html", "report/report.md", "runs/tiny/metrics.jsonl", *clips):
            assert (out / name).stat().st_size > 0


@pytest.mark.parametrize(
    "command",
    [
        *(("-m", "vfi.train"), ("-m", "launch.submit"), ("-m", "shards.synthetic"), ("-m", "vfi.cli", "runs")),
        ("-c", "from vfi.cli import main; main()", "train"),  # as the console script
    ],
)
def test_ctrl_c_during_the_imports_shows_no_traceback(command, tmp_path) -> None:
    (tmp_path / "tyro.py").write_text("import signal; signal.raise_signal(signal.SIGINT); raise ImportError('it went on')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_is_reported_once_a_command_runs_and_left_alone_elsewhere(tmp_path) -> None:
    """A command has Python's handler again once it has read its flags; a program that imports the package never loses it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import vfi, shards, launch")
    shown = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "mine" / "program.py").write_text(shown)
    (tmp_path / "runs").mkdir()
    code = f"import sys; sys.argv[1:] = ['runs']; from vfi.cli import main; main(); {shown}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for command in (("-c", code), ("-m", "mine.program")):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.stdout.endswith("True\n"), done.stderr
