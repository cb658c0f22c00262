"""Tables in parts: the cut, what rows cost, and whole runs of models with tied and own heads."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgvq_quantizer import cli, evaluate, table_parts
from mgvq_quantizer.batches import length_batches
from mgvq_quantizer.evaluate_text import evaluate_text
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.plain_text import read_passages, text_sample
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.table_parts import assumed_use, choose_parts, measured_use, split_tables
from mgvq_quantizer.teacher import Student, ask_teacher, heldout_kl
from mgvq_runtime import LLM, SamplingParams
from mgvq_runtime.checkpoint.bits import counted_bits_per_weight
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ConfigError
from mgvq_runtime.layers.row_parts import SplitEmbedding, SplitLinear
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents
from tests.runtime.conftest import write_tokenizer
from tests.runtime.models.decoders import write_decoder_folder

WORDS = "green squares stand over white ones while seven grey stars fall by two thin lines "
VOCABULARY = 1100
"""Four runs of rows, the last one longer."""
RECIPE = QuantRecipe(
    **{**QUICK, "codec": "trellis", "window": 8, "max_samples": 6, "embedding_bits": 3.5}
)


@pytest.fixture(scope="module", params=["qwen2-tied", "qwen2-untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a head of its own, and one with."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder)
    write_decoder_folder(folder, request.param, vocab_size=VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(np.random.default_rng(0).choice(WORDS.split(), 1500)))
    return file


@pytest.fixture(scope="module")
def quantized(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "checkpoint"
    report = quantize(model, output, RECIPE, text, show_progress=False)
    assert 0.0 < report.kl <= report.kl_rounded
    return output


def zipf(rows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    use = 1.0 / (np.arange(rows) + 64.0)
    return use / use.sum()


def test_the_cut_is_the_best_of_all_at_its_price() -> None:
    rng = np.random.default_rng(0)
    rates, tables = np.array([1, 2, 4]), np.array([300, 500, 900])
    weights = np.array([100, 100, 100, 100, 140])
    for _ in range(30):
        losses = rng.exponential(size=(5, 1)) * 4.0**-rates
        price = 10 ** rng.uniform(-5, -2.5)
        entry = price * (tables + table_parts._PART_SHARE * weights.sum())

        def cost(path: tuple[int, ...], losses=losses, price=price, entry=entry) -> float:  # type: ignore[no-untyped-def]
            total = sum(losses[b, r] + price * weights[b] * rates[r] for b, r in enumerate(path))
            starts = [r for b, r in enumerate(path) if b == 0 or path[b - 1] != r]
            return float(total + sum(entry[r] for r in starts))

        found = table_parts._cheapest(losses, weights, rates, price, tables)
        best = min(map(cost, itertools.product(range(3), repeat=5)))
        assert cost(tuple(found.tolist())) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("codec", ["lookup", "trellis"])
@pytest.mark.parametrize("bits", [2.3, 3.4])
def test_common_rows_get_more_bits_within_the_budget(codec: str, bits: float) -> None:
    rows, width = 49_152, 576
    parts = choose_parts(zipf(rows), width, QuantRecipe(codec=codec, embedding_bits=bits))
    assert sum(n for n, _ in parts) == rows
    rates = [rate for _, rate in parts]
    assert rates == sorted(rates, reverse=True)
    assert 3 <= len(rates) <= 6
    assert bits - 0.1 < sum(n * rate for n, rate in parts) / rows < bits
    ends = np.cumsum([n for n, _ in parts])
    loss = sum(
        part.sum() * 4.0**-r for part, r in zip(np.split(zipf(rows), ends), rates, strict=False)
    )
    assert loss < 0.6 * 4.0**-bits, "what equal bits would lose"


def test_rows_at_the_end_may_be_common_too() -> None:
    use = zipf(20_000)
    use[-300:] += 0.05 / 300  # as the tokens are that mark who speaks
    parts = choose_parts(use, 576, QuantRecipe(codec="trellis", embedding_bits=3.4))
    assert parts[-1][1] == parts[0][1] > parts[-2][1]


def test_too_few_bits_for_a_table_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not pay for the tables of 300 rows"):
        choose_parts(zipf(300), 8, QuantRecipe(codec="trellis", embedding_bits=2.5))


@torch.no_grad()
def test_use_is_what_noise_in_rows_costs(model: Path, text: Path) -> None:
    """Noise of one size, in all rows that are used much, costs the divergence said of them."""
    graph = load_model(model)
    passages = read_passages(text, Tokenizer.from_folder(model))
    samples = [text_sample(passage) for passage in passages]
    batches = length_batches(samples, graph.device)
    reference = ask_teacher(graph, batches, {})
    uses = measured_use(graph, reference, samples)
    assert [float(use.sum()) for use in uses.values()] == pytest.approx([1.0] * len(uses))
    assert list(uses) == list(assumed_use(graph))
    for name, use in uses.items():
        weight = graph.get_submodule(name).weight
        plain = weight.clone()
        noise = 0.05 * plain.square().mean(1, keepdim=True).sqrt()
        noise = noise * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
        often = use > use.median() * 3
        assert 0.005 < float(often.double().mean()) < 0.5
        costs = []
        for rows in (often, ~often):
            weight.copy_(plain + noise * rows[:, None])
            costs.append(heldout_kl(Student(graph), {}, batches, {}, reference))
        weight.copy_(plain)
        share = costs[0] / sum(costs)
        assert share == pytest.approx(float(use[often].sum()), abs=0.15), name


def test_a_model_in_parts_says_the_same(model: Path) -> None:
    graph = load_model(model)
    ids = torch.tensor([0, 255, 256, 1099, 512, 3])
    rows, hidden = graph.embed(ids), torch.randn(3, graph.config.text_config.hidden_size)
    said = graph.logits(hidden)
    bands = split_tables(graph, assumed_use(graph), RECIPE)
    assert isinstance(graph.model.embed_tokens, SplitEmbedding)
    assert torch.equal(graph.embed(ids), rows)
    torch.testing.assert_close(graph.logits(hidden), said)
    tables = 1 if graph.config.tie_word_embeddings else 2
    assert isinstance(graph.lm_head, SplitLinear) == (tables == 2)
    assert len(bands) >= 2 * tables
    kept = load_model(model)
    assert not split_tables(kept, assumed_use(kept), QuantRecipe(embedding_bits=3.5, keep="*"))
    assert not QuantRecipe(embedding_bits=3).has_row_parts
    assert torch.equal(kept.embed(ids), rows)


def test_a_checkpoint_in_parts_is_read_counted_and_written_alike_again(
    model: Path, text: Path, quantized: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(quantized)
    assert opened.quantization is not None
    assert opened.quantization.format_version == 2
    parts = [name for name in opened.quantization.matrices if ".parts." in name]
    is_tied = open_checkpoint(model).config["tie_word_embeddings"]
    assert {name.partition(".parts.")[0] for name in parts} == (
        {"model.embed_tokens"} if is_tied else {"model.embed_tokens", "lm_head"}
    )
    assert "model.embed_tokens.parts.1" in parts
    bits = counted_bits_per_weight(opened.quantization.matrices)["embedding"]
    assert bits < 3.5 + 16 / 64 + 0.1, "codes and tables, row scales, order"
    quantize(model, tmp_path / "again", RECIPE, text, show_progress=False)
    assert contents(tmp_path / "again") == contents(quantized)


def test_block_by_block_gives_the_same_parts(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, tuning_steps=0)
    for name, by_block in (("whole", False), ("stream", True)):
        quantize(model, tmp_path / name, recipe, text, show_progress=False, by_block=by_block)
    assert contents(tmp_path / "stream") == contents(tmp_path / "whole")


def test_a_checkpoint_in_parts_answers_as_its_dense_twin(
    model: Path, text: Path, quantized: Path
) -> None:
    """Kernels, the engine and evaluation see one model."""
    graph = load_model(quantized)
    assert graph.config.text_config.vocab_size == VOCABULARY
    dense = evaluate.to_dense(load_model(quantized))
    ids = torch.arange(0, VOCABULARY, 7)
    torch.testing.assert_close(graph.embed(ids), dense.embed(ids), rtol=1e-5, atol=1e-6)
    hidden = torch.randn(2, graph.config.text_config.hidden_size)
    torch.testing.assert_close(graph.logits(hidden), dense.logits(hidden), rtol=1e-4, atol=1e-4)
    assert evaluate_text(quantized, model, text, show_progress=False).kl < 1.0
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM(quantized, device="cpu", dtype="float32", max_model_len=64) as llm:
        (reply,) = llm.generate(["green squares"], greedy)
    assert reply.text


def test_a_plan_cuts_tables_too(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--plan", "--model", str(model), "--calibration", str(text), "--codec", "trellis"]
    words += ["--window", "8", "--bits", "2", "--allocation", "uniform", "--tuning-steps", "0"]
    sizes = []
    for bits in ("3", "3.5", "4"):
        assert cli.main([*words, "--embedding-bits", bits]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("bits a"))
        sizes.append(float(line.split("embedding ")[1].split(",")[0]))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("bits", [0.5, 5.5, 8.0])
def test_bits_beyond_the_codecs_rates_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="embedding_bits must"):
        QuantRecipe(codec="trellis", embedding_bits=bits)
