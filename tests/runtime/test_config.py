"""Engine settings: from flags, from keywords, and settled for a machine."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

import pytest

from mgvq_runtime.config import (
    EngineConfig,
    ModelFacts,
    NGramSpeculation,
    add_config_arguments,
    byte_count,
    config_from_arguments,
    field_docs,
    resolve_device,
    resolve_dtype,
    resolve_kv_cache_dtype,
    resolve_model_len,
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
        "--max-model-len", "100", "--device", "cpu", "--dtype", "bfloat16", "--deterministic"
    )
    assert config == EngineConfig(
        max_model_len=100, device="cpu", dtype="bfloat16", deterministic=True
    )


def test_speculation_is_settled_and_counted_in_what_a_step_may_take() -> None:
    assert EngineConfig().n_gram_speculation is None
    assert EngineConfig(max_num_seqs=8).max_logits_rows == 8
    config = parse("--speculation", "n-gram", "--num-speculative-tokens", "3")
    assert config.n_gram_speculation == NGramSpeculation(3, 4, 2)
    assert config.max_logits_rows == 32
    assert replace(config, max_batch_tokens=20).max_logits_rows == 20


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
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of auto, int8, got 'fp8'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"max_num_seqs": None}, "max_num_seqs must be"),
        ({"max_model_len": True}, "max_model_len must be"),
        ({"deterministic": "yes"}, "deterministic must be True or False"),
        ({"speculation": "draft"}, "speculation must be one of off, n-gram, got 'draft'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be an integer of at least 1"),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, r"prompt_lookup_min \(3\) must be at"),
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


def test_the_pool_has_the_type_of_activations_unless_told_otherwise() -> None:
    assert resolve_kv_cache_dtype("auto", "bfloat16") == "bfloat16"
    assert resolve_kv_cache_dtype("int8", "bfloat16") == "int8"
    assert parse("--kv-cache-dtype", "int8").kv_cache_dtype == "int8"


def test_context_is_the_models_own_up_to_8192_and_never_longer() -> None:
    assert resolve_model_len(EngineConfig(), FACTS) == 4096
    long = replace(FACTS, max_position_embeddings=32768)
    assert resolve_model_len(EngineConfig(), long) == 8192
    assert resolve_model_len(EngineConfig(max_model_len=32768), long) == 32768
    with pytest.raises(ConfigError, match="longer than the 4096 positions"):
        resolve_model_len(EngineConfig(max_model_len=5000), FACTS)


def test_bytes_may_have_a_unit() -> None:
    sizes = {"4GiB": 4 << 30, "512 MiB": 512 << 20, "2gb": 2 * 10**9, "1.5kB": 1500, "77": 77}
    for text, expected in sizes.items():
        assert byte_count(text) == expected
        assert parse("--gpu-memory-limit", text).gpu_memory_limit == expected
    for wrong in ("", "GiB", "4 giraffes", "-1", "1.2.3", "4 Gi B", "1e9"):
        with pytest.raises(ValueError, match="such as 4GiB"):
            byte_count(wrong)
