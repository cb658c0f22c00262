"""Plain text: how it is cut, what a sample of it says, text to calibrate on and to evaluate on."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgvq_quantizer import evaluate_cli, plain_text
from mgvq_quantizer.archive import DataError
from mgvq_quantizer.batches import decoder_runs, length_batches
from mgvq_quantizer.calibration import CalibrationError
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.evaluate import to_dense
from mgvq_quantizer.evaluate_text import draw, evaluate_text
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.plain_text import PASSAGE_TOKENS, Passage, cut, read_passages, text_sample
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.statistics import record_calls
from mgvq_quantizer.stream import walk_blocks
from mgvq_quantizer.survey import Evidence, _alone
from mgvq_quantizer.teacher import Student, ask_teacher, divergence, heldout_kl
from mgvq_runtime.assets import demo_picture_paths
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.loading import fill_model, load_model
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import QUICK
from tests.runtime.conftest import write_tokenizer
from tests.runtime.models.decoders import write_decoder_folder

WORDS = "the quick brown fox jumps over a lazy dog and asks how many red circles there are "
RECIPE = QuantRecipe(**{**QUICK, "max_samples": 6, "heldout_share": 0.3})


@pytest.mark.parametrize(("tokens", "lengths"), [(0, []), (1, []), (300, [300])])
def test_short_texts(tokens: int, lengths: list[int]) -> None:
    assert [len(p.token_ids) for p in cut("a", np.arange(tokens))] == lengths


def test_a_long_text_is_cut_without_gaps_and_its_rest_is_dropped() -> None:
    ids = np.arange(2 * PASSAGE_TOKENS + 300)
    passages = cut("a.txt", ids)
    assert [p.where for p in passages] == ["a.txt, token 0", f"a.txt, token {PASSAGE_TOKENS}"]
    assert np.array_equal(
        np.concatenate([p.token_ids for p in passages]), ids[: 2 * PASSAGE_TOKENS]
    )


def test_every_token_is_predicted_but_the_first(dense: Path, tmp_path: Path) -> None:
    """No template, nothing in front; two samples end to end never predict across their border."""
    (tmp_path / "a.txt").write_text("\ufeff" + WORDS)
    tokenizer = Tokenizer.from_folder(dense)
    (passage,) = read_passages(tmp_path / "a.txt", tokenizer)
    assert tokenizer.decode(passage.token_ids) == WORDS
    sample = plain_text.text_sample(passage)
    length = len(passage.token_ids)
    assert sample.is_answer.tolist() == [False] + [True] * (length - 1)
    assert sample.positions.tolist() == [list(range(length))] * 3
    (batch,) = length_batches([sample, plain_text.text_sample(passage)], torch.device("cpu"))
    wanted = [*range(length - 1), *range(length, 2 * length - 1)]
    assert batch.answer_rows.tolist() == wanted


def test_text_beside_conversations_calibrates_a_model_with_pictures(
    dense: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(dense / "calibration.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "b.txt").write_text(WORDS * 100)
    graph = load_model(dense)
    data = read_data(dense, graph, QuantRecipe(), tmp_path)
    kinds = [bool(sample.images) for sample in [*data.train, *data.heldout]]
    assert kinds.count(True) == 6
    assert kinds.count(False) > 1
    assert all(sample.images for sample in data.swapped)
    before = data.fingerprint
    (tmp_path / "b.txt").write_text(WORDS.upper() + WORDS * 99)
    assert read_data(dense, graph, QuantRecipe(), tmp_path).fingerprint != before


def test_what_cannot_be_used_is_said(dense: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(dense)
    with pytest.raises(CalibrationError, match="does not exist"):
        read_passages(tmp_path / "no.txt", tokenizer)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"holds no text.*\.txt files in UTF-8"):
        read_passages(tmp_path, tokenizer)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"'a\.txt' is not UTF-8"):
        read_passages(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.txt").write_text(WORDS * 200)
    with pytest.raises(CalibrationError, match="folder that holds conversations with pictures"):
        quantize(dense, tmp_path / "out", RECIPE, tmp_path / "a.txt", show_progress=False)
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(CalibrationError, match="at least 2"):
        quantize(dense, tmp_path / "out", RECIPE, tmp_path / "a.txt", show_progress=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in a random order: three passages and some more."""
    drawn = np.random.default_rng(0).choice(WORDS.split(), 1200)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(drawn))
    return file


