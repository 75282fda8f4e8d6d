"""Take three stills of each clip of a shard folder, as photographs for `shards.synthetic --photographs`.

python recipes/stills.py SHARDS OUT
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path


def main(shards: Path, out: Path) -> None:
    """Write the first frames of the first, the middle and the last sample of each clip, with the bytes that the shards hold."""
    clips: dict[str, list[tuple[Path, str]]] = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, extension = name.split(".", 1)
                if extension.startswith("im1."):
                    clips.setdefault(key.rpartition("-")[0], []).append((path, name))
    out.mkdir(parents=True, exist_ok=True)
    for clip, frames in clips.items():
        for number in sorted({0, len(frames) // 2, len(frames) - 1}):
            path, name = frames[number]
            with tarfile.open(path) as tar:
                file = tar.extractfile(name)
                assert file is not None, f"{path} lists {name} as something else than a file"
                (out / f"{clip}-{number}{Path(name).suffix}").write_bytes(file.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
