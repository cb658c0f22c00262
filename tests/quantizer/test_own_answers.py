"""The unquantized model's own answers: those of plain forwards, in their places, made once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgvq_kernels import dense_ops
from mgvq_quantizer import own_answers, pipeline
from mgvq_quantizer.baselines.bench import Bench, Options
from mgvq_quantizer.batches import Features, encode_pictures, unique_pictures
from mgvq_quantizer.calibration import CalibrationError, Sample, load_conversations
from mgvq_quantizer.dataset import Data, read_data
from mgvq_quantizer.expected_layout import expected_plans
from mgvq_quantizer.own_answers import MAX_ANSWER_TOKENS, answer_open_questions, expect_answers
from mgvq_quantizer.paged_runs import BLOCK
from mgvq_quantizer.pipeline import SURVEYS, quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.solver_work import macs
from mgvq_quantizer.stage_work import Stages
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.image import decode_image
from mgvq_runtime.request import Prompt
from tests.quantizer.conftest import QUICK, SMALL, llava_row, picture, write_calibration
from tests.quantizer.test_pipeline import contents
from tests.quantizer.test_solver_work import Products
from tests.runtime.family_folders import write_internvl_hub_folder, write_llava_folder

RECIPE = QuantRecipe(**QUICK)
ONCE = QuantRecipe(**{**SMALL, "permute": False, "guided": False})
"""The least that a run can do."""
UNTUNED = dataclasses.replace(ONCE, tuning_steps=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bare pictures, of two sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


@pytest.fixture(scope="module")
def graph(dense: Path) -> CausalLM:
    return load_model(dense)


@pytest.fixture
def data(dense: Path, graph: CausalLM, pictures: Path) -> Data:
    return read_data(dense, graph, RECIPE, pictures)


def features_of(graph: CausalLM, data: Data) -> Features:
    return encode_pictures(graph, unique_pictures(data.all), "cpu")


def answer(graph: CausalLM, data: Data, folder: Path, features: Features | None = None) -> Data:
    with torch.no_grad(), WorkFolder(folder / "work", {}) as work:
        features = features or features_of(graph, data)
        return answer_open_questions(graph, data, features, RECIPE, work, lambda _: None)


def said(sample: Sample) -> list[int]:
    return list(sample.token_ids[sample.is_answer])


def in_order(data: Data) -> list[Sample]:
    return sorted(data.all, key=lambda sample: sample.where)


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    """Note the sizes of the batches that are asked; Ctrl-C at the `stop_at`-th."""
    ask, asked = own_answers._answer, list[int]()

    def counted(graph: CausalLM, samples: Sequence[Sample], *rest: Any) -> list[list[int]]:
        if len(asked) + 1 == stop_at:
            raise KeyboardInterrupt
        asked.append(len(samples))
        return ask(graph, samples, *rest)

    monkeypatch.setattr(own_answers, "_answer", counted)
    return asked


def greedy(graph: CausalLM, prompt: Prompt, features: torch.Tensor, count: int) -> list[int]:
    """Generate without a cache: everything is read again for each token."""
    ids = list(prompt.token_ids)
    for n in range(len(ids), len(ids) + count):
        tail = np.tile(np.arange(len(prompt.token_ids), n) + prompt.position_delta, (3, 1))
        positions = torch.from_numpy(np.concatenate([prompt.positions, tail], axis=1))
        tokens = torch.tensor(ids)
        rows = graph.embed(tokens)
        rows[tokens == graph.config.image_token_id] = features
        logits = graph.logits(graph(rows, ForwardBatch.of_sequence(positions))[-1:])
        logits[0, list(graph.config.placeholder_ids)] = float("-inf")
        ids.append(int(logits.argmax()))
    return ids[len(prompt.token_ids) :]


@pytest.mark.parametrize(
    "write", [None, write_internvl_hub_folder, write_llava_folder], ids=["qwen2", "internvl", "ov"]
)
@torch.no_grad()
def test_answers_are_those_of_plain_forwards_and_stand_where_the_prompt_goes_on(
    write: Callable[[Path], Any] | None,
    dense: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_answers, "MAX_ANSWER_TOKENS", 9)
    folder = dense if write is None else tmp_path / "model"
    if write is not None:
        write(folder)
    graph = load_model(folder)
    data = read_data(folder, graph, RECIPE, pictures)
    answered = answer(graph, data, tmp_path)
    processor = ChatProcessor.from_checkpoint(open_checkpoint(folder), graph.config)
    conversations = sorted(load_conversations(pictures, folder)[1], key=lambda c: c.where)
    assert len(conversations) == len(answered.own) == len(answered.all)
    features, different = features_of(graph, data), set()
    for conversation, sample in zip(conversations, in_order(answered), strict=True):
        assert conversation.where == sample.where
        prompt = processor.prepare(
            conversation.messages[:-1], [decode_image(p) for p in conversation.pictures]
        )
        wanted = greedy(graph, prompt, features[id(sample.images[0])], 9)
        start = len(prompt.token_ids)
        assert sample.token_ids.tolist() == [*prompt.token_ids, *wanted]
        assert sample.is_answer.tolist() == [False] * start + [True] * 9
        whole = [prompt.positions, np.tile(np.arange(start, start + 9), (3, 1))]
        whole[1] += prompt.position_delta
        assert np.array_equal(sample.positions, np.concatenate(whole, axis=1))
        different.add(tuple(wanted))
    assert len(different) > 4, "one answer to everything shows nothing"


def test_an_answer_ends_with_the_models_end_token_or_where_it_is_cut(
    graph: CausalLM, data: Data, tmp_path: Path
) -> None:
    whole = in_order(answer(graph, data, tmp_path / "a"))
    assert {int(sample.is_answer.sum()) for sample in whole} == {MAX_ANSWER_TOKENS}
    assert not {t for sample in whole for t in said(sample)} & data.end_token_ids
    ends = {said(whole[0])[0], said(whole[3])[5]}  # at once, and after some tokens
    ending = dataclasses.replace(data, end_token_ids=frozenset(ends))
    lengths = []
    for sample, ended in zip(whole, in_order(answer(graph, ending, tmp_path / "b")), strict=True):
        tokens = said(sample)
        stops = [i + 1 for i, token in enumerate(tokens) if token in ends]
        assert said(ended) == tokens[: stops[0] if stops else None]
        lengths.append(len(said(ended)))
    assert lengths[0] == 1
    assert len(set(lengths)) > 2, "some end early, some later"


def test_an_answer_stays_within_the_context(data: Data) -> None:
    sample = data.train[0]
    for room in (1, 5, MAX_ANSWER_TOKENS, 1000):
        start = len(sample.token_ids) - 1
        longest = own_answers.with_room(sample, start + room)
        assert len(said(longest)) == min(room, MAX_ANSWER_TOKENS)
        assert len(longest.token_ids) <= start + room


def test_the_models_context_is_what_cuts_an_answer(
    graph: CausalLM, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = max(len(sample.token_ids) for sample in data.all) + 2
    text = dataclasses.replace(graph.config.text_config, max_position_embeddings=limit)
    monkeypatch.setattr(graph, "config", dataclasses.replace(graph.config, text_config=text))
    lengths = [len(sample.token_ids) for sample in answer(graph, data, tmp_path).all]
    assert max(lengths) == limit


def test_the_cache_is_as_long_as_the_tokens_are(
    graph: CausalLM, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long question among short ones must not take its length for each of them."""
    samples = [own_answers.with_room(sample, 10**6) for sample in data.all]
    make_cache, made = own_answers.make_cache, list[int]()

    def noted(graph: CausalLM, num_blocks: int) -> list[LayerCache]:
        made.append(num_blocks)
        return make_cache(graph, num_blocks)

    monkeypatch.setattr(own_answers, "make_cache", noted)
    own_answers._answer(graph, samples, features_of(graph, data), data.end_token_ids)
    tokens = sum(len(sample.token_ids) for sample in samples)
    assert tokens <= made[0] * BLOCK < tokens + BLOCK * len(samples)


