"""Engine settings: from flags, from keywords, and settled for a machine."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

import pytest

from mgvq_runtime.config import (
    CUDA_HEADROOM_BYTES,
    EngineConfig,
    ModelFacts,
    add_config_arguments,
    config_from_arguments,
    field_docs,
    kv_block_bytes,
    resolve,
    resolve_device,
    resolve_dtype,
)
from mgvq_runtime.errors import ConfigError

FACTS = ModelFacts(
    max_position_embeddings=4096,
    is_quantized=True,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=8,
)


def parse(*arguments: str) -> EngineConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_arguments(parser)
    return config_from_arguments(parser.parse_args(arguments))


def test_flags_without_values_are_the_defaults() -> None:
    assert parse() == EngineConfig()


def test_every_field_has_a_flag_a_help_text_and_a_way_back() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_arguments(parser)
    page = " ".join(parser.format_help().split())
    docs = field_docs(EngineConfig)
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')} " in page
        assert " ".join(docs[field.name].rstrip(".").split()[:5]) in page
    config = parse(
        "--max-model-len", "100", "--device", "cpu", "--dtype", "bfloat16", "--seed", "3"
    )
    assert config == EngineConfig(max_model_len=100, device="cpu", dtype="bfloat16", seed=3)


def test_flags_can_be_left_out() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_arguments(parser, leave_out=("seed",))
    assert "--seed" not in parser.format_help()
    assert config_from_arguments(parser.parse_args([])) == EngineConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_model_length": 5}, "did you mean 'max_model_len'"),
        ({"zzz": 1}, "known ones: checkpoint, "),
        ({"dtype": "int4"}, "dtype must be one of auto, float32"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"max_num_seqs": None}, "max_num_seqs must be"),
        ({"max_model_len": True}, "max_model_len must be"),
        ({"max_batch_tokens": 4, "max_num_seqs": 8}, "every running request takes one token"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict(values)


def test_device_auto_takes_a_gpu_where_there_is_one() -> None:
    assert resolve_device("auto", 0) == "cpu"
    assert resolve_device("auto", 2) == "cuda:0"
    assert resolve_device("cuda:1", 2) == "cuda:1"
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve_device("cuda", 0)
    with pytest.raises(ConfigError, match="numbered from 0"):
        resolve_device("cuda:2", 2)


def test_dtype_auto_goes_by_device_and_checkpoint() -> None:
    assert resolve_dtype("auto", "cpu", True) == "float32"
    assert resolve_dtype("auto", "cuda:0", True) == "float16"
    assert resolve_dtype("auto", "cuda:0", False) == "bfloat16"
    assert resolve_dtype("bfloat16", "cpu", False) == "bfloat16"


def test_the_cpu_pool_holds_every_context_up_to_a_gibibyte() -> None:
    config = EngineConfig(max_num_seqs=2, max_model_len=100, block_size=16)
    assert resolve(config, FACTS, "cpu", "float32", None).num_kv_blocks == 2 * 7 + 1
    huge = replace(FACTS, num_hidden_layers=200, head_dim=256)
    resolved = resolve(EngineConfig(), huge, "cpu", "float32", None)
    size = resolved.num_kv_blocks * kv_block_bytes(huge, 16, "float32")
    assert (1 << 30) - kv_block_bytes(huge, 16, "float32") < size <= 1 << 30


def test_the_gpu_pool_takes_what_is_free_but_the_headroom() -> None:
    block = kv_block_bytes(FACTS, 16, "float16")
    assert block == 2 * 3 * 2 * 8 * 2 * 16
    free = CUDA_HEADROOM_BYTES + 10 * block
    resolved = resolve(EngineConfig(), FACTS, "cuda:0", "float16", free)
    assert resolved.num_kv_blocks == 10
    with pytest.raises(ConfigError, match="at least two blocks"):
        resolve(EngineConfig(), FACTS, "cuda:0", "float16", CUDA_HEADROOM_BYTES)


def test_context_is_the_models_own_up_to_8192_and_never_longer() -> None:
    assert resolve(EngineConfig(), FACTS, "cpu", "float32", None).max_model_len == 4096
    long = replace(FACTS, max_position_embeddings=32768)
    assert resolve(EngineConfig(), long, "cpu", "float32", None).max_model_len == 8192
    with pytest.raises(ConfigError, match="longer than the 4096 positions"):
        resolve(EngineConfig(max_model_len=5000), FACTS, "cpu", "float32", None)


def test_kv_cache_bytes_is_an_upper_bound_that_is_kept() -> None:
    block = kv_block_bytes(FACTS, 16, "float32")
    config = EngineConfig(kv_cache_bytes=7 * block + 5)
    assert resolve(config, FACTS, "cpu", "float32", None).num_kv_blocks == 7
