"""Which input channels pictures feed, which text, and bands cut along that line (for `allocation`).

A channel's leaning is `q = log(omega_v A_v / (omega_t A_t))`: the energy that picture tokens bring
into it against what text brings, each token weighted by its gradient. Above the recipe's threshold
a channel is visual, below its negative textual, between them shared. The band of every rate is cut
into its classes, and a table is named after rate and class. Not here: how much a token counts
(`gradients`), which rate a channel gets (`precision`).

Source: method memo B.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgvq_quantizer.batches import Features, TokenBatch, decoder_runs
from mgvq_quantizer.gradients import TokenWeights, shows_picture, weights_of
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import run_widths
from mgvq_quantizer.statistics import input_energies
from mgvq_runtime.models.causal_lm import CausalLM

VISUAL, SHARED, TEXTUAL = "visual", "shared", "textual"
MAX_BANDS = 6
"""Of one matrix: kernels start anew at every band."""
_SMALLEST_ENERGY = 1e-300


@dataclass(frozen=True)
class Channels:
    """The input channels of one matrix, as the unquantized model feeds them."""

    order: tuple[int, ...]
    """By second moment, the smallest first; the moment is the one the matrix is rounded with."""
    leanings: tuple[float, ...]
    """`q` of each channel, in the model's order."""


@dataclass(frozen=True)
class Cut:
    """One band of a matrix: a rate and, where classes are told apart, whose channels."""

    rate: int
    width: int
    channel_class: str = SHARED
    channels: tuple[int, ...] = ()
    """Ascending; empty in a matrix of one class, whose bands take any channels of their width."""


def channels_of(
    model: CausalLM,
    names: Sequence[str],
    batches: Sequence[TokenBatch],
    features: Features,
    weights: TokenWeights,
    recipe: QuantRecipe,
) -> dict[str, Channels]:
    """Run the decoder once and see which tokens feed which channels.

    Where picture tokens get no gradient (a last block: only answers are read there) every channel
    is textual.

    Args:
        model: dense.
        names: linear layers of the decoder.
        batches: calibration samples.
        features: rows of every picture.
        weights: how much each token counts for each of `names`.
        recipe: whether a matrix is rounded with weighted moments.

    Returns:
        The channels by name of the matrix.
    """
    token = model.config.image_token_id
    pictures = [
        torch.cat([shows_picture(sample, token) for sample in batch.samples]) for batch in batches
    ]
    ways = {
        name: [
            torch.stack([torch.ones_like(w), w * picture.to(w), w * (~picture).to(w)])
            for w, picture in zip(weights_of(batches, weights[name]), pictures, strict=True)
        ]
        for name in names
    }
    modules = {name: model.get_submodule(name) for name in names}
    energies = input_energies(modules, decoder_runs(model, batches, features), ways)
    return {name: leaning(energy, recipe.guided) for name, energy in energies.items()}


def leaning(energies: Tensor, guided: bool) -> Channels:
    """Order channels and say where they lean; one that nothing enters is shared.

    Args:
        energies: `[3, I]` float64: of all tokens alike; of pictures and of text, weighted.
        guided: whether the order is that of the weighted tokens.
    """
    plain, pictures, text = energies
    low, high = (energy.clamp_min(_SMALLEST_ENERGY).log() for energy in (text, pictures))
    order = (pictures + text if guided else plain).argsort(stable=True)
    return Channels(tuple(order.tolist()), tuple((high - low).tolist()))


def cut_bands(
    bands: Sequence[tuple[int, int]], mine: Channels | None, threshold: float
) -> tuple[Cut, ...]:
    """Cut the band of every rate into classes, those with smaller inputs to the left.

    A class is as wide as the format's narrowest band or it is none: 32 channels of up to 1,024
    inputs, 128 of more. Widths are multiples of that, so a few channels on the border of a class
    are shared, or a few shared ones join a class. What a table for few channels costs is held down
    by sharing it between layers (`max_codebook_overhead`).

    Args:
        bands: rate and width of each, from left to right.
        mine: the matrix's channels; None tells no classes apart.
        threshold: the least leaning, either way, of a channel that is not shared.

    Returns:
        At most `MAX_BANDS`, unless there were more to begin with; the smallest classes give way.
    """
    if mine is None:
        return tuple(Cut(rate, width) for rate, width in bands)
    rank = {channel: place for place, channel in enumerate(mine.order)}
    parts: list[list[Cut]] = []
    start = 0
    for rate, width in bands:
        inside = mine.order[start : start + width]
        found = _classes(inside, mine, threshold)
        parts.append([Cut(rate, len(ids), name, ids) for name, ids in found])
        start += width
    while sum(map(len, parts)) > MAX_BANDS and max(map(len, parts)) > 1:
        _merge_smallest(parts)
    for part in parts:
        part.sort(key=lambda c: sum(rank[channel] for channel in c.channels) / c.width)
    cuts = tuple(c for part in parts for c in part)
    if len({c.channel_class for c in cuts}) == 1:
        return tuple(replace(c, channels=()) for c in cuts)
    return cuts


def class_names(mine: Channels | None, threshold: float) -> set[str]:
    """Return the classes that the channels of a matrix fall in, all of them at one rate."""
    if mine is None:
        return {SHARED}
    return {name for name, _ in _classes(mine.order, mine, threshold)}


def _classes(
    inside: Sequence[int], mine: Channels, threshold: float
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the classes among some channels with their members, none of them empty."""
    leanings, multiple = mine.leanings, run_widths(len(mine.order))[0]
    ordered = sorted(inside, key=lambda channel: (leanings[channel], channel))
    textual = sum(leanings[channel] < -threshold for channel in ordered)
    visual = sum(leanings[channel] > threshold for channel in ordered)
    spare = len(ordered) - textual - visual
    left = _width(textual, spare, multiple)
    right = _width(visual, spare - max(0, left - textual), multiple)
    middle = len(ordered) - left - right
    for name, ids in (
        (TEXTUAL, ordered[:left]),
        (SHARED, ordered[left : left + middle]),
        (VISUAL, ordered[left + middle :]),
    ):
        if ids:
            yield name, tuple(sorted(ids))


def _width(count: int, spare: int, multiple: int) -> int:
    """Round a class to a multiple, up only where `spare` shared channels can fill it."""
    if count < multiple:
        return 0
    missing = -count % multiple
    fits = 2 * missing < multiple and missing <= spare
    return count + missing if fits else count - count % multiple


def _merge_smallest(parts: list[list[Cut]]) -> None:
    """Make the smallest class of all bands that are cut a part of its rate's shared channels."""
    several = [part for part in parts if len(part) > 1]
    part, least = min(
        ((part, c) for part in several for c in part if c.channel_class != SHARED),
        key=lambda pair: pair[1].width,
    )
    others = [c for c in part if c.channel_class not in (SHARED, least.channel_class)]
    shared = [c for c in part if c.channel_class == SHARED] or [others.pop()]
    ids = tuple(sorted((*least.channels, *shared[0].channels)))
    part[:] = [*others, Cut(least.rate, len(ids), SHARED, ids)]
