"""What the unquantized model itself answers where the data have no answers (called by `pipeline`).

Bare pictures come with generic questions and nobody's answers. The model gives them, greedily, so
that sensitivity, tuning and the KL see whole answers and not the first token of each alone. Prompts
are read once, batch by batch, into a small paged cache (`paged_runs`); then each step takes one
token more of every conversation that has not ended.
Not here: models read block by block, for which every token would read all blocks again (`pipeline`
says so), and answers that came with the data, which stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence, Set
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgvq_quantizer.batches import MAX_TOKENS, Features, split_batches
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.dataset import Data
from mgvq_quantizer.paged_runs import BLOCK, Run, lay_out, make_cache, picture_rows, run_through
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import LOGIT_ROWS, not_finite
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.models.causal_lm import CausalLM

MAX_ANSWER_TOKENS = 64
"""Most tokens of an answer: a few sentences. Asked to describe a picture, a model goes on for
hundreds; more pictures teach more than the ends of long answers, and every token costs a step."""


def answer_open_questions(
    graph: CausalLM,
    data: Data,
    features: Features,
    recipe: QuantRecipe,
    work: WorkFolder | None,
    show: Callable[[str], None],
) -> Data:
    """Have the model answer the conversations that came without an answer.

    Batches depend on the conversations alone, so the facts that name a work folder, or one that
    runs share, decide the answers too: model, data, template, device, and whether it is asked. They
    are kept, batch by batch, in the folder of what is measured on them: whoever reads a survey
    there reads the answers that it was measured on, and an interrupted run does not ask twice.

    Args:
        graph: dense, all of it in memory; it is only run.
        data: of which `Data.unanswered` are asked.
        features: rows of every picture.
        recipe: how often pictures are swapped.
        work: where answers are kept; None keeps none.
        show: is told how far it has come.

    Returns:
        The data with their answers in them; itself where none is missing.

    Raises:
        CalibrationError: naming a conversation on which the model's states are not finite.
    """
    asked = sorted(data.unanswered, key=lambda sample: len(sample.token_ids))
    limit = graph.config.text_config.max_position_embeddings
    batches = split_batches([with_room(sample, limit) for sample in asked], MAX_TOKENS)
    said: list[list[int]] = []
    for number, batch in enumerate(batches):
        show(f"the unquantized model answers, {len(said)} of {len(asked)} questions done")
        kept = work and work.load_tensors(f"answers.{number}")
        if kept:
            answers = [kept[0][str(i)].tolist() for i in range(len(batch))]
        else:
            answers = _answer(graph, batch, features, data.end_token_ids)
            if work:
                tensors = {str(i): torch.tensor(answer) for i, answer in enumerate(answers)}
                work.save_tensors(f"answers.{number}", tensors)
        said += answers
    pairs = zip(asked, said, strict=True)
    return data.with_answers({id(s): with_answer(s, tokens) for s, tokens in pairs}, recipe)


def expect_answers(data: Data, limit: int, recipe: QuantRecipe) -> Data:
    """Return data with room for every missing answer at its longest (for `forecast`).

    Args:
        data: as a run would read them.
        limit: tokens that the model can read.
        recipe: as in `answer_open_questions`.
    """
    return data.with_answers({id(s): with_room(s, limit) for s in data.unanswered}, recipe)


def with_answer(sample: Sample, answer: Sequence[int]) -> Sample:
    """Return a sample with an answer in the place of its lone end token.

    An answer ends as the model ended it. One that was cut gets no end token: what the model would
    say behind its last token is not asked, and it should read nothing that it did not say.
    """
    start = len(sample.token_ids) - 1
    n = len(answer)
    tail = sample.positions[:, start:] + np.arange(n)  # [3, n]
    return dataclasses.replace(
        sample,
        token_ids=np.concatenate([sample.token_ids[:start], np.array(answer, dtype=np.int64)]),
        positions=np.concatenate([sample.positions[:, :start], tail], axis=1),
        is_answer=np.concatenate([sample.is_answer[:start], np.ones(n, dtype=np.bool_)]),
        is_unanswered=False,
    )


def with_room(sample: Sample, limit: int) -> Sample:
    """Return a sample with end tokens where its answer may stand, as many as the model may say.

    Args:
        sample: unanswered.
        limit: tokens that the model can read.
    """
    start = len(sample.token_ids) - 1
    return with_answer(sample, [int(sample.token_ids[-1])] * min(MAX_ANSWER_TOKENS, limit - start))


def count_reading(samples: Sequence[Sample]) -> tuple[int, int, int, int]:
    """Return what the decoder reads while it answers, as the fields of `stage_work.Reading`.

    Args:
        samples: answered; all but the last token of each answer is read again.
    """
    tokens = pairs = answers = 0
    for sample in samples:
        length, room = len(sample.token_ids), _room(sample)
        start = length - room
        tokens += length - 1
        pairs += start**2 + sum(range(start + 1, length))
        answers += room
    return tokens, pairs, answers, len(samples)


@torch.no_grad()
def _answer(
    graph: CausalLM, samples: Sequence[Sample], features: Features, ends: Set[int]
) -> list[list[int]]:
    """Return what the model says in the room of each sample, the end token included if it came."""
    rooms = [_room(sample) for sample in samples]
    starts = [len(sample.token_ids) - room for sample, room in zip(samples, rooms, strict=True)]
    widths = [-(-len(sample.token_ids) // BLOCK) for sample in samples]
    stops = list(accumulate(widths))
    cache = make_cache(graph, stops[-1])
    rows = [features[id(image)] for sample in samples for image in sample.images]
    pictures = torch.cat(rows) if rows else cache[0].keys.new_zeros(0, 0)
    places = _picture_rows(samples, graph.config.image_token_id)
    ids = [sample.token_ids.copy() for sample in samples]

    def run(i: int, first: int, last: int) -> Run:
        part, blocks = slice(first, last), list(range(stops[i] - widths[i], stops[i]))
        return Run(ids[i][part], places[i][part], samples[i].positions[:, part], last, blocks)

    live = list(range(len(samples)))
    said: list[list[int]] = [[] for _ in samples]
    runs = [run(i, 0, starts[i]) for i in live]
    while live:
        laid = lay_out(runs, graph.device)
        last_rows = torch.tensor(laid.cu_seqlens_q[1:], device=graph.device) - 1
        hidden = run_through(graph, laid, pictures, cache)[last_rows]  # [R, D]
        is_good = torch.isfinite(hidden).all(1).tolist()
        if not all(is_good):
            raise not_finite(samples[live[is_good.index(False)]], features)
        for i, token in zip(live, _most_probable(graph, hidden), strict=True):
            ids[i][starts[i] + len(said[i])] = token
            said[i].append(token)
        live = [i for i in live if said[i][-1] not in ends and len(said[i]) < rooms[i]]
        runs = [run(i, starts[i] + len(said[i]) - 1, starts[i] + len(said[i])) for i in live]
    return said


def _most_probable(graph: CausalLM, hidden: Tensor) -> list[int]:
    """Return the most probable token of each row `[R, D]`; no placeholder: no picture is behind."""
    tokens: list[int] = []
    for part in torch.split(hidden, LOGIT_ROWS):
        logits = graph.logits(part)  # [R, V]
        logits[:, list(graph.config.placeholder_ids)] = float("-inf")
        tokens += logits.argmax(1).tolist()
    return tokens


def _picture_rows(
    samples: Sequence[Sample], image_token_id: int | None
) -> list[npt.NDArray[np.int64]]:
    """Return which row of all their pictures each token of each sample takes."""
    found, first = [], 0
    for sample in samples:
        found.append(picture_rows(sample.token_ids, image_token_id, first))
        first += sum(image.num_tokens for image in sample.images)
    return found


def _room(sample: Sample) -> int:
    """Return how many tokens of answer a sample ends with."""
    return int(np.argmin(sample.is_answer[::-1]))
