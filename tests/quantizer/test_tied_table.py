"""How the two uses of a tied token table are weighed, against divergences measured directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_quantizer.batches import length_batches
from mgvq_quantizer.plain_text import read_passages, text_sample
from mgvq_quantizer.teacher import Reference, Student, ask_teacher, divergence, heldout_kl
from mgvq_quantizer.tied_table import head_moment, tied_moment
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.tokenizer import Tokenizer

WORDS = "green squares stand over white ones while seven grey stars fall by two thin lines "


@torch.no_grad()
def test_errors_cost_what_the_moment_says(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """Errors along the directions the head reads most, and along those it reads least."""
    (tmp_path / "a.txt").write_text(WORDS * 100)
    passages = read_passages(tmp_path / "a.txt", Tokenizer.from_folder(llama[0]))
    model = load_model(llama[0])
    batches = length_batches([text_sample(passage) for passage in passages], model.device)
    reference = ask_teacher(model, batches, {})
    table = model.model.embed_tokens.weight
    plain = table.clone()
    moment = tied_moment(model, reference, batches, {}, torch.Generator().manual_seed(1))
    assert torch.equal(table, plain), "the model is as it was"
    assert float(moment.diagonal().mean()) == pytest.approx(1.0)

    generator = torch.Generator().manual_seed(2)
    axes = torch.linalg.eigh(moment)[1]  # ascending
    seen, said = [], []
    for chosen in (axes[:, -8:], axes[:, :8]):
        drawn = torch.randn(len(plain), 8, generator=generator, dtype=torch.float64)
        error = 0.05 * float(plain.square().mean().sqrt()) * drawn @ chosen.T  # [V, D]
        table.copy_(plain + error.to(plain))
        seen.append(heldout_kl(Student(model), {}, batches, {}, reference))
        said.append(float((error @ moment * error).sum()))
    states = reference.states([sample for batch in batches for sample in batch.samples]).double()
    head = states.T @ states / states.square().mean() / len(states)
    equal = torch.eye(len(head), dtype=torch.float64) + head
    ratio = seen[0] / seen[1]
    assert ratio > 1.5, "both kinds of errors would be alike for the input"
    assert said[0] / said[1] == pytest.approx(ratio, rel=0.5)
    values = torch.linalg.eigvalsh(equal)
    assert float(values[-8:].mean() / values[:8].mean()) > 2 * ratio, "uses that count alike"


def test_sure_states_count_less_in_the_head() -> None:
    """Half the sum of the moment along an axis is the divergence that noise makes along it."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(40, 8, generator=generator)
    states = torch.randn(300, 8, generator=generator)
    sure = 8.0 * torch.nn.functional.normalize(head[:30]) + 0.1 * states[:30]
    states[:, :4] *= 0.2
    reference = Reference({0: states, 1: sure}, head)
    moment = head_moment(reference)
    everything = torch.cat([states, sure])
    said, noise = reference.log_probs_of(everything).double(), 0.01
    for axis in range(8):
        errors = noise * torch.randn(200, 40, generator=generator, dtype=torch.float64)
        moved = everything.double() @ head.double().T + everything[:, axis, None] * errors[:, None]
        seen = divergence(said, moved.log_softmax(-1)).sum(-1).mean()
        assert float(seen) == pytest.approx(float(moment[axis, axis]) * noise**2 / 2, rel=0.1)
    plain = everything.double().T @ everything.double()
    assert float((moment / plain).diagonal().min()) < 0.5 * float((moment / plain).diagonal().max())
