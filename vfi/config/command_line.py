"""The command line of training: flags on top of a preset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tyro

from shards.cli import parse_flags, split_flags
from vfi.config.configs import Config
from vfi.config.presets import get, override
from vfi.config.renamed_flags import TRAINING, with_new_names
from vfi.config.validation import validate
from vfi.credentials import hide
from vfi.errors import STOPPED

# published flags that mean a value of another one
_ALIASES = {"use_mhc": ("--mixing", "mhc"), "no_use_mhc": ("--mixing", "none")}
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
    config = parse_flags(
        Config, prog, _HELP, argv, default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip
    config = override(config, preset=default.run.preset)  # as it is spelt here, however it was typed
    if not config.run.exp_name:
        config = override(config, exp_name=f"{config.run.preset}_phase{config.model.phase}")
    validate(config)
    return config


def expand_aliases(argv: Sequence[str]) -> list[str]:
    """Replace aliases by what they stand for: --[no-]use_mhc, and --x4k_path FOLDER, the last folder of --data_path."""
    words, last = list[str](), list[str]()
    for name, flag in split_flags(argv):
        if name == "x4k_path":
            last += ["--data_path", *flag[0].split("=", 1)[1:], *flag[1:]]
        else:
            words += [*_ALIASES[name], *flag[1:]] if name in _ALIASES else flag
    return words + last
