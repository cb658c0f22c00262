"""Two hundred ways to damage a checkpoint: each is refused at load, in one kind of error."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mgvq_runtime.checkpoint.files import digest, to_json_bytes
from mgvq_runtime.checkpoint.manifest import FileEntry, Manifest, ShardEntry, read_manifest
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.tensor_file import open_tensor_file
from mgvq_runtime.errors import CheckpointError
from tests.runtime.checkpoint.conftest import flat, read_all
from tests.runtime.checkpoint.make_golden import GOLDEN

Draw = random.Random


def some_file(folder: Path, draw: Draw) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def flip_a_bit(folder: Path, draw: Draw) -> str:
    path = some_file(folder, draw)
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"bit flipped in {path.name} at {place}"


def truncate(folder: Path, draw: Draw) -> str:
    path = some_file(folder, draw)
    size = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size}"


def append(folder: Path, draw: Draw) -> str:
    path = some_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.choice([b"\0", b" ", b"\n", b"{}", b"\0" * 64]))
    return f"{path.name} grew"


def drop(folder: Path, draw: Draw) -> str:
    path = some_file(folder, draw)
    path.unlink()
    return f"{path.name} dropped"


def rename(folder: Path, draw: Draw) -> str:
    path = some_file(folder, draw)
    path.rename(path.with_name(draw.choice([path.name + ".bak", "x" + path.name, "model.bin"])))
    return f"{path.name} renamed"


def swap_files(folder: Path, draw: Draw) -> str:
    first, second = draw.sample(sorted(folder.iterdir()), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name} swapped"


def swap_tensors(folder: Path, draw: Draw) -> str:
    """Exchange the bytes of two tensors of one size, in one shard, that are not equal."""
    pairs = []
    for path in sorted(folder.glob("*.safetensors")):
        places = list(open_tensor_file(path).places.items())
        data = path.read_bytes()
        for i, (first, a) in enumerate(places):
            for second, b in places[i + 1 :]:
                ours, theirs = (data[p.start : p.start + p.size] for p in (a, b))
                if a.size == b.size and ours != theirs:
                    pairs.append((path, first, a, second, b))
    path, first, a, second, b = draw.choice(pairs)
    data = bytearray(path.read_bytes())
    ours, theirs = (bytes(data[p.start : p.start + p.size]) for p in (a, b))
    data[a.start : a.start + a.size], data[b.start : b.start + b.size] = theirs, ours
    path.write_bytes(data)
    return f"{first} and {second} swapped"


def pad_header(folder: Path, draw: Draw) -> str:
    """Change a shard's header so that it means the same: one more space before the tensors."""
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * 8
    path.write_bytes((length + 8).to_bytes(8, "little") + header + data[8 + length :])
    return f"the header of {path.name} padded"


DAMAGES: list[tuple[Callable[[Path, Draw], str], int]] = [
    (flip_a_bit, 80),
    (truncate, 30),
    (append, 20),
    (drop, 15),
    (rename, 15),
    (swap_files, 15),
    (swap_tensors, 15),
    (pad_header, 10),
]


def test_every_damage_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    read_all(open_checkpoint(checkpoint_folder))  # the undamaged one loads
    draw = random.Random(20260808)
    damages = [damage for damage, count in DAMAGES for _ in range(count)]
    assert len(damages) == 200
    for i, damage in enumerate(damages):
        folder = tmp_path / f"damaged-{i}"
        shutil.copytree(checkpoint_folder, folder)
        what = damage(folder, draw)
        loaded = True
        try:
            read_all(open_checkpoint(folder))
        except CheckpointError:
            loaded = False
        assert not loaded, f"{what}: loaded all the same"
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "manifest.json"])
def test_every_single_bit_of_the_small_files_counts(checkpoint_folder: Path, name: str) -> None:
    path = checkpoint_folder / name
    data = path.read_bytes()
    draw = random.Random(1)
    for place in draw.sample(range(len(data)), min(len(data), 150)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            open_checkpoint(checkpoint_folder)
    path.write_bytes(data)
    open_checkpoint(checkpoint_folder)


def test_the_error_lists_everything_and_says_what_to_do(checkpoint_folder: Path) -> None:
    (checkpoint_folder / "tokenizer.json").unlink()
    (checkpoint_folder / "config.json").write_bytes(b"{}")
    (checkpoint_folder / "extra.safetensors").write_bytes(b"")
    (checkpoint_folder / "notes.txt").write_text("ignored")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint_folder)
    problems = caught.value.problems
    assert len(problems) == 3
    assert "config.json has 2 bytes" in problems[0]
    assert "tokenizer.json is missing: copy it again" in problems[1]
    assert "extra.safetensors does not belong to this checkpoint: remove it" in problems[2]
    assert all(problem in str(caught.value) for problem in problems)


def test_every_damaged_tensor_is_named(checkpoint_folder: Path) -> None:
    names = []
    for path in sorted(checkpoint_folder.glob("*.safetensors")):
        name, place = next(reversed(open_tensor_file(path).places.items()))
        data = bytearray(path.read_bytes())
        data[place.start] ^= 1
        path.write_bytes(data)
        names.append(name)
    assert len(names) >= 3
    for consume in (read_all, lambda checkpoint: checkpoint.verify()):
        with pytest.raises(CheckpointError) as caught:
            consume(open_checkpoint(checkpoint_folder))
        assert len(caught.value.problems) == len(names)
        assert all(any(f"tensor {n} is damaged" in p for p in caught.value.problems) for n in names)


