"""Load a function of the user's own code, named on a command line as MODULE:FACTORY."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.schema import ShardError


def is_factory(name: str) -> bool:
    """Return whether this is MODULE:FACTORY, and not a path."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not Path(name).exists()


def call_factory(name: str, flag: str, device: Any) -> Callable[..., Any]:
    """Call the factory with the device and return the function that it gives.

    Modules are also found in the working directory. Raises ShardError for a missing module or factory, and for a result that is
    not callable; it names the flag.
    """
    module_name, _, factory_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ShardError(f"{flag} {name}: {error}; start the job in the module's folder, or set PYTHONPATH") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ShardError(f"{flag} {name}: {module.__file__} has no function {factory_name}")
    function = factory(device)
    if not callable(function):
        raise ShardError(f"{flag} {name}: {factory_name}(device) gave {type(function).__name__}, expected a function")
    return function
