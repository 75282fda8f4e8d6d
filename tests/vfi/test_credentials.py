"""Test that passwords and tokens in addresses reach their server, and nothing that is printed or stored."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from warm import TRAIN, Process

from launch import submit
from vfi import benchmark
from vfi.credentials import SECRETS, CredentialsError, hide, redact, reveal
from vfi.data.download import Patience, StorageError, fetch
from vfi.errors import JobError, clear_errors
from vfi.runtime.logging import logger

USER, PASSWORD, TOKEN = "reader", "pa:55/w@rd", "s1gn-ature"
QUOTED = "pa%3A55%2Fw%40rd"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRET_TEXTS = (PASSWORD, QUOTED, TOKEN, BASIC, json.dumps(PASSWORD)[1:-1])
IMPATIENT = Patience(attempts=2, first_wait=0.01, longest_wait=0.01, timeout=5.0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """No test learns secrets from another one, or from the user's own files."""
    monkeypatch.setenv(SECRETS, "")
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))


@contextlib.contextmanager
def serving(root: Path, redirects: dict[str, str] | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """A server on loopback whose files take Basic auth or a token: its host and port, and the sign-ins that it got."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            seen.append(self.headers.get("Authorization"))
            if target := (redirects or {}).get(address.path):
                self.send_response(302)
                self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif seen[-1] != f"Basic {BASIC}" and address.query != f"X-Amz-Signature={TOKEN}":
                self.send_error(401)
            else:
                data = (root / address.path.rpartition("/")[2]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def fetched(url: str) -> bytes:
    data = io.BytesIO()
    fetch(url, data, None, 1 << 20, IMPATIENT)
    return data.getvalue()


def assert_free_of_secrets(text: str | bytes, where: object) -> None:
    data = text.encode() if isinstance(text, str) else text
    assert not [secret for secret in SECRET_TEXTS if secret.encode() in data], where


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (f"https://{USER}:{QUOTED}@host:80/set?token={TOKEN}", "https://host:80/set"),
        (f"https://{USER}:{PASSWORD}@host/set", "https://host/set"),
        (f"https://{TOKEN}@host/set", "https://host/set"),
        (f"https://{TOKEN}:@host/set", "https://host/set"),
        (f"HTTPS://host/set/?a=b&sig={TOKEN}", "HTTPS://host/set/"),
        (f"ftp://{USER}:{QUOTED}@host/set", f"ftp://{USER}@host/set"),
        (f"simplecache::https://{USER}:{QUOTED}@host/set", "simplecache::https://host/set"),
    ],
)
def test_secrets_are_taken_out_and_found_again(url, public):
    assert redact(url) == public
    assert_free_of_secrets(redact(f"{url}: 403, see {url}"), url)
    assert hide(["--data_path", url]) == ["--data_path", public]
    if "::" not in url:
        assert reveal(public) == url.replace(":@", "@")
        below = url.partition("?")[0].rstrip("/") + "/x.tar" + "".join(url.partition("?")[1:])
        assert reveal(public.rstrip("/") + "/x.tar") == below.replace(":@", "@")
        assert reveal(public.rstrip("/") + "2") == public.rstrip("/") + "2"


@pytest.mark.parametrize("url", ["https://host:8080/a@b", "s3://bucket/what?/a@b:c", "memory://x", "https://host/set"])
def test_other_addresses_stay_as_they_are(url):
    assert redact(url) == reveal(url) == url
    assert hide([url]) == [url]


def test_the_last_and_longest_address_counts(monkeypatch):
    monkeypatch.setenv(SECRETS, "https://a:1@host https://b:2@host/set https://c:3@host/set https://d:4@other/set junk")
    assert reveal("https://host/set/x") == "https://c:3@host/set/x"
    assert reveal("https://host/sets/x") == "https://a:1@host/sets/x"
    assert reveal("http://host/set/x") == "http://host/set/x"


def test_messages_and_errors_lose_secrets(capsys, monkeypatch):
    text = f"https://{USER}:{QUOTED}@host/set?X-Amz-Signature={TOKEN}"
    logger.warning(f"reads {text}")
    with pytest.raises(SystemExit), clear_errors():
        raise JobError(f"can't read {text}")
    out, err = capsys.readouterr()
    assert "note: reads https://host/set" in err
    assert "error: can't read https://host/set" in err
    assert_free_of_secrets(out + err, "messages")


def write_netrc(path: Path, host: str, user: str = USER) -> str:
    path.write_text(f"machine {host} login {user} password {PASSWORD}\n")
    path.chmod(0o600)
    return str(path)


def test_each_way_to_sign_in(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"content")
    with serving(tmp_path) as (host, _):
        with pytest.raises(
            StorageError, match=rf"^http://{host}/x: 401 .*give https://USER:PASSWORD@…, or the same in {SECRETS}"
        ):
            fetched(f"http://{host}/x")
        monkeypatch.setenv("NETRC", write_netrc(tmp_path / "netrc", "127.0.0.1"))
        assert fetched(f"http://{host}/x") == b"content"
        monkeypatch.setenv("NETRC", write_netrc(tmp_path / "netrc", "default"))
        with pytest.raises(StorageError, match="401"):
            fetched(f"http://{host}/x")
        monkeypatch.setenv("NETRC", write_netrc(tmp_path / "netrc", "127.0.0.1 what"))
        with pytest.raises(CredentialsError, match="netrc can't be used: line 1") as error:
            fetched(f"http://{host}/x")
        assert_free_of_secrets(str(error.value), "netrc")
        monkeypatch.setenv(SECRETS, f"http://{USER}:{QUOTED}@{host}")
        assert fetched(f"http://{host}/x") == b"content"
        monkeypatch.setenv(SECRETS, f"http://{host}?X-Amz-Signature={TOKEN}")
        assert fetched(f"http://{host}/x") == b"content"
        monkeypatch.setenv(SECRETS, f"http://{USER}:wrong@{host}")
        with pytest.raises(StorageError, match="401"):
            fetched(f"http://{host}/x")


def test_a_redirect_takes_the_password_to_no_other_server(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"content")
    with serving(tmp_path) as (other, theirs), serving(tmp_path, {"/a/x": "/b/x", "/c/x": f"http://{other}/x"}) as (host, _):
        monkeypatch.setenv(SECRETS, f"http://{USER}:{QUOTED}@{host}")
        assert fetched(f"http://{host}/a/x") == b"content"
        with pytest.raises(StorageError, match="401"):
            fetched(f"http://{host}/c/x")
        assert theirs == [None]


class Signed(MemoryFileSystem):
    """Has errors that quote the address."""

    protocol = "signed"

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        raise ValueError(f"options {sorted(options)} of signed://{USER}:{QUOTED}@host do not fit")

    @staticmethod
    def _get_kwargs_from_urls(path):
        return {
            name: text for name, text in fsspec.utils.infer_storage_options(path).items() if name in ("username", "password")
        }


def test_fsspec_gets_the_password_and_its_errors_lose_it(monkeypatch):
    fsspec.register_implementation("signed", Signed, clobber=True)
    monkeypatch.setenv(SECRETS, f"signed://{USER}:{QUOTED}@host")
    with pytest.raises(StorageError, match=rf"'password'.*'username'.* of signed://{USER}@host") as error:
        fetched(f"signed://{USER}@host/x")
    assert_free_of_secrets(str(error.value), "fsspec")


def assert_files_free_of_secrets(root: Path) -> None:
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert_free_of_secrets(path.read_bytes(), path)


def train(tmp_path: Path, url: str, steps: int, **environment: str) -> tuple[int | None, str]:
    process = Process(
        *(TRAIN, "--preset", "tiny", "--crop", "64", "--batch_size", "4", "--num_workers", "1", "--save_every", "1"),
        *("--steps", steps, "--data_path", url, "--val_path", url, "--val_samples", "1", "--output_dir", tmp_path / "runs"),
        *("--exp_name", "run", "--resume", "auto", "--schedule", "extend", "--cache_dir", tmp_path / "cache"),
        **environment,
    )
    output, _ = process.communicate(timeout=120)
    assert_free_of_secrets(output, "output")
    return process.returncode, output


def test_no_file_of_a_run_or_benchmark_holds_a_secret(train_shards, tmp_path, monkeypatch, capsys):
    with serving(train_shards) as (host, seen):
        url = f"http://{USER}:{QUOTED}@{host}/set"
        assert train(tmp_path, url, 1)[0] == 0
        assert_files_free_of_secrets(tmp_path)
        config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
        assert config["data"]["data_path"] == [f"http://{host}/set"]
        public = f"http://{host}/set"
        code, output = train(tmp_path, public, 2)
        assert code == 2
        assert output.strip().splitlines()[-1].startswith(f"error: {public}/index.json: 401 Unauthorized")
        assert train(tmp_path, public, 2, NETRC=write_netrc(tmp_path.parent / "netrc", "127.0.0.1"))[0] == 0
        signed = f"{public}?X-Amz-Signature={TOKEN}"
        assert train(tmp_path, public, 3, **{SECRETS: signed})[0] == 0
        code, output = train(tmp_path, signed, 4)
        assert code == 0
        flags = ["--limit", "1", "--pictures", "0", "--workers", "0", "--no-motion", "--cache_dir", str(tmp_path / "cache")]
        model, out = str(tmp_path / "runs" / "run"), str(tmp_path / "results.json")
        benchmark.main(["--model", model, "--data", url, "--out", out, *flags])
        assert_free_of_secrets("".join(capsys.readouterr()), "benchmark")
        assert public in Path(out).read_text()
        assert_files_free_of_secrets(tmp_path)
        assert f"Basic {BASIC}" in seen


def test_a_job_with_a_secret_is_not_queued(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    url = f"https://{USER}:{QUOTED}@host/set"
    for flags in ([], ["--dry_run"], ["--setup", f"export SET={url}"]):
        with pytest.raises(SystemExit) as ended:
            submit.main(["--cluster", "local", "--gpus_per_node", "0", *flags, "--", "--data_path", url])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert "https://host/set' was given with a password or token, which the files of the job would keep" in err
        assert SECRETS in err
        assert_free_of_secrets(out + err, "submit")
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_its_secret_is_written_down_without_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SECRETS, f"https://{USER}:{QUOTED}@host")
    monkeypatch.setattr("launch.executors.submit", lambda *arguments: ["1"])
    submit.main(["--cluster", "local", "--gpus_per_node", "0", "--", "--data_path", "https://host/set"])
    assert_free_of_secrets("".join(capsys.readouterr()), "submit")
    shutil.rmtree(next(tmp_path.glob("runs/*/launch/1/code")))  # holds nothing but the packages
    assert_files_free_of_secrets(tmp_path)