def test_a_shard_that_shrinks_after_opening_is_an_error(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    for path in checkpoint_folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="needs .* bytes at"):
        read_all(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
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
    ],
)
def test_an_unlisted_file_the_runtime_would_open_is_refused(
    checkpoint_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = checkpoint_folder
    if (folder / name).exists():  # listed there
        folder = tmp_path / "golden"
        shutil.copytree(GOLDEN, folder)
    assert not (folder / name).exists()
    (folder / name).write_text('{"eos_token_id": 7}')
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} does not belong"):
        open_checkpoint(folder)


def reseal(folder: Path) -> None:
    """Write a manifest that fits what lies in the folder, as an attacker would."""
    old = read_manifest(folder)
    files = {}
    for name in old.files:
        data = (folder / name).read_bytes()
        files[name] = FileEntry(len(data), digest(data))
    shards = {}
    for name in old.shards:
        data = (folder / name).read_bytes()
        file = open_tensor_file(folder / name)
        tensors = {t: digest(data[p.start : p.start + p.size]) for t, p in file.places.items()}
        shards[name] = ShardEntry(len(data), file.header_digest, tensors)
    (folder / "manifest.json").write_bytes(Manifest(files, shards).to_bytes())


def edit_spec(folder: Path, edit: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    edit(config["quantization_config"])
    (folder / "config.json").write_bytes(to_json_bytes(config))
    reseal(folder)


def wreck(value: object, draw: Draw) -> object:
    """Return a JSON value with one random place replaced, removed or added."""
    junk = [None, True, -1, 0, 3, 10**400, 1e308, "", "mgvq", [], {}, [[]], 2**63, "lookup"]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        action = draw.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return {**value, draw.choice(["vector_dims", "x", "shape ", ""]): value[key]}
        return {**value, key: wreck(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], wreck(value[place], draw), *value[place + 1 :]]
    return draw.choice(junk)


def test_a_wrecked_spec_with_right_digests_is_an_error_or_the_same(
    checkpoint_folder: Path,
) -> None:
    """Hostile metadata: only CheckpointError may come, or exactly the weights that are there."""
    path = checkpoint_folder / "config.json"
    original = json.loads(path.read_bytes())
    given = dict(open_checkpoint(checkpoint_folder).vq_weights())
    draw = random.Random(7)
    refused = 0
    for _ in range(150):
        wrecked = {**original, "quantization_config": wreck(original["quantization_config"], draw)}
        path.write_bytes(json.dumps(wrecked).encode())
        reseal(checkpoint_folder)
        try:
            read = dict(open_checkpoint(checkpoint_folder).vq_weights())
        except CheckpointError:
            refused += 1
            continue
        assert list(read) == list(given)
        for name, weight in read.items():
            assert weight.layout == given[name].layout
            assert all(map(torch.equal, flat(weight), flat(given[name])))
    assert refused > 90


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: spec.update(format_version=2), "format_version is 2"),
        (lambda spec: spec.update(quant_method="gptq"), "quantized with 'gptq'"),
        (lambda spec: spec.update(recipee={}), "did you mean 'recipe'"),
        (lambda spec: spec["bits_per_weight"].update(decoder=2.0), "stated as 2.0, counted"),
        (lambda spec: spec["bits_per_weight"].update(projector=2.0), "no matrix belongs"),
        (lambda spec: spec["matrices"].pop("model.embed_tokens"), "neither part of a matrix"),
        (lambda spec: spec["matrices"].update({"a/../b": {}}), "a/../b"),
    ],
)
def test_contradictions_are_explained(
    checkpoint_folder: Path, edit: Callable[[dict], None], message: str
) -> None:
    edit_spec(checkpoint_folder, edit)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint_folder)
    assert message in str(caught.value)


def test_a_spec_of_other_shapes_names_each_tensor(checkpoint_folder: Path) -> None:
    def grow(spec: dict) -> None:
        spec["matrices"]["model.embed_tokens"]["shape"][0] = 2**40
        spec["bits_per_weight"] = {}

    edit_spec(checkpoint_folder, grow)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint_folder)
    assert set(caught.value.problems) == {
        "tensor model.embed_tokens.codes.0.0 is U8 [33, 8], the spec says U8 [1099511627776, 8]",
        "tensor model.embed_tokens.scales is F16 [33], the spec says F16 [1099511627776]",
    }


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/b.json", ".hidden", ""])
def test_the_manifest_cannot_name_files_elsewhere(checkpoint_folder: Path, name: str) -> None:
    old = read_manifest(checkpoint_folder)
    files = {**old.files, name: FileEntry(1, "0" * 32)}
    (checkpoint_folder / "manifest.json").write_bytes(Manifest(files, old.shards).to_bytes())
    with pytest.raises(CheckpointError, match="cannot be in a checkpoint"):
        open_checkpoint(checkpoint_folder)


def test_a_null_digest_checks_nothing_and_is_refused(checkpoint_folder: Path) -> None:
    path = checkpoint_folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["manifest_xxh3_128"]
    shard = next(iter(body["shards"].values()))
    shard["tensors"] = dict.fromkeys(shard["tensors"], None)
    seal = {"manifest_xxh3_128": digest(to_json_bytes(body))}
    path.write_bytes(to_json_bytes(body | seal))
    with pytest.raises(CheckpointError, match="form of a manifest"):
        open_checkpoint(checkpoint_folder)


def test_a_later_manifest_asks_for_a_later_runtime(checkpoint_folder: Path) -> None:
    path = checkpoint_folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 9'))
    with pytest.raises(CheckpointError, match="format version 9"):
        open_checkpoint(checkpoint_folder)
