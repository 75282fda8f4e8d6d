"""Who may import whom: a walk over every import statement of the project."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "vfi", "launch")
"""The lowest first: each imports those before it and never one after it."""
COMMANDS = (
    *("train", "benchmark", "report", "gates", "interpolate", "export", "app", "demo", "runs", "checkpoints"),
    *("model_summary", "benchmark_ops", "benchmark_data", "tune_kernels", "cli"),
)
# what lies directly inside a package ("": its own __init__.py), the lowest first: a part imports those in the rows before its
# own
ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "vfi": (
        *(
            ("credentials",),
            ("errors",),
            ("shipped",),
            ("config",),
            ("runtime",),
            ("io",),
            ("ops",),
            ("metrics",),
            ("model",),
            ("data",),
        ),
        *(("checkpoint",), ("tracking",), ("distributed",), ("training",), ("profiling",), ("inference",), ("video",)),
        *(("evaluation",), ("release",), ("reporting",), ("pretrained",), ("vapoursynth",), ("",), COMMANDS),
    ),
    "launch": (
        ("", "memory", "options", "preflight", "slurm", "submission"),
        *(("node", "plan", "snapshot"), ("executors", "status"), ("queue",), ("cancel", "profile", "resubmit", "submit")),
    ),
    "shards": (
        *(
            ("", "rich_motion", "rich_shapes", "schema", "torch_files"),
            ("cli", "codecs", "color_conversion", "parallel", "rich_scene", "tar_index"),
        ),
        ("sample_rules",),
        ("field_filters", "presentation"),
        ("video_reader",),
        ("factories", "frame_sources", "overlap", "photographs", "synthetic_scene", "writer"),
        ("published_sets", "rich_painting", "sequence_filter"),
        ("rich_drawing",),
        ("flow", "middlebury", "snu_film", "synthetic", "ucf101", "verify", "video", "vimeo90k", "x4k1000fps", "xiph"),
    ),
}
# module (or package, with what lies below it) -> what it must not import, beside what lies above it
NEVER = {
    "shards": ("torch", "accelerate"),
    "shards.schema": ("shards", "numpy", "PIL"),
    "vfi.config": ("shards", "torch"),
    "vfi.ops": ("shards", "vfi.config"),
    "vfi.model": ("shards", "vfi.metrics", "vfi.io", "pathlib", "os", "accelerate", "torch.distributed"),
    "vfi.data": ("vfi.model", "accelerate"),
    "vfi.data.augment": ("shards", "vfi.data"),
    "vfi.data.sampler": ("shards", "torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.data.shuffle": ("shards", "torch", "vfi"),
    "vfi.data.triplet_sampling": ("shards", "torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.data.shard_reader": ("torch", "vfi.data.loader"),
    "vfi.data.shard_cache": ("torch", "vfi.data.loader", "vfi.data.shard_reader", "vfi.config"),
    "vfi.data.download": ("torch", "vfi.data.loader", "vfi.data.shard_reader", "vfi.data.shard_cache", "vfi.config"),
    "vfi.data.bad_samples": ("torch", "vfi.data.loader", "vfi.data.shard_reader"),
    "vfi.metrics": ("shards", "accelerate"),
    "vfi.training.losses": ("shards", "vfi.model", "vfi.data", "accelerate"),
    "vfi.training.optimizer": ("shards", "vfi.model", "vfi.data", "accelerate"),
    "launch.node": ("torch", "accelerate"),
    "launch.plan": ("torch", "accelerate"),
    "launch.submit": ("torch", "accelerate"),
}
ALLOWED = {("shards.flow", "torch"), ("vfi.config.command_line", "shards")}
"""What a module may import against the rule of its package: it estimates flow by a network; every command line is parsed in
shards/cli.py."""
# only these files may touch a package that is not there on every machine
GUARDED = {
    "mamba_ssm": {"vfi/ops/ssm/ssd.py", "vfi/ops/ssm/selective_scan.py"},
    "selective_scan_cuda": {"vfi/ops/ssm/ssd.py"},
    "triton": {
        *(f"vfi/ops/triton/{name}.py" for name in ("precompile", "math", "launch_config")),
        "vfi/ops/ssm/fused_ss2d.py",
        *(f"vfi/ops/ssm/ss2d_{name}.py" for name in ("common", "fwd_kernels", "bwd_kernels")),
        *(f"vfi/ops/pointwise/{name}_kernels.py" for name in ("bias_prelu", "concat", "layer_norm")),
        "vfi/ops/loss/laplacian_kernels.py",
        "vfi/ops/warp/warp_kernels.py",
        "vfi/ops/attention/window_attention_kernels.py",
    },
    "flash_attn": {"vfi/ops/attention/window_attention.py"},
    "deepspeed": set(),
    "gradio": {"vfi/app.py"},
    "vapoursynth": {"vfi/vapoursynth.py"},
    "submitit": {"launch/executors.py", "launch/node/agent.py"},
    "onnx": set(),
    "onnxscript": set(),
    "onnxruntime": {"vfi/release/graph_formats.py"},
    "lpips": {"vfi/metrics/lpips.py"},
    "torchvision": {"vfi/training/perceptual_loss.py", "shards/flow.py"},
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


def place(module: str) -> tuple[int, int, str]:
    """Rank of the package, rank inside it, and the part of it that a module is in ("": the package's own file)."""
    package, _, inside = module.partition(".")
    part = inside.partition(".")[0]
    return PACKAGES.index(package), next(n for n, layer in enumerate(ORDER[package]) if part in layer), part


def imported_modules() -> dict[str, set[str]]:
    """Module of the project -> those that it imports, also inside functions; of `from package import name`, package.name if it
    is one."""
    found: dict[str, set[str]] = {}
    names = dict(modules())
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found[name].update(one if one in names else str(node.module) for one in inner)
        found[name] &= set(names)
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Paths of modules that import one another, each ending where it began."""
    found, done = [], set()

    def follow(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(edges[name]):
                follow(other, [*path, name])
            done.add(name)

    for name in edges:
        follow(name, [])
    return found


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_module_keeps_the_rules(name, path):
    for imported in set(imports(path)):
        for package, forbidden in NEVER.items():
            if below(name, package):
                broken = [rule for rule in forbidden if below(imported, rule) and (name, rule) not in ALLOWED]
                assert not broken, f"{name} must not import {imported} (rule for {package})"
        for package, allowed in GUARDED.items():
            if below(imported, package):
                assert str(path.relative_to(ROOT)) in allowed, f"{name} must not import {imported}"


def test_no_module_imports_the_private_names_of_another():
    """But the pieces of one kernel, which are files of one folder."""
    own = {name for name, _ in modules()}
    for name, path in modules():
        for imported in imports(path):
            module, _, last = imported.rpartition(".")
            private = module in own and last.startswith("_") and imported not in own
            assert not private or below(name, "vfi.ops.ssm"), f"{name} imports {imported}"


def test_each_part_imports_only_parts_below_it():
    upward = []
    for name, others in imported_modules().items():
        package, rank, part = place(name)
        for other in others:
            their_package, their_rank, their_part = place(other)
            if (package, part) != (their_package, their_part) and (their_package, their_rank) >= (package, rank):
                upward.append(f"{name} imports {other}")
    assert not upward


def test_no_modules_import_one_another():
    assert not circles(imported_modules())


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("package", PACKAGES)
def test_order_names_every_part_once(package):
    parts = {name.partition(".")[2].partition(".")[0] for name, _ in modules() if below(name, package)}
    assert sorted(part for layer in ORDER[package] for part in layer) == sorted(parts)


def test_rules_name_modules_that_exist():
    names = {name for name, _ in modules()}
    assert set(NEVER) <= names
    assert all((ROOT / file).is_file() for files in GUARDED.values() for file in files)


def test_walk_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import a.b\ndef f():\n    from c import d\n")
    assert set(imports(file)) == {"a.b", "c", "c.d"}


def test_a_run_starts_without_what_takes_seconds_to_import():
    """Each is imported where it is needed: FSDP2, the counting of MACs, compiling, kernels, mamba_ssm's language models."""
    slow = ["torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo", "sympy", "triton", "transformers"]
    code = f"import sys, vfi.train; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
