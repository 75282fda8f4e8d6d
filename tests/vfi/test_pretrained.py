"""A saved model equals the original, from disk and from a hub; loading executes no code; every mistake is one clear error."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_settings
import made_results
import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

from vfi import FrameInterpolator, interpolate
from vfi.checkpoint import pretrained_folder, store
from vfi.config import command_line, presets
from vfi.config.configs import Config
from vfi.errors import CheckpointError, JobError
from vfi.evaluation.results import write_results
from vfi.inference.loading import load
from vfi.io.dataclass_json import to_json
from vfi.model.interpolator import FrameInterpolator as Network
from vfi.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_run(folder: Path, config: Config, ema: bool = False) -> Path:
    """A run with random weights, far from a plain average; its running mean is that times 0.9."""
    torch.manual_seed(0)
    network = Network(config.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    weights = network.state_dict()
    average = {name: tensor * 0.9 for name, tensor in weights.items()} if ema else None
    store.save(folder, store.State(4), config, weights, {}, ema=average)
    (folder / "config.json").write_text(to_json(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = presets.override(
        presets.tiny(), phase=2, teacher=True, ssd_backend="blocked", data_path=("SHARDS/vimeo", "https://a.b/x4k/train")
    )
    return make_run(tmp_path_factory.mktemp("work") / "runs" / "some", config, ema=True)


@pytest.fixture(scope="module")
def model(run) -> FrameInterpolator:
    return FrameInterpolator.from_pretrained(run)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """A saved model; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "mine"
    model.save_pretrained(path, licence="CC-BY-4.0")
    return path


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "mine"))


def tensors(batch: int = 1, height: int = 45, width: int = 52) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    img0, img1 = torch.rand(2, batch, 3, height, width, generator=generator)
    return img0, img1


def expected(model: FrameInterpolator, img0: torch.Tensor, img1: torch.Tensor, timestep: float = 0.5) -> torch.Tensor:
    with torch.inference_mode():
        return model.network(img0, img1, torch.full((img0.shape[0],), timestep)).imgt.clamp(0, 1)


# what a program does with a model


def test_a_batch_of_tensors_gives_the_networks_frames(model) -> None:
    img0, img1 = tensors(batch=2)
    assert torch.equal(model(img0, img1), expected(model, img0, img1))
    assert torch.equal(model(img0, img1, 0.3), expected(model, img0, img1, 0.3))
    assert not torch.equal(model(img0, img1, 0.3), model(img0, img1, 0.6))


def test_one_frame_is_the_batch_of_one(model) -> None:
    img0, img1 = tensors()
    assert torch.equal(model(img0[0], img1[0]), model(img0, img1)[0])


@pytest.mark.parametrize("times", [[0.25, 0.5, 0.75], (0.4,), np.array([0.2, 0.8]), torch.tensor([0.25, 0.5])])
def test_several_timesteps_are_a_list_from_one_pass(model, times, monkeypatch) -> None:
    img0, img1 = tensors(batch=2)
    single = [model(img0, img1, float(time)) for time in times]
    passes = []
    encode = model.network.encode
    monkeypatch.setattr(model.network, "encode", lambda *inputs: passes.append(1) or encode(*inputs))
    several = model(img0, img1, times)
    assert isinstance(several, list)
    assert passes == [1]
    for one, other in zip(several, single, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.dtype(">u2"), np.float16, np.float32, np.float64])
