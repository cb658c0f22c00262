"""The training graph of mgvq-tiny-vl against transformers, and what its block mask hides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.tiny_vlm.conversations import Batch, Encoder, Turn, _padded
from benchmarks.tiny_vlm.export import load_checkpoint, save_checkpoint
from benchmarks.tiny_vlm.model import ModelConfig, TinyVLM
from benchmarks.tiny_vlm.pictures import QA
from benchmarks.tiny_vlm.scoring import forward

DENSE = Path(__file__).parents[2] / "benchmarks/tiny_vlm/dense"
CONFIG = ModelConfig(num_hidden_layers=2, vision_depth=2, intermediate_size=128)


def run(model: TinyVLM, batch: Batch, encoder: Encoder) -> list[torch.Tensor]:
    """Logits of every token of every row."""
    real = batch.blocks >= 0
    everything = replace(batch, labels=np.where(real, 0, -100))
    with torch.no_grad():
        logits = model.logits(forward(model, everything, encoder)[0])
    return list(logits.split(real.sum(1).tolist()))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(DENSE)


def random_model() -> TinyVLM:
    model = TinyVLM(CONFIG)
    model.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(torch.bfloat16).float()


def test_training_graph_equals_transformers(tmp_path: Path, encoder: Encoder) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model()
    save_checkpoint(model.state_dict(), CONFIG, DENSE, tmp_path)
    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    pictures = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    from PIL import Image

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 84, 112, 3), dtype=np.uint8)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Which picture shows a dog?"},
                {"type": "image"},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "the first"},
        {"role": "user", "content": "What is 3 + 4?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 12)
    inputs = dict(pictures(images=[Image.fromarray(i) for i in images], return_tensors="pt"))
    inputs["input_ids"] = tokenizer(text, return_tensors="pt")["input_ids"]
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == encoder.image_pad).int()
    with torch.no_grad():
        expected = reference(**inputs).logits[0]
    turns = [
        Turn("system", "You are a helpful assistant."),
        Turn("user", "Which picture shows a dog?<image><image>"),
        Turn("assistant", "the first"),
        Turn("user", "What is 3 + 4?"),
    ]
    row = encoder.chat_row(turns, (3, 4))
    row.add(encoder.ids("<|im_start|>assistant\n"), 0)
    assert row.tokens == inputs["input_ids"][0].tolist()
    batch = _padded([row], list(images), (84, 112), encoder.pad)
    logits = run(load_checkpoint(tmp_path), batch, encoder)[0]
    assert (logits - expected).abs().max() < 2e-4


def test_answers_do_not_see_other_blocks(encoder: Encoder) -> None:
    model = random_model()
    image = np.random.default_rng(1).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    mine = QA("count", "How many circles are there?", "3", 0.1)
    others = [QA("colour", "What color is the star?", "red", 0.1) for _ in range(3)]
    together = encoder.prefix_row((3, 3), [*others, mine])
    alone = encoder.prefix_row((3, 3), [mine])
    rows = [together, alone]
    logits = run(model, _padded(rows, [image, image], (84, 84), encoder.pad), encoder)
    length = sum(block == 1 for block in alone.blocks)
    end, start = len(together.tokens), len(alone.tokens)
    assert torch.equal(
        logits[0][end - length : end].argmax(-1), logits[1][start - length : start].argmax(-1)
    )
    difference = logits[0][end - length : end] - logits[1][start - length : start]
    assert difference.abs().max() < 1e-4


def test_words_are_spelt_and_specials_are_single_ids() -> None:
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    assert len(tokenizer.encode("TIGER").ids) == 5
    for name in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>"):
        assert tokenizer.encode(name).ids == [tokenizer.token_to_id(name)]
    text = "Où est le 北京 chat? 3 + 4 = 7\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
