"""Every decoder kind, text alone: quantize, serve, ask through the openai client."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from mgvq_quantizer.calibration import CalibrationError
from mgvq_quantizer.evaluate import evaluate
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime import LLM, Engine, EngineConfig, SamplingParams, inspect
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import RequestError
from mgvq_runtime.layers.embedding import TiedHead, VQEmbedding
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK
from tests.runtime.conftest import write_tokenizer
from tests.runtime.models.decoders import write_decoder_folder
from tests.runtime.tokenizer.sentencepiece_folders import FOLDERS
from tests.serve.conftest import MODEL, RunningServer, data_url, image_part, start_server

KINDS = {
    "qwen2-tied": None,
    "llama": "llama",
    "internlm2": "internlm2",
    "phi3-su": "phi3",
}
"""Decoders, and the sentencepiece tokenizer each comes with; None for a byte-level one."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ASKED = [{"role": "user", "content": "How many red circles are there?"}]
ROWS = [
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in (
        ("How many red circles are there?", "There are three red circles"),
        ("Describe it.", "one blue square"),
        ("What is in the picture?", "The quick brown fox"),
        ("And the dog?", "It is lazy"),
    )
]


def write_model(folder: Path, kind: str) -> Any:
    """A whole text-only folder; returns transformers' model of it."""
    folder.mkdir()
    if (tokenizer := KINDS[kind]) is None:
        write_tokenizer(folder)
        (folder / "preprocessor_config.json").unlink()
    else:
        FOLDERS[tokenizer](folder)
        end = "<|end|>" if tokenizer == "phi3" else "<|im_end|>"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": end}))
    return write_decoder_folder(folder, kind, seed=3, vocab_size=512, num_hidden_layers=2)


@pytest.fixture(scope="module", params=sorted(KINDS))
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path, Path]:
    """(kind, transformers' model, dense folder, the same at 2 bits)."""
    base = tmp_path_factory.mktemp(request.param)
    reference = write_model(base / "dense", request.param)
    data = base / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    recipe = QuantRecipe(**QUICK)
    quantize(base / "dense", base / "2bit", recipe, data, show_progress=False)
    return request.param, reference, base / "dense", base / "2bit"


def test_the_text_is_transformers(folders: tuple[str, Any, Path, Path]) -> None:
    """Greedy, dense, float32, from the same prompt ids."""
    _, reference, dense, _ = folders
    with LLM(dense, device="cpu", dtype="float32", max_model_len=64) as llm:
        prompt = llm.engine.chat_processor.prepare(ASKED)
        reply = llm.chat(ASKED, GREEDY)
    ids = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=sorted(llm_ends(dense)),
        )
    assert list(reply.token_ids) == output[0, ids.shape[1] :].tolist()


def llm_ends(folder: Path) -> frozenset[int]:
    from mgvq_runtime.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder).eos_token_ids


def test_everything_but_norms_is_quantized(folders: tuple[str, Any, Path, Path]) -> None:
    kind, _, _, quantized = folders
    model = load_model(quantized)
    assert model.visual is None
    assert isinstance(model.model.embed_tokens, VQEmbedding)
    assert isinstance(model.lm_head, TiedHead) == (kind == "qwen2-tied")
    assert all(parameter.ndim == 1 for parameter in model.parameters())
    spec = open_checkpoint(quantized).quantization
    assert spec is not None
    assert len(spec.matrices) == 2 * 4 + 1 + (not isinstance(model.lm_head, TiedHead))
    assert (quantized / "tokenizer.json").is_file()
    assert not (quantized / "tokenizer.model").exists()


@pytest.fixture(scope="module")
def server(folders: tuple[str, Any, Path, Path]) -> Iterator[RunningServer]:
    config = EngineConfig(device="cpu", max_model_len=128, max_num_seqs=4)
    running = start_server(Engine.from_checkpoint(folders[3], config))
    yield running
    running.stop()


def test_the_server_answers(server: RunningServer, folders: tuple[str, Any, Path, Path]) -> None:
    with LLM(folders[3], device="cpu", max_model_len=128) as llm:
        expected = llm.chat(ASKED, GREEDY)
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    parts = [{"type": "text", "text": ASKED[0]["content"]}]
    with server.client() as client:
        reply = client.chat.completions.create(messages=ASKED, **asked)
        in_parts = client.chat.completions.create(
            messages=[{"role": "user", "content": parts}], **asked
        )
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(messages=ASKED, stream=True, **asked)
        )
    assert reply.choices[0].message.content == expected.text == streamed
    assert in_parts.choices[0].message.content == expected.text
    assert reply.usage.completion_tokens == expected.usage.completion_tokens > 0


def test_it_is_evaluated_and_inspected(
    folders: tuple[str, Any, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, dense, quantized = folders
    questions = dense.parent / "questions.zip"
    row = {"kind": "text", "images": [], "question": "How many circles?", "answer": "three"}
    with zipfile.ZipFile(questions, "w") as archive:
        archive.writestr("questions.jsonl", json.dumps(row))
    scored = evaluate(quantized, dense, questions, show_progress=False)
    assert scored.n == 1
    assert 0 < scored.kl < 10
    same = evaluate(dense, dense, questions, show_progress=False)
    assert same.kl < 1e-6
    for folder in (dense, quantized):
        assert inspect.main([str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "longest context           512 tokens" in shown
        assert "not known" not in shown


def test_a_picture_is_refused(server: RunningServer) -> None:
    content = [image_part(data_url((56, 56))), {"type": "text", "text": "What is it?"}]
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="reads text alone; leave pictures out"):
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=4
            )
        reply = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=2)
    assert reply.usage.completion_tokens > 0


def test_without_a_chat_template_texts_are_continued(tmp_path: Path) -> None:
    write_model(tmp_path / "dense", "qwen2-tied")
    (tmp_path / "dense/chat_template.json").unlink()
    path = tmp_path / "dense/tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with LLM(tmp_path / "dense", device="cpu", max_model_len=64) as llm:
        assert llm.generate("The quick brown", GREEDY).usage.completion_tokens > 0
        with pytest.raises(RequestError, match="has no chat template"):
            llm.chat(ASKED, GREEDY)


def test_calibration_data_must_be_given(tmp_path: Path) -> None:
    write_model(tmp_path / "dense", "qwen2-tied")
    with pytest.raises(
        CalibrationError, match=r"give --calibration a \.txt file of text, or a \.jsonl"
    ):
        quantize(tmp_path / "dense", tmp_path / "out", QuantRecipe(**QUICK), show_progress=False)
