"""The command `mgvq-eval`: a checkpoint against its reference; the last line is one JSON object.

`mgvq-eval compare` is `baselines.cli`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mgvq_quantizer.baselines import cli
from mgvq_quantizer.evaluate import Evaluation, evaluate
from mgvq_quantizer.evaluate_text import DEFAULT_TOKENS, TextEvaluation, evaluate_text
from mgvq_quantizer.flags import natural, positive
from mgvq_runtime.checkpoint.files import unwritable
from mgvq_runtime.config import resolve_device
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import MgvqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mgvq-eval`.

    Returns:
        The exit status: 0, 2 for what the user can put right, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["compare"]:
        return cli.main(words[1:])
    parser = build_parser()
    parsed = parser.parse_args(words)
    if parsed.text is None and parsed.text_tokens is not None:
        parser.error("--text-tokens belongs to --text")
    if parsed.text is not None and (parsed.limit, parsed.seed) != (None, None):
        parser.error("--limit and --seed draw questions: with --text give --text-tokens")
    try:
        if parsed.num_threads is not None:
            torch.set_num_threads(parsed.num_threads)
        result = _examine(parsed)
    except MgvqError as error:
        if debug_tracebacks():
            raise
        print(f"mgvq-eval: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    line = json.dumps(asdict(result))
    if parsed.json is not True:
        print(_table(result) if isinstance(result, Evaluation) else _text_table(result))
    print(line)
    if isinstance(parsed.json, Path):
        try:
            parsed.json.write_text(line + "\n")
        except OSError as error:
            print(f"mgvq-eval: error: {unwritable(parsed.json, error)}", file=sys.stderr)
            return 2
    return 0


def _examine(parsed: argparse.Namespace) -> Evaluation | TextEvaluation:
    device = resolve_device(parsed.device, torch.cuda.device_count())
    folders = parsed.checkpoint, parsed.reference
    if parsed.text is not None:
        return evaluate_text(*folders, parsed.text, parsed.text_tokens or DEFAULT_TOKENS, device)
    return evaluate(*folders, parsed.questions, parsed.limit, parsed.seed or 0, device)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="mgvq-eval",
        description="Compare a checkpoint with its reference, on questions on pictures or on text. "
        "mgvq-eval compare --help: published quantizers side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="folder to examine")
    add("--reference", type=Path, required=True, metavar="DIR", help="folder it was made from")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="zip file or folder with questions.jsonl and pictures (default: the checkpoint's "
        "questions.zip, else the reference's)",
    )
    data.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a .txt file, a folder or zip file of them, or a .jsonl file of conversations "
        "(LLaVA rows without pictures): KL and perplexity on text, or answers, instead",
    )
    add(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="most tokens of the text, in windows drawn evenly from it (default: "
        f"{DEFAULT_TOKENS})",
    )
    add(
        "--limit", type=positive, metavar="N", help="most questions, drawn at random (default: all)"
    )
    add("--seed", type=natural, metavar="N", help="seed of the draw (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--num-threads", type=positive, metavar="N", help="CPU threads of torch")
    add(
        "--json",
        nargs="?",
        const=True,
        type=Path,
        metavar="FILE",
        help="write the JSON line to FILE too; without FILE, print nothing else",
    )
    return parser


def _table(result: Evaluation) -> str:
    kinds = sorted(result.accuracy_by_kind)
    lines = [f"{'kind':<16}{'checkpoint':>12}{'reference':>12}"]
    for kind in kinds:
        mine, other = result.accuracy_by_kind[kind], result.reference_accuracy_by_kind[kind]
        lines.append(f"{kind:<16}{mine:>12.1%}{other:>12.1%}")
    lines += [
        f"{'all':<16}{result.accuracy:>12.1%}{result.reference_accuracy:>12.1%}",
        f"KL {result.kl:.4f} +- {result.kl_se:.4f} nats an answer token, "
        f"same first choice {result.top1_agreement:.1%}",
        f"{result.bits_per_weight:.3f} bits a decoder weight in full, "
        f"{result.file_bytes / 2**20:.1f} MiB of weights",
        f"{result.n} questions, {result.n_tokens} answer tokens, {result.seconds:.0f} s",
    ]
    return "\n".join(lines)


def _text_table(result: TextEvaluation) -> str:
    error = "" if result.kl_se is None else f" +- {result.kl_se:.4f}"
    lines = [
        f"{'':<12}{'checkpoint':>12}{'reference':>12}",
        f"{'perplexity':<12}{result.perplexity:>12.3f}{result.reference_perplexity:>12.3f}",
        f"KL {result.kl:.4f}{error} nats a token, same first choice {result.top1_agreement:.1%}",
        f"{result.bits_per_weight:.3f} bits a decoder weight in full, "
        f"{result.file_bytes / 1e6:.1f} MB of weights",
        f"{result.n} windows, {result.n_tokens} predicted tokens, {result.seconds:.0f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
