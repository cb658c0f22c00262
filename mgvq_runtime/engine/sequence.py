"""The engine's running account of one request (made by `engine.Engine.add`).

Tokens known, tokens whose keys and values are cached, blocks held and by which keys they are found,
text released. Who runs next is the scheduler's decision, tensors belong to the model runner: this
file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mgvq_runtime.cache.block_key import BlockKey, block_key
from mgvq_runtime.request import Request

if TYPE_CHECKING:
    import torch

    from mgvq_runtime.engine.logits_processor import LogitsProcessor
    from mgvq_runtime.engine.n_gram import NGramProposer
    from mgvq_runtime.engine.output import OutputText

ImageKey = tuple[bytes, str | None]
"""Digest and cache_salt of a picture: what its embeddings are kept under."""


class Sequence:
    """One request while it waits or runs."""

    __slots__ = (
        "_block_keys",
        "_last_placeholder",
        "_root",
        "block_table",
        "deadline",
        "image_embeds",
        "image_ends",
        "logits_processor",
        "max_tokens",
        "num_cached_tokens",
        "num_accepted_tokens",
        "num_computed",
        "num_draft_tokens",
        "num_prompt_tokens",
        "order",
        "output",
        "placeholders",
        "proposer",
        "request",
        "request_id",
        "seed",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        max_tokens: int,
        seed: int,
        placeholder_ids: tuple[int, ...],
        output: OutputText,
        root: bytes = b"",
    ) -> None:
        """Start a waiting sequence.

        Args:
            request: What was asked.
            max_tokens: Tokens to generate, already clamped to the context.
            seed: Key of this request's random numbers.
            placeholder_ids: What pictures stand behind; none for a model that takes no pictures.
            output: What turns its tokens into text.
            root: What the keys of its blocks are chained to, from `block_key.root_digest`.
        """
        prompt = request.prompt
        self.request = request
        self.request_id = request.request_id
        self.token_ids = list(prompt.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = max_tokens
        self.seed = seed
        self.num_computed = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache on first admission; None before it."""
        self.block_table: list[int] = []
        self.order = (request.priority, 0)
        """Who goes first: priority, then arrival, which the scheduler counts."""
        self.deadline: float | None = None
        """When to give up, on the engine's clock."""
        self.output = output
        self.logits_processor: LogitsProcessor | None = None
        self.proposer: NGramProposer | None = None
        """Guesses its next tokens; None where nothing is guessed."""
        self.num_draft_tokens = self.num_accepted_tokens = 0
        """Tokens that were guessed, and those of them that were right."""
        self._root = root
        self._block_keys: list[BlockKey] = []
        ids = np.asarray(self.token_ids, dtype=np.int64)
        self.placeholders: npt.NDArray[np.int64] = (
            np.flatnonzero(np.isin(ids, placeholder_ids)) if prompt.images else ids[:0]
        )
        """Indices of the prompt tokens that stand for pictures, ascending."""
        self._last_placeholder = int(self.placeholders[-1]) if len(self.placeholders) else -1
        self.image_ends: npt.NDArray[np.int64] = np.cumsum(
            [image.num_tokens for image in prompt.images], dtype=np.int64
        )
        """One past each picture's last placeholder, counted in placeholders."""
        self.image_embeds: dict[int, torch.Tensor] = {}
        """`[num_tokens, D]` by picture, for those whose placeholders are being read."""

    @property
    def num_remaining(self) -> int:
        """Known tokens whose keys and values are not cached yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_draft_tokens(self) -> int:
        """Most tokens worth guessing: whatever is guessed, one more is drawn."""
        return self.max_tokens - self.num_completion_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to run is the token generated last."""
        return self.num_remaining == 1 and self.num_completion_tokens > 0

    def positions(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the positions `[3, end - start]` of tokens `start` to `end`."""
        prompt = self.request.prompt
        from_prompt = prompt.positions[:, start:end]  # [3, at most end - start]
        known = from_prompt.shape[1]
        if known == end - start:
            return from_prompt
        positions = np.empty((3, end - start), dtype=np.int64)
        positions[:, :known] = from_prompt
        positions[:, known:] = np.arange(start + known, end) + prompt.position_delta
        return positions

    def placeholder_range(self, start: int, end: int) -> tuple[int, int]:
        """Return which placeholders, counted from 0, lie in tokens `start` to `end`."""
        if start > self._last_placeholder:
            return len(self.placeholders), len(self.placeholders)
        low, high = np.searchsorted(self.placeholders, (start, end))
        return int(low), int(high)

    def images_between(self, start: int, end: int) -> range:
        """Return the indices of the pictures that have a placeholder in tokens `start` to `end`."""
        low, high = self.placeholder_range(start, end)
        if low == high:
            return range(0)
        first = int(np.searchsorted(self.image_ends, low, side="right"))
        last = int(np.searchsorted(self.image_ends, high - 1, side="right"))
        return range(first, last + 1)

    def image_start(self, index: int) -> int:
        """Return which token is the first placeholder of a picture."""
        return int(self.placeholders[self.image_ends[index - 1] if index else 0])

    def image_key(self, index: int) -> ImageKey:
        """Return what the embeddings of a picture are kept under."""
        return self.request.prompt.images[index].digest, self.request.cache_salt

    def block_keys(self, first: int, last: int, block_size: int) -> Iterator[BlockKey]:
        """Yield the keys of full blocks `first` to `last`; each is made once, when it is needed."""
        for index in range(first, last):
            while len(self._block_keys) <= index:
                self._block_keys.append(self._next_block_key(block_size))
            yield self._block_keys[index]

    def advance(self, num_tokens: int) -> None:
        """Note that `num_tokens` more tokens are cached; drop pictures read to their end."""
        self.num_computed += num_tokens
        if self.image_embeds:
            done = self.placeholder_range(0, self.num_computed)[1]
            for index in [i for i in self.image_embeds if self.image_ends[i] <= done]:
                del self.image_embeds[index]

    def reset(self) -> None:
        """Forget what was computed: tokens, text and seed stay, all else is made again."""
        self.num_computed = 0
        self.image_embeds.clear()

    def _next_block_key(self, block_size: int) -> BlockKey:
        index = len(self._block_keys)
        start, end = index * block_size, (index + 1) * block_size
        images = self.request.prompt.images
        return block_key(
            self._block_keys[-1].digest if index else self._root,
            self.token_ids[start:end],
            self.positions(start, end).tobytes(),
            [
                (images[i].digest, start - self.image_start(i))
                for i in self.images_between(start, end)
            ],
        )
