"""Quantizers side by side on a tiny model: rows, resuming, table, plot, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mgvq_quantizer import evaluate_cli
from mgvq_quantizer import recipe as recipe_module
from mgvq_quantizer.baselines import bench, plot, tables
from mgvq_quantizer.baselines.bench import Bench, Options
from mgvq_quantizer.baselines.cli import main, read_checkpoint, read_rates
from mgvq_quantizer.baselines.comparison import compare
from mgvq_quantizer.baselines.interface import Layer, Quantized
from mgvq_quantizer.baselines.methods import Method, find_methods
from mgvq_quantizer.baselines.ours import VARIANTS, Variant
from mgvq_quantizer.baselines.rows import Comparison, Row
from mgvq_quantizer.baselines.rsavq import channel_scores, rsavq
from mgvq_quantizer.baselines.through_model import decoder_linears, fishers_of
from mgvq_quantizer.baselines.tuned import tune_decoder
from mgvq_quantizer.batches import embed, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.calibration import load_conversations, prepare
from mgvq_quantizer.evaluate import Marks, evaluate
from mgvq_quantizer.evaluate_text import evaluate_text
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor

MARKS = Marks(0.1, 0.01, 0.9, 0.8, 0.02, 0.85, {"all": 0.8}, {"all": 0.85}, 100, 300)


def test_the_command_compares_and_adds_to_what_is_there(
    dense: Path,
    quantized: tuple[Path, Report],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    words = ["compare", "--model", str(dense), "--output", str(output), "--bits", "2.25,4.25"]
    words += ["--device", "cpu", "--limit", "6", "--checkpoint", f"ours={quantized[0]}"]
    text = tmp_path / "text.txt"
    text.write_text(
        "A red bar stands left of a blue one, and nothing else is in the picture. " * 30
    )
    words += ["--text", str(text)]
    assert evaluate_cli.main([*words, "--methods", "rtn,gptq"]) == 0
    first = json.loads((output / "compare.json").read_text())["rows"]
    by_key = {(row["label"], row["target"]): row for row in first}
    assert by_key["ours", 2.0]["quantized"] == "decoder, embedding, projector, vision"
    assert by_key["ours", 2.0]["marks"]["kl"] == pytest.approx(
        evaluate(quantized[0], dense, limit=6, show_progress=False).kl, rel=1e-4
    )
    read = evaluate_text(quantized[0], dense, text, show_progress=False)
    assert by_key["ours", 2.0]["text"]["kl"] == pytest.approx(read.kl, rel=1e-4)
    assert by_key["ours", 2.0]["text"]["perplexity"] == pytest.approx(read.perplexity, rel=1e-4)
    for row in first:
        found, original = row["text"]["perplexity"], row["text"]["reference_perplexity"]
        assert original == pytest.approx(read.reference_perplexity, rel=1e-4)
        assert found != original
    coarse, fine = (by_key["RTN, clip search", bits]["marks"]["kl"] for bits in (2.25, 4.25))
    assert 0.0 < fine < 0.5 * coarse
    printed, shown = capsys.readouterr()
    assert "question/s" in shown, "progress, with the time left"
    assert "| accuracy | perplexity | seeds |" in printed
    assert (output / "compare.md").read_text() in printed
    with Image.open(output / "compare.png") as picture:
        assert picture.size == (2100, 720), "the checkpoint is tuned, the baselines are not"

    asked = []
    run = Bench.run

    def note(self: Bench, method: Method | Variant, rows: Sequence[Row]) -> Iterator[Row]:
        asked.extend((method.name, row.target, row.seed) for row in rows)
        return run(self, method, rows)

    monkeypatch.setattr(Bench, "run", note)
    assert evaluate_cli.main([*words, "--methods", "rtn,quip", "--seeds", "0", "1"]) == 0
    assert asked == [("quip", 2.25, 0), ("quip", 2.25, 1), ("quip", 4.25, 0), ("quip", 4.25, 1)]
    rows = json.loads((output / "compare.json").read_text())["rows"]
    assert rows[: len(first)] == first
    assert "E8P has no setting" in rows[-1]["undefined"]
    printed = capsys.readouterr().out
    section = printed[printed.index("### 4.25 bits, untuned") :]
    assert "| LDLQ + E8P (QuIP#-like) | not defined |" in section
    text.write_text("Another text. " * 100)
    assert evaluate_cli.main([*words, "--methods", "rtn"]) == 2
    assert "text_fingerprint" in capsys.readouterr().err
    text.unlink()
    assert evaluate_cli.main([*words, "--methods", "rtn"]) == 2
    assert "text.txt" in capsys.readouterr().err
    words = words[:-2]

    assert evaluate_cli.main([*words, "--limit", "5"]) == 2
    assert "limit = 6, this run has 5" in capsys.readouterr().err


def test_our_own_runs_under_the_baselines_conditions(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    save = WorkFolder.save

    def note(self: WorkFolder, name: str, solution: Solution) -> None:
        saved.append(name)
        save(self, name, solution)

    monkeypatch.setattr(WorkFolder, "save", note)
    methods = find_methods(["rtn", "mgvq-uniform"])
    options = Options(limit=4, max_samples=16, tuning_steps=(12, 0))
    rows = compare(dense, tmp_path / "out", methods, [2.0, 2.25], [1], options=options)
    assert {name.partition(".layers.")[0] for name in saved} == {"model"}
    assert len(saved) == len(set(saved)), "the tuned row takes the matrices of the untuned one"
    ours = {(row.target, row.tuning_steps): row for row in rows if row.is_ours}
    assert "bits must be one of 1, 2, 3, 4, 8" in (ours[2.25, 0].undefined or "")
    assert ours[2.0, 12].label == "MGVQ, uniform, tuned 12 steps"
    untuned, tuned = ours[2.0, 0], ours[2.0, 12]
    assert untuned.marks is not None
    assert tuned.marks is not None
    assert untuned.marks.kl != tuned.marks.kl
    assert untuned.bits_per_weight == tuned.bits_per_weight
    assert [path.name for path in (tmp_path / "out" / "mgvq").iterdir()] == ["surveys"]

    recipe = QuantRecipe(
        bits=2.0,
        seed=1,
        allocation="uniform",
        tuning_steps=0,
        max_samples=16,
        keep="visual.*,model.embed_tokens",
    )
    quantize(dense, tmp_path / "alone", recipe, show_progress=False)
    alone = evaluate(tmp_path / "alone", dense, limit=4, show_progress=False)
    assert untuned.marks.kl == pytest.approx(alone.kl, rel=1e-4)
    assert untuned.bits_per_weight == pytest.approx(alone.bits_per_weight)


def test_what_another_run_left_behind_is_not_taken_for_this_one(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped at its first questions; then defaults that changed."""
    methods, output = find_methods(["mgvq-uniform"]), tmp_path / "out"

    def run(limit: int = 2) -> Row:
        (row,) = compare(dense, output, methods, [2.0], [0], options=Options(limit=limit))
        return row

    def stop(*_: object) -> Row:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(Bench, "_examine", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    left = output / "mgvq" / "mgvq-uniform-2-0-0"
    assert left.is_dir()
    with pytest.raises(ResumeError, match="limit = 2, this run has 3"):
        run(3)
    with monkeypatch.context() as counting:
        counting.setattr(bench, "quantize", lambda *_, **__: pytest.fail("it was finished"))
        first = run()
    assert not left.exists()
    (output / "compare.json").unlink()
    with monkeypatch.context() as stopping:
        stopping.setattr(Bench, "_examine", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert left.is_dir(), "of the first defaults"
    monkeypatch.setattr(recipe_module, "_DRAW_OUT", 0.0)
    second = run()
    assert (second.key, second.recipe) != (first.key, first.recipe)
    assert second.marks != first.marks
    monkeypatch.setattr(bench, "quantize", lambda *_, **__: pytest.fail("it is finished"))
    assert run().recipe == second.recipe


def test_every_ablation_is_a_recipe_that_differs() -> None:
    recipes = {QuantRecipe(**{"bits": 2.0, **variant.settings}) for variant in VARIANTS.values()}
    assert len(recipes) == len(VARIANTS)
    found = [method.name for method in find_methods(["rtn", "mgvq*", "mgvq"])]
    assert found == ["rtn", *VARIANTS]


def test_the_plot_has_a_panel_for_tuning_and_one_for_ablations(tmp_path: Path) -> None:
    rows = [
        Row(
            label + (", tuned 9 steps" if steps else ""),
            target,
            seed,
            bits_per_weight=target,
            tuning_steps=steps,
            is_ours=label != "A",
            marks=dataclasses.replace(MARKS, kl=kl / target / (1 + steps) + 0.001 * seed),
        )
        for label, kl in (("A", 0.2), ("MGVQ", 0.1), ("MGVQ, uniform", 0.15))
        for target in (2.0, 3.0)
        for steps in (0, 9)
        for seed in (0, 1)
    ]
    plot.plot(rows, tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.size == (2100, 1440)
    best = tables.best_baseline(tables.lines_of(rows[:4]), 3.0, 0)
    assert best is not None
    assert best.target == 2.0, "nothing at 3 bits untuned: a lower rate counts"
    plot.plot([row for row in rows if row.label != "MGVQ"], tmp_path / "some.png")
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.size == (2100, 1440), "tuned, the whole is there to compare with"
    plot.plot(
        [row for row in rows if "MGVQ," in row.label and not row.tuning_steps], tmp_path / "1.png"
    )
    with Image.open(tmp_path / "1.png") as picture:
        assert picture.size == (1200, 720), "nothing to compare an ablation with"
    plot.plot([], tmp_path / "none.png")
    axes = Figure().subplots()
    lines = [line for line in tables.lines_of(rows) if line.target == 3.0 and not line.tuning_steps]
    plot._ablations(axes, lines, ["uniform"], [("MGVQ", 2.0), ("MGVQ", 3.0)])
    ((mark,), (label,)) = axes.get_legend_handles_labels()
    assert label == "MGVQ changed, 3 bits"
    assert mark.lines[0].get_color() == "C1", "its own, though 2 bits are not in this panel"
    whole, changed = (
        next(line for line in tables.lines_of(rows) if line.label == label)
        for label in ("MGVQ", "MGVQ, uniform")
    )
    one_seed = dataclasses.replace(changed, rows=changed.rows[1:])
    assert plot._multiple(one_seed, whole)[0] == pytest.approx(0.076 / 0.051), "of that seed"
    both = (0.075 / 0.05, 0.076 / 0.051)
    assert plot._multiple(changed, whole) == pytest.approx((fmean(both), stdev(both)))
    elsewhere = dataclasses.replace(whole, rows=whole.rows[:1])
    assert plot._multiple(one_seed, elsewhere)[0] == pytest.approx(0.076 / 0.05), "of the means"
    headings = [s for s in tables.markdown(rows).splitlines() if s.startswith("###")]
    assert headings[:2] == ["### 2 bits, untuned", "### 2 bits, tuned 9 steps"]


def test_every_matrix_of_the_decoder_is_quantized_on_what_the_others_left(
    dense: Path, tmp_path: Path
) -> None:
    bench = Bench(dense, tmp_path, Options(limit=2), lambda text: None)

    def run(factor: float) -> tuple[Row, list[torch.Tensor]]:
        """Multiply every matrix instead of quantizing it; return the moments that were seen."""
        seen: list[torch.Tensor] = []

        def multiply(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
            seen.append(layer.moment)
            return Quantized({"w": factor * layer.weight}, lambda values: values["w"], 3)

        (row,) = bench.run(Method("x", "X", multiply), [Row("X", 2.0, 0)])
        return row, seen

    same, kept = run(1.0)
    assert same.marks is not None
    assert same.marks.kl == pytest.approx(0.0, abs=1e-6)
    row, moments = run(2.0)
    model = load_model(dense)
    names = [n for i in range(len(model.model.layers)) for n in decoder_linears(model, i)]
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    assert len(moments) == len(names) == 4 * len(model.model.layers)
    assert row.bits_per_weight == pytest.approx(3 * len(names) / weights)
    assert torch.allclose(kept[0], moments[0]), "nothing before the first matrix is changed"
    grown = float(moments[3].trace() / kept[3].trace())
    assert grown > 4, "gate and up are doubled before down_proj's inputs are looked at"


def test_tuning_lowers_what_a_baseline_lost_and_keeps_its_codes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[tuple[float, float]] = []
    tuned_results: list[Mapping[str, Quantized]] = []
    models: list[CausalLM] = []

    def note(model: CausalLM, results: Mapping[str, Quantized], *rest: Any) -> tuple[float, float]:
        outcomes.append(tune_decoder(model, results, *rest))
        tuned_results.append(results)
        models.append(model)
        return outcomes[-1]

    monkeypatch.setattr(bench, "tune_decoder", note)
    options = Options(limit=4, tuning_steps=(0, 12))
    method = find_methods(["gptvq-2d"])[0]
    rows = [Row(method.label, 2.25, 0, tuning_steps=steps) for steps in (0, 12)]
    untuned, row = Bench(dense, tmp_path, options, lambda _: None).run(method, rows)
    ((before, after),) = outcomes
    assert after < 0.95 * before
    assert row.marks is not None
    assert untuned.marks is not None
    assert row.marks.kl != untuned.marks.kl
    assert 2.25 * 0.9 <= (row.bits_per_weight or 0) <= 2.25 * 1.05
    for name, result in tuned_results[0].items():
        old, new = result.weight, models[0].get_submodule(name).weight
        groups = {}  # equal pairs of old weights have one code and one codebook in their rows
        for pair, now in zip(old[0, :16].view(-1, 2), new[0, :16].view(-1, 2), strict=True):
            assert torch.equal(groups.setdefault(tuple(pair.tolist()), now), now), name
    norm = models[0].model.norm.weight
    assert torch.equal(norm, norm.half().float())


def test_a_fisher_is_the_sum_over_plain_backwards(dense: Path) -> None:
    model = load_model(dense)
    processor = ChatProcessor.from_checkpoint(open_checkpoint(dense), model.config, 64)
    _, conversations = load_conversations(None, dense)
    samples = prepare(conversations[:3], processor, processor.tokenizer)
    features = encode_pictures(model, unique_pictures(samples), "cpu")
    fishers = fishers_of(model, samples, features)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    gradients = []
    for sample in samples:
        weight.requires_grad_(True)
        batch = make_batch([sample], "cpu")
        states = model(embed(model, batch, features), batch.forward)
        chances = model.logits(states[batch.answer_rows]).log_softmax(-1)
        tokens = torch.from_numpy(sample.token_ids[sample.is_answer.astype(bool)])
        (-chances[torch.arange(len(tokens)), tokens].sum()).backward()
        gradients.append(weight.grad.double())
        weight.grad = None
    G = torch.stack(gradients)
    O, I = weight.shape  # noqa: E741
    assert torch.allclose(fishers[name].gradient, G.mean(0), rtol=1e-3, atol=1e-7)
    expected = torch.einsum("soi,spi->op", G, G) / (3 * I)
    assert torch.allclose(fishers[name].outputs, expected, rtol=1e-3, atol=1e-9)
    expected = torch.einsum("soi,soj->ij", G, G) / (3 * O)
    assert torch.allclose(fishers[name].inputs, expected, rtol=1e-3, atol=1e-9)

    damped = fishers[name].outputs + 0.01 * fishers[name].outputs.trace() / O * torch.eye(O)
    scores = channel_scores(fishers[name])
    column = fishers[name].gradient[:, 5]
    kronecker = damped * (fishers[name].inputs[5, 5] + 0.01 * fishers[name].inputs.trace() / I)
    by_hand = 0.5 * column @ torch.linalg.inv(kronecker) @ column
    assert float(scores[5]) == pytest.approx(float(by_hand), rel=1e-6)
    layer = Layer(weight.detach(), torch.eye(I, dtype=torch.float64), fishers[name])
    result = rsavq(layer, 4.0, torch.Generator().manual_seed(0))
    assert 0.9 * 4 <= result.bits / (O * I) <= 1.05 * 4
    assert float((result.weight - layer.weight).square().mean()) < 0.05 * float(
        layer.weight.square().mean()
    )


def test_rows_of_one_label_are_averaged_and_checkpoints_replaced(tmp_path: Path) -> None:
    folder = Comparison(tmp_path, {"model": "m"})
    for seed, kl in ((0, 0.1), (1, 0.3)):
        marks = dataclasses.replace(MARKS, kl=kl)
        folder.add(Row("A", 2.0, seed, bits_per_weight=2.0625, marks=marks))
    folder.add(Row("B", 2.0, 0, undefined="no"))
    ours = Row("ours", 2.0, 0, "old", bits_per_weight=2.0, marks=MARKS, is_ours=True)
    folder.add(ours)
    assert not folder.has(Row("ours", 2.0, 0, source="new"))
    folder.add(dataclasses.replace(ours, source="new"))
    odd = Row("A", 2.03125, 0, bits_per_weight=2.03125, marks=MARKS)
    other = Comparison(tmp_path / "other", {"model": "m"})
    other.add(odd)
    assert Comparison(tmp_path / "other", {"model": "m"}).has(odd), "a target keeps its digits"
    again = Comparison(tmp_path, {"model": "m"})
    assert again.rows == folder.rows
    assert [row.source for row in again.rows if row.label == "ours"] == ["new"]
    lines = tables.markdown(again.rows).splitlines()
    assert lines[0] == "### 2 bits, untuned"
    assert lines[4] == "| ours | 2.000 | 0.10000 | 0.50 | 90.00% | 80.00% | 1 |"
    assert lines[5].startswith("| **A** | 2.062 | 0.20000 ± 0.14142 | 1.00 |")
    assert lines[6] == "| B | not defined | | | | | |"
    assert "85.00%" in lines[-2]
    assert "over questions is up to 10% of it" in lines[-1]
    alone = dataclasses.replace(MARKS, kl_se=float("nan"))  # of one window, written before
    assert "nan" not in tables.markdown([Row("A", 2.0, 0, bits_per_weight=2.0, marks=alone)])
    with pytest.raises(ResumeError, match="model = 'm', this run has 'n'"):
        Comparison(tmp_path, {"model": "n"})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/out cannot be written"):
        Comparison(tmp_path / "file" / "out", {"model": "m"})
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        Comparison(tmp_path, {"model": "m"})


def test_what_cannot_be_compared_is_refused(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="no known method: choose from rtn, gptq"):
        find_methods(["awq"])
    with pytest.raises(ConfigError, match="between 1 and 8, got 0.5"):
        read_rates("2,0.5")
    with pytest.raises(ConfigError, match="numbers with commas"):
        read_rates("two")
    assert read_checkpoint("a=b/c") == ("a", Path("b/c"))
    assert read_checkpoint("b/c") == ("MGVQ checkpoint", Path("b/c"))
    with pytest.raises(CheckpointError, match="quantized already"):
        compare(quantized[0], tmp_path / "x", [], [], [])
    with pytest.raises(CheckpointError, match="not quantized"):
        compare(dense, tmp_path / "x", [], [], [], [("ours", dense)])
    twice = [("ours", quantized[0]), ("ours", quantized[0])]
    with pytest.raises(ConfigError, match="tell them apart with --checkpoint LABEL=DIR"):
        compare(dense, tmp_path / "x", [], [], [], twice)
    words = ["--model", str(dense), "--output", str(tmp_path / "y"), "--methods", "rtn,none"]
    assert main(words) == 2
    assert "'none' is no known method" in capsys.readouterr().err


def test_an_interrupted_comparison_says_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", interrupt)
    words = ["--model", str(dense), "--output", str(tmp_path), "--device", "cpu", "--limit", "2"]
    assert main(words) == 130
    assert "compare.json; the same command goes on" in capsys.readouterr().err
