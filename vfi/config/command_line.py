"""The command line of training: flags on top of a preset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tyro

from vfi.config.configs import Config
from vfi.config.presets import get, override
from vfi.config.renamed_flags import TRAINING, with_new_names
from vfi.config.validation import validate
from vfi.credentials import hide
from vfi.errors import STOPPED

# published flags that mean a value of another one
ALIASES = {"--use_mhc": ("--mixing", "mhc"), "--no-use_mhc": ("--mixing", "none")}
_FOLDERS = ("data_path", "x4k_path")
_HELP = f"""Train a model on shards; a run folder holds all that comes of it.

SIGTERM, SIGUSR2 and Ctrl-C finish the step, save and end with exit code {STOPPED}; --resume auto continues from there. A second
signal ends at once. Other exit codes: 0 done, 1 a bug or a process that hangs or died, 2 a mistake in settings or data.
torchrun and accelerate launch make 1 of every code but 0."""


def from_command_line(argv: Sequence[str] | None = None, prog: str = "vfi.train") -> Config:
    """Return the checked Config of a command line. The preset gives every default; `_` and `-` are equal in a flag.

    Addresses in it are without their passwords and tokens (see vfi/credentials.py).
    """
    argv = with_new_names(expand_aliases(hide(sys.argv[1:] if argv is None else argv)), TRAINING)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="small")
    default = get(finder.parse_known_args(argv)[0].preset)
    config = tyro.cli(
        Config, prog=prog, description=_HELP, args=argv, default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip
    config = override(config, preset=default.run.preset)  # as it is spelt here, however it was typed
    if not config.run.exp_name:
        config = override(config, exp_name=f"{config.run.preset}_phase{config.model.phase}")
    validate(config)
    return config


def expand_aliases(argv: Sequence[str]) -> list[str]:
    """Replace aliases by the flags they stand for: those of ALIASES, and --x4k_path FOLDER, the last folder of --data_path."""
    known = {name.replace("-", "_"): meaning for name, meaning in ALIASES.items()}
    return _append_x4k([part for argument in argv for part in known.get(argument.replace("-", "_"), (argument,))])


def _append_x4k(argv: list[str]) -> list[str]:
    words = [word for argument in argv for word in (argument.split("=", 1) if _is_flag(argument, *_FOLDERS) else [argument])]
    at = next((number for number, word in enumerate(words) if _is_flag(word, "x4k_path")), None)
    if at is None:
        return argv
    folder, rest = words[at + 1 : at + 2], words[:at] + words[at + 2 :]
    first = next((number for number, word in enumerate(rest) if _is_flag(word, "data_path")), None)
    if first is None:
        return [*rest, "--data_path", *folder]
    end = next((number for number in range(first + 1, len(rest)) if rest[number].startswith("--")), len(rest))
    return [*rest[:end], *folder, *rest[end:]]


def _is_flag(word: str, *names: str) -> bool:
    return word.partition("=")[0].replace("-", "_").removeprefix("__") in names and word.startswith("--")
