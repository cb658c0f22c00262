"""Ask the engine about a bundled picture and print what it took (run by `make demo`).

Prints the answer, time to the first token, tokens a second and memory. Speeds of one short answer
are a first impression; `bench_decode.py` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mgvq_runtime import (
    LLM,
    EngineConfig,
    MediaLimits,
    SamplingParams,
    add_config_arguments,
    config_from_arguments,
    demo_checkpoint_path,
    demo_picture_paths,
)
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.pictures import take_pictures

QUESTION = "Which bar is the highest?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; the last line of the output is one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("question", nargs="?", default=QUESTION, help="what to ask")
    parser.add_argument("--image", type=Path, help="a picture; the first bundled one if not given")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    add_config_arguments(parser)
    parsed = parser.parse_args(arguments)
    try:
        config = config_from_arguments(parsed)
        pictures = [parsed.image] if parsed.image else demo_picture_paths()[:1]
        if not pictures:
            parser.error("no picture is bundled with this installation: give one with --image")
        result = ask(config, pictures[0], parsed.question, parsed.max_new_tokens)
    except MgvqError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def ask(config: EngineConfig, picture: Path, question: str, max_new_tokens: int) -> dict[str, Any]:
    """Ask one question, print the answer as it comes and then the figures; return them."""
    folder = Path(config.checkpoint or demo_checkpoint_path())
    quantization = open_checkpoint(folder).quantization
    began = time.perf_counter()
    settings = {name: value for name, value in vars(config).items() if name != "checkpoint"}
    with LLM(folder, **settings) as llm:
        load_s = time.perf_counter() - began
        messages = _messages({"type": "image_url", "image_url": {"url": str(picture)}}, question)
        params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        # Compiles kernels; with another picture, so that nothing of the real one is cached.
        blank = {"type": "image", "image": Image.new("RGB", (448, 448))}
        for _ in llm.stream(_messages(blank, question), params):
            pass
        print(f"picture   {picture.name}\nquestion  {question}\nanswer    ", end="", flush=True)
        times, text = [time.perf_counter()], ""
        for output in llm.stream(messages, params):
            times.append(time.perf_counter())
            text += output.text
            print(output.text, end="", flush=True)
        memory = llm.memory_summary()
        prompt = llm.engine.chat_processor.prepare(*take_pictures(messages, MediaLimits()))
    decode_s = times[-1] - times[1]
    result: dict[str, Any] = {
        "checkpoint": str(folder),
        "bits_per_weight": None if quantization is None else quantization.bits_per_weight,
        "picture": picture.name,
        "question": question,
        "answer": text,
        "prompt_tokens": output.num_prompt_tokens,
        "image_tokens": sum(image.num_tokens for image in prompt.images),
        "new_tokens": output.num_completion_tokens,
        "load_s": round(load_s, 3),
        "ttft_s": round(times[1] - times[0], 4),
        "decode_tokens_per_s": round((len(times) - 2) / decode_s, 1) if decode_s else None,
        "weights_bytes": memory.weights_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "peak_rss_bytes": memory.peak_rss_bytes,
        "peak_device_bytes": memory.peak_device_bytes,
    }
    print_figures(result)
    return result


def _messages(picture: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def print_figures(result: dict[str, Any]) -> None:
    """Print the figures below the answer."""
    bits = result["bits_per_weight"]
    kind = "dense" if bits is None else f"{bits['decoder']:.2f} bits a decoder weight"
    speed = result["decode_tokens_per_s"]
    mebibytes = {
        name: f"{result[f'{name}_bytes'] / 2**20:.1f} MiB"
        for name in ("weights", "kv_cache", "peak_rss", "peak_device")
        if result[f"{name}_bytes"] is not None
    }
    print(
        f"""
prompt    {result["prompt_tokens"]} tokens, {result["image_tokens"]} of them the picture
first     {1000 * result["ttft_s"]:.0f} ms to the first token
speed     {"one token only" if speed is None else f"{speed} tokens/s"} ({result["new_tokens"]} new)
weights   {mebibytes.pop("weights")} ({kind}, {result["checkpoint"]})
memory    {", ".join(f"{name.replace('_', ' ')} {size}" for name, size in mebibytes.items())}
"""
    )


if __name__ == "__main__":
    sys.exit(main())
