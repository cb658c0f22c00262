"""Trains the byte-level BPE tokenizer and writes Qwen2-VL's processor files (run once, by hand).

Qwen2's pre-tokenizer and special tokens, 2,048 ids. The text is what the questions and answers say
plus Python's own help topics. Runs of capitals are left out of it, so that a word that is read from
a picture is spelt letter by letter.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm

from benchmarks.tiny_vlm.assets import DEFAULT_CACHE, load
from benchmarks.tiny_vlm.conversations import conversation
from benchmarks.tiny_vlm.drawing import choose_size, choose_type, draw

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 2048
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's own."""


def corpus(cache: Path, pictures: int, seed: int) -> Iterator[str]:
    """Text of the training questions, and of Python's help."""
    from pydoc_data.topics import topics

    capitals = re.compile(r"\S*[A-Z]{2,}\S*")
    assets = load(cache, "train")
    rng = Random(f"tokenizer/{seed}")
    for _ in tqdm(range(pictures), desc="text", unit="picture"):
        size = choose_size(rng)
        for item in draw(rng, assets, choose_type(rng, size), size).questions:
            yield capitals.sub("", item.question)
            yield capitals.sub("", item.answer)
        for turn in conversation(rng, assets, (84, 84))[0]:
            yield f"{turn.role}\n"
            yield capitals.sub("", turn.text.replace("<image>", ""))
    for text in topics.values():
        yield capitals.sub("", text)


def train(texts: Iterator[str]) -> Tokenizer:
    """A tokenizer of exactly `VOCAB_SIZE` ids, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"{tokenizer.get_vocab_size()} ids, expected {VOCAB_SIZE}: too little text"
        )
    return tokenizer


def processor_files() -> dict[str, dict[str, object]]:
    """The JSON files beside `tokenizer.json` that AutoProcessor reads."""
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    preprocessor = {
        "min_pixels": 56 * 56,
        "max_pixels": 224 * 224,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    return {"tokenizer_config.json": tokenizer_config, "preprocessor_config.json": preprocessor}


def main() -> None:
    """Train the tokenizer and write it with the processor files."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    default = Path("benchmarks/tiny_vlm/dense")
    parser.add_argument("--out", type=Path, default=default, help="folder for the files")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="download folder")
    parser.add_argument("--pictures", type=int, default=12_000, help="pictures whose text is used")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn text")
    arguments = parser.parse_args()
    texts = corpus(arguments.cache, arguments.pictures, arguments.seed)
    tokenizer = train(texts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    for name, content in processor_files().items():
        (arguments.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} ids -> {arguments.out}")


if __name__ == "__main__":
    main()
