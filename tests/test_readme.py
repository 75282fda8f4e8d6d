"""The README tells the truth: its tree is the tree, its commands exist, their flags are known."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from vfi import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def tree_paths() -> list[str]:
    """Paths of the block under 'The tree', by indentation."""
    block = next(body for _, body in blocks_of(TEXT) if body.startswith("README.md"))
    parents: list[str] = []
    paths = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_tree_lists_what_each_package_holds_and_nothing_else():
    paths = tree_paths()
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    packages = ("launch", "shards", "vfi")
    inside = [path for package in packages for path in (ROOT / package).iterdir() if path.name != "__init__.py"]
    modules = {str(path.relative_to(ROOT)) for path in inside if path.suffix == ".py"}
    folders = {f"{path.relative_to(ROOT)}/" for path in inside if (path / "__init__.py").exists()}
    assert modules | folders == {path for path in paths if path.startswith(packages) and path.rstrip("/") not in packages}


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and body of each fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def commands(blocks: list[tuple[str, str]]) -> list[list[str]]:
    """Words of every command line of the bash blocks, without comments and environment settings."""
    found = []
    for kind, body in blocks:
        if kind == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if not re.match(r"^[A-Z_]+=", word)]
                found += [words] if words else []
    return found


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The project's module that a command starts, and its arguments."""
    if words[0] == "vfi":
        return cli.module_of(words[1]), words[2:]
    if "-m" in words:
        at = words.index("-m")
        return words[at + 1], words[at + 2 :]
    return None


def test_readme_and_docs_show_every_job():
    pages = [TEXT, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    everywhere = [words for page in pages for words in commands(blocks_of(page))]
    shown = {started[0] for words in everywhere if (started := module_of(words))}
    jobs = {path.stem for path in (ROOT / "shards").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert shown >= {f"shards.{job}" for job in jobs} >= {"shards.video", "shards.verify"}
    assert shown >= {cli.module_of(job) for job in cli.JOBS if job != "demo"}
    assert ["make", "demo"] in commands(blocks_of(TEXT))
    assert ["make", "test"] in commands(blocks_of(TEXT))


def cases() -> dict[str, set[str]]:
    """Module -> flags that the README gives it."""
    flags: dict[str, set[str]] = {}
    for words in commands(blocks_of(TEXT)):
        if started := module_of(words):
            module, arguments = started
            flags.setdefault(module, set()).update(word for word in arguments if re.match(r"^-{1,2}[a-z]", word))
    return flags


@pytest.mark.parametrize(("module", "flags"), cases().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_flags_are_known(module, flags, capsys):
    job = importlib.import_module(module)
    assert re.search(r'^if __name__ == "__main__":\n    .*\bmain\(\)', Path(job.__file__).read_text(), flags=re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        job.main(["--help"])
    assert stop.value.code in (0, None)
    known = set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", capsys.readouterr().out))
    unknown = {flag for flag in flags if flag.replace("_", "-") not in known}
    assert not unknown, f"{module} has no {unknown}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(blocks_of(TEXT)):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)


def test_accelerate_configs_of_the_readme_exist():
    files = re.findall(r"--config_file (\S+)", TEXT)
    assert files
    assert all((ROOT / file).is_file() for file in files)
