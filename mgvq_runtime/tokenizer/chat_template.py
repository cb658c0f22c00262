"""Messages to the text a model was trained on (called by `tokenizer.Tokenizer`).

The template is the checkpoint's own, run in the sandbox of `sandbox.py`, or Qwen2-VL's where the
checkpoint has none. Says nothing about tokens, and does not mark which text a user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError

from mgvq_runtime.errors import RequestError, TokenizerError
from mgvq_runtime.tokenizer.sandbox import BoundedSandbox, RaisedByTemplate

MAX_TEMPLATE_CHARS = 1_000_000
MAX_PARTS = 10_000
"""Messages and their parts in one conversation."""

# Source: chat_template.json of Qwen/Qwen2-VL-2B-Instruct.
QWEN2_VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self,
        source: str = QWEN2_VL_TEMPLATE,
        variables: Mapping[str, str] | None = None,
        exchange: Callable[[str], str] | None = None,
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja, as Hugging Face tokenizers carry it.
            variables: what the template may use beside the messages, such as `bos_token`.
            exchange: what becomes of each text that is written in the template.

        Raises:
            TokenizerError: if it is not Jinja, or far too long.
        """
        self.source = source
        self._variables = {"tools": None, "documents": None, **(variables or {})}
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TokenizerError(f"the chat template has over {MAX_TEMPLATE_CHARS} characters")
        self._sandbox = BoundedSandbox()
        try:
            self._template = self._sandbox.compile_bounded(source, exchange)
        except (TemplateSyntaxError, RecursionError, SyntaxError, ValueError) as error:
            raise TokenizerError(f"the chat template is not valid Jinja: {error}") from error
        self._reads_texts = self._shows("probe")
        self._reads_parts = self._shows([{"type": "text", "text": "probe"}])

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as text.

        Args:
            messages: `{"role", "content": str | [{"type": "text", "text": ...} | {"type":
                "image" | "video"}]}`, in order.
            add_generation_prompt: whether the assistant's turn is opened at the end.

        Returns:
            The text, special tokens spelled out.

        Raises:
            RequestError: if the template refuses the conversation; the message is the template's.
            TokenizerError: if the template itself fails, or does what the sandbox forbids.
        """
        check_size(messages)
        try:
            return self._render([self._shaped(m) for m in messages], add_generation_prompt)
        except RaisedByTemplate as error:
            raise RequestError(
                f"the model's chat template refuses the conversation: {error}", param="messages"
            ) from error
        except Exception as error:
            raise TokenizerError(
                f"the checkpoint's chat template failed: {type(error).__name__}: {error}"
            ) from error

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        variables = self._variables | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._sandbox.render_bounded(self._template, variables)

    def _shows(self, content: Any) -> bool:
        """Return whether the template writes the text of a message whose content is like this."""
        try:
            text = self._render([{"role": "user", "content": content}])
        except Exception:  # noqa: BLE001 - whatever it cannot read, it cannot read
            return False
        return "probe" in text and "{'type'" not in text

    def _shaped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write a message's content in the one form, text or parts, that the template reads."""
        content = message.get("content")
        if isinstance(content, str) and self._reads_parts and not self._reads_texts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list | tuple) and self._reads_texts and not self._reads_parts:
            if all(part.get("type") == "text" for part in content):
                return {**message, "content": "".join(part["text"] for part in content)}
        return message


def check_size(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a conversation of absurdly many parts.

    Raises:
        RequestError: naming the limit.
    """
    contents = [message.get("content") for message in messages]
    num_parts = sum(1 if isinstance(c, str) or c is None else 1 + len(c) for c in contents)
    if num_parts > MAX_PARTS:
        raise RequestError(
            f"the conversation has {num_parts} messages and parts, at most {MAX_PARTS} are taken",
            param="messages",
        )
