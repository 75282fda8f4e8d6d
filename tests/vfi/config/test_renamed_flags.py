"""Former spellings of flags and commands do what the present ones do."""

from __future__ import annotations

import pytest

from vfi.config import command_line
from vfi.config.configs import Config
from vfi.config.renamed_flags import TRAINING, with_new_names
from vfi.io.dataclass_json import config_from_json, to_json


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--keep_it", "3"], ["--hold", "3"]),
        (["--keep-it=3", "x"], ["--hold=3", "x"]),
        (["--no-keep_it", "--no_keep-it"], ["--no-hold", "--no_hold"]),
        (["--keep_its", "keep_it", "--keep", "a=--keep_it"], ["--keep_its", "keep_it", "--keep", "a=--keep_it"]),
        (["--out=--keep_it"], ["--out=--keep_it"]),
    ],
)
def test_renamed_flags_are_recognised(given, expected):
    assert with_new_names(given, {"keep_it": "hold"}) == expected


def test_former_flags_of_training_set_what_they_did():
    config = command_line.from_command_line(["--guard_roll_backs", "5", "--max-fault-rate=0.25"])
    assert (config.guard.max_rollbacks, config.data.max_bad_sample_rate) == (5, 0.25)


def test_settings_of_before_the_renaming_are_read(capsys):
    text = to_json(Config())
    for former, present in TRAINING.items():
        assert f'"{present}": ' in text
        text = text.replace(f'"{present}": ', f'"{former}": ')
    assert config_from_json(text) == Config()
    assert capsys.readouterr() == ("", "")  # and nothing took a default
