"""A flag given twice, in every command of the project."""

from __future__ import annotations

import importlib
import re

import pytest
import tyro
from test_imports import ROOT, modules

from launch.options import Options
from launch.plan import plan
from shards import cli, verify
from vfi.config import command_line

COMMANDS = [
    name
    for name, path in modules()
    if name not in ("vfi.cli", "launch.node.rank") and '\nif __name__ == "__main__":\n' in path.read_text()
]


class _ParsedError(Exception):
    """Carries the words that the parser gets."""


def test_every_command_is_parsed_in_one_place() -> None:
    assert [name for name, path in modules() if re.search(r"tyro\.cli\(|\bparse_args\(", path.read_text())] == ["shards.cli"]
    assert {"vfi.train", "vfi.benchmark", "shards.verify", "shards.vimeo90k", "launch.submit", "launch.profile"} < set(COMMANDS)
    scripts = {path.stem for path in ROOT.glob("recipes/*.py")}
    assert scripts == {"peers", "stills"}, "scripts with a parser of their own"


@pytest.mark.parametrize("command", [*COMMANDS, "vfi.benchmark --speed"])
def test_a_repeated_flag_of_several_values_has_all_of_them(command, monkeypatch, capsys) -> None:
    """What the help calls `--flag [X [X ...]]`, and no other flag: there the last one counts."""
    name, *arguments = command.split()
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    flags = re.findall(r"^. (--[a-z][\w-]*)( \[)?", capsys.readouterr().out, flags=re.MULTILINE)
    assert flags

    def show(*_, args, **__) -> None:
        raise _ParsedError(args)

    monkeypatch.setattr(tyro, "cli", show)
    for flag, several in flags:
        other = flag.replace("-", "_").replace("__", "--")
        words = ["--before", "1", flag, "tiny", "--between", "2", other, "small", f"{flag}=base"]  # that --preset knows, too
        with pytest.raises(_ParsedError) as parsed:
            main([*arguments, *words])
        joined = ["--before", "1", flag, "tiny", "small", "base", "--between", "2"]
        assert parsed.value.args[0] == (joined if several else words)


@pytest.mark.parametrize(
    ("argv", "joined"),
    [
        ("x --a 1 2 --b 3 --a=4 -5 --c", "x --a 1 2 4 -5 --b 3 --c"),
        ("--a --b --a 1 -h", "--a 1 --b -h"),
        ("--a=1 --b 2 --b 3 --a 4", "--a=1 4 --b 2 --b 3"),
        ("--b 1 --aa 1 --aa 2", "--b 1 --aa 1 --aa 2"),
    ],
)
def test_words_are_joined(argv, joined) -> None:
    assert cli.join_repeated(argv.split(), {"a"}) == joined.split()


def test_commands_take_all_values(monkeypatch) -> None:
    words = "--data_path A --lr 1e-3 --data-path B C --lr 1e-4 --x4k_path D --data_path=E --mixed_ratio 1:1:1:1:1"
    config = command_line.from_command_line(words.split())
    assert (config.data.data_path, config.optim.lr) == (("A", "B", "C", "E", "D"), 1e-4)
    taken: list[object] = []
    monkeypatch.setattr(verify, "_job", lambda options: taken.append(options) or 0)
    assert verify.main(["S0", "--against", "S0", "--against", "S1"]) == 0
    assert list(map(str, taken[0].against)) == ["S0", "S1"]
    options = cli.parse_flags(Options, "", None, ["--sbatch", "a=1", "--nodes", "2", "--sbatch", "b=2"])
    assert options.sbatch == ("a=1", "b=2")


def test_flags_of_a_phase_replace_those_of_all_phases(tmp_path, train_shards, val_shards) -> None:
    common = ["--data_path", str(train_shards), "--exp_name", "a", "--exp_name", "b", "--output_dir", str(tmp_path)]
    common += ["--batch_size", "2", "--steps", "2"]
    second = ["--data_path", str(val_shards), "--steps", "3"]
    options = Options(preset="tiny", chain="1,2", gpus_per_node=0)
    runs, _ = plan(options, [common, [], second], ROOT / "accelerate_configs" / "cpu.yaml")
    configs = [command_line.from_command_line(run.arguments) for run in runs]
    assert [config.data.data_path for config in configs] == [(str(train_shards),), (str(val_shards),)]
    assert [config.run.steps for config in configs] == [2, 3]
    assert [run.name for run in runs] == ["b_phase1", "b_phase2"]
