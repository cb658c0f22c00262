"""Qwen2-VL is shown a video: greedy text from transformers' own cache, and through the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_runtime import LLM, Engine, EngineConfig, SamplingParams
from tests.runtime.conftest import write_hub_folder
from tests.runtime.multimodal.video_reference import random_frames
from tests.serve.conftest import MODEL, data_url, start_server

CONFIG: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder in the hub's dialect, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("qwen2-vl")
    return folder, write_hub_folder(folder, seed=0)


def asked(frames: list[Any]) -> list[Any]:
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What moves?"}]
    return [{"role": "user", "content": content}]


def test_the_text_is_transformers(model: tuple[Path, Any]) -> None:
    """Chunks of the prompt end inside the video."""
    folder, reference = model
    frames = random_frames(6, 120, 90)
    with LLM(folder, max_batch_tokens=16, **CONFIG) as llm:
        prompt = llm.engine.chat_processor.prepare(
            [{"role": "user", "content": [{"type": "video"}, asked([])[0]["content"][1]]}], [frames]
        )
        reply = llm.chat(asked(frames), GREEDY)
    (video,) = prompt.images
    assert video.grid_thw == (3, 6, 8)
    ids = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        output = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=torch.from_numpy(video.patches),
            video_grid_thw=torch.tensor([video.grid_thw]),
            mm_token_type_ids=2 * (ids == reference.config.video_token_id).int(),
            max_new_tokens=GREEDY.max_tokens,
            min_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=-1,
        )
    assert list(reply.token_ids) == output[0, ids.shape[1] :].tolist()


def test_the_server_takes_frames_as_data_urls(model: tuple[Path, Any]) -> None:
    folder, _ = model
    urls = [data_url((84, 56)) for _ in range(3)]
    with LLM(folder, **CONFIG) as llm:
        expected = llm.chat(asked(urls), GREEDY)
    running = start_server(Engine.from_checkpoint(folder, EngineConfig(**CONFIG)))
    try:
        with running.client() as client:
            reply = client.chat.completions.create(
                model=MODEL,
                messages=asked(urls),
                temperature=0,
                max_tokens=GREEDY.max_tokens,
                extra_body={"ignore_eos": True},
            )
    finally:
        running.stop()
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens == expected.usage.prompt_tokens
