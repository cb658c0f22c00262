"""Names of parts: what is found, what is refused, and which version of the format knows them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgvq_kernels.layout import VQLayout
from mgvq_runtime.checkpoint.row_parts import is_part, part_name, row_parts
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.layers.row_parts import SplitEmbedding, SplitLinear


def test_parts_are_found_by_their_names() -> None:
    shapes = {f"lm_head.parts.{i}": (10 * i + 10, 8) for i in range(11)}
    shapes |= {"model.embed_tokens": (99, 8), "visual.parts.0": (4, 4)}
    assert row_parts(shapes) == {"lm_head": [10 * i + 10 for i in range(11)]}
    assert part_name("lm_head", 3) == "lm_head.parts.3"
    assert is_part("model.embed_tokens.parts.0")
    assert not is_part("model.embed_tokens")


@pytest.mark.parametrize("numbers", [("1",), ("0", "2"), ("0", "x"), ("00",)])
def test_a_missing_part_is_named(numbers: tuple[str, ...]) -> None:
    shapes = {f"lm_head.parts.{number}": (8, 8) for number in numbers}
    with pytest.raises(ValueError, match=f"lm_head has parts {', '.join(numbers)}; they must be"):
        row_parts(shapes)


def test_parts_need_version_2() -> None:
    spec = QuantizationSpec({"lm_head.parts.0": MatrixSpec(VQLayout.uniform(8, 8, 2))})
    assert spec.format_version == 2
    entry = spec.to_json() | {"format_version": 1}
    with pytest.raises(CheckpointError) as caught:
        QuantizationSpec.from_json(entry)
    assert "lm_head.parts.0: a part needs format_version 2, the file says 1" in str(caught.value)


def test_rows_come_from_their_parts() -> None:
    sizes, table = [3, 1, 4], torch.randn(8, 6)
    parts = [nn.Embedding.from_pretrained(rows) for rows in table.split(sizes)]
    ids = torch.tensor([7, 0, 3, 2, 4, 3])
    assert torch.equal(SplitEmbedding(parts, sizes)(ids), table[ids])
    assert SplitEmbedding(parts, sizes)(ids[:0]).shape == (0, 6)
    heads = []
    for rows in table.split(sizes):
        heads.append(nn.Linear(6, len(rows), bias=False))
        heads[-1].weight = nn.Parameter(rows)
    hidden = torch.randn(2, 6)
    torch.testing.assert_close(SplitLinear(heads)(hidden), hidden @ table.T)
