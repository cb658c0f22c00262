"""Marks against plain forwards and greedy decoding, and the command's last line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mgvq_quantizer import evaluate_cli
from mgvq_quantizer.archive import Archive, DataError
from mgvq_quantizer.evaluate import _prepare, evaluate, to_dense
from mgvq_quantizer.questions import find_questions, load_questions
from mgvq_quantizer.report import Report
from mgvq_quantizer.shared_prefix import Asked, answer_states, make_exam
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.models.qwen2_vl import Qwen2VL
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer
from tests.runtime.conftest import write_hub_folder, write_tokenizer
from tests.runtime.models.decoders import write_decoder_folder

KEYS = (
    "kl",
    "top1_agreement",
    "accuracy",
    "reference_accuracy",
    "accuracy_by_kind",
    "bits_per_weight",
    "file_bytes",
)


@pytest.fixture(scope="module")
def model(dense: Path) -> Qwen2VL:
    return load_model(dense)


@pytest.fixture(scope="module")
def asked(dense: Path, model: Qwen2VL) -> list[Asked]:
    archive = Archive(dense / "questions.zip")
    tokenizer = Tokenizer.from_folder(dense)
    processor = ChatProcessor(
        tokenizer, Qwen2VLImageProcessor.from_folder(dense, None), model.config
    )
    return _prepare(archive, load_questions(archive, None, 0), processor)


def plain_states(model: Qwen2VL, question: Asked, extra: list[int]) -> torch.Tensor:
    """Final states of prompt and `extra` in one forward without a cache."""
    prompt = question.prompt
    ids = torch.tensor([*prompt.token_ids, *extra])
    embeds = model.embed(ids)
    if prompt.images:
        patches = torch.cat([torch.from_numpy(image.patches) for image in prompt.images])
        rows = model.encode_images(patches, [image.grid_thw for image in prompt.images])
        embeds[ids == model.config.image_token_id] = rows
    tail = torch.arange(len(prompt.token_ids), len(ids)) + prompt.position_delta
    positions = torch.cat([torch.from_numpy(prompt.positions), tail.expand(3, -1)], dim=1)
    return model(embeds, ForwardBatch.of_sequence(positions))


def test_a_reference_that_reads_otherwise_is_refused(
    dense: Path, model: Qwen2VL, tmp_path: Path
) -> None:
    text_only = tmp_path / "text"
    text_only.mkdir()
    write_tokenizer(text_only)
    write_decoder_folder(text_only, "llama", vocab_size=model.config.text_config.vocab_size)
    with pytest.raises(DataError, match="placeholder for a picture is token None"):
        evaluate(text_only, dense, limit=2, show_progress=False)
    other = shutil.copytree(dense, tmp_path / "other")
    write_hub_folder(other, seed=0, vocab_size=1000)
    with pytest.raises(DataError, match="knows 1000 tokens"):
        evaluate(other, dense, limit=2, show_progress=False)


def test_a_result_is_printed_though_its_file_cannot_be_written(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(dense), "--reference", str(dense), "--limit", "1"]
    assert evaluate_cli.main([*words, "--json", "/nowhere/x.json"]) == 2
    printed, said = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["kl"] == 0.0
    assert "/nowhere/x.json cannot be written" in said


def test_flags_that_would_do_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "c", "--reference", "r"]
    for more, problem in (
        (["--text-tokens", "9"], "--text-tokens belongs to --text"),
        (["--text", "t.txt", "--limit", "1"], "--limit and --seed draw questions"),
        (["--text", "t.txt", "--seed", "0"], "--limit and --seed draw questions"),
        (["--limit", "-1"], "expected a whole number of at least 1, got -1"),
    ):
        with pytest.raises(SystemExit):
            evaluate_cli.main([*words, *more])
        assert problem in capsys.readouterr().err


@torch.no_grad()
def test_shared_prompts_give_the_states_of_plain_forwards(
    model: Qwen2VL, asked: list[Asked]
) -> None:
    exam = make_exam(asked, model.config.image_token_id)
    assert exam.prefixes is not None
    tokens = exam.prefixes.token_ids.numel() + exam.rests.token_ids.numel()
    whole = sum(len(q.prompt.token_ids) + len(q.answer) - 1 for q in asked)
    assert tokens < 0.9 * whole
    expected = [
        plain_states(model, question, list(question.answer[:-1]))[-len(question.answer) :]
        for question in exam.asked
    ]
    assert torch.allclose(answer_states(model, exam), torch.cat(expected), atol=2e-4)
    assert exam.targets.tolist() == [token for question in exam.asked for token in question.answer]


@torch.no_grad()
def test_all_tokens_first_choice_is_greedy_exact_match(
    model: Qwen2VL, asked: list[Asked], dense: Path
) -> None:
    """Greedy generation, token by token, of answers the model would give and of others."""
    question, length = asked[0], 4
    greedy: list[int] = []
    for _ in range(length):
        logits = model.logits(plain_states(model, question, greedy)[-1:])
        greedy.append(int(logits.argmax()))
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 400]
    for answer, is_right in ((greedy, True), (wrong, False)):
        exam = make_exam([Asked("x", question.prompt, tuple(answer))], model.config.image_token_id)
        best = model.logits(answer_states(model, exam)).argmax(-1)
        assert torch.equal(best, exam.targets) == is_right


def test_a_model_against_itself_agrees_completely(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(dense), "--reference", str(dense), "--device", "cpu"]
    assert evaluate_cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(key in result for key in KEYS)
    assert result["kl"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["accuracy"] == result["reference_accuracy"]
    assert result["bits_per_weight"] == 32.0
    assert result["n"] == 10


def test_a_quantized_checkpoint_is_near_its_source(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = quantized
    arguments = ["--checkpoint", str(folder), "--reference", str(dense), "--device", "cpu"]
    file = tmp_path / "result.json"
    assert evaluate_cli.main([*arguments, "--json", str(file)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text()) == result
    assert 0.0 < result["kl"] < 1.0
    assert 0.0 < result["kl_se"] < result["kl"]
    assert result["bits_per_weight"] == pytest.approx(report.groups["decoder"].bits_per_weight)
    assert result["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert set(result["accuracy_by_kind"]) == {"count", "what", "two", "text"}
    assert evaluate_cli.main([*arguments, "--json", "--limit", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["n"] == 3


@torch.no_grad()
def test_dense_stand_ins_compute_what_the_quantized_layers_compute(
    quantized: tuple[Path, Report], asked: list[Asked]
) -> None:
    vq = load_model(quantized[0])
    before = vq.logits(plain_states(vq, asked[0], []))
    after = to_dense(vq)
    assert torch.allclose(after.logits(plain_states(after, asked[0], [])), before, atol=2e-3)


def test_a_draw_is_the_same_for_a_seed_and_missing_data_is_named(
    dense: Path, tmp_path: Path
) -> None:
    archive = Archive(dense / "questions.zip")
    assert load_questions(archive, 4, 1) == load_questions(archive, 4, 1)
    assert load_questions(archive, 4, 1) != load_questions(archive, 4, 2)
    with pytest.raises(DataError, match="name one with --questions"):
        find_questions(None, [tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        evaluate(dense, dense, tmp_path / "no.zip")
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    with pytest.raises(DataError, match="line 1"):
        load_questions(Archive(tmp_path), None, 0)
