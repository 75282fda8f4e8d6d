"""The README and the docs tell the truth: the tree is the tree, commands exist, their flags are known, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from vfi import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# test_cluster_doc.py looks at the commands of one, and those of the other are as they were on their day
OTHERS = {ROOT / "docs" / "cluster.md", ROOT / "docs" / "experiments.md"}
TEXT = "\n".join(page.read_text() for page in PAGES if page not in OTHERS)
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)


def tree_paths() -> list[str]:
    """Paths of the block under 'The tree', by indentation."""
    block = next(body for _, body in BLOCKS if body.startswith("README.md"))
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


def commands() -> list[list[str]]:
    """Words of every command line of the bash blocks, without comments and environment settings."""
    found = []
    for kind, body in BLOCKS:
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
        name = words[at + 1]
        return (name, words[at + 2 :]) if name.partition(".")[0] in ("launch", "shards", "vfi") else None
    return None


def test_every_job_is_shown():
    shown = {started[0] for words in commands() if (started := module_of(words))}
    jobs = {path.stem for path in (ROOT / "shards").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert shown >= {f"shards.{job}" for job in jobs} >= {"shards.video", "shards.verify"}
    assert shown >= {cli.module_of(job) for job in cli.JOBS if job != "demo"}
    assert ["make", "demo"] in commands()
    assert ["make", "test"] in commands()


def cases() -> dict[str, set[str]]:
    """Module -> flags that the pages give it."""
    flags: dict[str, set[str]] = {}
    for words in commands():
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
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)


def test_accelerate_configs_exist():
    files = re.findall(r"--config_file (\S+)", TEXT)
    assert files
    assert all((ROOT / file).is_file() for file in files)


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names under which a page's headings are linked: in lower case, without punctuation, with - for each space."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "findings" / "README.md", ROOT / "recipes" / "README.md"], ids=lambda page: page.name
)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page))
    targets = [((page.parent / path).resolve() if path else page, anchor) for path, anchor in links]
    assert not [str(target) for target, _ in targets if not target.exists()]
    assert not [f"{target}#{anchor}" for target, anchor in targets if anchor and anchor not in anchors(target)]
