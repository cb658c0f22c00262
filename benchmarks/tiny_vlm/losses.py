"""What training minimises: answers, and what each patch shows (called by `train`).

The answers are the task. The dense losses use what the drawing code knows anyway, where every
object, letter and bar is: a linear head, which no checkpoint keeps, names what each patch of the
tower shows, and the merged rows are drawn to the words for it. Without them the tower did not tell
shapes apart after 20,000 pictures; with them it names the shape of four patches in five after
70,000.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_vlm.concepts import COUNTRIES
from benchmarks.tiny_vlm.conversations import (
    COLOUR_NUMBERS,
    DENSE_CLASSES,
    Batch,
    Encoder,
    place_labels,
)
from benchmarks.tiny_vlm.model import Looking, ModelConfig, TinyVLM
from benchmarks.tiny_vlm.scoring import forward

NOTHING_WEIGHT = 0.1
"""Most patches show nothing; they count less."""
COLOUR_WEIGHT = 0.3
LOOKING = Looking(layers=(2, 3), heads=2)
"""Layers of the two hops of `look_loss`; their first two heads share keys and values."""


def training_model() -> TinyVLM:
    """The model with the head for dense labels, which no checkpoint keeps."""
    model = TinyVLM(ModelConfig())
    width = len(DENSE_CLASSES) + len(COLOUR_NUMBERS)
    model.add_module("dense", nn.Linear(model.config.vision_dim, width))
    return model


def answer_loss(
    model: TinyVLM, batch: Batch, encoder: Encoder, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answer tokens of one micro-batch, and `look_loss`."""
    hidden, seen = forward(model, batch, encoder, features, LOOKING)
    labels = torch.from_numpy(batch.labels[batch.labels >= 0]).to(hidden.device)
    loss = F.cross_entropy(model.logits(hidden), labels)
    return loss, look_loss(seen, batch)


def look_loss(seen: list[Tensor], batch: Batch) -> Tensor:
    """How far the looking heads are from the things that the answers are read from.

    For each prediction and hop the mean over its things, and over the heads, of minus the log of
    the attention that falls on the thing; the mean of that over predictions and hops.

    Args:
        seen: for each hop the attention `[B, heads, L, L]` of its layer.
        batch: its `looks` say who should look where.

    Returns:
        A scalar; 0 if nobody has to look anywhere.
    """
    weights = torch.from_numpy(batch.looks.weights).to(seen[0].device)
    if not len(weights):
        return seen[0].new_zeros(())
    hop, row, query = torch.from_numpy(batch.looks.where).to(seen[0].device).unbind(-1)
    attention = torch.stack(seen)[hop, row, :, query]  # [M, heads, L]
    keys = torch.from_numpy(batch.looks.keys).to(attention)
    on_thing = torch.einsum("mhl,ml->mh", attention, keys)
    return -(on_thing.clamp(min=1e-6).log().mean(-1) * weights).sum() / weights.sum()


def dense_loss(model: TinyVLM, batch: Batch, features: Tensor) -> Tensor:
    """Mean cross-entropy of what each patch shows and in which colour."""
    logits = model.dense(F.layer_norm(features, features.shape[-1:])).float()
    classes = torch.from_numpy(batch.dense_classes).to(logits.device)
    colours = torch.from_numpy(batch.dense_colours).to(logits.device)
    count = len(DENSE_CLASSES)
    weights = torch.ones(count, device=logits.device)
    weights[0] = NOTHING_WEIGHT
    loss = F.cross_entropy(logits[..., :count].flatten(0, 1), classes.flatten(), weights)
    if (colours >= 0).any():
        by_colour = F.cross_entropy(logits[..., count:].flatten(0, 1), colours.flatten())
        loss = loss + COLOUR_WEIGHT * by_colour
    return loss


def dense_words(encoder: Encoder) -> tuple[Tensor, ...]:
    """First tokens, bare and after a space, of what patches are labelled with.

    Returns:
        `[classes, 2]`, `[colours, 2]`, `[2, 2]` for top and bottom, `[2, 2]` for left and right.
    """

    def tokens(words: list[str]) -> Tensor:
        return torch.tensor([[encoder.ids(w)[0], encoder.ids(" " + w)[-1]] for w in words])

    names = [name.split(" ", 1)[-1] for name in DENSE_CLASSES]
    names = [COUNTRIES.get(name, name) for name in names]
    colours = tokens(list(COLOUR_NUMBERS))
    return tokens(names), colours, tokens(["top", "bottom"]), tokens(["left", "right"])


def word_loss(model: TinyVLM, batch: Batch, features: Tensor, words: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy of the words for what and where a merged patch is, read off its decoder row.

    It lays the tower's output where the decoder already keeps these words, so that a question's
    word finds its picture row by likeness.
    """
    rows = model.visual.merge(features)  # [N, P / 4, D]
    likelihood = model.logits(model.model["norm"](rows)).log_softmax(-1)
    N, T, _ = likelihood.shape
    targets, known = [], []
    classes = batch.dense_classes
    numbered = (classes, batch.dense_colours, *place_labels(batch), batch.dense_partners)
    for numbers, table in zip(numbered, (*words, words[0]), strict=True):
        labels = torch.from_numpy(numbers)
        targets.append(table[labels.clamp(min=0)].reshape(N, T, -1))
        is_known = labels > 0 if table is words[0] else labels >= 0
        known.append(is_known.unsqueeze(-1).expand(-1, -1, 2).reshape(N, T, -1))
    wanted = torch.cat(targets, dim=-1).to(likelihood.device)
    mask = torch.cat(known, dim=-1).to(likelihood.device)
    return -(likelihood.gather(-1, wanted) * mask).sum() / mask.sum().clamp(min=1)
