"""vfi benchmark --speed: rows, alternation, ratios by a fake clock, frames, models that exceed the memory, and the file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vfi.benchmark import main
from vfi.checkpoint import store
from vfi.config import presets
from vfi.errors import JobError
from vfi.evaluation import latency
from vfi.evaluation.external_models import load_any
from vfi.evaluation.latency import SpeedSettings, make_predictor, real_pairs
from vfi.evaluation.latency_results import Speed, SpeedRow, against, is_speed, read_speed, table, write_speed
from vfi.evaluation.results import ResultError
from vfi.inference.loading import load, predict
from vfi.io.dataclass_json import to_json
from vfi.model.compile import compile_modules
from vfi.model.interpolator import FrameInterpolator
from vfi.profiling.timing import WARMUP
from vfi.runtime.cuda_graphs import Graphs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ADAPTERS = """
import torch

clock, calls = [0.0], []  # seconds; (name, size, timestep, scale)

def _make(name, seconds, parameters=None):
    def factory(device):
        def interpolate(img0, img1, timestep, scale):
            if name == "hungry" and img0.shape[2] > 40:
                raise torch.OutOfMemoryError("CUDA out of memory")
            calls.append((name, img0, timestep, scale))
            clock[0] += seconds(len(calls))
            return (img0 + img1) / 2
        if parameters:
            interpolate.parameters = parameters
        return interpolate
    return factory

