"""Which rows of the token table and of the head get which bits (called by `pipeline`, `forecast`).

What an error in a row costs depends on how often its token is read and said, and that differs by
thousands. Where a recipe's `embedding_bits` are no whole number, table and head are cut into runs
of rows with a rate each. Tokenizers count their merges from the commonest on, so a few runs do;
tokens added behind them, which mark who speaks, are found by their use. Not here: the rounding of a
part (`solver`), how parts are stored (`mgvq_runtime.checkpoint.row_parts`).

Measured on SmolLM2 with noise of 7 % in some rows, on text that nothing here has seen: rows 0 to
1023 of 49,152 make 47 % of the divergence, the next 3,072 18 %, the last half 11 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mgvq_quantizer.allocation import Bands, table_bits
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import LOGIT_ROWS, Reference
from mgvq_runtime.checkpoint.row_parts import HEAD, TABLE, part_name
from mgvq_runtime.errors import ConfigError
from mgvq_runtime.layers.embedding import TiedHead
from mgvq_runtime.layers.row_parts import SplitEmbedding, SplitLinear
from mgvq_runtime.models.causal_lm import CausalLM

ROWS = 256
"""Rows that get their bits together: a segment of a trellis."""
_UNSEEN = 0.1
"""What falls on every row alike, beside the use that is seen: calibration shows a small part of a
language. On SmolLM2 .59, .15, .11, .07, .07 are seen in five runs of rows, where noise on text of
another source costs .47, .18, .14, .10, .11; with a tenth it is .52, .14, .12, .09, .13."""
_PART_SHARE = 0.002
"""Of a table's weights: bits that one more part must save, as it costs a launch a token."""
_RANK = 64
"""Zipf's law with ranks from here on: .43, .20, .16, .10, .10 in the runs above."""
_STEPS = 60


def measured_use(
    graph: CausalLM, reference: Reference, samples: Sequence[Sample]
) -> dict[str, Tensor]:
    """Measure what errors in rows cost: of the same relative size, against each other.

    A row of the table counts as often as it is read, one of the head by the `p (1 - p)` of its
    token, which is the curvature of the divergence; a tied one by the mean of both.

    Args:
        graph: dense.
        reference: what it says about all samples.
        samples: what it reads.

    Returns:
        `[V]` float64 with a sum of 1, by module name.
    """
    vocab_size = graph.config.text_config.vocab_size
    read = torch.zeros(vocab_size, dtype=torch.float64)
    for sample in samples:
        read += torch.bincount(torch.from_numpy(sample.token_ids), minlength=vocab_size)
    if graph.config.image_token_id is not None:
        read[graph.config.image_token_id] = 0.0  # a picture's rows take its place
    said = torch.zeros(vocab_size, dtype=torch.float64)
    for states in torch.split(torch.cat(list(reference.hidden.values())), LOGIT_ROWS):
        chances = reference.log_probs_of(states).exp()  # [a, V]
        said += (chances * (1.0 - chances)).sum(0).double().cpu()
    uses = {TABLE: read / read.sum(), HEAD: said / said.sum()}
    if graph.config.tie_word_embeddings:
        uses = {TABLE: (uses[TABLE] + uses[HEAD]) / 2}
    weights = {name: graph.get_submodule(name).weight for name in uses}
    found = {}
    for name, use in uses.items():
        weight = weights[name]
        assert isinstance(weight, Tensor)
        cost = (use + _UNSEEN / vocab_size) * weight.double().square().mean(1).cpu()
        found[name] = cost / cost.sum()
    return found


def assumed_use(graph: CausalLM) -> dict[str, Tensor]:
    """Return what `measured_use` would give where nothing can be measured: Zipf's law."""
    cost = 1.0 / (torch.arange(graph.config.text_config.vocab_size, dtype=torch.float64) + _RANK)
    names = [TABLE] if graph.config.tie_word_embeddings else [TABLE, HEAD]
    return {name: cost / cost.sum() for name in names}