def test_several_questions_are_held_out(dense: Path, graph: CausalLM, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    heldout = read_data(dense, graph, RECIPE, tmp_path).heldout
    assert len({sample.where.split(", ")[1] for sample in heldout}) == len(heldout) == 3


def test_batches_change_no_answer(
    graph: CausalLM, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = in_order(answer(graph, data, tmp_path / "a"))
    monkeypatch.setattr(own_answers, "MAX_TOKENS", 1)
    asked = count_calls(monkeypatch)
    alone = in_order(answer(graph, data, tmp_path / "b"))
    assert asked == [1] * 8
    assert [said(sample) for sample in together] == [said(sample) for sample in alone]


def test_a_placeholder_is_never_said(
    graph: CausalLM, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak, placeholder = graph.logits, graph.config.image_token_id

    def loud(hidden: torch.Tensor) -> torch.Tensor:
        logits = speak(hidden)
        logits[:, placeholder] = 1e9
        return logits

    before = [said(sample) for sample in in_order(answer(graph, data, tmp_path / "a"))]
    monkeypatch.setattr(graph, "logits", loud)
    assert [said(sample) for sample in in_order(answer(graph, data, tmp_path / "b"))] == before


def test_the_graph_stays_as_it_is(graph: CausalLM, data: Data, tmp_path: Path) -> None:
    names = [name for name, _ in graph.named_modules()]
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    answer(graph, data, tmp_path)
    after = graph.state_dict()
    assert names == [name for name, _ in graph.named_modules()]
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in graph.parameters())


def test_answers_of_the_data_stay_and_empty_ones_are_given(
    dense: Path, graph: CausalLM, tmp_path: Path
) -> None:
    rows = [llava_row(f"{i}.png") for i in range(4)]
    rows[1]["conversations"][3]["value"] = ""  # behind an answer that is there
    path = write_calibration(tmp_path / "c.zip", rows, {f"{i}.png": picture(i) for i in range(4)})
    before = read_data(dense, graph, RECIPE, path)
    after = answer(graph, before, tmp_path)
    assert before.answers == "3 of the data, 1 missing"
    assert after.answers == "3 of the data, 1 of the unquantized model"
    for old, new in zip(before.all, after.all, strict=True):
        assert (old is new) == ("line 2" not in old.where)
    (own,) = after.own
    (old,) = before.unanswered
    assert np.array_equal(own.is_answer[: len(old.token_ids)], old.is_answer)
    assert int(own.is_answer.sum()) == int(old.is_answer.sum()) - 1 + MAX_ANSWER_TOKENS
    swapped = {id(sample.token_ids) for sample in after.swapped}
    assert swapped == {id(sample.token_ids) for sample in after.train}
    assert [s.images for s in before.swapped] == [s.images for s in after.swapped]
    assert answer(graph, dataclasses.replace(before, train=after.train), tmp_path).own == ()


def test_states_that_are_not_finite_name_the_question(
    graph: CausalLM, data: Data, tmp_path: Path
) -> None:
    features = features_of(graph, data)
    bad = next(s for s in data.all if s.where.startswith("1.png")).images[0]
    features[id(bad)][0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"rows of picture 1 .*1\.png, question \d: check"):
        answer(graph, data, tmp_path, features)


@pytest.fixture(scope="module")
def whole(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an undisturbed run on bare pictures."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(small, output, ONCE, pictures, show_progress=False)
    return output


def test_an_interrupted_run_asks_for_no_answer_twice(
    small: Path, pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_answers, "MAX_TOKENS", 400)
    asked = []
    for stop_at in (2, 0):
        with monkeypatch.context() as patch:
            asked.append(count_calls(patch, stop_at))
            patch.setattr(WorkFolder, "save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                quantize(small, tmp_path / "out", ONCE, pictures, show_progress=False)
    assert len(asked[0]) == 1
    assert sum(asked[0] + asked[1]) == 8
    with monkeypatch.context() as patch:
        patch.setattr(own_answers, "_answer", lambda *_: pytest.fail("it was asked again"))
        quantize(small, tmp_path / "out", ONCE, pictures, show_progress=False)
    assert contents(tmp_path / "out") == contents(whole)  # which asked all in one batch
    report = json.loads((whole / "quantization_report.json").read_text())
    assert report["calibration"]["answers"] == "of the unquantized model"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_runs_that_share_a_survey_share_the_answers_it_was_measured_on(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, shared = count_calls(monkeypatch), tmp_path / "shared"
    guided = dataclasses.replace(UNTUNED, guided=True)  # by gradients, which are kept there

    def run(name: str, recipe: QuantRecipe, **more: Any) -> None:
        output = tmp_path / name
        quantize(small, output, recipe, pictures, show_progress=False, shared=shared, **more)

    run("a", guided)
    run("b", dataclasses.replace(guided, refit_rounds=2))
    assert asked == [8]
    assert len(list((shared / SURVEYS).iterdir())) == 1
    run("c", guided, by_block=True)  # sees other answers: none
    assert asked == [8]
    assert len(list((shared / SURVEYS).iterdir())) == 2


def test_baselines_are_calibrated_on_the_same_answers(
    dense: Path, graph: CausalLM, data: Data, pictures: Path, tmp_path: Path
) -> None:
    options = Options(calibration=pictures, limit=2)
    bench = Bench(dense, tmp_path / "scratch", options, lambda _: None)
    seen = sorted((s for b in bench._batches for s in b.samples), key=lambda s: s.where)
    expected = sorted(answer(graph, data, tmp_path).train, key=lambda s: s.where)
    assert list(map(said, seen)) == list(map(said, expected))
    assert max(len(said(sample)) for sample in seen) > 1


def test_a_run_by_block_leaves_answers_out_and_says_so(
    small: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "answer_open_questions", interrupt)
    quantize(small, tmp_path / "out", UNTUNED, pictures, by_block=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "holds 8 questions without answers, and with --stream the model does not give" in said
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"]["answers"] == "missing"
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupt_after(WorkFolder.save))
        with pytest.raises(KeyboardInterrupt):
            quantize(small, tmp_path / "b", UNTUNED, pictures, show_progress=False, by_block=True)
    with pytest.raises(ResumeError, match=r"own_answer_tokens = 0, this one has 64 \(with --st"):
        quantize(small, tmp_path / "b", UNTUNED, pictures, show_progress=False)


def interrupt_after(save: Callable[..., None]) -> Callable[..., None]:
    def saved(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    return saved


@pytest.fixture
def counted_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    """A counter of products that sees attention, too: it is not compiled."""
    monkeypatch.setattr(dense_ops, "has_numba", lambda: False)
    with Products() as products:
        yield products


def test_a_plan_counts_the_products_that_are_done(
    dense: Path, pictures: Path, tmp_path: Path, counted_attention: Products
) -> None:
    graph = load_model(dense)
    data = read_data(dense, graph, RECIPE, pictures)
    features = features_of(graph, data)
    before = counted_attention.macs
    answer(graph, data, tmp_path, features)
    real = counted_attention.macs - before
    plans = expected_plans(graph, RECIPE)
    planned = expect_answers(data, graph.config.text_config.max_position_embeddings, RECIPE)
    counted = macs(Stages(graph, plans, RECIPE, planned).own_answers())
    assert counted == pytest.approx(real, rel=0.03)
    assert macs(Stages(graph, plans, RECIPE, data).own_answers()) == 0
