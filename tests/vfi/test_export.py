"""vfi export: the exported file is the model, its deviation is measured and reported, and graphs accept any size."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vfi import export
from vfi.checkpoint import store, weights
from vfi.config import presets
from vfi.errors import CheckpointError
from vfi.inference.loading import load, predict
from vfi.io.dataclass_json import to_json
from vfi.model.backbone import of_each_frame
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.ssm.scan_order import ALL, OPEN_SCANS, SCANS
from vfi.ops.ssm.ssd import ssd_open, ssd_reference
from vfi.ops.warp.warp import backward_warp
from vfi.release import graph_formats
from vfi.release.traceable import open_operators, trace, traceable

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_frames(monkeypatch) -> None:
    """The job compares on larger ones."""
    monkeypatch.setattr(graph_formats, "CASES", ((1, 64, 96), (2, 45, 52)))


def random_network(**changes) -> FrameInterpolator:
    """With weights far from those that training starts with."""
    torch.manual_seed(0)
    network = FrameInterpolator(presets.override(presets.tiny(), **changes).model).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return network


def make_run(folder: Path, **changes) -> Path:
    network = random_network(**changes)
    config = presets.override(presets.tiny(), data_path=("SHARDS/vimeo",), **changes)
    state = network.state_dict()
    average = {name: tensor * 0.9 for name, tensor in state.items()}
    store.save(folder, store.State(4), config, state, {}, ema=average)
    (folder / "config.json").write_text(to_json(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("work") / "runs" / "some", phase=2)


def call(*arguments: object) -> None:
    export.main([str(argument) for argument in arguments])


def told(text: str) -> list[tuple[str, float]]:
    """(frames, largest difference of 255) of every line on a comparison."""
    return [(frames, float(away)) for frames, away in re.findall(r"^(.+): at most (\S+) of 255 from the original", text, re.M)]


def differences_of_card(folder: Path) -> list[tuple[str, float]]:
    rows = re.findall(r"^\| (\d+ of \d+x\d+) \| (\S+) \|", (folder / "README.md").read_text(), re.M)
    return [(frames, float(away)) for frames, away in rows]


def test_weights_are_exported_without_a_difference(run, tmp_path, capsys) -> None:
    call(run, "--out", tmp_path / "new", "--licence", "mit", "--trained_on", "Vimeo 90K", "X4K")
    out = capsys.readouterr().out
    assert [away for _, away in told(out)] == [0] * len(graph_formats.CASES)
    assert differences_of_card(tmp_path / "new") == told(out)
    assert re.search(r"new: some at step 4, EMA weights, torch, fp32, \d+\.\d MB\n$", out)
    exported, original = load(tmp_path / "new", CPU), load(run, CPU)
    assert exported.fingerprint() == original.fingerprint()
    assert exported.origin.trained_on == ("Vimeo 90K", "X4K")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "license: mit" in card
    assert "- vimeo-90k\n- x4k" in card
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_half_the_bytes_are_near_and_say_how_far(run, tmp_path, capsys) -> None:
    call(run, "--out", tmp_path / "new", "--dtype", "fp16")
    lines = told(capsys.readouterr().out)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    exported, original = load(tmp_path / "new", CPU), load(run, CPU)
    assert {parameter.dtype for parameter in exported.model.parameters()} == {torch.float32}
    for (frames, away), (batch, height, width) in zip(lines, graph_formats.CASES, strict=True):
        assert frames == f"{batch} of {width}x{height}"
        img0, img1 = graph_formats.moving_photographs(batch, height, width)
        times = torch.linspace(0.25, 0.5, batch)
        one, other = (predict(model.model, img0, img1, times, torch.float32) for model in (exported, original))
        assert away == pytest.approx(255 * (one - other).abs().max().item(), rel=0.01)
        assert 0 < away < 2
    assert differences_of_card(tmp_path / "new") == lines


def test_what_was_exported_can_be_exported_again(run, tmp_path) -> None:
    call(run, "--out", tmp_path / "a", "--licence", "mit")
    call(tmp_path / "a", "--out", tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


SOURCES = (
    'source,name,licence,what\nhttps://a.b/c,Film | one,"CC-BY 4.0, by A","97 clips\nof it"\nhttps://d.e,Two,unknown,all\n'
)


def test_the_card_lists_sources_with_their_licences_and_the_recipe(run, tmp_path) -> None:
    (tmp_path / "sources.csv").write_text(SOURCES)
    recipe = "vfi train --phase 1\n```\nvfi train --phase 2   # one GPU"
    call(run, "--out", tmp_path / "new", "--sources", tmp_path / "sources.csv", "--recipe", recipe, "--hours", 12.5)
    card = (tmp_path / "new" / "README.md").read_text()
    section = card.partition("## Training\n\n")[2].partition("\n## ")[0]
    assert section.splitlines() == [
        "    vfi train --phase 1",
        "    ```",
        "    vfi train --phase 2   # one GPU",
        "",
        "It took 12.5 hours.",
        "",
        "| data | source | licence | what |",
        "| --- | --- | --- | --- |",
        r"| Film \| one | https://a.b/c | CC-BY 4.0, by A | 97 clips of it |",
        "| Two | https://d.e | unknown | all |",
    ]
    call(run, "--out", tmp_path / "plain")
    assert "## Training" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "sources.csv cannot be read as CSV in UTF-8: "),
        (b"\xff\xff", "sources.csv cannot be read as CSV in UTF-8: "),
        (b'name,source,licence,what\na,b,"c"d,e\n', "sources.csv cannot be read as CSV in UTF-8: "),
        (b"", "has the columns (none); needed are name, source, licence, what"),
        (b"path,source,licence,what\na,b,c,d\n", "has the columns path, source, licence, what; needed are name, source"),
        (b"name,source,licence,what\n", "lists no source: add a line for each, or leave it out"),
        (b"name,source,licence,what\na,b,c,d\na,b, ,d\n", "line 3: fill in name, source, licence, what, and nothing else"),
        (b"name,source,licence,what\na,b,c,d,e\n", "line 2: fill in name, source, licence, what, and nothing else"),
    ],
)
def test_a_list_of_sources_that_is_incomplete_is_refused(run, tmp_path, capsys, content, message) -> None:
    if content is not None:
        (tmp_path / "sources.csv").write_bytes(content)
    assert message in refused(capsys, run, "--out", tmp_path / "new", "--sources", tmp_path / "sources.csv")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("hours", [0, -1, "nan", "inf"])
def test_hours_that_are_none_are_refused(run, tmp_path, capsys, hours) -> None:
    assert "must be positive and finite" in refused(capsys, run, "--out", tmp_path / "new", "--hours", hours)


def test_a_named_file_is_taken_as_it_is(run, tmp_path, capsys) -> None:
    call(run / "checkpoints/step_00000004/model.safetensors", "--out", tmp_path / "new")
    assert "EMA" not in capsys.readouterr().out
    network, _ = weights.load_model(run / "checkpoints/step_00000004/model.safetensors", CPU)
    assert torch.equal(load(tmp_path / "new", CPU).model.refine.head.weight, network.refine.head.weight)


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return line


def test_a_folder_with_something_in_it_is_refused(run, tmp_path, capsys) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    assert "new already exists and is not empty" in refused(capsys, run, "--out", tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.txt"]
    assert "mine.txt is a file" in refused(capsys, run, "--out", tmp_path / "new" / "mine.txt" / "new")


def test_an_empty_folder_is_taken(run, tmp_path) -> None:
    (tmp_path / "new").mkdir()
    call(run, "--out", tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_what_fails_leaves_nothing(run, tmp_path, capsys, monkeypatch) -> None:
    assert "no run or checkpoint" in refused(capsys, tmp_path / "none", "--out", tmp_path / "new")
    assert "results file" in refused(capsys, run, "--out", tmp_path / "new", "--results", tmp_path / "none.json")
    assert "--dtype fp16 is for --format torch" in refused(
        capsys, run, "--out", tmp_path / "new", "--dtype", "fp16", "--format", "onnx"
    )
    large = make_run(tmp_path / "runs" / "large")
    network = load(large, CPU).model
    with torch.no_grad():
        network.refine.head.bias.fill_(1e6)
    monkeypatch.setattr(weights, "read_weights", lambda *_: network.state_dict())
    message = refused(capsys, large, "--out", tmp_path / "new", "--dtype", "fp16")
    assert "--dtype fp16: refine.head.bias has values up to 1e+06, more than fp16 can hold: use fp32" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_missing_package_is_named(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(graph_formats, "_NEEDED", ("onnx", "no_such_package"))
    message = refused(capsys, run, "--out", tmp_path / "new", "--format", "onnx")
    assert message == "error: --format onnx needs no_such_package: pip install -e '.[onnx]'"


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_an_operator_that_cannot_be_traced_is_named(tmp_path, capsys, kind) -> None:
    message = refused(capsys, make_run(tmp_path / "runs" / "old", ssm="mamba1"), "--out", tmp_path / "new", "--format", kind)
    assert "--ssm mamba1 cannot be traced: its operator (vfi/ops/ssm/selective_scan.py) is a loop over tokens" in message
    assert not (tmp_path / "new").exists()


# graphs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scan": "flip", "gate": "elementwise", "window_size": 7},
        {"ssd_groups": "per_head", "xb_share": 2},
        {"mixing": "mhc", "depths": (2, 1)},
        {"phase": 2, "scale": 0.5},
        {"phase": 2, "warp": "flow_only", "gate": "off", "backbone_mode": "gated_attn_only"},
    ],
    ids=str,
)
def test_the_network_for_tracing_is_the_network(changes) -> None:
    """Also where decays are so small that a chunk forgets nothing."""
    network = random_network(**changes)
    for name, parameter in network.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    open_network = traceable(network)
    for batch, height, width in ((1, 32, 32), (2, 33, 100)):
        img0, img1 = torch.rand(2, batch, 3, height, width)
        timestep = torch.linspace(0.3, 0.6, batch)
        with torch.no_grad():
            truth = network(img0, img1, timestep).imgt.clamp(0, 1)
            torch.testing.assert_close(open_network(img0, img1, timestep), truth, rtol=0, atol=2e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("L", [1, 63, 64, 65, 64 * 64, 64 * 64 + 1, 9000])
def test_the_recurrence_without_a_loop_is_the_recurrence(L) -> None:
    """From one token to three chunks of chunks; the decay is such that the first token still counts at the end."""
    generator = torch.Generator().manual_seed(L)
    x, B, C = (torch.randn(2, L, heads, 3, generator=generator) for heads in (4, 2, 2))
    dt = torch.randn(2, L, 4, generator=generator) - 6
    A, D, bias = -torch.rand(4, generator=generator), torch.ones(4), torch.zeros(4)
    truth = ssd_reference(*(t.double() for t in (x, dt, A, B, C, D, bias)))
    away = (ssd_open(x, dt, A, B, C, D, bias) - truth).abs().max()
    assert away <= 2 * (ssd_reference(x, dt, A, B, C, D, bias) - truth).abs().max() + 1e-6


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize(("H", "W"), [(3, 5), (4, 4), (1, 7)])
def test_scan_orders_without_an_index_are_the_orders(kind, H, W) -> None:
    x = torch.randn(4, H, W, 6)
    for orders in (ALL, range(2, 4)):
        scanned = SCANS[kind].scan(x, orders)
        assert torch.equal(OPEN_SCANS[kind].scan(x, orders), scanned)
        assert torch.equal(OPEN_SCANS[kind].unscan(scanned, 2, H, W, orders), SCANS[kind].unscan(scanned, 2, H, W, orders))


class OneBlock(nn.Module):
    """An LGS block and a warp, called as the network is: what is special in a graph of it, but traced within seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = random_network().backbone.stages[0][0]

    def forward(self, img0: torch.Tensor, img1: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        frames = torch.cat((img0, img1))
        seen = self.block(frames.permute(0, 2, 3, 1).repeat(1, 1, 1, 22)[..., :64]).permute(0, 3, 1, 2)
        moved0, moved1 = of_each_frame(backward_warp(frames, seen[:, :2].contiguous()))
        return torch.lerp(moved0, moved1, timestep.view(-1, 1, 1, 1))


@pytest.fixture(scope="module")
def traced():
    """A module, and the trace of its copy with open operators."""
    ordinary = OneBlock().eval()
    opened = copy.deepcopy(ordinary).to(memory_format=torch.contiguous_format)
    open_operators(opened, "interleaved")
    return ordinary, trace(opened)


@pytest.mark.slow
@pytest.mark.parametrize("kind", graph_formats.WRITERS)
def test_a_graph_is_of_any_size(traced, tmp_path, kind) -> None:
    ordinary, program = traced
    run = graph_formats.WRITERS[kind](tmp_path, program)
    assert [path.name for path in tmp_path.iterdir()] == [graph_formats.FILES[kind]]
    for batch, height, width in ((1, 32, 32), (3, 9, 33), (1, 70, 71)):
        img0, img1 = torch.rand(2, batch, 3, height, width)
        timestep = torch.linspace(0.3, 0.6, batch)
        with torch.no_grad():
            truth = ordinary(img0, img1, timestep)
            torch.testing.assert_close(run(img0, img1, timestep), truth, rtol=0, atol=2e-4)


class CrossFade(nn.Module):
    """Far from the network, and traced at once."""

    def forward(self, img0: torch.Tensor, img1: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.lerp(img0, img1, timestep.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", graph_formats.WRITERS)
def test_the_difference_is_that_of_the_file(run, tmp_path, capsys, monkeypatch, kind) -> None:
    """Of a graph that is something else, so that it is not small."""
    monkeypatch.setattr(export, "traceable", lambda _: CrossFade())
    call(run, "--out", tmp_path / "new", "--format", kind)
    lines = told(capsys.readouterr().out)
    network = load(run, CPU).model
    for (_, away), case in zip(lines, graph_formats.CASES, strict=True):
        frames, timestep = graph_formats.moving_photographs(*case), torch.linspace(0.25, 0.5, case[0])
        truth = predict(network, *frames, timestep, torch.float32)
        assert away == pytest.approx(255 * (CrossFade()(*frames, timestep) - truth).abs().max().item(), rel=0.01)
        assert away > 2
    folder = tmp_path / "new"
    assert differences_of_card(folder) == lines
    file = graph_formats.FILES[kind]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", "config.json", file])
    assert file in (folder / "README.md").read_text()
    with pytest.raises(
        CheckpointError, match=f"lacks model.safetensors, the only file .* it holds README.md, config.json, {file}"
    ):
        load(folder, CPU)
