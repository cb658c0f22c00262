"""The report's page: what it shows, escaping, size, without sensitivities."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from mgvq_kernels.layout import TRELLIS_RATES
from mgvq_quantizer.gate import Verdict
from mgvq_quantizer.recipe import RATES
from mgvq_quantizer.report import GroupReport, MatrixReport, Report
from mgvq_quantizer.report_page import report_page

MIXED = MatrixReport(
    ((3, 32), (2, 96)), 2.345, False, 0.25, 0.125, 0.0123, (0.1, 0.2), (0.25, 0.75)
)


def report(matrices: dict[str, MatrixReport]) -> Report:
    groups = {"decoder": GroupReport(1024, 2.5, 0.125)}
    return Report({"bits": 2.5}, {"name": "a & b"}, groups, matrices, 0.5, 0.25, 7, 3.0, 2**20)


class Page(HTMLParser):
    """The cells of the tables, the tags and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lasttag == "td" and data.strip():
            self.rows[-1][-1] += data


def test_every_rate_has_a_colour() -> None:
    for rate in {*RATES, *TRELLIS_RATES}:
        text = report_page(report({"matrix": replace(MIXED, bands=((rate, 128),))}))
        assert f'class="r{rate}"' in text
        assert f".r{rate}{{fill:" in text
        assert f"--r{rate}:#" in text


def test_every_matrix_its_bits_and_bands_are_shown() -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    page = Page(report_page(report(dict.fromkeys(names, MIXED))))
    for name in names:
        row = ["2.345", "32 at 3 bit, 96 at 2 bit", "0.25000", "0.12500", "0.0123"]
        assert [name, *row] in page.rows
        assert f"{name}: 32 channels at 3 bit" in page.text
    assert "50%" in page.text


def test_where_several_roundings_were_tried_the_page_says_which_was_kept() -> None:
    gate = Verdict("two_sided", {"plain": 0.25, "two_sided": 0.125})
    page = Page(report_page(report({"tried": replace(MIXED, gate=gate), "plain": MIXED})))
    rows = {row[0]: row[6:] for row in page.rows if row and row[0] in ("tried", "plain")}
    assert rows["tried"] == ["two_sided", "plain 0.25, two_sided 0.125"]
    assert rows["plain"] == ["", ""]
    assert "two_sided" not in report_page(report({"plain": MIXED}))


def test_hostile_names_are_text() -> None:
    name = '<script>alert("1")</script>&.0.x'
    page = Page(report_page(report({name: MIXED})))
    assert "script" not in page.tags
    assert any(row[:1] == [name] for row in page.rows)


def test_a_uniform_allocation_says_that_nothing_was_measured() -> None:
    plain = replace(MIXED, alone=None, reference_losses=(), picture_share=())
    assert "Not measured" in Page(report_page(report({"model.embed": plain}))).text


def test_only_time_and_memory_differ_and_a_large_model_stays_small() -> None:
    names = [f"model.layers.{i}.self_attn.part_{k}_proj" for i in range(28) for k in range(7)]
    one = report(dict.fromkeys(names, MIXED))
    other = replace(one, seconds=9.0, peak_memory_bytes=2**30)
    first, second = report_page(one), report_page(other)
    assert first != second
    assert first.replace("<dd>3</dd>", "<dd>9</dd>").replace("1 MiB", "1024 MiB") == second
    assert len(first.encode()) < 600_000
    assert not re.search(r"https?:|src=|href=", first)
