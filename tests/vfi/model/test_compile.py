"""Compilation and activation recomputation: the same outputs, loss and gradients, and the intended savings of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from vfi import train
from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model import compile as compile_module
from vfi.model.backbone import LGSBlock
from vfi.model.compile import checkpoint_activations, compile_modules
from vfi.model.flow import FlowStage
from vfi.model.hyper_connections import MixingRecord, mixing_report, recording
from vfi.model.interpolator import FrameInterpolator, Prediction
from vfi.model.refinement import RefineNet
from vfi.training import run
from vfi.training.losses import training_losses

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIM = presets.tiny().optim
ONE = dataclasses.replace(presets.tiny().model, width=4, head_dim=8)
TWO = dataclasses.replace(ONE, phase=2, teacher=True)
NETWORKS = {
    "phase 1": ONE,
    "phase 2": TWO,
    "mixed": dataclasses.replace(ONE, mixing="mhc", mixing_streams=2, sinkhorn_iterations=3),
    "mixed, phase 2": dataclasses.replace(TWO, mixing="mhc", mixing_streams=2, sinkhorn_iterations=3),
}
SIZE = (64, 80)
CPU = torch.device("cpu")


class Step(NamedTuple):
    """What comes of a training step."""

    prediction: Prediction
    loss: Tensor
    gradients: dict[str, Tensor]
    records: dict[str, MixingRecord]


def network(config: ModelConfig, device: torch.device = CPU) -> FrameInterpolator:
    """In float64: where a flow points just beside a pixel, the rounding of fp32 would decide which one its gradient is of.

    And nothing starts at zero: a last layer of zeros would keep all gradients from what lies before it.
    """
    torch.manual_seed(0)
    made = FrameInterpolator(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.to(device).train()


def frames(size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """img0, img1, timestep, imgt."""
    draw = torch.Generator().manual_seed(1)
    img0, img1, imgt = (torch.rand(2, 3, *size, generator=draw, dtype=torch.float64) for _ in range(3))
    return img0, img1, torch.tensor([0.3, 0.6], dtype=torch.float64), imgt


def step(made: FrameInterpolator) -> Step:
    with recording(made) as records:
        given = tuple(tensor.to(next(made.parameters()).device) for tensor in frames())
        prediction = made(*given)
        loss = training_losses(prediction, given[3], OPTIM)["loss"]
        loss.backward()
    return Step(prediction, loss, {name: p.grad for name, p in made.named_parameters()}, dict(records))


@functools.cache
def plain_step(name: str, device: torch.device = CPU) -> Step:
    return step(network(NETWORKS[name], device))


def tensors(prediction: Prediction) -> dict[str, Tensor]:
    """All that it holds, by name."""
    found = {name: value for name, value in prediction._asdict().items() if isinstance(value, Tensor)}
    teacher = () if prediction.teacher is None else (prediction.teacher,)
    for i, stage in enumerate((*prediction.stages, *teacher)):
        found |= {f"{i} {name}": value for name, value in stage._asdict().items()}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: a compiler adds up in another order, and some of the network's outputs are fp32 in any case.

    5e-6 of a norm was seen; an error would be of its size.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_it_is_the_same_to_the_bit(name):
    made, plain = network(NETWORKS[name]), plain_step(name)
    checkpoint_activations(made)
    found = step(made)
    assert torch.equal(found.loss, plain.loss)
    for ours, theirs in ((tensors(found.prediction), tensors(plain.prediction)), (found.gradients, plain.gradients)):
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert tensor.any(), key
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_it_is_the_same_but_for_rounding(name, recomputed, monkeypatch):
    """Captured forward and backward as for compiling, and run operator by operator."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compare_compiled(name, recomputed)


def test_the_compilers_own_code_is_the_same_but_for_rounding(monkeypatch):
    """Of an LGS block and a flow stage: that of the whole network takes minutes to compile."""
    parts = compile_module._compiled

    def some(made: FrameInterpolator) -> list[nn.Module]:
        return [*list(parts(made))[:3], made.flow.stages[-1]]

    monkeypatch.setattr(compile_module, "_compiled", some)
    compare_compiled("mixed, phase 2", recomputed=False)


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_all_of_the_compilers_code_on_a_gpu(recomputed):
    compare_compiled("mixed, phase 2", recomputed, torch.device("cuda"))


def compare_compiled(name: str, recomputed: bool, device: torch.device = CPU) -> None:
    made, plain = network(NETWORKS[name], device), plain_step(name, device)
    compile_modules(made)
    if recomputed:
        checkpoint_activations(made)
    found = step(made)
    assert_close({"loss": found.loss}, {"loss": plain.loss})
    assert_close(tensors(found.prediction), tensors(plain.prediction))
    assert_close(found.gradients, plain.gradients)


def names(module: nn.Module) -> tuple[list[str], list[str], list[str]]:
    return [name for name, _ in module.named_modules()], [name for name, _ in module.named_parameters()], [*module.state_dict()]


@pytest.mark.parametrize("change", [compile_modules, checkpoint_activations])
def test_names_stay_as_they_are(change):
    made = network(NETWORKS["mixed, phase 2"])
    before = names(made)
    change(made)
    assert names(made) == before


