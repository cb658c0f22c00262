"""Does a prompt fit the model it is meant for (called by `Engine.add`).

What passes here can be run: an error inside a step would end the engine for everybody. Lengths
against the context are checked by `Engine.add` itself.
"""

from __future__ import annotations

from mgvq_runtime.errors import RequestError
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.request import Request


def check_prompt(request: Request, config: ModelConfig) -> None:
    """Refuse a prompt that the graph could only fail on.

    Raises:
        RequestError: if it is empty, a token id is outside the vocabulary, or its placeholders,
            positions and pictures do not agree, or pictures are cut into other patches than the
            vision tower takes.
    """
    prompt = request.prompt
    num_tokens = len(prompt.token_ids)
    if not num_tokens:
        raise RequestError("the prompt is empty: it needs at least one token", param="messages")
    vocab_size = config.text_config.vocab_size
    low, high = min(prompt.token_ids), max(prompt.token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise RequestError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}", param="prompt"
        )
    if prompt.positions.shape != (3, num_tokens):
        raise RequestError(
            f"positions must be [3, {num_tokens}], got {list(prompt.positions.shape)}",
            param="prompt",
        )
    if not prompt.images:
        return
    if config.vision_config is None or not config.placeholder_ids:
        raise RequestError("this model reads text alone; leave pictures out", param="messages")
    for index, image in enumerate(prompt.images):
        t, h, w = image.grid_thw
        num_tokens = config.num_image_tokens(image)
        if image.patches.shape[1:] != (config.vision_config.patch_dim,):
            raise RequestError(
                f"picture {index} has patches of shape {list(image.patches.shape[1:])}; this "
                f"model's vision tower takes [{config.vision_config.patch_dim}]",
                param="messages",
            )
        if len(image.patches) != t * h * w or image.num_tokens != num_tokens:
            raise RequestError(
                f"picture {index} has {len(image.patches)} patches for {image.num_tokens} tokens; "
                f"a grid of {t}x{h}x{w} has {t * h * w} for {num_tokens}",
                param="messages",
            )
    wanted = sum(image.num_tokens for image in prompt.images)
    found = sum(prompt.token_ids.count(token) for token in config.placeholder_ids)
    if wanted != found:
        raise RequestError(
            f"the prompt has {found} picture placeholders for pictures of {wanted} tokens",
            param="messages",
        )