@pytest.fixture(scope="module")
def two_bit(llama: tuple[Path, Any], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two_bit") / "checkpoint"
    report = quantize(llama[0], output, RECIPE, text, show_progress=False)
    assert report.calibration["name"] == "words.txt"
    assert report.calibration["conversations"] >= 2
    assert 0.0 < report.kl <= report.kl_rounded
    return output


def test_figures_are_those_counted_by_hand(
    llama: tuple[Path, Any], two_bit: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers' own log-probabilities of the original, float64 sums, window by window."""
    folder, reference = llama
    arguments = ["--checkpoint", str(two_bit), "--reference", str(folder), "--device", "cpu"]
    assert evaluate_cli.main([*arguments, "--text", str(text), "--text-tokens", "1100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    passages = read_passages(text, Tokenizer.from_folder(folder))
    assert (found["n"], found["n_tokens"]) == (2, 2 * (PASSAGE_TOKENS - 1))
    model = to_dense(load_model(two_bit))
    kls, losses, agreed = [], [], []
    with torch.no_grad():
        for window in draw([text_sample(passage) for passage in passages], 1100):
            ids = torch.from_numpy(window.token_ids)
            theirs = reference(ids[None]).logits[0, :-1].double().log_softmax(-1)
            positions = torch.arange(len(ids)).expand(3, -1)
            states = model(model.embed(ids), ForwardBatch.of_sequence(positions))
            ours = model.logits(states[:-1]).double().log_softmax(-1)
            kls.append((theirs.exp() * (theirs - ours)).sum(-1))
            losses.append(torch.stack([-x[range(len(x)), ids[1:]] for x in (ours, theirs)]))
            agreed.append(ours.argmax(-1) == theirs.argmax(-1))
    means = torch.stack(kls).mean(1)
    assert found["kl"] == pytest.approx(float(means.mean()), rel=1e-3)
    assert found["kl_se"] == pytest.approx(float(means.std() / math.sqrt(2)), rel=1e-2)
    ours, theirs = torch.cat(losses, 1).mean(1).exp().tolist()
    assert found["perplexity"] == pytest.approx(ours, rel=1e-4)
    assert found["reference_perplexity"] == pytest.approx(theirs, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(
        float(torch.cat(agreed).float().mean()), abs=2e-3
    )
    assert found["file_bytes"] == (two_bit / "model.safetensors").stat().st_size
    assert any(line.startswith("perplexity") for line in lines)


def test_quantizers_are_compared_on_text_where_a_model_brings_no_questions(
    llama: tuple[Path, Any],
    two_bit: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "compared"
    words = ["compare", "--model", str(llama[0]), "--output", str(output), "--device", "cpu"]
    words += ["--calibration", str(text), "--methods", "rtn", "--bits", "2.25,4.25"]
    words += ["--checkpoint", f"ours={two_bit}"]
    assert evaluate_cli.main(words) == 2
    assert "brings a questions.zip" in capsys.readouterr().err
    assert evaluate_cli.main([*words, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "| same first choice | perplexity | seeds |" in printed
    assert "standard error over windows of text" in printed
    rows = json.loads((output / "compare.json").read_text())["rows"]
    kl = {(row["label"], row["target"]): row["text"]["kl"] for row in rows}
    read = evaluate_text(two_bit, llama[0], text, show_progress=False)
    assert kl["ours", 2.0] == pytest.approx(read.kl, rel=1e-4)
    assert 0.0 < kl["RTN, clip search", 4.25] < 0.5 * kl["RTN, clip search", 2.25]
    assert evaluate_cli.main([*words, "--text", str(text)]) == 0
    assert json.loads((output / "compare.json").read_text())["rows"] == rows, "nothing ran again"


def test_a_model_against_itself_and_against_another(
    llama: tuple[Path, Any], dense: Path, text: Path, tmp_path: Path
) -> None:
    same = evaluate_text(llama[0], llama[0], text, show_progress=False)
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)
    assert same.perplexity == same.reference_perplexity
    write_tokenizer(tmp_path)
    write_decoder_folder(tmp_path, "llama", vocab_size=1000)
    with pytest.raises(DataError, match="the folder the checkpoint was made from"):
        evaluate_text(tmp_path, llama[0], text, show_progress=False)
    answer = ["--checkpoint", str(llama[0]), "--reference", str(llama[0]), "--text", "no.txt"]
    assert evaluate_cli.main(answer) == 2


@torch.no_grad()
def test_of_conversations_the_answers_are_predicted(
    llama: tuple[Path, Any], two_bit: Path, tmp_path: Path
) -> None:
    """Counted by hand over answers of different lengths; one with a picture is refused by name."""
    file = tmp_path / "asked.jsonl"
    spoken = [("how many", "the fox"), ("red circles", "over a lazy dog and asks how many")]
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in spoken]
    file.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    found = evaluate_text(two_bit, llama[0], file, show_progress=False)
    models = [to_dense(load_model(folder)) for folder in (two_bit, llama[0])]
    tokenizer = Tokenizer.from_folder(llama[0])
    sums = []
    for question, answer in spoken:
        asked = tokenizer.encode_chat([{"role": "user", "content": question}])
        ids = torch.tensor([*asked, *tokenizer.encode(answer)])
        forward = ForwardBatch.of_sequence(torch.arange(len(ids)).expand(3, -1))
        ours, theirs = (m.logits(m(m.embed(ids), forward)).log_softmax(-1) for m in models)
        kl = divergence(theirs, ours)[len(asked) - 1 :]  # the end token is predicted too
        sums.append((float(kl.sum()), len(kl)))
    (a, n), (b, m) = sums
    assert (found.n, found.n_tokens) == (2, n + m)
    assert found.kl == pytest.approx((a + b) / (n + m), rel=1e-3)
    error = 2 * abs(a - found.kl * n) / (n + m)  # both windows stray by as much
    assert found.kl_se == pytest.approx(error, rel=1e-2)
    turns[1][0]["value"] += "<image>"
    file.write_text(json.dumps({"conversations": turns[1], "image": "a.png"}) + "\n")
    (tmp_path / "a.png").write_bytes(demo_picture_paths()[0].read_bytes())
    with pytest.raises(DataError, match=r"asked\.jsonl.*ask about pictures with --questions"):
        evaluate_text(two_bit, llama[0], file, show_progress=False)


def test_windows_are_drawn_evenly() -> None:
    passages = [Passage(str(i), np.zeros(PASSAGE_TOKENS, np.int64)) for i in range(10)]
    windows = [text_sample(passage) for passage in passages]
    assert [p.where for p in draw(windows, 5 * PASSAGE_TOKENS + 1)] == ["0", "2", "4", "6", "8"]
    assert len(draw(windows, 1)) == 1
    assert len(draw(windows, 10**6)) == 10


@torch.no_grad()
def test_a_matrix_alone_is_measured_as_by_running_the_whole_model(
    llama: tuple[Path, Any], text: Path
) -> None:
    """And the divergence, summed in parts, is that of all rows at once."""
    graph = fill_model(open_checkpoint(llama[0]), torch.device("cpu")).float()
    data = read_data(llama[0], graph, RECIPE, text)
    batches = length_batches(data.train, torch.device("cpu"))
    reference = ask_teacher(graph, batches, {})
    name = "model.layers.1.mlp.down_proj"
    module = graph.get_submodule(name)
    weight = module.weight + 0.1 * torch.randn_like(module.weight)
    evidence = Evidence(batches, {}, {}, {}, batches, reference)
    calls = record_calls(graph.model.layers[0], decoder_runs(graph, batches, {}))
    calls = walk_blocks(graph.model.layers[:1], calls)
    found = _alone(graph, 1, graph.model.layers[1], module, calls, evidence, weight)
    values = {f"model.{name}.weight": weight}
    assert found == pytest.approx(heldout_kl(Student(graph), values, batches, {}, reference))
    rows = torch.func.functional_call(Student(graph), values, (batches[0], {}, reference))
    module.weight.copy_(weight)
    logits = graph.logits(graph(graph.embed(batches[0].token_ids), batches[0].forward))
    whole = divergence(
        reference.log_probs(batches[0].samples), logits[batches[0].answer_rows].log_softmax(-1)
    )
    assert len(whole) > 512
    assert torch.allclose(rows, whole, atol=1e-6)