quick = _make("quick", lambda number: 0.010, 1_234_567)
slow = _make("slow", lambda number: 0.025)
hungry = _make("hungry", lambda number: 0.001)
uneven = _make("uneven", lambda number: 0.001 * number)
wrong = lambda device: lambda img0, img1, timestep, scale: None
"""


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """Write a module of models that advance a fake clock, which is the one that is read."""
    (tmp_path / "speed_adapters.py").write_text(ADAPTERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("speed_adapters", None)
    import speed_adapters

    monkeypatch.setattr(latency.time, "perf_counter", lambda: speed_adapters.clock[0])
    yield speed_adapters
    sys.modules.pop("speed_adapters", None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One run without flow and one with flow; nothing in them is zero, as it would be after a fresh start."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    for name, phase in (("still", 1), ("moving", 2)):
        config = presets.override(presets.tiny(), phase=phase, width=4, head_dim=8)
        torch.manual_seed(phase)
        model = FrameInterpolator(config.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
        store.save(folder / name, store.State(3), config, model.state_dict(), {})
        (folder / name / "config.json").write_text(to_json(config))
    return folder


def measure(out: Path, *models: object, **changed: object) -> Speed:
    options = SpeedSettings(tuple(map(str, models)), out, device="cpu", sizes=("32x48",), factors=(2,), repeats=2)
    return latency.speed(dataclasses.replace(options, **changed), "vfi benchmark --speed")


# ---------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("size", [(32, 32), (100, 70), (736, 1280)])
def test_frames_are_parts_of_different_photographs_that_move(size):
    pairs = real_pairs(*size)
    frames = [frame for pair in pairs for frame in pair]
    assert len(pairs) == 3
    for frame in frames:
        assert frame.shape == (1, 3, *size)
        assert frame.dtype == torch.float32
        assert frame.is_contiguous()
        assert 0 <= frame.min() < frame.max() <= 1
        assert frame.std() > 0.05
    for one, other in itertools.combinations(frames, 2):
        assert (one - other).abs().mean() > 0.003
    dy, dx = (max(1, round(side * part)) for side, part in zip(size, (1 / 90, 1 / 45), strict=True))
    for img0, img1 in pairs:
        assert torch.equal(img0[..., dy:, dx:], img1[..., :-dy, :-dx])


# ------------------------------------------------------------------------------------------------------------ prediction


def without_graphs_differ(*frames: Tensor) -> bool:
    return all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(frames, 2))


@pytest.mark.parametrize("name", ["still", "moving"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_features_made_once_give_the_same_frames(runs, name, precision):
    loaded = load(runs / name, CPU)
    img0, img1 = real_pairs(40, 52)[0]
    timesteps = torch.arange(1, 8) / 8
    for scale in (None, 0.5) if name == "moving" else (None,):
        found = loaded.predict_several(img0, img1, timesteps, precision, scale)
        expected = [predict(loaded.model, img0, img1, one, precision, scale) for one in timesteps.split(1)]
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.cat(expected))
        assert without_graphs_differ(*expected)


def test_a_call_makes_all_frames_and_the_features_once(runs, adapters, monkeypatch):
    """×2 as the jobs ask, ×4 by one encoding and three decodings; other models are asked for each frame."""
    loaded = load(runs / "moving", CPU)
    pair = real_pairs(32, 48)[0]
    seen = []
    for name in ("forward", "encode", "decode"):
        method = getattr(loaded.model, name)

        def spy(*args, name=name, method=method, **kwargs):
            seen.append((name, float(args[-1]) if name == "decode" and args[-1] is not None else None))
            return method(*args, **kwargs)

        monkeypatch.setattr(loaded.model, name, spy)
    assert make_predictor(loaded, 4, CPU, torch.float32, None)(*pair).shape == (3, 3, 32, 48)
    assert seen == [("encode", None), ("decode", 0.25), ("decode", 0.5), ("decode", 0.75)]
    del seen[:]
    assert torch.equal(
        make_predictor(loaded, 2, CPU, torch.float32, None)(*pair),
        predict(loaded.model, *pair, torch.tensor([0.5]), torch.float32),
    )
    assert seen[0] == ("forward", None)
    adapter = load_any("speed_adapters:quick", CPU)
    assert len(make_predictor(adapter, 4, CPU, torch.float32, 0.5)(*pair)) == 3
    assert [call[2:] for call in adapters.calls] == [(0.25, 0.5), (0.5, 0.5), (0.75, 0.5)]


def test_compiled_parts_are_what_runs(runs, monkeypatch):
    """Also without gradients, for which training compiles nothing; and the frames are the same."""
    made, called = [], []

    def compile(forward, dynamic):
        made.append(forward)

        def compiled(*args):
            called.append(forward)
            return forward(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    plain, loaded = load(runs / "moving", CPU), load(runs / "moving", CPU)
    refine = loaded.model.refine.forward
    compile_modules(loaded.model, without_gradients=True)
    pair = real_pairs(32, 48)[0]
    fast = dataclasses.replace(loaded, graphs=Graphs())
    for factor, decoded in ((2, 1), (4, 3)):
        del called[:]
        found = make_predictor(fast, factor, CPU, torch.float32, None)(*pair)
        assert torch.equal(found, make_predictor(plain, factor, CPU, torch.float32, None)(*pair))
        assert not found.requires_grad
        assert set(called) == set(made)
        assert called.count(refine) == decoded
    assert fast.parameters == plain.parameters


# ------------------------------------------------------------------------------------------------------------------ rows


def test_rows_are_complete(runs, tmp_path):
    out = tmp_path / "new" / "speed.json"
    models = (runs / "moving", runs / "still")
    found = measure(out, *models, sizes=("32x48", "48x32", "32x48"), factors=(2, 8), precision="bf16")
    assert [(row.size, row.factor, row.model) for row in found.rows] == [
        (size, factor, name) for size in ("32x48", "48x32") for factor in (2, 8) for name in ("moving", "still")
    ]
    for row in found.rows:
        assert row.path == str(runs / row.model)
        assert row.parameters == load(runs / row.model, CPU).parameters
        assert (row.precision, row.compiled, row.out_of_memory) == ("bf16 autocast", False, False)
        assert 0 < row.ms <= row.ms_p90
        assert row.frames_per_s == pytest.approx(1e3 * (row.factor - 1) / row.ms)
        assert (row.allocated, row.reserved) == (None, None)
    assert [row.ratio == 1 for row in found.rows] == [True, False] * 4
    told = found.environment
    assert told["command"] == "vfi benchmark --speed"
    assert {"device", "packages", "git", "threads", "created", "tf32_matmul", "tf32_cudnn", "cudnn_benchmark"} <= set(told)
    assert list(told["choices"]) == ["moving", "still"]
    assert any(line.startswith("ssd: ") for line in told["choices"]["moving"])
    settings = found.settings
    assert (settings["precision"], settings["TF32"], settings["torch.compile"]) == ("bf16 autocast", False, False)
    assert (settings["timed calls"], settings["warm-up calls"], settings["CUDA graphs"]) == (2, WARMUP, "none")
    assert read_speed(out) == found


def test_time_is_the_median_and_nine_of_ten(adapters, tmp_path):
    """The n-th call of all takes n ms, and eleven are timed after three of warm-up: 4, 5 … 14 ms."""
    (row,) = measure(tmp_path / "s.json", "speed_adapters:uneven", repeats=11).rows
    assert (row.ms, row.ms_p90) == (pytest.approx(9), pytest.approx(13))
    assert row.frames_per_s == pytest.approx(1000 / 9)
    assert (row.path, row.parameters, row.precision) == (None, None, "its own")


def test_ratios_are_those_to_the_first_model(adapters, tmp_path):
    found = measure(tmp_path / "s.json", "speed_adapters:quick", "speed_adapters:slow", factors=(2, 8)).rows
    assert [row.ms for row in found] == pytest.approx([10, 25, 70, 175])
    assert [row.ratio for row in found] == pytest.approx([1, 2.5, 1, 2.5])
    assert [row.frames_per_s for row in found] == pytest.approx([100, 40, 100, 40])
    assert [row.parameters for row in found] == [1_234_567, None] * 2


def test_models_take_turns_and_frames_rotate(adapters, tmp_path):
    measure(tmp_path / "s.json", "speed_adapters:quick", "speed_adapters:slow", repeats=4, scale=0.5)
    assert [call[0] for call in adapters.calls] == ["quick", "slow"] * (WARMUP + 4)
    assert {call[2:] for call in adapters.calls} == {(0.5, 0.5)}
    for name in ("quick", "slow"):
        frames = [call[1] for call in adapters.calls if call[0] == name]
        assert all(one is not other for one, other in itertools.pairwise(frames))
        assert len({id(frame) for frame in frames}) == 3
    assert adapters.calls[0][1] is not adapters.calls[1][1]


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_that_runs_out_of_memory_has_a_row_and_the_others_go_on(adapters, tmp_path, place):
    models = ["speed_adapters:quick"]
    models.insert(place, "speed_adapters:hungry")
    found = measure(tmp_path / "s.json", *models, sizes=("64x64", "32x32"), factors=(2, 4))
    large, small = found.rows[:4], found.rows[4:]
    for row in large:
        if row.model == "speed_adapters:hungry":
            assert row == SpeedRow(row.model, None, None, "64x64", row.factor, "its own", False, out_of_memory=True)
        else:
            assert row.ms == pytest.approx(10 * (row.factor - 1))
            assert row.ratio == (1 if place else None)  # there is no first model to compare with
    assert not any(row.out_of_memory or row.ratio is None for row in small)
    assert [row.model for row in large] == models * 2
    shown = table(read_speed(tmp_path / "s.json"))
    assert shown.count("out of memory") == 2


def test_memory_that_is_short_later_on_or_for_one_of_ours(runs, adapters, tmp_path, monkeypatch):
    """Words of CUDA itself, in a timed call; any other error is not swallowed."""
    real = latency.LoadedModel.predict
    number = itertools.count(1)

    def predict(self, img0, *args):
        if next(number) > WARMUP + 1:
            raise RuntimeError(words)
        return real(self, img0, *args)

    monkeypatch.setattr(latency.LoadedModel, "predict", predict)
    words = "CUDA error: out of memory"
    ours, other = measure(tmp_path / "s.json", runs / "still", "speed_adapters:quick").rows
    assert (ours.out_of_memory, ours.ms, ours.ratio) == (True, None, None)
    assert (other.out_of_memory, other.ms) == (False, pytest.approx(10))
    words = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        measure(tmp_path / "s.json", runs / "still")


def test_memory_is_that_of_the_model_alone(monkeypatch):
    """A fake allocator: tuning takes 1000 bytes, later calls 50, on top of weights of 300, of which 200 are others'."""
    peak = [0]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 300))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak[0] + 25)
    calls = []

    class Frame:
        def to(self, device):
            return self

    def ask(*pair):
        calls.append(pair)
        peak[0] = max(peak[0], 300 + (1000 if len(calls) == 1 else 50))

    assert latency._memory(ask, (Frame(), Frame()), 200, torch.device("cuda")) == (150, 175)
    assert len(calls) == 1 + WARMUP
    assert latency._memory(ask, (Frame(), Frame()), 200, CPU) == (None, None)


