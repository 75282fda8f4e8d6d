"""Test the memory formula against an independent solver and counted memory, and the batch choice against brute force."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.memory.batch_size import MARGIN, OUTSIDE_GIB, GpuSpec, choose_batch, identify
from launch.memory.model import (
    GIB,
    PROFILES,
    Entry,
    Fit,
    ManualProfile,
    Point,
    Profiles,
    add,
    fit_points,
    read_profiles,
    write_profiles,
)
from vfi.config import presets
from vfi.config.configs import Config, ConfigError, OptimConfig

ROOT = Path(__file__).parents[3]
# bytes of a training step of `small`, phase 1, bf16, in plain torch, counted from the shapes of all its tensors: (crop, batch)
COUNTED = {
    (128, 1): 399462142, (128, 2): 680487746, (128, 8): 2382587738, (128, 24): 6921534904,
    (256, 1): 1250907326, (256, 2): 2388693570, (256, 8): 9215432568, (256, 24): 27420073912,
    (320, 1): 1908351070,
}  # fmt: skip
CARDS = {"v100": (16, 32), "rtx5090": (32,), "a100": (40, 80), "h100": (80,), "h200": (141,)}
STATED = (
    ManualProfile("v100", 16, 2, 256, "stated"),
    ManualProfile("rtx5090", 32, 8, 256, "stated"),
    ManualProfile("a100", 80, 16, 256, "stated"),
)


def small(**changed: object) -> Config:
    return presets.override(presets.small(), **changed)


def points(counted: dict[tuple[int, int], int]) -> list[Point]:
    return [Point(batch, crop, allocated) for (crop, batch), allocated in counted.items()]


def entry(config: Config, card: str = "a100", gib: float = 79.2, precision: str = "bf16", **changed: object) -> Entry:
    """Return an entry with a fit of 0.5 GiB + 1 GiB for each sample of 256x256."""
    fit = Fit(0.5 * GIB, GIB / 256**2, 0.0)
    made = Entry("small", card, gib, config.model, precision, False, False, (Point(8, 256, int(8.5 * GIB)),), fit, (), {})
    return dataclasses.replace(made, **changed)


def profiles(*entries: Entry) -> Profiles:
    return Profiles(CARDS, STATED, entries)


def test_fit_is_the_weighted_least_squares_of_another_solver():
    rng = np.random.default_rng(0)
    some = [
        Point(batch, crop, int((3e8 + 5600 * batch * crop**2) * rng.uniform(0.97, 1.03)))
        for crop in (64, 256, 384, 512) for batch in (1, 2, 8, 24)
    ]  # fmt: skip
    measured = np.array([point.allocated for point in some], dtype=float)
    rows = np.stack([np.ones(len(some)), [point.batch * point.crop**2 for point in some]], axis=1)
    fixed, per_pixel = np.linalg.lstsq(rows / measured[:, None], np.ones(len(some)), rcond=None)[0]
    fit = fit_points(some)
    assert (fit.fixed, fit.per_pixel) == pytest.approx((fixed, per_pixel), rel=1e-6)
    assert fit.residual == pytest.approx(np.abs(rows @ [fixed, per_pixel] / measured - 1).max(), rel=1e-6)
    assert 0.005 < fit.residual < 0.06


def test_formula_predicts_memory_that_it_was_not_fitted_to():
    fitted = {case: size for case, size in COUNTED.items() if case in ((128, 2), (128, 8), (128, 24))}
    others = {case: size for case, size in COUNTED.items() if case not in fitted}
    fit = fit_points(points(fitted), points(others))
    assert max(map(abs, fit.errors(points(fitted)))) < 0.001
    assert 0 < fit.residual == max(map(abs, fit.errors(points(others)))) < 0.02  # also at 4 times what was fitted


def test_too_few_different_points_give_no_formula():
    assert fit_points([Point(1, 256, 5), Point(2, 256, 9)]) is None
    assert fit_points([Point(4, 128, 5), Point(1, 256, 5), Point(2, 256, 9)]) is None  # two different sizes only
    assert fit_points([Point(1, 256, 5), Point(2, 256, 9), Point(3, 256, 13)]).per_pixel == pytest.approx(4 / 256**2)


@given(
    fixed=st.floats(1e6, 5e9), per_sample=st.floats(1e6, 2e10), residual=st.floats(0, 0.2), budget=st.floats(1e8, 2e11)
)  # fmt: skip
def test_largest_batch_fits_and_one_more_does_not(fixed, per_sample, residual, budget):
    fit = Fit(fixed, per_sample / 320**2, residual)
    batch = fit.largest_batch(320, budget)
    assert batch == 0 or fit.bytes_at(batch, 320) * (1 + residual) <= budget * (1 + 1e-9)
    assert fit.bytes_at(batch + 1, 320) * (1 + residual) > budget * (1 - 1e-9)


@given(share=st.integers(1, 300), processes=st.integers(1, 64), gib=st.floats(4, 200))
def test_choice_is_the_largest_divisor_that_fits(share, processes, gib):
    config = small(global_batch=share * processes)
    choice = choose_batch(config, "a100", processes, "bf16", memory_gib=gib, profiles=profiles(entry(config, gib=gib)))
    assert choice.basis == "fit"
    assert choice.device_batch * choice.accumulation * processes == choice.global_batch == share * processes

    def fits(batch: int) -> bool:
        return 0.5 + batch <= (gib - OUTSIDE_GIB) * (1 - MARGIN)

    assert choice.device_batch == max(batch for batch in range(1, share + 1) if share % batch == 0 and fits(batch))
    assert choice.predicted_gib == pytest.approx(0.5 + choice.device_batch)


def test_an_experiment_means_the_same_on_every_card():
    config = small(global_batch=256)
    choices = [choose_batch(config, gpu, processes, "bf16")
               for gpu in ("v100", "rtx5090", "a100-80gb", "h100") for processes in (1, 2, 16)]  # fmt: skip
    assert {choice.global_batch for choice in choices} == {256}
    assert len({choice.device_batch for choice in choices}) > 2
    for choice in choices:
        applied = choice.applied_to(config)
        assert (applied.data.batch_size, applied.data.global_batch) == (choice.device_batch, 256)
    with pytest.raises(ConfigError, match="256 is not a multiple of 3 processes"):
        choose_batch(config, "a100", 3, "bf16")


def test_without_a_global_batch_it_is_that_of_training():
    choice = choose_batch(small(batch_size=24), "a100", 4, "bf16", memory_gib=79.2, profiles=profiles())
    assert (choice.global_batch, choice.device_batch, choice.accumulation) == (96, 12, 2)


def test_knowledge_is_taken_the_best_first():
    config = small(global_batch=1024)
    other = entry(config, "h200", 139.8, fit=Fit(0.5 * GIB, 2 * GIB / 256**2, 0.0))
    point = entry(config, "h200", 139.8, fit=None, points=(Point(32, 256, 9 * GIB),))

    def choose(*entries: Entry):
        return choose_batch(config, "a100-80gb", 1, "bf16", profiles=profiles(*entries))

    on_this, on_other, by_point, stated = choose(other, entry(config)), choose(point, other), choose(point), choose()
    assert [choice.basis for choice in (on_this, on_other, by_point, stated)] == ["fit", "fit", "point", "stated"]
    assert [choice.device_batch for choice in (on_this, on_other, by_point, stated)] == [64, 32, 32, 16]
    assert "another card" not in on_this.why
    assert "on another card (h200, 140 GiB)" in on_other.why
    assert "single measurement on another card" in by_point.why
    assert "not measured" not in by_point.why
    assert "stated" in stated.why
    assert "python -m launch.profile" in stated.why


def test_what_was_measured_without_fused_kernels_is_taken_where_nothing_else_was():
    """Fused kernels take less memory: the batch fits, and the explanation says so."""
    config = small(batch_size=128)
    unfused = entry(small(ssd_backend="mamba_ssm", ssd_precision="fp32", attention_backend="sdpa", pointwise_backend="torch"))
    choice = choose_batch(config, "a100-80gb", 1, "bf16", profiles=profiles(unfused))
    assert (choice.device_batch, choice.basis) == (64, "fit")
    assert "without fused kernels, which take less" in choice.why
    less = entry(config, fit=Fit(0.5 * GIB, 0.5 * GIB / 256**2, 0.0))
    choice = choose_batch(config, "a100-80gb", 1, "bf16", profiles=profiles(unfused, less))
    assert choice.device_batch == 128
    assert "without" not in choice.why


def test_a_fit_beyond_what_was_measured_says_so():
    config = small(global_batch=64)
    assert "beyond what was measured (batch 8 at crop 256)" in choose_batch(
        config, "a100-80gb", 1, "bf16", profiles=profiles(entry(config))
    ).why  # fmt: skip
    many = entry(config, points=(Point(80, 256, int(80.5 * GIB)),))
    assert "beyond" not in choose_batch(config, "a100-80gb", 1, "bf16", profiles=profiles(many)).why


def test_a_point_stands_for_its_batch_and_crop_and_for_smaller_ones_only():
    config = small(global_batch=256)
    single = entry(config, "h200", 139.8, fit=None, points=(Point(32, 224, 9 * GIB),))
    known = profiles(single)

    def choose(crop: int, gpu: str = "a100-80gb"):
        return choose_batch(presets.override(config, crop=crop), gpu, 1, "bf16", profiles=known)

    assert (choose(224).basis, choose(224).device_batch) == ("point", 32)
    assert (choose(128).basis, choose(128).device_batch) == ("point", 32)
    assert choose(224).predicted_gib is None
    assert choose(256).basis == "stated"


def test_a_point_that_takes_more_than_the_card_has_is_not_used():
    config = small(global_batch=256, crop=224)
    single = entry(config, "h200", 139.8, fit=None, points=(Point(32, 224, 20 * GIB),))
    choice = choose_batch(config, "v100-16gb", 1, "bf16", profiles=profiles(single))
    assert (choice.basis, choice.device_batch) == ("stated", 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"precision": "fp32"},
        {"checkpointing": True},
        {"compile": True},
        {"cuda_graphs": True},
        {"phase": 2},
        {"width": 32},
        {"mixing": "mhc"},
    ],
    ids=str,
)
def test_measurements_of_something_else_are_not_used(asked):
    asked = dict(asked)
    precision = asked.pop("precision", "bf16")
    choice = choose_batch(small(**asked), "a100-80gb", 1, precision, profiles=profiles(entry(small())))
    assert choice.basis == "stated"


def test_phase_3_is_the_network_of_phase_2():
    known = profiles(entry(small(phase=2)))
    assert choose_batch(small(phase=3), "a100-80gb", 1, "bf16", profiles=known).basis == "fit"
    assert choose_batch(small(phase=3, scale=0.5), "a100-80gb", 1, "bf16", profiles=known).basis == "stated"


def test_accelerates_word_for_fp32_is_known():
    known = profiles(entry(small(), precision="fp32"))
    assert choose_batch(small(), "a100-80gb", 1, "no", profiles=known).basis == "fit"
    with pytest.raises(ConfigError, match=r"'fp8' does not exist; choose from no, fp32, bf16, fp16"):
        choose_batch(small(), "a100-80gb", 1, "fp8", profiles=known)


def test_stated_batches_are_those_of_the_plan_and_shrink_with_the_area():
    def choose(gpu: str, crop: int = 256) -> int:
        return choose_batch(small(global_batch=240, crop=crop), gpu, 1, "fp16").device_batch

    assert [choose(gpu) for gpu in ("v100-16gb", "NVIDIA GeForce RTX 5090", "a100-80gb")] == [2, 8, 16]
    assert [choose("a100-80gb", crop) for crop in (128, 384, 512)] == [16, 6, 4]  # 16, 7.1 and 4 by area; 6 divides 240


def test_unknown_card_is_judged_by_its_memory_and_that_is_said():
    choice = choose_batch(small(), "NVIDIA RTX 6000 Ada Generation", 1, "fp16", memory_gib=47.4)
    assert choice.device_batch == 8
    assert "by its memory of 47 GiB" in choice.why
    assert "rtx5090 32 GB" in choice.why
    with pytest.raises(ConfigError, match=r"memory of a GPU named 'quantum' is not known .* such as quantum-48gb"):
        choose_batch(small(), "quantum", 1, "fp16")


def test_when_nothing_fits_what_fits_is_named():
    config = small(crop=512, global_batch=8)
    known = profiles(
        entry(config, precision="fp32"),
        entry(config, precision="fp32", checkpointing=True, fit=Fit(0.5 * GIB, GIB / 512**2, 0.0)),
    )
    with pytest.raises(ConfigError) as caught:
        choose_batch(config, "v100", 1, "fp32", memory_gib=4.0, profiles=known)
    message = str(caught.value)
    assert "small, phase 1, fp32, crop 512 does not fit into 2.8 GiB of v100 (4.0 GiB less 1 GiB and a margin of 6%)" in message
    assert "a batch of 1 takes 4.5 GiB" in message
    assert "--checkpointing (a batch of 2 fits by measurement)" in message
    assert "bf16 (fp16 on cards without it) (not measured)" in message
    crop = int(message.partition("--crop up to ")[2].split(",")[0])
    assert crop == max(c for c in range(64, 512, 16) if 0.5 + c**2 / 256**2 <= 3 * (1 - MARGIN))
    fitting = presets.override(config, crop=crop)
    assert choose_batch(fitting, "v100", 1, "fp32", memory_gib=4.0, profiles=known).device_batch == 1


def test_when_nothing_is_stated_for_so_little_it_is_refused():
    with pytest.raises(ConfigError, match="no batch is stated for so little memory"):
        choose_batch(small(), "t4-8gb", 1, "fp16")
    with pytest.raises(ConfigError, match=r"a smaller --curriculum_crops"):
        choose_batch(small(phase=3, curriculum=True), "v100-16gb", 1, "fp16")


@pytest.mark.parametrize("name", ["vgg_weight", "style_weight"])
def test_a_perceptual_loss_is_in_no_profile(name):
    config = Config(optim=OptimConfig(**{name: 0.01}))
    with pytest.raises(ConfigError, match=r"no memory profile includes the perceptual loss .*: give --batch_size"):
        choose_batch(config, "a100-80gb", 1, "bf16")


def test_a_curriculum_is_judged_by_its_largest_crop():
    growing = small(phase=3, curriculum=True, global_batch=64)
    known = profiles(entry(growing))
    assert choose_batch(growing, "a100-80gb", 1, "bf16", profiles=known).device_batch == 16  # 4 GiB a sample at crop 512
    assert choose_batch(small(phase=3, global_batch=64), "a100-80gb", 1, "bf16", profiles=known).device_batch == 64


@pytest.mark.parametrize(
    ("name", "kind", "gib"),
    [
        ("a100", "a100", 39.2),
        ("a100-80gb", "a100", 78.4),
        ("nvidia_a100_80gb", "a100", 78.4),
        ("NVIDIA A100-SXM4-80GB", "a100", 78.4),
        ("Tesla V100-SXM2-16GB", "v100", 15.68),
        ("rtx_5090", "rtx5090", 31.36),
        ("NVIDIA GeForce RTX 5090", "rtx5090", 31.36),
        ("NVIDIA H200", "h200", 138.18),
        ("mi300x-192gb", "mi300x", 188.16),
    ],
)
def test_cards_are_known_by_the_names_of_torch_and_slurm(name, kind, gib):
    card = identify(name, None, CARDS)
    assert (card.kind, card.gib) == (kind, pytest.approx(gib))
    assert identify(name, 50.0, CARDS) == GpuSpec(kind, 50.0)
    assert bool(card.note) == (name == "a100")  # of two sizes the smaller one is taken, and that is said


def test_file_of_the_project_holds_what_is_known():
    known = read_profiles()
    assert {(row.card, row.gb, row.batch, row.crop) for row in known.stated} == {
        ("v100", 16, 2, 256), ("rtx5090", 32, 8, 256), ("a100", 80, 16, 256),
    }  # fmt: skip
    for one in known.measured:
        again = fit_points(one.points, one.held_out)
        assert (one.fit is None) == (again is None)
        if again:  # Python 3.12 sums more exactly
            assert dataclasses.astuple(one.fit) == pytest.approx(dataclasses.astuple(again), rel=1e-9)


def test_an_entry_replaces_its_own_kind_only(tmp_path):
    path = tmp_path / "profiles.json"
    write_profiles(profiles(), path)
    first = entry(small(), environment={"torch": "2.11"})
    others = [entry(small(), "h100"), entry(small(), gib=39.4), entry(small(), precision="fp32"), entry(small(phase=2)),
              entry(small(), checkpointing=True), entry(small(), compile=True)]  # fmt: skip
    for one in (first, *others):
        add(one, path)
    assert read_profiles(path) == profiles(first, *others)  # what is read is what was written
    newer = entry(small(), gib=79.1, fit=None, held_out=(Point(4, 256, 7, 8, 9, 10),))
    add(newer, path)
    assert read_profiles(path) == profiles(*others, newer)


def test_jobs_that_add_at_once_lose_nothing(tmp_path):
    path = tmp_path / "profiles.json"
    write_profiles(profiles(), path)
    script = (
        "import sys, dataclasses\nfrom pathlib import Path\nfrom launch.memory.model import *\nfrom vfi.config import presets\n"
        "for width in map(int, sys.argv[2:]):\n"
        "    model = dataclasses.replace(presets.small().model, width=width)\n"
        "    add(Entry('x', 'a100', 79.2, model, 'bf16', False, False, (), None, (), {}), Path(sys.argv[1]))\n"
    )

    def run(start: int) -> None:
        widths = [str(width) for width in range(start, start + 15)]
        subprocess.run([sys.executable, "-c", script, str(path), *widths], cwd=ROOT, check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, (100, 200, 300)))
    widths = sorted(one.model.width for one in read_profiles(path).measured)
    assert widths == [*range(100, 115), *range(200, 215), *range(300, 315)]
    assert [file.name for file in tmp_path.iterdir()] == ["profiles.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as memory profiles"),
        ("[]", "is not a vfi-memory-profiles file of version 1"),
        ('{"schema": "vfi-memory-profiles", "version": 2}', "version 1"),
        (json.dumps({"schema": "vfi-memory-profiles", "version": 1, "cards": {}, "stated": [], "measured": [{}]}), "measured"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "profiles.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_profiles(path)
    with pytest.raises(ConfigError, match=r"profiles\.json"):
        read_profiles(path)


def test_a_login_node_needs_no_torch():
    code = (
        "import sys\nfrom launch.memory.batch_size import choose_batch\nfrom vfi.config import presets\n"
        "choose_batch(presets.small(), 'a100', 1, 'bf16')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_file_is_part_of_the_package():
    settings = (ROOT / "setup.cfg").read_text()
    assert PROFILES.suffix == ".json"
    assert "launch.memory = *.json" in settings