@pytest.mark.parametrize("batch", [None, 2])
def test_arrays_come_back_as_they_were(model, dtype, batch) -> None:
    dtype = np.dtype(dtype)
    top = np.iinfo(dtype).max if dtype.kind == "u" else 1
    img0, img1 = tensors(batch or 1)
    arrays = [(image.movedim(1, -1).numpy() * top).astype(dtype) for image in (img0, img1)]
    truth = expected(model, *(torch.tensor(array.astype(np.float32) / top).movedim(-1, 1) for array in arrays))
    arrays = [array if batch else array[0] for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    made = model(*arrays)
    assert isinstance(made, np.ndarray)
    assert (made.dtype, made.shape) == (dtype, arrays[0].shape)
    truth = truth.movedim(1, -1).numpy() if batch else truth.movedim(1, -1).numpy()[0]
    away = np.abs(made.astype(np.float64) - truth.astype(np.float64) * top)
    assert away.max() <= (0.51 if top > 1 else 1e-3 if dtype == np.float16 else 1e-6)
    (several,) = model(*arrays, [0.5])
    np.testing.assert_array_equal(several, made)


def test_arrays_may_be_views(model) -> None:
    first, last = ((image[0].movedim(0, -1).numpy() * 255).astype(np.uint8) for image in tensors())
    turned = model(first[::-1, :, ::-1], last[::-1, :, ::-1])
    np.testing.assert_array_equal(turned, model(first[::-1, :, ::-1].copy(), last[::-1, :, ::-1].copy()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_come_back_as_they_were(model, dtype) -> None:
    top = 255 if dtype == torch.uint8 else 1
    img0, img1 = ((image * top).to(dtype) for image in tensors())
    made = model(img0, img1)
    assert (made.dtype, made.shape, made.device) == (dtype, img0.shape, img0.device)
    truth = expected(model, img0.float() / top, img1.float() / top)
    assert (made.double() / top - truth).abs().max() <= {torch.uint8: 0.501 / 255, torch.bfloat16: 4e-3}.get(dtype, 1e-3)


def test_scale_is_that_of_the_network(model) -> None:
    img0, img1 = tensors(height=64, width=96)
    with torch.inference_mode():
        half = model.network(img0, img1, torch.tensor([0.5]), scale=0.5).imgt.clamp(0, 1)
    assert torch.equal(model(img0, img1, scale=0.5), half)
    assert not torch.equal(half, model(img0, img1))


ARRAY, TENSOR = np.zeros((40, 48, 3), np.uint8), torch.zeros(3, 40, 48)
REFUSED = {
    "a path": ("a.png", TENSOR, {}, "img0 is a str; give a NumPy array"),
    "a picture": (ARRAY, Image.new("RGB", (48, 40)), {}, r"img1 is a Image; give a NumPy array .* numpy.asarray"),
    "numbers of another type": (ARRAY.astype(np.int32), ARRAY, {}, "img0 is an array of int32; allowed are uint8, uint16"),
    "a tensor of another type": (TENSOR, TENSOR.int(), {}, "img1 is a tensor of torch.int32; allowed are uint8, float16"),
    "above 1": (TENSOR, TENSOR + 200, {}, "img1 has values from 200 to 200; floats must lie between 0 and 1: divide it by 255"),
    "a little below 0": (TENSOR - 0.1, TENSOR, {}, "img0 has values from -0.1 to -0.1; .*: clamp it"),
    "not finite": (TENSOR * torch.nan, TENSOR, {}, "img0 has values from nan to nan; .* values that are not finite"),
    "not finite in an array": (ARRAY + np.float32(np.inf), ARRAY + np.float32(0), {}, "img0 has values from inf to inf"),
    "channels first in an array": (ARRAY.transpose(2, 0, 1), ARRAY, {}, r"img0 is an array \[3, 40, 48\]; .* numpy.moveaxis"),
    "channels last in a tensor": (TENSOR, TENSOR.permute(1, 2, 0), {}, r"img1 is a tensor \[40, 48, 3\]; .* image.movedim"),
    "grey": (ARRAY[..., 0], ARRAY, {}, r"img0 is an array \[40, 48\]; an array must be \[H, W, 3\]"),
    "with transparency": (np.zeros((40, 48, 4), np.uint8), ARRAY, {}, "three channels, red, green and blue"),
    "too small": (ARRAY[:31], ARRAY[:31], {}, r"img0 is 48x31 \(width x height\); each side must be at least 32"),
    "an empty batch": (TENSOR[None][:0], TENSOR[None][:0], {}, "a batch must hold at least one frame"),
    "two sizes": (ARRAY, ARRAY[:, :40], {}, r"img0 is \[40, 48, 3\] and img1 \[40, 40, 3\]: both must have one shape"),
    "two kinds": (ARRAY, TENSOR, {}, "img0 is a ndarray and img1 a Tensor: give both as arrays or both as tensors"),
    "two types": (ARRAY, ARRAY.astype(np.uint16), {}, "img0 is of uint8 and img1 of uint16: give both in one type"),
    "two devices": (TENSOR, TENSOR.to("meta"), {}, r"img0 is on cpu and img1 on meta: move one of them"),
    "timestep 0": (TENSOR, TENSOR, {"timestep": 0}, "timestep is 0; it must be a number above 0"),
    "timestep 1 of several": (TENSOR, TENSOR, {"timestep": [0.5, 1.0]}, "timestep is 1.0; it must be a number above 0"),
    "timestep of no number": (TENSOR, TENSOR, {"timestep": float("nan")}, "timestep is nan; it must"),
    "timestep of text": (TENSOR, TENSOR, {"timestep": "0.5"}, "timestep is '0.5'; it must be a number"),
    "no timestep": (TENSOR, TENSOR, {"timestep": []}, "timestep is an empty list"),
    "scale": (TENSOR, TENSOR, {"scale": 0.3}, "scale is 0.3; choose from 1.0, 0.5, 0.25"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_is_said(model, case) -> None:
    img0, img1, settings, message = REFUSED[case]
    with pytest.raises(JobError, match=message):
        model(img0, img1, **settings)


@pytest.mark.parametrize(("name", "value"), [("device", "gpu"), ("precision", "fp8")])
def test_unknown_settings_are_refused(run, name, value) -> None:
    with pytest.raises(JobError, match=f"{name} is '{value}'; choose from auto, "):
        FrameInterpolator.from_pretrained(run, **{name: value})


def test_a_model_without_flow_has_no_scale(tmp_path) -> None:
    blends = FrameInterpolator.from_pretrained(make_run(tmp_path / "one", presets.tiny()))
    with pytest.raises(JobError, match=r"scale is 0.5, but .* is of phase 1, without flow: leave it out"):
        blends(TENSOR, TENSOR, scale=0.5)


@pytest.mark.gpu
def test_frames_and_model_may_be_on_different_devices(run) -> None:
    model = FrameInterpolator.from_pretrained(run, device="cuda", precision="fp32")
    img0, img1 = tensors(batch=2)
    here, there = model(img0, img1), model(img0.cuda(), img1.cuda())
    assert (here.device.type, there.device.type) == ("cpu", "cuda")
    assert torch.equal(here, there.cpu())


def test_the_package_imports_nothing_heavy_until_asked() -> None:
    code = "import sys, vfi; assert 'torch' not in sys.modules; from vfi import FrameInterpolator as F; print(F.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vfi.pretrained"]


# save and load


def test_a_saved_model_is_the_model(model, saved) -> None:
    again = FrameInterpolator.from_pretrained(saved)
    img0, img1 = tensors(batch=2)
    assert torch.equal(again(img0, img1), model(img0, img1))
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "some" not in repr(again)
    assert "step 4" in repr(again)


def test_the_running_mean_is_saved_and_not_the_teacher(run, saved) -> None:
    trained = load_file(run / "checkpoints/step_00000004/ema.safetensors")
    kept = load_file(saved / "model.safetensors")
    assert set(trained) - set(kept) == {name for name in trained if name.startswith("flow.teacher.")} != set()
    assert all(torch.equal(kept[name], trained[name]) for name in kept)


def test_a_run_is_portable(saved) -> None:
    """The run asked for the reference operators and a teacher."""
    described = pretrained_folder.read_description(saved)
    assert described.model == presets.override(presets.tiny(), phase=2).model
    assert described.origin == pretrained_folder.Origin("some", "tiny", 4, True, ("vimeo", "x4k train"), "CC-BY-4.0")


@pytest.mark.parametrize("of", ["", "model.safetensors"])
def test_jobs_take_a_saved_model(saved, of, tmp_path) -> None:
    loaded = load(saved / of, CPU)
    assert (loaded.name, loaded.step, loaded.run_folder) == ("mine", 4, saved)
    assert loaded.config.run.preset == "tiny"
    img0, img1 = ((image[0].movedim(0, -1).numpy() * 255).astype(np.uint8) for image in tensors())
    for name, image in (("a", img0), ("b", img1)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    arguments = [tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "mid.png", "--model", saved / of, "--device", "cpu"]
    interpolate.main([str(argument) for argument in arguments])
    made = FrameInterpolator.from_pretrained(saved)(img0, img1)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mid.png")), made)


def test_nothing_is_overwritten(model, saved) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(JobError, match="mine already exists and is not empty: give another folder"):
        model.save_pretrained(saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_a_folder_that_failed_leaves_nothing(model, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(JobError, match="new cannot be written: No space left on device"):
        model.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_the_hub_reads(model, tmp_path) -> None:
    measured = made_results.results("some")
    ours = dataclasses.replace(measured.rows[2], step=4, psnr=33.25)
    protocol = {"protocol": "ucf101", "profile": "rife", "TTA": "none", "frame set": "all samples", "source": "/home/me"}
    measured = dataclasses.replace(measured, rows=(*measured.rows[:2], ours), protocol=protocol)
    write_results(tmp_path / "ucf.json", measured)
    model.save_pretrained(tmp_path / "new", licence="My own: terms", results=[tmp_path / "ucf.json"])
    text = (tmp_path / "new" / "README.md").read_text()
    front = metadata_load(tmp_path / "new" / "README.md")
    body = text.split("---\n", 2)[2]
    assert front["license"] == "other"
    assert front["license_name"] == "my-own-terms"
    assert front["datasets"] == ["vimeo", "x4k-train"]
    assert "video-frame-interpolation" in front["tags"]
    (of_model,) = front["model-index"]
    (result,) = of_model["results"]
    assert (of_model["name"], result["dataset"]) == ("some", {"name": "ucf101 (rife)", "type": "ucf101-rife"})
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("psnr", 33.25),
        ("ssim", round(ours.ssim, 4)),
    ]
    assert "| some | 33.25 |" in body
    assert "| frame average | 30.00 |" in body
    assert "Of the weights: My own: terms." in body
    assert "/home/me" not in text


def test_a_card_claims_nothing_that_was_not_given(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    assert metadata_load(tmp_path / "new" / "README.md")["license"] == "unknown"
    assert "did not state under which licence" in text
    assert "PSNR" not in text
    assert "model-index" not in text


def test_results_of_another_model_are_refused(model, tmp_path) -> None:
    write_results(tmp_path / "other.json", made_results.results("some"))  # of step 1200
    with pytest.raises(JobError, match=r"other.json was not measured with some at step 4: its models are some \(step 1200\)"):
        model.save_pretrained(tmp_path / "new", results=[tmp_path / "other.json"])
    assert not (tmp_path / "new").exists()


# what is wrong with a folder


def edit(folder: Path, **changes: object) -> None:
    """Change fields of config.json; a dictionary changes fields of that part."""
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))


def without_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("refine.head.weight")
    save_file(weights | {"made.up": torch.zeros(1)}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing: without it nobody knows which network"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: "),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a JSON list, expected an object"),
    "another schema": (
        lambda f: edit(f, schema="other"),
        "does not describe a model of this project: its schema is 'other'",
    ),
    "a later version": (
        lambda f: edit(f, version=2, written_by="vfi-training-stack 9.1"),
        "is of schema version 2, written by vfi-training-stack 9.1; vfi-training-stack .* reads version 1",
    ),
    "an unknown field of the architecture": (
        lambda f: edit(f, model={"rotary": True}, written_by="vfi-training-stack 9.1"),
        r"Unknown fields: \['rotary'\] .*was written by vfi-training-stack 9.1; this is vfi-training-stack",
    ),
    "code by name": (lambda f: edit(f, auto_map={"AutoModel": "modeling.Evil"}), r"Unknown fields: \['auto_map'\]"),
    "a wrong type": (lambda f: edit(f, model={"width": "8"}), "model: width is '8', expected <class 'int'>"),
    "an impossible architecture": (lambda f: edit(f, model={"head_dim": 7}), "--head_dim 7 must divide"),
    "a huge architecture": (lambda f: edit(f, model={"width": 1 << 20}), "is of another architecture: .* of another shape"),
    "endless blocks": (lambda f: edit(f, model={"depths": [1, 1 << 40]}), "asks for more blocks than model.safetensors holds"),
    "cut weights": (cut, "model.safetensors cannot be read: "),
    "weights of another network": (without_weight, "1 missing: refine.head.weight; 1 unknown: made.up"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "lacks model.safetensors, the only file that weights are read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_error(broken, case) -> None:
    damage, message = BROKEN[case]
    damage(broken)
    with pytest.raises(CheckpointError, match=message) as raised:
        FrameInterpolator.from_pretrained(broken)
    assert str(broken) in str(raised.value)


def test_settings_that_came_later_have_their_defaults(broken, capsys) -> None:
    content = json.loads((broken / "config.json").read_text())
    del content["model"]["gate"]
    (broken / "config.json").write_text(json.dumps(content))
    FrameInterpolator.from_pretrained(broken)
    assert "older than these settings, which have their defaults: gate" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "optimizer.pt", "config.pkl"])
def test_a_pickle_is_never_loaded(broken, tmp_path, name) -> None:
    """Not beside the weights, and not in their place."""
    touched = tmp_path / "touched"
    evil = pickle.dumps(Payload(touched))
    pickle.loads(evil)  # it would do harm
    touched.unlink()
    (broken / name).write_bytes(evil)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
            FrameInterpolator.from_pretrained(broken)
    else:
        FrameInterpolator.from_pretrained(broken)
        (broken / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=f"lacks model.safetensors.*{name}"):
            FrameInterpolator.from_pretrained(broken)
    assert not touched.exists()


def test_a_safetensors_that_claims_too_much_is_refused(broken) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        FrameInterpolator.from_pretrained(broken)


def test_a_path_to_nothing_names_the_runs(run, monkeypatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    for path in ("runs/smoe", "smoe", "./a/b/c"):
        with pytest.raises(CheckpointError, match=f"no run or checkpoint '{path.removeprefix('./')}'"):
            FrameInterpolator.from_pretrained(path)


# the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as the library asks for: one repository, org/mine, of one commit, with a tag v1."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if "/org/" in self.path:  # once a day the library asks for other things, without a token
            self.server.tokens.add(self.headers.get("Authorization"))
        files = {file.name: file.read_bytes() for file in self.server.folder.iterdir()}
        repository = "/api/models/org/mine"
        revision = path.rpartition("/")[2]
        if path in (f"{repository}/revision/{name}" for name in ("main", "v1", COMMIT)):
            self._json({"id": "org/mine", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path == f"{repository}/tree/{COMMIT}":
            entries = [(name, content, hashlib.sha1(content).hexdigest()) for name, content in files.items()]
            self._json([{"type": "file", "path": name, "size": len(data), "oid": oid} for name, data, oid in entries])
        elif path.startswith(f"/org/mine/resolve/{COMMIT}/") and revision in files:
            etag = hashlib.sha1(files[revision]).hexdigest()
            self._send(200, files[revision] if body else b"", {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[revision])
        elif path.startswith(repository):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
        else:
            self._send(401 if self.server.private else 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], whole: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content if whole is None else whole)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked, server.tokens, server.private = folder, [], set(), False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(broken, tmp_path, monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub with a model, and an empty cache; the current folder is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve(broken) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub_settings, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_settings, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_model_comes_from_the_hub_once_and_then_from_the_cache(hub, model, tmp_path, monkeypatch) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "touched")))
    (hub.folder / "modeling.py").write_text("raise SystemExit('executed')")
    img0, img1 = tensors()
    fetched = FrameInterpolator.from_pretrained("org/mine", revision="v1")
    assert torch.equal(fetched(img0, img1), model(img0, img1))
    taken = {path.rpartition("/")[2] for path in hub.asked if "resolve" in path}
    assert taken == {"README.md", "config.json", "model.safetensors"}
    assert load("org/mine", CPU).name == "org/mine"  # as jobs do; also puts `main` into the cache
    hub.asked.clear()
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    cached = FrameInterpolator.from_pretrained("org/mine")
    assert torch.equal(cached(img0, img1), model(img0, img1))
    assert hub.asked == []
    with pytest.raises(CheckpointError, match="org/other at main is not in the cache, and the hub can't be reached"):
        FrameInterpolator.from_pretrained("org/other")


def test_what_the_hub_does_not_have_is_said(hub) -> None:
    with pytest.raises(CheckpointError, match="org/mine has no revision 'v2': give a branch, a tag or a commit"):
        FrameInterpolator.from_pretrained("org/mine", revision="v2")
    with pytest.raises(CheckpointError, match="no run, file or folder org/other here and no such model on the hub"):
        FrameInterpolator.from_pretrained("org/other")
    hub.private = True
    with pytest.raises(CheckpointError, match=r"no such model on the hub \(or it is private: set HF_TOKEN\)"):
        FrameInterpolator.from_pretrained("org/other")
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        FrameInterpolator.from_pretrained("org/mine")


def test_the_token_is_that_of_the_library(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    FrameInterpolator.from_pretrained("org/mine")
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_folder_goes_before_the_hub(hub, saved) -> None:
    shutil.copytree(saved, "org/mine")
    assert load("org/mine", CPU).run_folder == Path("org/mine")
    with pytest.raises(CheckpointError, match="no run or checkpoint 'org/other'"):
        load("org/other", CPU)
    with pytest.raises(CheckpointError, match=r"revision 'v1' is for a model on the hub .* leave it out"):
        load("org/mine", CPU, "v1")
    assert hub.asked == []


# training starts from it


def begun(start: str | Path, tmp_path: Path, shards: Path, *flags: object) -> trainer.Trainer:
    """A training that starts from there."""
    words = ["--preset", "tiny", "--phase", 2, "--data_path", shards, "--num_workers", 0, "--crop", 64, "--steps", 1,
             "--output_dir", tmp_path / "runs", "--start_from", start, *flags]  # fmt: skip
    return trainer.Trainer(command_line.from_command_line(list(map(str, words))))


@pytest.mark.parametrize("where", ["a folder", "the hub"])
def test_training_starts_from_a_saved_model(where, hub, saved, tmp_path, train_shards, capsys) -> None:
    trainer = begun(saved if where == "a folder" else "org/mine", tmp_path, train_shards)
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.live.network.state_dict().items())
    assert "(step 4)" in capsys.readouterr().out
    trainer.fit()
    assert store.latest(trainer.folder).step == 1


def test_training_names_what_does_not_fit(saved, broken, tmp_path, train_shards) -> None:
    with pytest.raises(CheckpointError, match=r"is of another architecture[\s\S]* Settings that differ: .*use_ecab"):
        begun(saved, tmp_path, train_shards, "--no-use_ecab")
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        begun(broken, tmp_path, train_shards)
