"""manifest.json: the digest of everything in an MGVQ checkpoint (called by reader and writer).

Its bytes are canonical: the reader writes what it read again and compares, so not even a space can
change unnoticed, and its own digest is over itself without that field. It protects against damage,
not against somebody who rewrites the manifest as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq_runtime.checkpoint.files import (
    digest,
    digest_file,
    is_file_name,
    parse_json,
    read_bytes,
    to_json_bytes,
)
from mgvq_runtime.checkpoint.spec import FORMAT_VERSION, READ_VERSIONS
from mgvq_runtime.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.json"
SHARD_SUFFIX = ".safetensors"
RUNTIME_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""Files the runtime opens by name: one that the manifest does not list would change the answers."""

DIGEST = re.compile(r"[0-9a-f]{32}")
DAMAGED = "copy it again from where the folder came from"


@dataclass(frozen=True)
class FileEntry:
    """A file digested whole."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        _check_entry(self.size, self.digest)


@dataclass(frozen=True)
class ShardEntry:
    """A safetensors file, digested in parts."""

    size: int
    header_digest: str
    tensors: Mapping[str, str]
    """Digest of every tensor by name."""

    def __post_init__(self) -> None:
        _check_entry(self.size, self.header_digest, *self.tensors.values())


@dataclass(frozen=True)
class Manifest:
    """What lies in the folder."""

    files: Mapping[str, FileEntry]
    shards: Mapping[str, ShardEntry]
    format_version: int = FORMAT_VERSION
    """That of config.json."""

    def __post_init__(self) -> None:
        if type(self.format_version) is not int or self.format_version not in READ_VERSIONS:
            raise ValueError(f"format_version must be one of {READ_VERSIONS}")

    def to_bytes(self) -> bytes:
        """Return the file's bytes, its own digest included."""
        body: dict[str, Any] = {
            "format_version": self.format_version,
            "files": {n: {"bytes": f.size, "xxh3_128": f.digest} for n, f in self.files.items()},
            "shards": {
                name: {
                    "bytes": shard.size,
                    "header_xxh3_128": shard.header_digest,
                    "tensors": dict(shard.tensors),
                }
                for name, shard in self.shards.items()
            },
        }
        return to_json_bytes(body | {"manifest_xxh3_128": digest(to_json_bytes(body))})


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`; the files it lists are not opened.

    Raises:
        CheckpointError: if it is missing, damaged, of another version, or names a file that cannot
            be inside the folder.
    """
    path = folder / MANIFEST_NAME
    data = read_bytes(path)
    body = parse_json(data, path)
    version = body.get("format_version")
    if type(version) is int and version > max(READ_VERSIONS):
        raise CheckpointError(
            f"{path} is of format version {version}; this version of MGVQ Runtime reads "
            f"{READ_VERSIONS}: use a later one"
        )
    try:
        manifest = Manifest(
            {n: FileEntry(f["bytes"], f["xxh3_128"]) for n, f in body["files"].items()},
            {
                n: ShardEntry(s["bytes"], s["header_xxh3_128"], dict(s["tensors"]))
                for n, s in body["shards"].items()
            },
            body["format_version"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has not the form of a manifest: {DAMAGED}") from error
    if manifest.to_bytes() != data:
        raise CheckpointError(f"{path} is damaged: {DAMAGED}")
    if bad := [name for name in (*manifest.files, *manifest.shards) if not is_file_name(name)]:
        raise CheckpointError(f"{path} names files that cannot be in a checkpoint: {bad}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> list[str]:
    """Compare a folder with its manifest, shards by their size only.

    Args:
        folder: the checkpoint.
        manifest: what should be in it.

    Returns:
        One sentence for every file that is missing, changed or unlisted; [] if all is well.
    """
    problems = []
    for name, entry in manifest.files.items():
        problem = _check_size(folder / name, entry.size)
        if not problem and digest_file(folder / name) != entry.digest:
            problem = f"{name} is damaged: {DAMAGED}"
        problems += [problem] if problem else []
    for name, shard in manifest.shards.items():
        problem = _check_size(folder / name, shard.size)
        problems += [problem] if problem else []
    listed = {*manifest.files, *manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.name not in listed and (path.suffix == SHARD_SUFFIX or path.name in RUNTIME_FILES):
            problems.append(f"{path.name} does not belong to this checkpoint: remove it")
    return problems


def _check_entry(size: object, *digests: object) -> None:
    """Refuse what is no size or digest; a null would otherwise check nothing."""
    if type(size) is not int or not all(
        isinstance(text, str) and DIGEST.fullmatch(text) for text in digests
    ):
        raise ValueError("sizes must be whole numbers, digests 32 hexadecimal digits")


def _check_size(path: Path, expected: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing: {DAMAGED}"
    if (size := path.stat().st_size) != expected:
        return f"{path.name} has {size} bytes, the manifest says {expected}: {DAMAGED}"
    return None
