"""The table of SmolLM2: what is read out of R's files, what is drawn, what a row says."""

from __future__ import annotations

import zlib

import pytest

from benchmarks.real_decoders import generated_text, table, texts


def r_vector(lines: list[str]) -> bytes:
    """A serialized vector of strings, as R 3 writes it into a lazy-load database."""
    head = b"X\n" + b"".join(n.to_bytes(4) for n in (3, 0x040201, 0x030500, 5)) + b"UTF-8"
    blob = head + (16).to_bytes(4) + len(lines).to_bytes(4)
    for line in lines:
        data = line.encode()
        mark = b"\x00\x04\x00\x09" if line.isascii() else b"\x00\x00\x80\x09"
        blob += mark + len(data).to_bytes(4) + data
    return blob


def test_novels_come_out_of_a_database_of_r() -> None:
    novels = [["Emma", "", "by Jane Austen"], ["fiancée"]]
    packed = [zlib.compress(r_vector(lines)) for lines in novels]
    data = b"".join(len(p).to_bytes(4) + p for p in packed)
    assert [list(texts._strings(blob)) for blob in texts._blobs(data)] == novels


def test_another_file_than_the_pinned_one_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / texts._SHAKESPEARE_FILE
    with pytest.raises(ValueError, match="not the file that was pinned"):
        texts._fetch(["cp", "/dev/null", str(file)], file)


def test_no_prompt_both_calibrates_and_judges() -> None:
    judged, calibrating = (generated_text.prompts(is_judged) for is_judged in (True, False))
    assert (len(judged), len(calibrating)) == (24, 72)
    assert len({*judged, *calibrating}) == 96
    assert judged[0] == "What is the capital of France?"
    assert generated_text.prompts(True) == judged


def test_each_recipe_fits_its_size() -> None:
    embedding, decoder = 28.3e6, 106.2e6
    for size, recipe in table.RECIPES.items():
        mega = (recipe.bits * decoder + recipe.embedding_bits * embedding) / 8e6
        assert float(size) - 1.0 < mega < float(size), size


def test_a_row_says_what_was_measured() -> None:
    row = {
        "file_bytes": 43_960_000,
        "bits_per_weight_by_group": {"decoder": 2.4789, "embedding": 3.03},
        "kl": 0.71234,
        "kl_se": 0.0123,
        "top1_agreement": 0.654,
        "perplexity": 41.256,
        "reference_perplexity": 26.261,
        "answers": {"kl": 0.6789, "kl_se": 0.0456},
        "recipe": {"tuning_steps": 100, "tuning_batch_tokens": 512},
        "quantize_processor_seconds": 3601,
    }
    *_, last = table.table({"44": row}).splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:4] == ["44.0", "2.48 / 3.03", "0.712 ± 0.012", "65.4%"]
    assert cells[4:6] == ["41.26 (26.26)", "0.679 ± 0.046"]
    assert cells[6:] == ["100 of 512 tokens", "60 min"]
    assert table._TABLE.search(table.README.read_text())