def test_compiled_or_recomputed_mixing_is_recorded(eager):
    """Also when both are; in one place of the network each, and the same numbers."""
    plain = plain_step("mixed, phase 2").records
    for changes in ((compile_modules,), (checkpoint_activations,), (compile_modules, checkpoint_activations)):
        made = network(NETWORKS["mixed, phase 2"])
        for change in changes:
            change(made)
        found = step(made).records
        assert list(found) == list(plain)
        assert len(found) == 4
        assert mixing_report(found) == pytest.approx(mixing_report(plain), rel=1e-5, abs=1e-6)


# what is compiled


@pytest.fixture
def eager(monkeypatch):
    """Captured as for compiling, but run as it is: what is asked here does not depend on the code that comes of it.

    More variants of a function than torch wants to compile are an error.
    """
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with dynamo.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield
    torch.compiler.reset()


def graphs() -> int:
    """Captured so far."""
    return counters["stats"]["unique_graphs"]


def test_a_validation_on_frames_of_other_sizes_compiles_nothing(eager):
    made, plain = network(TWO), network(TWO)
    compile_modules(made)
    made(*frames())
    compiled = graphs()
    assert compiled > 10
    made(*frames())
    assert graphs() == compiled
    for size in ((64, 80), (72, 96), (100, 37)):
        with torch.no_grad():
            found, expected = made.eval()(*frames(size)[:3]), plain.eval()(*frames(size)[:3])
        assert torch.equal(found.imgt, expected.imgt)
    assert graphs() == compiled


def test_what_is_compiled_is_in_graphs_as_large_as_can_be(eager, monkeypatch):
    """Flow stages, RefineNet, fusion and attention are one graph each; the scan is broken where kernels of its own follow."""
    sizes = {"flow_only": dataclasses.replace(TWO, warp="flow_only", teacher=False, backbone_mode="gated_attn_only")}
    made = network(sizes["flow_only"])
    compile_modules(made)
    made(*frames())
    assert graphs() == 2 + 2 + 3  # attention and fusion at two strides, three flow stages
    assert not counters["graph_break"]


def test_every_crop_of_a_curriculum_is_compiled(eager):
    """Blocks of two widths, with windows shifted or not, in three crops: twelve variants of the attention."""
    made = network(dataclasses.replace(ONE, depths=(2, 2), backbone_mode="gated_attn_only"))
    compile_modules(made)
    counts = [0]
    for size in ((64, 64), (96, 96), (128, 128)):
        made(*frames(size))
        counts.append(graphs())
    assert counts[1] == 4 + 2 + 1  # attention, fusion, RefineNet
    assert counts[2:] == [2 * counts[1], 3 * counts[1]]


# what is kept


def kept(made: FrameInterpolator) -> int:
    """Bytes that a forward pass keeps for the backward pass beside parameters; those of parts that are recomputed are not seen
    here, for nothing of them is kept.
    """
    seen: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or another one could take its place, and would not be counted
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(*frames())
    return sum(seen.values())


@pytest.mark.parametrize("name", ["phase 1", "phase 2"])
def test_recomputed_activations_are_not_kept(name):
    made = network(NETWORKS[name])
    before = kept(made)
    checkpoint_activations(made)
    assert kept(made) < before / 2


def test_each_block_stage_and_refine_net_is_computed_twice_and_the_rest_once():
    made = network(TWO)
    checkpoint_activations(made)
    # their first layers: the second time nothing is computed beyond what the backward pass needs
    first = {LGSBlock: "norm1", FlowStage: "body", RefineNet: "mix.4"}
    inside = [part.get_submodule(first[type(part)]) for part in made.modules() if is_part(part)]
    outside = [*made.backbone.stem, *made.backbone.down, *made.backbone.norms]
    counts = dict.fromkeys((*inside, *outside), 0)

    def count(module: nn.Module, *_: object) -> None:
        counts[module] += 1

    for module in counts:
        module.register_forward_hook(count)
    step(made)
    assert len(inside) == 2 + 4 + 1
    assert [counts[module] for module in inside] == [2] * 7
    assert [counts[module] for module in outside] == [1] * len(outside)
    with torch.no_grad():
        made(*frames())
    assert [counts[module] for module in inside] == [3] * 7


def is_part(module: nn.Module) -> bool:
    return isinstance(module, LGSBlock | FlowStage | RefineNet)


def test_training_takes_them_as_asked(tmp_path, train_shards, monkeypatch):
    """Compiled first: what is recomputed is the compiled code."""
    for flags, expected in ((("--compile", "--checkpointing"), ["compile_modules", "checkpoint_activations"]), ((), [])):
        asked: list[str] = []
        for change in ("compile_modules", "checkpoint_activations"):
            monkeypatch.setattr(run, change, spy(asked, change))
        train.main(["--preset", "tiny", "--width", "2", "--head_dim", "8", "--crop", "64", "--num_workers", "0", "--steps", "1",
                    "--batch_size", "1", "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--exp_name",
                    f"run{len(flags)}", *flags])  # fmt: skip
        assert asked == expected


def spy(asked: list[str], name: str) -> Callable[[nn.Module], None]:
    return lambda made: asked.append(name)
