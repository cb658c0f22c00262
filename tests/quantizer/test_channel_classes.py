"""Channel classes: who feeds a channel, how bands are cut, what is counted, what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_quantizer.allocation import MatrixPlan, plan, plan_matrix
from mgvq_quantizer.batches import decoder_runs, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.channel_classes import (
    MAX_BANDS,
    SHARED,
    TEXTUAL,
    VISUAL,
    Channels,
    channels_of,
    class_names,
    cut_bands,
    leaning,
)
from mgvq_quantizer.gradients import shows_picture
from mgvq_quantizer.ordering import channel_order
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.precision import choose_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.solver import Problem, Solution, solve
from mgvq_quantizer.statistics import input_moments
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.bits import count_bits
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents
from tests.quantizer.test_precision import MODEL, sensitivities
from tests.quantizer.test_sensitivity import samples_of, seeded

CLASSED = QuantRecipe(**QUICK, channel_classes=True, class_threshold=4.2)


def random_channels(width: int, seed: int, spread: float = 2.0) -> Channels:
    rng = Random(seed)
    order = rng.sample(range(width), width)
    return Channels(tuple(order), tuple(rng.gauss(0.0, spread) for _ in range(width)))


def test_leanings_are_the_log_ratio_of_what_both_bring() -> None:
    plain = [4.0, 3.0, 2.0, 0.0]
    pictures, text = [8.0, 1.0, 0.0, 0.0], [2.0, 1.0, 5.0, 0.0]
    energies = torch.tensor([plain, pictures, text], dtype=torch.float64)
    found = leaning(energies, guided=False)
    assert found.leanings[:2] == pytest.approx((torch.tensor(4.0).log().item(), 0.0))
    assert found.leanings[2] < -100
    assert found.leanings[3] == 0.0  # nothing enters it: shared
    assert found.order == (3, 2, 1, 0)
    assert leaning(energies, guided=True).order == (3, 1, 2, 0)


def test_energies_are_the_diagonals_of_the_moments(dense: Path) -> None:
    graph = load_model(dense)
    samples = samples_of(dense, graph)
    features = encode_pictures(graph, unique_pictures(samples), "cpu")
    batches = [make_batch([sample], "cpu") for sample in samples]
    token = graph.config.image_token_id
    names = ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"]
    weights = {
        name: {id(s): torch.rand(len(s.token_ids), generator=seeded(i)) for s in samples}
        for i, name in enumerate(names)
    }
    with torch.no_grad():
        found = channels_of(graph, names, batches, features, weights, CLASSED)
        runs = decoder_runs(graph, batches, features)
        modules = {name: graph.get_submodule(name) for name in names}
        plain = input_moments(modules, runs)
        parts = []
        for wanted in (True, False):
            rows = {
                name: [weights[name][id(s)] * (shows_picture(s, token) == wanted) for s in samples]
                for name in names
            }
            sums = {name: sum(float(row.double().sum()) for row in rows[name]) for name in names}
            moments = input_moments(modules, runs, rows)
            parts.append({name: moments[name].diagonal() * sums[name] for name in names})
    for name in names:
        expected = (parts[0][name] / parts[1][name]).log()
        leanings = torch.tensor(found[name].leanings, dtype=torch.float64)
        assert torch.allclose(leanings, expected, atol=1e-4)
        assert float(expected.std()) > 0.01
        ordered = plain[name].diagonal()[list(found[name].order)]
        assert bool((ordered.diff() >= -1e-4 * ordered[1:]).all())


def test_clear_classes_are_cut_out_exactly_at_every_rate() -> None:
    leanings = [3.0] * 64 + [0.5] * 96 + [-3.0] * 96
    mine = Channels(tuple(range(0, 256, 2)) + tuple(range(1, 256, 2)), tuple(leanings))
    found = cut_bands([(3, 128), (2, 128)], mine, 1.0)
    assert [(c.rate, c.width, c.channel_class) for c in found] == [
        (3, 32, VISUAL),
        (3, 64, SHARED),  # 48 shared and what textual ones make no whole band
        (3, 32, TEXTUAL),
        (2, 32, VISUAL),
        (2, 64, SHARED),
        (2, 32, TEXTUAL),
    ]
    for c in found:
        parity = 0 if c.rate == 3 else 1
        assert all(channel % 2 == parity for channel in c.channels)
        if c.channel_class != SHARED:
            wanted = leanings[0] if c.channel_class == VISUAL else leanings[-1]
            assert {leanings[channel] for channel in c.channels} == {wanted}
    assert class_names(mine, 1.0) == {VISUAL, SHARED, TEXTUAL}
    assert class_names(mine, 4.0) == class_names(None, 1.0) == {SHARED}
    assert [c.channels for c in cut_bands([(3, 128), (2, 128)], mine, 4.0)] == [(), ()]


@pytest.mark.parametrize("seed", range(12))
def test_cuts_are_legal_and_keep_opposites_apart(seed: int) -> None:
    rng = Random(seed)
    columns = rng.choice([128, 256, 768, 1024, 1536, 4096, 136])
    mine = random_channels(columns, seed)
    step = 32 if columns <= 1024 else 128
    rates = sorted(rng.sample([1, 2, 3, 4], rng.randint(1, 4)))
    widths = [step] * (len(rates) - 1)
    bands = [*zip(rates, [*widths, columns - sum(widths)], strict=True)]
    if columns % step:
        bands = [(2, columns)]
    cuts = cut_bands(bands, mine, 1.0)
    made = plan_matrix("m", 64, bands, QuantRecipe(), [class_names(mine, 1.0)], mine)
    assert isinstance(made.layout, VQLayout)  # refuses widths the format cannot hold
    assert made.classes == tuple(c.channel_class for c in cuts)
    assert len(cuts) <= max(MAX_BANDS, len(bands))
    start = 0
    for rate, width in bands:
        inside = [c for c in cuts if c.rate == rate]
        assert sum(c.width for c in inside) == width
        if made.channels:
            joined = sorted(channel for c in inside for channel in c.channels)
            assert joined == sorted(mine.order[start : start + width])
        start += width
    for c in cuts:
        leanings = [mine.leanings[channel] for channel in c.channels]
        assert c.channel_class != VISUAL or min(leanings, default=0.0) >= -1.0
        assert c.channel_class != TEXTUAL or max(leanings, default=0.0) <= 1.0


def test_above_six_bands_the_smallest_classes_become_shared() -> None:
    sizes = {VISUAL: (64, 96, 128), TEXTUAL: (96, 64, 32)}  # of 256 channels at 4, 3 and 2 bits
    leanings: list[float] = []
    for visual, textual in zip(*sizes.values(), strict=True):
        leanings += [3.0] * visual + [-3.0] * textual + [0.0] * (256 - visual - textual)
    mine = Channels(tuple(range(768)), tuple(leanings))
    found = cut_bands([(4, 256), (3, 256), (2, 256)], mine, 1.0)
    assert len(found) == MAX_BANDS
    assert sorted((c.rate, c.channel_class, c.width) for c in found) == [
        (2, SHARED, 128),
        (2, VISUAL, 128),
        (3, SHARED, 160),
        (3, VISUAL, 96),
        (4, SHARED, 160),
        (4, TEXTUAL, 96),
    ]
    for start, rate in ((0, 4), (256, 3), (512, 2)):
        joined = sorted(channel for c in found if c.rate == rate for channel in c.channels)
        assert joined == [*range(start, start + 256)]


def two_sources() -> tuple[torch.Tensor, torch.Tensor, Channels]:
    """64 channels that pictures feed, with weights of two values, and 64 of text, Gaussian."""
    signs = torch.randn(192, 64, generator=seeded(0)).sign()
    visual = signs * (1 + 0.05 * torch.randn(192, 64, generator=seeded(1)))
    textual = 0.3 * torch.randn(192, 64, generator=seeded(2))
    mixed = torch.randperm(128, generator=seeded(3))
    weight = torch.cat([visual, textual], dim=1)[:, mixed]
    basis = torch.randn(512, 128, generator=seeded(4), dtype=torch.float64)
    moment = basis.T @ basis / 512
    is_visual = mixed < 64
    pictures = torch.where(is_visual, 0.9, 0.1) * moment.diagonal()
    energies = torch.stack([moment.diagonal(), pictures, moment.diagonal() - pictures])
    return weight, moment, leaning(energies, guided=False)


def test_own_tables_of_two_unlike_groups_lower_the_loss_at_one_rate() -> None:
    weight, moment, mine = two_sources()
    recipe = QuantRecipe(bits=2.0, allocation="uniform", codebook_iterations=8, refit_rounds=2)

    def error(made: MatrixPlan) -> float:
        order = channel_order(weight, moment, made.layout, recipe, seeded(1), made.channels)
        problem = Problem(weight, moment, order, made.layout, made.tables)
        return solve([problem], recipe, seeded(2))[0].error

    classed = plan_matrix("m", 192, [(2, 128)], recipe, [class_names(mine, 1.0)], mine)
    assert sorted(classed.classes) == [TEXTUAL, VISUAL]
    assert len({name for band in classed.tables for name in band}) == 2
    members = dict(zip(classed.classes, classed.channels, strict=True))
    loud = weight.square().mean(0) > 0.5
    assert set(loud.nonzero()[:, 0].tolist()) == set(members[VISUAL])
    one = plan_matrix("m", 192, [(2, 128)], recipe, [{SHARED}])
    one_table_in_class_order = MatrixPlan(
        "m", classed.layout, "m", (SHARED, SHARED), classed.channels
    )
    split = error(classed)
    assert split < 0.7 * error(one)
    assert split < 0.8 * error(one_table_in_class_order)


@pytest.mark.parametrize(
    ("bits", "max_codebook_overhead"), [(2.0, 0.0), (2.25, 0.0), (3.0, 0.0), (2.75, 100.0)]
)
@pytest.mark.parametrize("allocation", ["model", "layer"])
def test_the_tables_of_classes_are_counted_in_the_budget(
    bits: float, max_codebook_overhead: float, allocation: str
) -> None:
    recipe = QuantRecipe(
        bits=bits + 0.4 * (allocation == "layer"),
        max_codebook_overhead=max_codebook_overhead,
        allocation=allocation,
        channel_classes=True,
    )
    found = sensitivities(MODEL, recipe, seed=0)
    channels = {s.name: random_channels(sum(s.widths), seed) for seed, s in enumerate(found)}
    first = plan(MODEL, recipe, channels=channels)
    bands = choose_bands(found, first, recipe, channels)
    plans = plan(MODEL, recipe, bands, channels)
    assert {n: p.label for n, p in plans.items()} == {n: p.label for n, p in first.items()}
    count = count_bits({n: p.spec for n, p in plans.items()})["decoder"]
    assert (recipe.bits - 0.1) * count.weights < count.bits <= recipe.bits * count.weights
    classes = {c for p in plans.values() for c in p.classes}
    assert classes == {VISUAL, SHARED, TEXTUAL}
    plain = plan(MODEL, recipe, choose_bands(found, plan(MODEL, recipe), recipe))
    tables = count_bits({n: p.spec for n, p in plain.items()})["decoder"].codebooks
    assert count.codebooks > tables
    names = {t for n, p in plans.items() if "layers" in n for band in p.tables for t in band}
    assert any("-visual-" in name for name in names)


@pytest.fixture(scope="module")
def classed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("classed") / "checkpoint"
    return output, quantize(dense, output, CLASSED, show_progress=False)


def test_a_checkpoint_with_classes_is_stored_as_counted_and_runs(
    classed: tuple[Path, Report],
) -> None:
    folder, report = classed
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization is not None
    count = count_bits(checkpoint.quantization.matrices)["decoder"]
    stored = sum(
        8 * tensor.numel() * tensor.element_size()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(("model.layers.", "codebooks.model-layers"))
        and not name.endswith((".bias", ".weight"))
    )
    assert stored == count.bits
    assert report.groups["decoder"].bits_per_weight == count.bits_per_weight
    model = load_model(folder)
    several = 0
    for name, weight in checkpoint.vq_weights():
        layout = weight.layout
        several += len(layout.bands) > 1
        assert {band.rate for band in layout.bands} <= {2, 4}
        module = model.get_submodule(name)
        if name.startswith("model.layers."):
            x = torch.randn(3, layout.in_features, generator=seeded(0))
            bias = 0.0 if module.bias is None else module.bias
            expected = x @ ops.vq_dequantize(weight).T + bias
            # As in tests/kernels: a core with byte shuffles rounds its partial sums.
            assert float((module(x) - expected).norm() / expected.norm()) < 2e-4
    assert several > 1
    written = json.loads((folder / "quantization_report.json").read_text())["matrices"]
    page = (folder / "quantization_report.html").read_text()
    seen = {c for name in written for c in written[name]["classes"]}
    assert {SHARED, TEXTUAL} == seen
    for name, matrix in written.items():
        if matrix["classes"]:
            assert len(matrix["classes"]) == len(matrix["bands"])
            assert name.startswith("model.layers.")
            rate, width = matrix["bands"][0]
            assert f"{width} {matrix['classes'][0]} at {rate} bit" in page


def test_classes_of_a_trellis_read_one_table(dense: Path, tmp_path: Path) -> None:
    """Its tables are not trained: bands of one rate hold the same one, in the work folder too."""
    settings = {"codec": "trellis", "window": 8, "tuning_steps": 0, "max_codebook_overhead": 0.0}
    recipe = dataclasses.replace(CLASSED, **settings)
    quantize(dense, tmp_path / "checkpoint", recipe, show_progress=False)
    spec = open_checkpoint(tmp_path / "checkpoint").quantization
    assert spec is not None
    several = [matrix.codebooks for matrix in spec.matrices.values() if len(matrix.codebooks) > 1]
    assert several
    assert all(len(set(books)) == 1 for books in several)


def test_interrupted_with_classes_it_goes_on_to_the_same_bytes(
    dense: Path,
    classed: tuple[Path, Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[str] = []
    save = WorkFolder.save

    def stop_after(self: WorkFolder, name: str, solution: Solution) -> None:
        save(self, name, solution)
        saved.append(name)
        if len(saved) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "save", stop_after)
    output = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, output, CLASSED, show_progress=False)
    quantize(dense, output, CLASSED, show_progress=False)
    assert len(saved) == len(set(saved)) == 20
    assert contents(output) == contents(classed[0])


def test_where_no_channel_leans_far_enough_the_tensors_are_those_without_classes(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path
) -> None:
    recipe = QuantRecipe(**QUICK, channel_classes=True, class_threshold=1e9)
    quantize(dense, tmp_path / "checkpoint", recipe, show_progress=False)
    name = "model.safetensors"
    assert (tmp_path / "checkpoint" / name).read_bytes() == (quantized[0] / name).read_bytes()
