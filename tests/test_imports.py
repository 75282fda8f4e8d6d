"""Who may import whom: a walk over every import statement of the project."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "vfi")
JOBS = (
    *("vfi.train", "vfi.benchmark", "vfi.report", "vfi.interpolate", "vfi.demo", "vfi.model_summary", "vfi.benchmark_data"),
    *("vfi.runs", "vfi.checkpoints", "vfi.export"),
)
TRAINING = (
    "vfi.data",
    "vfi.train",
    "vfi.training.losses",
    "vfi.training.optimizer",
    "vfi.tracking.tracker",
    "accelerate",
    "torch.distributed",
)

# module (or package, with what lies below it) -> what it must not import
NEVER = {
    "shards": ("torch", "vfi", "accelerate"),
    "shards.schema": ("shards", "numpy", "PIL"),
    "vfi.config.configs": ("shards", "vfi", "torch"),
    "vfi.ops": ("shards", *(f"vfi.{name}" for name in ("config", "model", "data", "augment", "losses", "metrics", "train"))),
    "vfi.model": ("shards", "vfi.checkpoint.store", "vfi.metrics.image_quality", "pathlib", "os", *TRAINING, *JOBS),
    "vfi.data": ("vfi.model", "accelerate"),
    "vfi.data.augment": ("shards", "vfi.data"),
    "vfi.data.sampler": ("shards", "torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.data.shuffle": ("shards", "torch", "vfi"),
    "vfi.data.triplet_sampling": ("shards", "torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.data.shard_reader": ("torch", "vfi.data.loader"),
    "vfi.data.shard_cache": ("torch", "vfi.data.loader", "vfi.data.shard_reader", "vfi.config.configs"),
    "vfi.data.download": ("torch", "vfi.data.loader", "vfi.data.shard_reader", "vfi.data.shard_cache", "vfi.config.configs"),
    "vfi.data.bad_samples": ("torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.data.tar_index": ("shards", "torch", "vfi"),
    "vfi.training.losses": ("shards", "vfi.model", "vfi.data", "accelerate"),
    "vfi.metrics.image_quality": ("shards", "vfi.model", "vfi.data", "accelerate"),
    "vfi.training.optimizer": ("shards", "vfi.model", "vfi.data", "accelerate"),
    **{job: tuple(other for other in JOBS if other != job) for job in JOBS},
}
# only these files may touch a package that is not there on every machine
GUARDED = {
    "mamba_ssm": {"vfi/ops/ssm/ssd.py", "vfi/ops/ssm/selective_scan.py"},
    "selective_scan_cuda": {"vfi/ops/ssm/ssd.py"},
    "triton": {
        "vfi/ops/triton/precompile.py",
        "vfi/ops/ssm/fused_ss2d.py",
        "vfi/ops/triton/math.py",
        "vfi/ops/triton/launch_config.py",
        *(
            f"vfi/ops/{name}_kernels.py"
            for name in ("activation", "norm", "pyramid", "ss2d", "stack", "warp", "window_attention")
        ),
    },
    "flash_attn": {"vfi/ops/attention/window_attention.py"},
    "deepspeed": set(),
    "gradio": {"vfi/app.py"},
    "submitit": set(),
    "onnx": set(),
    "onnxscript": set(),
    "onnxruntime": {"vfi/release/graph_formats.py"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_module_keeps_the_rules(name, path):
    for imported in set(imports(path)):
        for package, forbidden in NEVER.items():
            if below(name, package):
                broken = [rule for rule in forbidden if below(imported, rule)]
                assert not broken, f"{name} must not import {imported} (rule for {package})"
        for package, allowed in GUARDED.items():
            if below(imported, package):
                assert str(path.relative_to(ROOT)) in allowed, f"{name} must not import {imported}"


def test_rules_name_modules_that_exist():
    names = {name for name, _ in modules()}
    assert set(NEVER) <= names


def test_walk_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import a.b\ndef f():\n    from c import d\n")
    assert set(imports(file)) == {"a.b", "c", "c.d"}


def test_a_run_starts_without_what_takes_seconds_to_import():
    """Each is imported by whoever needs it: FSDP2, the counting of MACs, compiling, kernels, mamba_ssm's language models."""
    slow = ["torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo", "sympy", "triton", "transformers"]
    code = f"import sys, vfi.train; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