def test_compiled_is_said(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    found = measure(tmp_path / "s.json", runs / "still", compile=True)
    assert [row.compiled for row in found.rows] == [True]
    assert found.settings["torch.compile"] is True
    assert found.environment["choices"]["still"]
    assert "fp32, compiled" in table(found)


# ------------------------------------------------------------------------------------------------------------------- job


def test_the_job_prints_the_table(adapters, tmp_path, capsys):
    out = tmp_path / "s.json"
    flags = ["--model", "speed_adapters:quick", "speed_adapters:slow", "--sizes", "32x48", "--factors", "2", "8"]
    main(["--speed", *flags, "--repeats", "1", "--device", "cpu", "--out", str(out)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["size", "model", "params", "rate", "precision", "ms", "p90", "frames/s", "ratio"]
    assert shown[4].split() == ["32x48", "speed_adapters:slow", "x8", "its", "own", "175.00", "175.00", "40.0", "2.50"]
    assert len({len(line) for line in shown[:5]}) == 1
    assert "CUDA graphs: none" in shown
    assert shown[-1] == f"speed: {out}"
    assert read_speed(out).environment["command"].startswith("vfi benchmark --speed --model speed_adapters:quick")


def test_the_job_compares_with_an_earlier_run(adapters, tmp_path, capsys):
    flags = ["--speed", "--model", "speed_adapters:quick", "--sizes", "32x48", "--repeats", "1", "--device", "cpu"]
    main([*flags, "--factors", "2", "8", "--out", str(tmp_path / "then.json")])
    capsys.readouterr()
    main([*flags, "--factors", "2", "--out", str(tmp_path / "now.json"), "--compare_to", str(tmp_path / "then.json")])
    shown = capsys.readouterr().out
    lines = shown[shown.index("compared to") :].splitlines()
    assert lines[0] == f"compared to {tmp_path / 'then.json'}:"
    assert lines[1].split() == ["size", "model", "rate", "precision", "ms", "ms", "then", "time"]
    assert lines[2].split() == ["32x48", "speed_adapters:quick", "x2", "its", "own", "10.00", "10.00", "1.00x"]
    assert lines[3] == "32x48 speed_adapters:quick x8 its own was measured then, and is not now"
    with pytest.raises(SystemExit) as error:  # before anything is measured
        main([*flags, "--out", str(tmp_path / "later.json"), "--against", str(tmp_path / "none.json")])
    assert error.value.code == 2
    assert "none.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "later.json").exists()


def test_against_another_run():
    now = dataclasses.replace(
        SPEED,
        environment={"device": "another GPU"},
        settings={"timed calls": 20, "flow scale": 0.5},
        rows=(
            dataclasses.replace(ROW, ms=3.0, allocated=ROW.allocated // 2),
            dataclasses.replace(ROW, factor=8, ms=None, ratio=None, allocated=None, out_of_memory=True),
            dataclasses.replace(ROW, model="b"),
        ),
    )
    then = dataclasses.replace(SPEED, rows=(ROW, dataclasses.replace(ROW, factor=8), dataclasses.replace(ROW, compiled=True)))
    head, first, second, *rest = against(now, then).splitlines()
    assert head.split() == ["size", "model", "rate", "precision", "ms", "ms", "then", "time", "memory"]
    assert first.split() == ["32x48", "a", "x2", "fp32", "3.00", "1.50", "2.00x", "0.50x"]
    assert second.split() == ["32x48", "a", "x8", "fp32", "out", "of", "memory", "1.50"]
    assert rest == [
        "device: another GPU, then a GPU",
        "flow scale: 0.5, then None",
        "32x48 b x2 fp32 was not measured then",
        "32x48 a x2 fp32, compiled was measured then, and is not now",
    ]


@pytest.mark.parametrize("name", ["h100", "h100_4k"])
def test_stored_runs_can_be_compared_with(name):
    stored = read_speed(Path(__file__).parents[3] / "docs" / "speed" / f"{name}.json")
    lines = against(stored, stored).splitlines()
    assert len(lines) == 1 + len(stored.rows)
    assert all(line.split()[-2:] == ["1.00x", "1.00x"] for line in lines[1:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": ()}, "--model needs at least one run folder"),
        ({"out": Path("{tmp}")}, "is a folder: give a file name, such as --out"),
        ({"out": Path("{tmp}/speed")}, "speed must end in .json"),
        ({"out": Path("{tmp}/speed_adapters.py/s.json")}, "speed_adapters.py is not a folder"),
        ({"sizes": ()}, "--sizes needs at least one size, such as 736x1280"),
        ({"sizes": ("64x64", "20x64")}, "--sizes 20x64: each side must be at least 32"),
        ({"sizes": ("720p",)}, "--sizes '720p' is not HEIGHTxWIDTH"),
        ({"factors": ()}, "--factors needs at least one factor, such as 2"),
        ({"factors": (2, 1)}, "--factors 1 must be at least 2"),
        ({"repeats": 0}, "--repeats 0 must be at least 1"),
        ({"compile": True}, "--compile does not reach into --model speed_adapters:quick: compile it in the adapter yourself"),
        ({"scale": 0.3}, "--scale 0.3: choose from 1.0, 0.5, 0.25"),
        ({"model": ("{runs}/still",), "scale": 0.5}, "is of phase 1, without flow"),
        ({"model": ("speed_adapters:quick",) * 2}, "--model was given the same model twice"),
        ({"model": ("speed_adapters:none",)}, "has no function none"),
        ({"model": ("speed_adapters:wrong",)}, "gave NoneType for frames"),
    ],
)
def test_unusable_options_are_refused(changed, message, adapters, runs, tmp_path):
    def filled(value):
        text = str(value).replace("{tmp}", str(tmp_path)).replace("{runs}", str(runs))
        return Path(text) if isinstance(value, Path) else text

    for name, value in changed.items():
        if name == "model":
            changed = changed | {name: tuple(map(filled, value))}
        elif isinstance(value, Path):
            changed = changed | {name: filled(value)}
    with pytest.raises(JobError) as refused:
        measure(
            **{"out": tmp_path / "s.json", **({} if "model" in changed else {"model": ("speed_adapters:quick",)}), **changed}
        )
    assert message in str(refused.value)
    assert not (tmp_path / "s.json").exists()


def test_a_missing_run_ends_the_job_in_one_line(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--speed", "--model", str(runs / "stil"), "--out", str(tmp_path / "s.json"), "--device", "cpu"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "moving, still" in line


# ------------------------------------------------------------------------------------------------------------------ file

ROW = SpeedRow("a", "runs/a", 5, "32x48", 2, "fp32", False, 1.5, 2.0, 1e3 / 1.5, 2**30, 2**31, 1.0)
SPEED = Speed({"device": "a GPU", "packages": {"torch": "2"}}, {"timed calls": 20}, (ROW,))


def test_a_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "s.json"
    write_speed(path, dataclasses.replace(SPEED, rows=(ROW, dataclasses.replace(ROW, ms=None, ratio=None, out_of_memory=True))))
    assert read_speed(path).rows[0] == ROW
    assert read_speed(path).rows[1].out_of_memory
    assert read_speed(path).environment == SPEED.environment
    content = json.loads(path.read_text())
    assert (content["schema"], content["version"]) == ("vfi-speed", 1)
    shown = table(read_speed(path)).splitlines()
    assert shown[0].split()[-5:] == ["GiB", "allocated", "GiB", "reserved", "ratio"]
    assert shown[1].split() == ["32x48", "a", "0.0", "M", "x2", "fp32", "1.50", "2.00", "666.7", "1.00", "2.00", "1.00"]
    assert shown[3:] == ["device: a GPU", "timed calls: 20"]


def test_is_speed_tells_the_kinds_of_files_apart(tmp_path):
    path = tmp_path / "file.json"
    for text, answer in {
        '{"schema": "vfi-speed", "version": 7}': True,
        '{"schema": "vfi-results"}': False,
        "[]": False,
        "{": False,
        "[" * 100_000: False,
    }.items():
        path.write_text(text)
        assert is_speed(path) is answer
    path.write_bytes(b"\xff\xfe\x00")
    assert not is_speed(path)
    assert not is_speed(tmp_path)
    assert not is_speed(tmp_path / "none.json")


def content(**changed: object) -> str:
    return json.dumps({"schema": "vfi-speed", "version": 1} | dataclasses.asdict(SPEED) | changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a speed file: it is not JSON"),
        ("[]", "is not a speed file: it holds a JSON list. `vfi benchmark --speed` writes speed files"),
        ('{"schema": "vfi-results"}', "is not a speed file: its schema is 'vfi-results'"),
        ("{}", "is not a speed file: it has no schema"),
        (content(version=9), "has version 9, this program reads version 1: run `vfi benchmark --speed` again"),
        (content(rows=[]), "has no rows: run"),
        (content(rows=[{"model": "a"}]), "rows[0]: written by another version of the project; missing fields"),
        (content(rows=[dataclasses.asdict(ROW) | {"ms": "fast"}]), "rows[0]: ms is 'fast', expected"),
        (content(rows=[dataclasses.asdict(ROW) | {"ms": None}]), "a at 32x48 has no time although not out of memory: run"),
        (content(rows=[dataclasses.asdict(ROW) | {"out_of_memory": True}]), "a at 32x48 has a time although out of memory"),
        (content(more=1), "Unknown fields: ['more']"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ResultError) as refused:
        read_speed(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ResultError, match="does not exist: `vfi benchmark --speed --out"):
        read_speed(tmp_path / "none.json")
    with pytest.raises(ResultError, match="is a folder, not a speed file"):
        read_speed(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(runs, tmp_path, compiled):
    """Memory by the allocator's own count: that of a model does not depend on which others are there."""

    def found(*names: str) -> dict[tuple[str, int, str], SpeedRow]:
        models, sizes = tuple(str(runs / name) for name in names), ("64x64", "256x256")
        options = SpeedSettings(models, tmp_path / "s.json", device="cuda", sizes=sizes, repeats=5, compile=compiled)
        return {(row.size, row.factor, row.model): row for row in latency.speed(options).rows}

    together, alone = found("moving", "still"), found("still")
    for (size, factor, name), row in together.items():
        assert not row.out_of_memory
        assert 0 < row.ms <= row.ms_p90
        height, width = map(int, size.split("x"))
        assert 4 * row.parameters + 4 * 3 * height * width * (1 + factor) < row.allocated <= row.reserved
        if name == "still":
            assert row.allocated == pytest.approx(alone[size, factor, name].allocated, rel=0.02, abs=2**20)
    assert together["256x256", 2, "moving"].allocated > together["64x64", 2, "moving"].allocated


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_features_made_once_give_the_same_frames_by_a_graph(runs, precision):
    loaded = load(runs / "moving", torch.device("cuda"))
    timesteps = torch.arange(1, 8, device="cuda") / 8
    for img0, img1 in real_pairs(64, 96) * 2:
        pair = img0.cuda(), img1.cuda()
        found = loaded.predict_several(*pair, timesteps, precision)
        expected = [predict(loaded.model, *pair, one, precision) for one in timesteps.split(1)]
        assert torch.equal(found, torch.cat(expected))
    assert len(loaded.graphs.made) == 1
