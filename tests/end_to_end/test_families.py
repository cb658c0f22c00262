"""Every family with pictures, in its published folders: ask, quantize, serve, ask again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime import LLM, Engine, EngineConfig, SamplingParams
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import RequestError
from tests.quantizer.conftest import QUICK
from tests.runtime.conftest import write_json
from tests.runtime.family_folders import (
    write_internvl_hf_folder,
    write_internvl_hub_folder,
    write_llava_folder,
    write_lmms_lab_folder,
)
from tests.runtime.multimodal.tiled_sizes import random_picture
from tests.runtime.tokenizer.sentencepiece_folders import FOLDERS
from tests.serve.conftest import MODEL, RunningServer, data_url, image_part, start_server

CONFIG: dict[str, Any] = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 4}
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SIZES = [(90, 70), (60, 60), (200, 90), (40, 120)]


def write_sentencepiece_folder(folder: Path, tokenizer: str, template: str, kind: str) -> Any:
    """An InternVL2 folder as those sizes come: tokenizer.model, pictures' tokens added behind."""
    reference = write_internvl_hub_folder(
        folder,
        kind,
        tokenizer,
        template,
        **({"num_key_value_heads": 4, "pad_token_id": 0} if kind == "phi3" else {}),
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer.json").unlink()
    FOLDERS[tokenizer](folder)
    write_json(folder / "config.json", config)
    added = json.loads((folder / "added_tokens.json").read_text())
    for literal in ("<img>", "</img>", "<IMG_CONTEXT>"):
        added.setdefault(literal, max(added.values()) + 1)
    write_json(folder / "added_tokens.json", added)
    return reference


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "llava-onevision": write_llava_folder,
    "llava-onevision-lmms-lab": write_lmms_lab_folder,
    "internvl2-1b": write_internvl_hub_folder,
    "internvl2-2b": lambda folder: write_sentencepiece_folder(
        folder, "internlm2", "internlm2-chat", "llama"
    ),
    "internvl2-4b": lambda folder: write_sentencepiece_folder(folder, "phi3", "phi3-chat", "phi3"),
    "internvl-transformers": write_internvl_hf_folder,
}
Folders = tuple[str, Any, Path, Path]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """(name, transformers' model, dense folder, the same at 2 bits)."""
    base = tmp_path_factory.mktemp(request.param)
    reference = FAMILIES[request.param](base / "dense")
    rows = []
    for i, size in enumerate(SIZES):
        random_picture(*size, i).save(base / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the picture?"},
            {"from": "gpt", "value": "three red circles and one blue square"},
        ]
        rows.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (base / "rows.jsonl").write_text("\n".join(rows))
    recipe = QuantRecipe(**QUICK)
    quantize(base / "dense", base / "2bit", recipe, base / "rows.jsonl", show_progress=False)
    return request.param, reference, base / "dense", base / "2bit"


def asked(picture: Image.Image | str) -> list[dict[str, Any]]:
    part = image_part(picture) if isinstance(picture, str) else {"type": "image", "image": picture}
    return [{"role": "user", "content": [part, {"type": "text", "text": "Which colour?"}]}]


def test_the_text_is_transformers(folders: Folders) -> None:
    """Greedy, dense, float32, from the same prompt ids and pixels."""
    name, reference, dense, _ = folders
    picture = random_picture(150, 100, 7)
    with LLM(dense, dtype="float32", **CONFIG) as llm:
        prompt = llm.engine.chat_processor.prepare(
            [{"role": "user", "content": [{"type": "image"}]}], [picture]
        )
        reply = llm.chat(
            [{"role": "user", "content": [{"type": "image", "image": picture}]}], GREEDY
        )
    side = prompt.images[0].grid_thw[1]
    tiles = prompt.images[0].patches.reshape(-1, side, side, 3, 14, 14)
    pixels = torch.from_numpy(tiles.transpose(0, 3, 1, 4, 2, 5).copy()).flatten(4).flatten(2, 3)
    images: dict[str, Any] = {"pixel_values": pixels}
    if name.startswith("llava"):
        padded = torch.nn.functional.pad(pixels, (0, 4, 0, 4))  # the rest no patch covers
        images = {"pixel_values": padded[None], "image_sizes": torch.tensor([[100, 150]])}
    # The reference has the placeholder of its own vocabulary.
    reference.config.image_token_id = llm_placeholder(dense)
    ids = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        output = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_tokens,
            min_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[],
            **images,
        )
    assert list(reply.token_ids) == output[0, ids.shape[1] :].tolist()


def llm_placeholder(folder: Path) -> int:
    from mgvq_runtime.models.loading import model_config

    token = model_config(open_checkpoint(folder)).image_token_id
    assert token is not None
    return token


@pytest.fixture(scope="module")
def server(folders: Folders) -> Iterator[RunningServer]:
    running = start_server(Engine.from_checkpoint(folders[3], EngineConfig(**CONFIG)))
    yield running
    running.stop()


def test_the_server_answers_at_two_bits(server: RunningServer, folders: Folders) -> None:
    """Through the openai client, streamed or not, one picture and several."""
    url = data_url((130, 75))
    with LLM(folders[3], **CONFIG) as llm:
        expected = llm.chat(asked(url), GREEDY)
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 10}
    settings["extra_body"] = {"ignore_eos": True}
    with server.client() as client:
        reply = client.chat.completions.create(messages=asked(url), **settings)
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(
                messages=asked(url), stream=True, **settings
            )
        )
        two = [{"role": "user", "content": [*asked(url)[0]["content"], image_part(data_url())]}]
        several = client.chat.completions.create(messages=two, **settings)
    assert reply.choices[0].message.content == expected.text == streamed
    assert reply.usage.completion_tokens == several.usage.completion_tokens == 10
    assert several.usage.prompt_tokens > 20


def test_a_video_is_answered_as_a_list_of_frames(server: RunningServer, folders: Folders) -> None:
    """The same over HTTP and in Python; a video file is refused by name, and the server goes on."""
    urls = [data_url((90, 60)), data_url((40, 70))]
    question = {"type": "text", "text": "What moves?"}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "video", "video": urls}, question]}
    ]
    file = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    refused: list[Any] = [{"role": "user", "content": [file]}]
    with LLM(folders[3], **CONFIG) as llm:
        expected = llm.chat(messages, GREEDY)
        text_alone = llm.chat([{"role": "user", "content": [question]}], GREEDY)
        with pytest.raises(RequestError, match="must be text, image or video, got 'video_url'"):
            llm.chat(refused, GREEDY)
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="video_url"):
            client.chat.completions.create(model=MODEL, messages=refused)
        reply = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=10,
            extra_body={"ignore_eos": True},
        )
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens > text_alone.usage.prompt_tokens + 8  # two frames


def test_the_checkpoint_needs_no_other_file(folders: Folders) -> None:
    _, _, dense, quantized = folders
    spec = open_checkpoint(quantized).quantization
    assert spec is not None
    assert len(spec.matrices) > 15
    assert {"vision", "projector", "decoder", "embedding"} <= set(spec.bits_per_weight)
    assert (quantized / "tokenizer.json").is_file()
    source, own = (json.loads((f / "config.json").read_text()) for f in (dense, quantized))
    assert {key: own[key] for key in source} == source
