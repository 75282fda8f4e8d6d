"""Tables of contents against the standard library's, and tars that claim what is not so."""

from __future__ import annotations

import io
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.tar_index import Member, TarError, members

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=180).filter(
    lambda name: name.strip("/. ") and not name.endswith("/")
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                         tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])  # fmt: skip


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, layout: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(layout)


def read(data: bytes) -> list[Member]:
    return [member for member in members(io.BytesIO(data), 1000) if not member.kind]


@given(
    members=st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=1100)), max_size=6),
    layout=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_finds_what_tarfile_finds(members, layout):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "to/" + name
            info.size = len(content) if kind in tarfile.REGULAR_TYPES else 0
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert read(buffer.getvalue()) == expected
    contents = [content for _, kind, content in members if kind in tarfile.REGULAR_TYPES]
    assert [buffer.getvalue()[m.offset : m.offset + m.size] for m in expected] == contents


def test_short_names_with_a_prefix():
    long = "p" * 120 + "/" + "n" * 90
    assert read(header(long, layout=tarfile.USTAR_FORMAT) + bytes(1024)) == [Member(long, 512, 0)]


@pytest.mark.parametrize("layout", ["gnu", "posix"])
def test_sparse_files_are_passed_over(tmp_path, layout):
    with (tmp_path / "holes").open("wb") as file:
        for piece in range(30):  # more pieces than fit into a header
            file.seek(piece << 20)
            file.write(b"x" * 4096)
    (tmp_path / "plain").write_bytes(b"plain")
    tar = tmp_path / "sparse.tar"
    command = ["tar", "--create", "--sparse", f"--format={layout}", "--file", str(tar), "holes", "plain"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert tar.stat().st_size < 1 << 20
    (member,) = read(tar.read_bytes())
    assert (member.name, tar.read_bytes()[member.offset :][: member.size]) == ("plain", b"plain")


WHOLE = header("a.json", size=3) + b"one".ljust(512, b"\0") + header("b.json", size=3) + b"two".ljust(512, b"\0") + bytes(1024)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG" * 400, "not a tar, or is damaged, at byte 0"),
        (WHOLE[:1024] + header("b", size=10**15), "at byte 1024 claims 1000000000000000 bytes"),
        (WHOLE[:1536] + b"tw", "ends at byte 1538, and member 'b.json' at byte 1024 claims 3 bytes"),
        (WHOLE[:1100], "damaged, at byte 1024"),
        (header("a", b"L", size=1 << 30), "claims 1073741824 bytes"),
        (header("a", b"x", size=1 << 17) + bytes(1 << 17), "extended header of member 'a' at byte 0 claims 131072 bytes"),
        (header("a", b"x", size=512) + b"99 path=b\n".ljust(512, b"\0") + header("b"), "malformed"),
        (header("a", b"x", size=512) + b"9999 path=b\n".ljust(512, b"\0") + header("b"), "malformed"),
        (header("a", b"x", size=512) + b"-9 path=b\n".ljust(512, b"\0") + header("b"), "malformed"),
        (header("a", b"x", size=512) + b"9 size=-1\n".ljust(512, b"\0") + header("b"), "malformed|no number"),
        (header("a", b"x", size=512) + b"11 size=-1\n".ljust(512, b"\0") + header("b"), "not a number"),
    ],
)
def test_what_is_not_so_is_refused(data, message):
    with pytest.raises(TarError, match=message):
        read(data)


@pytest.mark.parametrize("field", [b"\xff" * 12, b"\xff" * 11 + b"\0", b"-0000000512\0", b"99999999999\0"])
def test_sizes_that_step_back_are_refused(field):
    """tarfile takes the first for -1 and, in some versions, goes round for ever."""
    block = bytearray(header("a.json"))
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(TarError, match="at byte 0 claims a size that is not a number"):
        read(bytes(block) * 3)


def test_more_headers_than_were_asked_for_are_refused():
    with pytest.raises(TarError, match=r"more than 7 headers.* member 'a' at byte 3584"):
        list(members(io.BytesIO(header("a", tarfile.LNKTYPE) * 8), 7))
    assert len(list(members(io.BytesIO(header("a", tarfile.LNKTYPE) * 7), 7))) == 7


class Counted(io.BytesIO):
    """Counts the bytes that are read of it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found


def test_a_chain_of_headers_is_read_once():
    """tarfile calls itself for each and ends in a RecursionError."""
    chain = header("a", b"x") * 100_000
    file = Counted(chain + WHOLE)
    assert list(members(file, 200_000)) == [Member(m.name, m.offset + len(chain), m.size) for m in read(WHOLE)]
    assert file.taken <= len(chain + WHOLE)


@given(cut=st.integers(0, len(WHOLE) - 1), place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_damage_ends_in_an_error_or_in_true_places(cut, place, value):
    damaged = bytearray(WHOLE)
    damaged[place] = value
    for data in (WHOLE[:cut], bytes(damaged)):
        found = []
        try:
            for member in members(io.BytesIO(data), 10):
                found.append(member)
        except TarError:
            pass
        assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in found)
