"""The `vfi` command: `vfi COMMAND --help` lists the flags of each.

A command is imported when it is called, so that `vfi --help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence

JOBS = {
    "train": "train a model on shards",
    "runs": "list runs: state, steps, best PSNR",
    "checkpoints": "list and verify the checkpoints of a run",
    "benchmark": "measure models on shards: PSNR and SSIM, beside the frame average",
    "report": "turn benchmark results into a table and a page",
    "gates": "thresholds of the three phases, and what was measured",
    "profile": "what a model costs: parameters, MACs, memory and time, by part",
    "bench-ops": "speed of each operator that has fused Triton kernels",
    "tune-kernels": "find the fastest configurations of the kernels on this GPU, and keep them",
    "export": "hand a model to others: weights and a card, or a graph",
    "interpolate": "make a video smoother or slower, or the in-between frame of two images",
    "app": "a local web page: try a model on two images or a short video",
    "demo": "the whole path on generated data within minutes, on a CPU",
}
"""Name -> what it does."""
_FORMER = {"model": "profile", "operators": "bench-ops", "tune": "tune-kernels"}
"""Former names of commands, which stay valid."""
_ELSEWHERE = {"profile": "vfi.model_summary", "bench-ops": "vfi.benchmark_ops", "tune-kernels": "vfi.tune_kernels"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with the arguments after its name; exits with 2 for an unknown name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *rest = arguments
    name = _FORMER.get(name, name)
    if name not in JOBS:
        print(f"error: {unknown(name)}", file=sys.stderr)
        sys.exit(2)
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports shows no traceback; until parse_flags
    importlib.import_module(module_of(name)).main(rest)


def module_of(name: str) -> str:
    """Return the module of a command, which has `main(argv)`."""
    return _ELSEWHERE.get(name, f"vfi.{name}")


def usage() -> str:
    """Return the text of `vfi --help`."""
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {what}" for name, what in JOBS.items())
    return (
        "usage: vfi COMMAND [flags]\n\nVideo frame interpolation: train, measure and use models.\n\n"
        f"{jobs}\n\n`vfi COMMAND --help` lists the flags of a command. Data: `python -m shards.synthetic --help`."
    )


def unknown(name: str) -> str:
    """Return the message for an unknown command."""
    close = difflib.get_close_matches(name, JOBS, n=1)
    guess = f" Did you mean `vfi {close[0]}`?" if close else ""
    return f"{name!r} is not a command: there are {', '.join(JOBS)}.{guess}"


if __name__ == "__main__":
    main()
