"""Complete tiny folders of LLaVA-OneVision and InternVL2: weights, tokenizer, templates, processor.

What `models.families` makes, with the files around it that a hub folder has, so that it can be
asked, served and quantized. The tokenizer is the one trained in `conftest`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.runtime.conftest import train_tokenizer, write_json
from tests.runtime.models.families import (
    internvl_config,
    internvl_hub_config,
    internvl_hub_tensors,
    llava_config,
    lmms_lab_config,
    lmms_lab_tensors,
    reference_model,
    tensors_of,
    write_folder,
)

LLAVA_SPECIALS = ("<image>", "<video>")
INTERNVL_SPECIALS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|system|>", "<|user|>")
INTERNVL_SPECIALS += ("<|assistant|>", "<|end|>", "<s>")

# chat_template.json of llava-hf/llava-onevision-qwen2-7b-ov-hf
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ '\n' + content['text'] }}"
    "{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# chat_template.jinja of OpenGVLab/InternVL3-1B-hf, without tools
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|im_start|>assistant\n' }}{% endif %}"
)
# The decoder's own, as tokenizer_config.json of lmms-lab's and OpenGVLab's folders carries it.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_family_tokenizer(
    folder: Path, specials: tuple[str, ...], template: str | None, **config: Any
) -> dict[str, int]:
    """Write tokenizer files with some more special tokens; return the ids of all of them."""
    from tokenizers import AddedToken

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    values: dict[str, Any] = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2TokenizerFast",
        "model_max_length": 2048,
        **config,
    }
    if template is not None:
        values["chat_template"] = template
    write_json(folder / "tokenizer_config.json", values)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def write_llava_folder(folder: Path, seed: int = 0) -> Any:
    """Write a folder as transformers publishes it; return its model."""
    ids = write_family_tokenizer(folder, LLAVA_SPECIALS, None)
    write_json(folder / "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
    config = llava_config(ids)
    reference = reference_model(config, seed)
    write_folder(folder, config, tensors_of(reference))
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "size": {"height": 60, "width": 60},
        },
    )
    return reference


def write_lmms_lab_folder(folder: Path, seed: int = 0) -> Any:
    """Write a folder as lmms-lab publishes it: no image token, no image processor's file."""
    ids = write_family_tokenizer(folder, (), TEXT_TEMPLATE)
    config = llava_config({"<image>": max(ids.values()) + 1})
    reference = reference_model(config, seed)
    write_folder(folder, lmms_lab_config(config), lmms_lab_tensors(tensors_of(reference)))
    return reference


def write_internvl_hub_folder(
    folder: Path,
    kind: str = "qwen2",
    hub_kind: str = "qwen2",
    template: str = "Hermes-2",
    seed: int = 0,
    **text: Any,
) -> Any:
    """Write a folder as OpenGVLab publishes it, with a decoder and a conversation format."""
    tokenizer_config = {"bos_token": "<s>", "add_bos_token": template == "internlm2-chat"}
    write_family_tokenizer(folder, INTERNVL_SPECIALS, TEXT_TEMPLATE, **tokenizer_config)
    config = internvl_config(kind, **text)
    reference = reference_model(config, seed)
    hub = internvl_hub_config(config, hub_kind, template=template)
    write_folder(folder, hub, internvl_hub_tensors(hub, tensors_of(reference)))
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": 56,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": 56,
        },
    )
    return reference


def write_internvl_hf_folder(folder: Path, seed: int = 0) -> Any:
    """Write a folder as transformers publishes it."""
    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    ids = write_family_tokenizer(folder, INTERNVL_SPECIALS, None, extra_special_tokens=extra)
    (folder / "chat_template.jinja").write_text(INTERNVL_TEMPLATE)
    config = {**internvl_config(), "image_token_id": ids["<IMG_CONTEXT>"]}
    reference = reference_model(config, seed)
    write_folder(folder, config, tensors_of(reference))
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "size": {"height": 56, "width": 56},
        },
    )
    return reference
