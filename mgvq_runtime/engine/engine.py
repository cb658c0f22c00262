"""The engine: requests in, tokens out, one step at a time (called by `llm.LLM` and serve's thread).

Synchronous and single-threaded: whoever calls it owns it. `Engine.step` is the diagram. It decides
nothing itself: who runs is `scheduler`, the arithmetic is `model_runner`, the choice of a token is
`sampler`, text and stopping are `output`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path

import torch

from mgvq_runtime.cache.block_key import root_digest
from mgvq_runtime.cache.block_manager import BlockManager
from mgvq_runtime.cache.kv_cache import KVCache
from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.config import EngineConfig, ResolvedConfig
from mgvq_runtime.engine.decode_graphs import CudaRecorder, DecodeGraphs
from mgvq_runtime.engine.grammar import TOO_COMPLEX, GrammarCompiler
from mgvq_runtime.engine.logits_processor import make_logits_processor
from mgvq_runtime.engine.memory import (
    MemorySummary,
    decode_bytes,
    peak_device_bytes,
    peak_rss_bytes,
    weights_bytes,
)
from mgvq_runtime.engine.memory_demand import model_facts
from mgvq_runtime.engine.memory_plan import MemoryPlan
from mgvq_runtime.engine.model_runner import ModelRunner
from mgvq_runtime.engine.n_gram import NGramProposer
from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.engine.prompt_check import check_prompt
from mgvq_runtime.engine.sampler import BAD_ROW, Sample, sample
from mgvq_runtime.engine.scheduler import Chunk, Scheduler
from mgvq_runtime.engine.sequence import ImageKey, Sequence
from mgvq_runtime.engine.startup import start
from mgvq_runtime.errors import ContextLengthError, EngineDeadError, RequestError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.request import FinishReason, Request, RequestOutput, TokenLogprob
from mgvq_runtime.tokenizer import IncrementalDetokenizer, Tokenizer

NOT_FINITE = (
    "the model's output for this request was not finite (NaN or infinity): the picture, the "
    "checkpoint or the activation type may be at fault; other requests are not affected"
)
OUT_OF_GRAMMAR = (
    "the grammar of this request became too complex to follow; simplify it, its repetitions first"
)


class Engine:
    """Continuous batching of image-and-text requests over one model."""

    def __init__(
        self,
        model: CausalLM,
        chat_processor: ChatProcessor,
        config: ResolvedConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a loaded model on `config.device` and allocate the key/value pool.

        Most callers want `Engine.from_checkpoint`. `clock` gives seconds, for requests that end
        after a time.
        """
        self.config = config
        self.model_config: ModelConfig = model.config
        self.chat_processor = chat_processor
        self.tokenizer: Tokenizer = chat_processor.tokenizer
        self.grammars = GrammarCompiler(self.tokenizer, model.config.text_config.vocab_size)
        """Compiles the forms of answers; what other threads compile here before `add` is cached."""
        device = torch.device(config.device)
        cache = KVCache(
            model_facts(model.config, is_quantized=False),
            config.num_kv_blocks,
            config.block_size,
            device,
            getattr(torch, config.kv_cache_dtype),
        )
        images = LRUCache[ImageKey, torch.Tensor](config.image_cache_bytes)
        graphs = None
        if config.decode_batch_sizes:
            sizes, recorder = config.decode_batch_sizes, CudaRecorder(device)
            graphs = DecodeGraphs(model, cache.layers, sizes, config.max_model_len, recorder)
        self._runner = ModelRunner(model, cache, images, config, graphs)
        self._blocks = BlockManager(config.num_kv_blocks, config.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            images,
            config.max_num_seqs,
            config.max_batch_tokens,
            config.max_batch_patches,
        )
        self.max_model_len = min(config.max_model_len, self._blocks.capacity_tokens)
        """Most tokens of prompt and answer together."""
        self.memory_plan: MemoryPlan | None = None
        """What every byte was planned for, where `from_checkpoint` made this engine."""
        self.num_draft_tokens = self.num_accepted_tokens = 0
        """Tokens guessed ahead since the start, and those of them that were right."""
        self._sequences: dict[str, Sequence] = {}
        self._seeds = random.Random(config.seed)
        self._clock = clock
        self._cache_facts = (repr(model.config), config.dtype, config.kv_cache_dtype)
        self._is_dead = False

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | None = None, config: EngineConfig | None = None
    ) -> Engine:
        """Load a checkpoint, quantized or dense, and make an engine for it.

        Args:
            path: Checkpoint folder; None takes `config.checkpoint`, and if that is None too, the
                bundled demonstration model.
            config: Settings; None takes the defaults.

        Raises:
            CheckpointError: if the folder is missing, damaged or not ours.
            ConfigError: if the settings do not fit this model or this machine.
        """
        model, chat_processor, resolved, plan = start(path, config or EngineConfig())
        engine = cls(model, chat_processor, resolved)
        engine.memory_plan = plan
        return engine

    def add(self, request: Request) -> None:
        """Queue a request; its tokens come out of later `step`s.

        Raises:
            ContextLengthError: if prompt and one new token are longer than `max_model_len`.
            RequestError: if the id is in use, the prompt does not fit the model, or the form of
                the answer is wrong.
            EngineDeadError: if an earlier step failed.
        """
        self._check_alive()
        if request.request_id in self._sequences:
            raise RequestError(
                f"request id {request.request_id!r} is in use by a request that has not ended",
                param="request_id",
            )
        check_prompt(request, self.model_config)
        num_prompt_tokens = len(request.prompt.token_ids)
        if num_prompt_tokens + 1 > self.max_model_len:
            raise ContextLengthError(num_prompt_tokens, self.max_model_len)
        params = request.sampling_params
        max_tokens = min(params.max_tokens, self.max_model_len - num_prompt_tokens)
        output = OutputText(
            IncrementalDetokenizer(self.tokenizer),
            params,
            self.tokenizer.eos_token_ids,
            max_tokens,
        )
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        placeholder_ids = self.model_config.placeholder_ids
        root = root_digest(self._cache_facts, request.cache_salt)
        sequence = Sequence(request, max_tokens, seed, placeholder_ids, output, root)
        sequence.logits_processor = make_logits_processor(request, self.grammars)
        if self.config.speculation is not None and sequence.logits_processor is None:
            sequence.proposer = NGramProposer(self.config.speculation)
        if request.timeout_s is not None:
            sequence.deadline = self._clock() + request.timeout_s
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def step(self) -> list[RequestOutput]:
        """Run one forward; return what each request that got a token gained, or why it ended."""
        with self._dies_on_error(), torch.inference_mode():
            expired = self._expire()
            step = self._scheduler.schedule()
            if not step.chunks:
                return expired
            self._runner.encode_images(step)
            logits = self._runner.run(step.chunks)
            rows = [(chunk.sequence, i) for chunk in step.chunks for i in range(chunk.num_rows)]
            samples = sample(logits, [seq for seq, _ in rows], [ahead for _, ahead in rows])
            return expired + self._commit(step.chunks, samples)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state and free what it holds, at once.

        Returns:
            Its last output, with the text that was held back; None if no such request is left.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return self._output(sequence, sequence.output.flush(), (), FinishReason.ABORT)

    def has_unfinished(self) -> bool:
        """Whether a request waits or runs, so that `step` has something to do."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._scheduler.waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a request had to give its blocks back and start over."""
        return self._scheduler.num_preemptions

    @property
    def kv_usage(self) -> float:
        """Share of the key/value pool in use, from 0 to 1."""
        return 1.0 - self._blocks.num_free_blocks / (self._blocks.num_blocks - 1)

    def memory_summary(self) -> MemorySummary:
        """Return what the engine holds now and the most its process has held."""
        device = torch.device(self.config.device)
        return MemorySummary(
            weights_bytes=weights_bytes(self._runner.model, device_type=device.type),
            decode_bytes=decode_bytes(self._runner.model),
            kv_cache_bytes=self._runner.kv_cache.num_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            peak_device_bytes=peak_device_bytes(device),
        )

    def _expire(self) -> list[RequestOutput]:
        """End what has run out of time, waiting or running."""
        now = self._clock()
        late = [s for s in self._sequences.values() if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self._end(sequence)
        return [
            self._output(
                sequence,
                sequence.output.flush(),
                (),
                FinishReason.TIMEOUT,
                error=f"the request did not end within {sequence.request.timeout_s:g} seconds",
            )
            for sequence in late
        ]

    def _commit(self, chunks: Items[Chunk], samples: Items[Sample]) -> list[RequestOutput]:
        """Write the step down: tokens computed, tokens drawn, requests ended."""
        for chunk in chunks:
            self._scheduler.advance(chunk.sequence, chunk.end - len(chunk.draft))
        drawn = iter(samples)
        return [
            self._commit_drawn(chunk, list(islice(drawn, chunk.num_rows)))
            for chunk in chunks
            if chunk.is_sampled
        ]

    def _commit_drawn(self, chunk: Chunk, drawn: Items[Sample]) -> RequestOutput:
        """Take what was drawn for one sequence, up to the first token that was guessed wrong.

        A token drawn after a wrong guess has a beginning that is not the sequence's; its keys and
        values are written over.
        """
        sequence, text = chunk.sequence, ""
        taken: list[Sample] = []
        reason = None
        for one, guessed in zip_longest(drawn, chunk.draft):
            if one.token_id == BAD_ROW:
                return self._fail(sequence, NOT_FINITE, text, taken, is_poisoned=True)
            processor = sequence.logits_processor
            if processor is not None and not processor.push(one.token_id):
                return self._fail(sequence, OUT_OF_GRAMMAR, text, taken, error_code=TOO_COMPLEX)
            sequence.token_ids.append(one.token_id)
            taken.append(one)
            more, reason = sequence.output.push(one.token_id)
            text += more
            if reason is not None:
                self._end(sequence)
            if reason is not None or one.token_id != guessed:
                break
            self._scheduler.advance(sequence, len(sequence.token_ids))
        self._count_draft(chunk, taken)
        return self._output(sequence, text, taken, reason)

    def _count_draft(self, chunk: Chunk, taken: Items[Sample]) -> None:
        pairs = zip(taken, chunk.draft, strict=False)
        num_right = sum(one.token_id == guessed for one, guessed in pairs)
        for account in (self, chunk.sequence):
            account.num_draft_tokens += len(chunk.draft)
            account.num_accepted_tokens += num_right

    def _fail(
        self,
        sequence: Sequence,
        error: str,
        text: str,
        taken: Items[Sample],
        is_poisoned: bool = False,
        error_code: str | None = None,
    ) -> RequestOutput:
        """End one request with an error after what it got in this step; the others go on."""
        self._end(sequence, is_poisoned)
        text += sequence.output.flush()
        return self._output(sequence, text, taken, FinishReason.ERROR, error, error_code)

    def _output(
        self,
        sequence: Sequence,
        text: str,
        drawn: Items[Sample],
        reason: FinishReason | None,
        error: str | None = None,
        error_code: str | None = None,
    ) -> RequestOutput:
        logprobs = None
        if sequence.request.sampling_params.logprobs is not None:
            logprobs = tuple(self._token_logprob(one) for one in drawn)
        return RequestOutput(
            request_id=sequence.request_id,
            text=text,
            token_ids=tuple(one.token_id for one in drawn),
            logprobs=logprobs,
            finish_reason=reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_completion_tokens=sequence.num_completion_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            num_draft_tokens=sequence.num_draft_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
            error=error,
            error_code=error_code,
        )

    def _token_logprob(self, drawn: Sample) -> TokenLogprob:
        def entry(token_id: int, logprob: float, top: tuple[TokenLogprob, ...]) -> TokenLogprob:
            raw = self.tokenizer.token_bytes(token_id)
            return TokenLogprob(token_id, raw.decode("utf-8", "replace"), raw, logprob, top)

        top = tuple(entry(token_id, logprob, ()) for token_id, logprob in drawn.top)
        return entry(drawn.token_id, drawn.logprob, top)

    def _end(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        """Free everything a sequence holds; it is forgotten."""
        self._scheduler.remove(sequence, is_poisoned)
        del self._sequences[sequence.request_id]

    def _check_alive(self) -> None:
        if self._is_dead:
            raise EngineDeadError(
                "the engine stopped after an error in an earlier step; restart it"
            )

    @contextmanager
    def _dies_on_error(self) -> Iterator[None]:
        """Refuse to go on after a failed step: nobody knows what the cache holds then."""
        self._check_alive()
        try:
            yield
        except BaseException:
            self._is_dead = True
            raise
