"""What a model family adds to the tokenizer of a folder: conversation format and placeholder.

Called by `tokenizer.folder`. Families published with code of their own (lmms-lab's, OpenGVLab's)
keep the format in that code; the template such a folder's tokenizer carries is the decoder's, which
knows no pictures, and is not used. Data and their choice only; nothing is rendered here.

Source: `conversation.py` of LLaVA-VL/LLaVA-NeXT (qwen_1_5) and of OpenGVLab/InternVL2-2B; the chat
template of llava-hf/llava-onevision-qwen2-7b-ov-hf and of OpenGVLab/InternVL3-1B-hf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mgvq_runtime.errors import TokenizerError

INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_PICTURE = "<img><IMG_CONTEXT></img>"
PLACEHOLDERS = frozenset({"<image>", "<video>", "<img>", "<IMG_CONTEXT>", "</img>"})
"""What stands for pictures and around them, whether a tokenizer calls it special or not."""


LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL_HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _template(
    system: str, opening: tuple[str, str], end: str, picture: str, numbers_pictures: bool = False
) -> str:
    """Write a template.

    Args:
        system: What the system says where the conversation does not.
        opening: What stands before and behind a role.
        end: What ends a message.
        picture: What stands for a picture, or for a video where one gets here.
        numbers_pictures: Whether several pictures are called "Image-1: " and so on; the frames of a
            video are not.
    """
    before, behind = opening
    number = (
        "{% if not content['is_frame'] %}{% set count.seen = count.seen + 1 %}"
        "{% if count.total > 1 %}Image-{{ count.seen }}: {% endif %}{% endif %}"
    )
    return (
        "{% set count = namespace(total=0, seen=0) %}{% for message in messages %}"
        "{% if message['content'] is not string %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' and not content['is_frame'] %}"
        "{% set count.total = count.total + 1 %}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
        "{% if messages[0]['role'] != 'system' %}"
        f"{before}system{behind}{system}{end}{{% endif %}}"
        f"{{% for message in messages %}}{before}{{{{ message['role'] }}}}{behind}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] != 'text' %}"
        f"{number if numbers_pictures else ''}{picture}{{{{ '\\n' }}}}"
        "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
        f"{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{before}assistant{behind}{{% endif %}}"
    )


_CHATML = ("<|im_start|>", "{{ '\\n' }}")
QWEN_1_5_TEMPLATE = _template(
    "You are a helpful assistant.", _CHATML, "<|im_end|>{{ '\\n' }}", "<image>"
)
_INTERNVL_CHATML = _template(INTERNVL_SYSTEM, _CHATML, "<|im_end|>", _PICTURE, True)
INTERNVL2_TEMPLATES = {
    "Hermes-2": (_INTERNVL_CHATML, "<|im_end|>"),
    "internlm2-chat": (_INTERNVL_CHATML, "<|im_end|>"),
    "phi3-chat": (
        _template(INTERNVL_SYSTEM, ("<|", "|>{{ '\\n' }}"), "<|end|>", _PICTURE, True),
        "<|end|>",
    ),
}
"""Template and end token by what config.json calls it; no line ends behind an end token."""


def family_template(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], own: str | None
) -> tuple[str | None, str | None]:
    """Choose a folder's chat template.

    Args:
        config: config.json.
        tokenizer_config: tokenizer_config.json.
        own: The template the folder carries.

    Returns:
        The template, None where neither folder nor family has one, and the literal that ends an
        answer where only the family knows it.

    Raises:
        TokenizerError: if config.json names a conversation format that is not known.
    """
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    if architecture == "LlavaQwenForCausalLM":
        return QWEN_1_5_TEMPLATE, "<|im_end|>"
    if architecture == "LlavaOnevisionForConditionalGeneration":
        return own or LLAVA_ONEVISION_TEMPLATE, None
    if architecture == "InternVLForConditionalGeneration":
        # transformers' processor puts these two tokens around a picture when it expands it.
        source = own or INTERNVL_HF_TEMPLATE
        return source if "<img>" in source else source.replace("<IMG_CONTEXT>", _PICTURE), None
    if architecture != "InternVLChatModel":
        return own, None
    name = config.get("template")
    if not isinstance(name, str) or name not in INTERNVL2_TEMPLATES:
        raise TokenizerError(
            f"config.json: template must be one of {', '.join(INTERNVL2_TEMPLATES)}, got {name!r}"
        )
    source, end = INTERNVL2_TEMPLATES[name]
    has_bos = tokenizer_config.get("add_bos_token", name == "internlm2-chat") is True
    return ("{{ bos_token }}" if has_bos else "") + source, end


def missing_placeholder(config: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return id and literal of the placeholder a family's tokenizers may lack, else None."""
    if config.get("architectures") != ["LlavaQwenForCausalLM"]:
        return None
    token = config.get("image_token_index", 151646)
    return (token, "<image>") if type(token) is int and token >= 0 else None
