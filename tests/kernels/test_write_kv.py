"""New keys and values in the paged caches, plain and int8, against loops over numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import ops

SLOTS = torch.tensor([7, 0, 10])


def int8_caches() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three blocks of four slots, two heads of eight; filled, so that a stray write shows."""
    codes = [torch.full((3, 4, 2, 8), 99, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((3, 4, 2), 0.75).half() for _ in range(2)]
    return codes[0], codes[1], scales[0], scales[1]


def rounded(vector: np.ndarray) -> tuple[np.float16, np.ndarray]:
    """One head of one token, by the definition."""
    scale = np.float16(np.float32(np.abs(vector).max()) / np.float32(127))
    return scale, np.rint(vector / np.float64(scale)).clip(-127, 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_rounds_each_head_of_a_token_by_its_largest_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(3, 2, 8).to(dtype) * 10.0**exponent for exponent in (-2, 1))
    keys, values, key_scales, value_scales = int8_caches()
    ops.write_kv(k, v, keys, values, SLOTS, key_scales, value_scales)
    for x, cache, scales in ((k, keys, key_scales), (v, values, value_scales)):
        codes, scale = cache.flatten(0, 1), scales.flatten(0, 1)
        for token, slot in enumerate(SLOTS.tolist()):
            for head in range(2):
                step, expected = rounded(x[token, head].double().numpy())
                assert scale[slot, head].item() == step
                np.testing.assert_array_equal(codes[slot, head].numpy(), expected)
        untouched = [slot for slot in range(12) if slot not in SLOTS]
        assert (codes[untouched] == 99).all()
        assert (scale[untouched] == 0.75).all()


@given(st.floats(-20, 10), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(exponent: float, seed: int) -> None:
    """Over thirty powers of two, down to scales that float16 holds with few bits."""
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    keys, values, *scales = int8_caches()
    ops.write_kv(x, -x, keys, values, SLOTS, *scales)
    step = scales[0].flatten(0, 1)[SLOTS].double()[..., None]
    back = keys.flatten(0, 1)[SLOTS].double() * step
    clipped = (x.abs().amax(-1, keepdim=True).double() - 127 * step).clamp(min=0)
    assert ((back - x.double()).abs() <= torch.maximum(step / 2, clipped) * (1 + 1e-6)).all()
    assert torch.equal(values.flatten(0, 1)[SLOTS], -keys.flatten(0, 1)[SLOTS])


def test_int8_of_zeros_and_of_numbers_that_are_not_finite() -> None:
    """Zeros stay zeros, tiny vectors vanish, NaN and infinity show in their own vector only."""
    k = torch.ones(3, 2, 8)
    k[0, 0], k[0, 1] = 0.0, 1e-7
    k[1, 0, 3], k[1, 1, 5] = torch.nan, torch.inf
    k[2, 0] = 3e38  # a scale beyond float16
    keys, values, *scales = int8_caches()
    ops.write_kv(k, k, keys, values, SLOTS, *scales)
    back = (keys.float() * scales[0].float()[..., None]).flatten(0, 1)[SLOTS]
    assert not back[0].any()
    assert back[1].isnan().all()
    assert back[2, 0].isnan().all()
    torch.testing.assert_close(back[2, 1], k[2, 1], rtol=1e-3, atol=0)


def test_a_plain_cache_keeps_its_dtype() -> None:
    k = torch.randn(3, 2, 8)
    keys, values = torch.zeros(3, 4, 2, 8).bfloat16(), torch.zeros(3, 4, 2, 8).bfloat16()
    ops.write_kv(k, k * 2, keys, values, SLOTS)
    assert torch.equal(keys.flatten(0, 1)[SLOTS], k.bfloat16())
    assert torch.equal(values.flatten(0, 1)[SLOTS], (k * 2).bfloat16())
    assert torch.count_nonzero(keys.flatten(0, 1).any(-1).any(-1)) == 3


def test_wrong_caches_are_named() -> None:
    k, (keys, values, *scales) = torch.zeros(3, 2, 8), int8_caches()
    strided = values.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(TypeError, match=r"key_cache without key_scales must be one of .*int8"):
        ops.write_kv(k, k, keys, values, SLOTS)
    with pytest.raises(TypeError, match=r"key_cache must be torch.int8, as key_scales is given"):
        ops.write_kv(k, k, keys.float(), values, SLOTS, *scales)
    with pytest.raises(ValueError, match="must both be given"):
        ops.write_kv(k, k, keys, values, SLOTS, scales[0])
    with pytest.raises(ValueError, match="value_cache must be contiguous"):
        ops.write_kv(k, k, keys, strided, SLOTS, *scales)
    with pytest.raises(ValueError, match=r"value_scales must be contiguous \[3, 4, 2\] float16"):
        ops.write_kv(k, k, keys, values, SLOTS, scales[0], scales[1].float())
    with pytest.raises(ValueError, match=r"slot_mapping \[T\], got"):
        ops.write_kv(k, k, keys, values, SLOTS[:2], *scales)


def test_rope_write_kv_is_its_two_halves() -> None:
    """Against transformers' rotation and the loops above; q, k and v are left as they were."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, v = torch.randn(3, 8, 8).split((4, 2, 2), dim=1)
    before = q.clone(), k.clone()
    angles = torch.rand(3, 4) * 9
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    keys, values, key_scales, value_scales = int8_caches()
    y = ops.rope_write_kv(q, k, v, cos, sin, keys, values, SLOTS, key_scales, value_scales)
    expected_q, expected_k = modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    torch.testing.assert_close(y, expected_q, rtol=1e-6, atol=1e-6)
    for x, cache, scales in ((expected_k, keys, key_scales), (v, values, value_scales)):
        step = scales.flatten(0, 1)[SLOTS].float()[..., None]
        back = cache.flatten(0, 1)[SLOTS] * step
        assert ((back - x).abs() <= step * 0.51).all()
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    with pytest.raises(ValueError, match="Dh must be even"):
        ops.rope(q[..., :7], k[..., :7], cos[:, :7], sin[:, :7])