def split_tables(
    graph: CausalLM, uses: Mapping[str, Tensor], recipe: QuantRecipe
) -> dict[str, Bands]:
    """Cut table and head into parts, unless the recipe keeps them.

    Args:
        graph: dense; its modules are replaced.
        uses: `[V]` what errors in rows cost, by module name.
        recipe: `embedding_bits`, no whole number.

    Returns:
        The band of each part, by its module's name.

    Raises:
        ConfigError: if the bits do not pay for the tables of one part.
    """
    bands: dict[str, Bands] = {}
    for name, use in uses.items():
        weight = graph.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if weight.shape[1] % 8 or _is_kept(name, recipe):
            continue
        parts = choose_parts(use.numpy(), weight.shape[1], recipe)
        sizes = [rows for rows, _ in parts]
        if name == TABLE:
            table = SplitEmbedding(map(_table, torch.split(weight, sizes)), sizes)
            graph.model.embed_tokens = table
            if graph.config.tie_word_embeddings:
                graph.lm_head = TiedHead(table)
        else:
            graph.lm_head = SplitLinear(map(_head, torch.split(weight, sizes)))
        for i, (_, rate) in enumerate(parts):
            bands[part_name(name, i)] = [(rate, weight.shape[1])]
    return bands


def choose_parts(
    use: npt.NDArray[np.float64], width: int, recipe: QuantRecipe
) -> list[tuple[int, int]]:
    """Cut rows into parts so that the sum of losses is least within the bits.

    A bit more quarters a row's loss. For a price of a bit, the best cut is a shortest path over
    runs of `ROWS` rows and rates; the price is the least whose cut is within the bits.

    Args:
        use: `[V]` what errors in rows cost.
        width: D.
        recipe: `embedding_bits`, which pay for codes and tables, and the codec.

    Returns:
        Rows and rate of each part, in order.

    Raises:
        ConfigError: if the bits do not pay for one part of the lowest rate.
    """
    rows = np.full(max(1, len(use) // ROWS), ROWS)
    rows[-1] += len(use) - rows.sum()
    losses = np.add.reduceat(use, np.r_[0, rows.cumsum()[:-1]])  # [B]
    rates = np.array(recipe.known_rates)
    tables = np.array([table_bits(int(rate), recipe) for rate in rates])
    room = recipe.embedding_bits * len(use) * width
    low, high = 1e-12 / (len(use) * width), 1.0
    best: list[tuple[int, int]] | None = None
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        path = _cheapest(losses[:, None] * 4.0**-rates, rows * width, rates, price, tables)
        parts = _merged(rows, rates[path])
        spent = sum(n * width * rate + table_bits(rate, recipe) for n, rate in parts)
        if spent <= room:
            best, high = parts, price
        else:
            low = price
    if best is None:
        raise ConfigError(
            f"embedding_bits is {recipe.embedding_bits}, which does not pay for the tables of "
            f"{len(use)} rows: give more, or a whole number, whose tables are not counted"
        )
    return best


def _cheapest(
    losses: npt.NDArray[np.float64],
    weights: npt.NDArray[np.int64],
    rates: npt.NDArray[np.int64],
    price: float,
    tables: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the place `[B]` of each run's rate, by dynamic programming over runs.

    Args:
        losses: `[B, R]`.
        weights: `[B]` of each run.
        rates: `[R]`.
        price: of a bit, in losses.
        tables: `[R]` bits of a new part's table.
    """
    costs = losses + price * weights[:, None] * rates  # [B, R]
    entry = price * (tables + _PART_SHARE * weights.sum())  # [R]
    total = costs[0] + entry
    came_from = np.empty(costs.shape, dtype=np.int64)
    for b in range(1, len(costs)):
        cheapest = int(total.argmin())
        stays = total <= total[cheapest] + entry  # [R]
        came_from[b] = np.where(stays, np.arange(len(rates)), cheapest)
        total = np.where(stays, total, total[cheapest] + entry) + costs[b]
    path = np.empty(len(costs), dtype=np.int64)
    path[-1] = total.argmin()
    for b in range(len(costs) - 1, 0, -1):
        path[b - 1] = came_from[b, path[b]]
    return path


def _merged(rows: npt.NDArray[np.int64], rates: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join neighbouring runs of one rate."""
    pairs = zip(rates.tolist(), rows.tolist(), strict=True)
    return [
        (sum(n for _, n in run), rate) for rate, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def _table(rows: Tensor) -> nn.Embedding:
    with torch.device("meta"):
        made = nn.Embedding(*rows.shape)
    made.weight = nn.Parameter(rows.clone(), requires_grad=False)
    return made


def _head(rows: Tensor) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    made.weight = nn.Parameter(rows.clone(), requires_grad=False)
    return made


def _is_kept(name: str, recipe: QuantRecipe) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in recipe.kept_patterns)
