"""The mean error of a rounded layer goes into its bias, exactly, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from mgvq_quantizer import calibration
from mgvq_quantizer.allocation import plan
from mgvq_quantizer.batches import encode_batch, unique_pictures
from mgvq_quantizer.bias_correction import mean_error
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.statistics import input_mean
from mgvq_quantizer.stream import Stream
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import QUICK


def test_the_mean_output_error_is_gone_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    W, V = (torch.randn(12, 20, generator=g) for _ in range(2))
    runs = [3 * torch.randn(n, 20, generator=g) + 1 for n in (7, 30)]
    weights = [torch.rand(len(x), generator=g) for x in runs]
    linear = nn.Linear(20, 12)
    calls = [lambda x=x: linear(x) for x in runs]
    x, weight = torch.cat(runs).double(), torch.cat(weights).double()
    for given, share in ((None, torch.ones_like(weight)), (weights, weight)):
        bias = mean_error(W, V, input_mean("it", linear, calls, given))
        error = x @ W.double().T - (x @ V.double().T + bias)  # [T, O]
        mean = (share[:, None] * error).sum(0) / share.sum()
        assert float(mean.abs().max()) < 1e-12
        assert float(error.abs().max()) > 1.0


def mean_errors(model: CausalLM, dense: CausalLM, runs: list) -> dict[str, tuple[Tensor, Tensor]]:
    """Each vision layer's mean output error on the quantized model's own inputs, and its bias."""
    found = {}
    for name, module in model.named_modules():
        if name.startswith("visual.") and isinstance(module, nn.Linear) and module.bias is not None:
            original = dense.get_submodule(name)
            mean = input_mean(name, module, runs)
            error = mean_error(original.weight, module.weight, mean)
            found[name] = error + original.bias - module.bias, module.bias
    return found


def test_every_layer_with_a_bias_is_corrected_on_what_it_sees(dense: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.from_folder(dense), load_model(dense).config
    images = Qwen2VLImageProcessor.from_folder(dense, None)
    _, conversations = calibration.load_conversations(None, dense)
    processor = ChatProcessor(tokenizer, images, config)
    pictures = unique_pictures(calibration.prepare(conversations, processor, tokenizer))
    worst = {}
    for correct in (False, True):
        recipe = QuantRecipe(**QUICK, bias_correction=correct)
        model = load_model(dense)
        plans = {n: p for n, p in plan(model, recipe).items() if n.startswith("visual.")}
        with WorkFolder(tmp_path / str(correct), {}) as work, torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
            original = copy.deepcopy(model)
            stream = Stream(model, plans, recipe, work, lambda *_: None)
            stream.share_books([pictures], [], {}, torch.device("cpu"), lambda _: None)
            stream.vision([pictures], torch.device("cpu"))
            runs = [lambda model=model: encode_batch(model, pictures, "cpu")]
            found = mean_errors(model, original, runs)
        assert len(found) >= 9
        worst[correct] = max(float(error.abs().max()) for error, _ in found.values())
        for name, (error, bias) in found.items():
            rounding = bias.abs().double() * 2**-11 + 1e-6
            if correct:
                assert bool((error.abs() <= rounding).all()), name
            again = work.load(name, plans[name].layout) if name in plans else None
            assert again is None or (again.bias is not None) == correct
    assert worst[False] > 1e-3
