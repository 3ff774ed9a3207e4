"""The page across studies: what it says of each, how they agree with others, and that nothing in it can run or load."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_up_study import declare
from many_studies import record
from page_reader import Reader, assert_harmless

from gpt2lab.reports.index import write_index
from gpt2lab.reports.read import read_study
from gpt2lab.reports.tables import difference_cell

HOSTILE = "<script>alert(1)</script> | \"x\" onload='y' [a](javascript:b) `c` $x^2$"
POSENC = {"learned": 2.2, "rotary": 2.15, "none": 2.2003}


def made(root: Path) -> tuple[str, str, dict[str, Any]]:
    """Write the page -> (HTML, Markdown, JSON)."""
    page = write_index(root / "runs", root / "reports")
    assert page == root / "reports/index.html"
    return page.read_text(), page.with_suffix(".md").read_text(), json.loads(page.with_suffix(".json").read_text())


def test_an_empty_store_says_what_to_run(tmp_path: Path) -> None:
    for text in made(tmp_path)[:2]:
        assert "Nothing is recorded yet" in text
        assert "gpt2lab run ablations/posenc.yaml --scale nano" in text
    assert not (tmp_path / "reports/index.svg").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_study_is_told_with_its_verdicts_and_agreements(tmp_path: Path) -> None:
    record(tmp_path / "runs", means=POSENC, arms={"rotary": {"expected": "better: says somebody"}})
    source, _, record_ = made(tmp_path)
    [study] = record_["studies"]
    rotary, none = study["contrasts"]
    assert (rotary["word"], rotary["agreement"]["word"]) == ("better", "found again")
    assert [(p["source"], p["word"]) for p in rotary["published"]] == [
        ("EleutherAI, rotary write-up", "found again"),
        ("EleutherAI, rotary write-up", "same sign at gpt2-124m"),
    ]
    assert (none["word"], none["agreement"]) == ("no difference larger than 0.005", None)
    assert [p["word"] for p in none["published"]] == ["found again", "no difference at gpt2-124m either"]
    shown = Reader(source).text
    published = "better (2.759 against 2.809 nats); 125-150M, OpenWebText2"
    for part in ("posenc@gpt2-124m", "What does posenc do?", "124 M parameters", "2026-11-23",
                 "says somebody", "found again", published, "no difference", "Haviv et al. 2022"):  # fmt: skip
        assert part in shown, part
    cell = difference_cell(rotary["difference"], rotary["low"], rotary["high"])
    assert f"{cell.text} {cell.detail}" in shown


@pytest.mark.usefixtures("no_figures")
def test_verdicts_are_those_of_the_studys_own_report_whatever_lies_beside_it(tmp_path: Path) -> None:
    from gpt2lab.reports.study import write_report

    declare(tmp_path / "runs")
    file = write_report(read_study("posenc", tmp_path / "runs"), tmp_path / "reports").parent / "verdicts.json"
    own = json.loads(file.read_text())
    file.write_text('{"contrasts": [{"arm": "rotary", "against": "learned", "word": "worse"}]}')
    [study] = made(tmp_path)[2]["studies"]
    keys = ("arm", "against", "word", "difference", "low", "high", "p_holm")
    of_index, of_report = ([{key: c[key] for key in keys} for c in one["contrasts"]] for one in (study, own))
    assert of_index == of_report


def test_nothing_in_a_name_or_question_can_run(tmp_path: Path) -> None:
    arms = {"rotary": {"expected": f"better {HOSTILE}"}}
    record(tmp_path / "runs", means=POSENC | {HOSTILE: 2.3}, arms=arms, question=HOSTILE, caveat=HOSTILE)
    source, markdown, _ = made(tmp_path)
    assert_harmless(source, r"#|index\.(md|json)$|https://(arxiv\.org|github\.com)/")
    assert "alert(1)" in Reader(source).text
    assert "<script" not in source and "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)  # escaped brackets make no link


@pytest.mark.usefixtures("no_figures")
def test_every_table_of_the_markdown_is_whole(tmp_path: Path) -> None:
    record(tmp_path / "runs", means=POSENC | {"a|b": 2.3}, question="a | b")
    record(tmp_path / "runs", scale="nano", means=POSENC)
    counts: list[set[int]] = []
    for line in made(tmp_path)[1].splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if cells and (re.fullmatch(r"[|\s:-]+", line) or (counts and counts[-1])):
            counts[-1].add(cells)
        else:
            counts.append({cells} if cells else set())
    tables = [count for count in counts if count]
    assert len(tables) == 2  # agreement, and the question at both scales
    assert all(len(count) == 1 for count in tables), tables


@pytest.mark.usefixtures("no_figures")
def test_a_study_with_a_report_is_linked_to_it(tmp_path: Path) -> None:
    record(tmp_path / "runs", means=POSENC)
    record(tmp_path / "runs", scale="micro", means=POSENC)
    record(tmp_path / "runs", scale="nano", means=POSENC)
    for folder in ("posenc@micro", "published/posenc@nano"):
        (tmp_path / "reports" / folder).mkdir(parents=True)
        (tmp_path / "reports" / folder / "index.html").write_text("x")
    source, markdown, found = made(tmp_path)
    links = [link for link in Reader(source).links() if link.endswith(".html")]
    assert set(links) == {"posenc%40micro/index.html", "published/posenc%40nano/index.html"}
    assert all(link in markdown for link in links)
    assert {s["name"]: s["report"] for s in found["studies"]}["posenc@gpt2-124m"] is None


@pytest.mark.usefixtures("no_figures")
def test_contrasts_stand_side_by_side_over_scales_from_small_to_large(tmp_path: Path) -> None:
    record(tmp_path / "runs", scale="gpt2-124m", means=POSENC)
    record(tmp_path / "runs", scale="nano", means={"learned": 2.2, "rotary": 2.0}, smallest_effect=0.05)
    record(tmp_path / "runs", "norm", "micro", slot="norm", means={"layernorm": 2.2, "rmsnorm": 2.25})
    source, markdown, _ = made(tmp_path)
    assert "nano (842 k parameters, 1,000 tokens) | gpt2-124m (124 M parameters, 1,000 tokens)" in markdown
    [row] = [line for line in markdown.splitlines() if line.startswith("| rotary; against learned |")]
    cells = [cell.strip() for cell in row.split("|")[2:4]]
    assert [cell.partition(";")[0] for cell in cells] == ["**better**", "**better**"]
    sizes = [float(re.findall(r"−(0\.\d+) \\", cell)[0]) for cell in cells]
    assert sizes == [pytest.approx(0.2, abs=0.01), pytest.approx(0.05, abs=0.01)]
    assert "rmsnorm" in Reader(source).text


@pytest.mark.usefixtures("no_figures")
def test_a_shared_pool_of_baseline_runs_is_counted(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        record(tmp_path / "runs", name, pool="shared", means=POSENC)
    record(tmp_path / "runs", "alone", means=POSENC)
    shown = Reader(made(tmp_path)[0]).text
    assert "4 studies, 8 contrasts, 30 runs, 30.0 GFLOP, 30.0 minutes of training" in shown  # 36 but for the 6 shared


@pytest.mark.usefixtures("no_figures")
def test_what_failed_or_is_missing_is_said(tmp_path: Path) -> None:
    study = record(tmp_path / "runs", means={"learned": 2.2, "rotary": 3.32})  # above the unigram floor less the margin
    absent = tmp_path / "runs" / study["arms"]["learned"]["runs"]["0"]
    for file in sorted(absent.rglob("*.json")):
        file.unlink()
    source, _, found = made(tmp_path)
    assert "(1 run without a value)" in Reader(source).text
    [contrast] = found["studies"][0]["contrasts"]
    assert contrast["word"].startswith("unstable (3 of 3 failed)")
    assert {p["word"] for p in contrast["published"]} == {"inconclusive"}
    assert all(p["why"].startswith("unstable") for p in contrast["published"])


EFFECT = {"arm": "rotary", "against": "learned", "weights": {"rotary": 0.5, "none": 0.5, "learned": -1.0}}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("contrasts", "of_arms", "of_effects", "expected"),
    [
        ([["rotary", "learned"], ["rotary", "none"], ["none", "alibi"]], {"rotary": "better", "none": "worse"}, {},
         ["better", None, "worse"]),  # none is not compared with the baseline
        ([EFFECT], {"rotary": "better"}, {}, [None]),
        ([EFFECT | {"arm": "some=rotary", "against": "some=learned"}], {}, {"some=rotary": "better (a book)"},
         ["better (a book)"]),
    ],
)  # fmt: skip
def test_what_is_expected_is_compared_with_the_contrast_that_it_is_about(
    tmp_path: Path, contrasts: Any, of_arms: dict[str, str], of_effects: dict[str, str], expected: list[str | None]
) -> None:
    arms = {arm: {"expected": text} for arm, text in of_arms.items()}
    record(tmp_path / "runs", means=POSENC | {"alibi": 2.1}, arms=arms, contrasts=contrasts, expected=of_effects)
    shown = made(tmp_path)[2]["studies"][0]["contrasts"]
    assert [c["expected"] for c in shown] == expected
    if len(contrasts) == 1:  # an effect over several arms repeats nothing that was published
        assert shown[0]["published"] == []
        assert (shown[0]["agreement"] or {}).get("word") == ("found again" if of_effects else None)


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_record_costs_its_own_lines_only(tmp_path: Path) -> None:
    record(tmp_path / "runs", means=POSENC)
    studies = tmp_path / "runs/studies"
    (studies / "broken@nano.json").write_text("{")
    (studies / "hollow@nano.json").write_text('{"name": "hollow@nano"}')
    (studies / "other@nano.json").write_text((studies / "posenc@gpt2-124m.json").read_text())
    source, markdown, found = made(tmp_path)
    assert {one["name"] for one in found["damaged"]} == {"broken@nano", "hollow@nano", "other@nano"}
    assert [s["name"] for s in found["studies"]] == ["posenc@gpt2-124m"]
    assert "The record of hollow@nano cannot be read." in source and "The record of hollow@nano" in markdown


@pytest.mark.usefixtures("no_figures")
def test_agreements_are_counted(tmp_path: Path) -> None:
    arms = {"rotary": {"expected": "better"}, "none": {"expected": "worse"}, "alibi": {"expected": "worse"}}
    record(tmp_path / "runs", means=POSENC | {"alibi": 2.1}, arms=arms, seeds=5)
    lines = made(tmp_path)[1].splitlines()
    assert "| what the study's file expects | 1 | 0 | 1 | 0 | 1 |" in lines  # rotary; alibi; none: no size is published
    assert "| published results | 3 | 3 | 0 | 0 | 0 |" in lines  # at 125M, and again above 1B


def test_the_same_store_gives_the_same_page(tmp_path: Path) -> None:
    record(tmp_path / "runs", means=POSENC)
    assert made(tmp_path) == made(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("studies", "seeds"), [(40, 5), (25, 8)])
def test_a_thousand_runs_take_less_than_ten_seconds(tmp_path: Path, studies: int, seeds: int) -> None:
    """Studies of 5 arms; the time is printed with `-s`."""
    means = {"learned": 2.2, "rotary": 2.15, "none": 2.2003, "alibi": 2.1, "sinusoidal": 2.199}
    for number in range(studies):
        record(tmp_path / "runs", f"study{number}", means=means, seeds=seeds)
    began = time.perf_counter()
    found = made(tmp_path)[2]
    took = time.perf_counter() - began
    print(f"\n{sum(s['runs'] for s in found['studies'])} runs in {len(found['studies'])} studies: {took:.2f} s")
    assert sum(s["runs"] for s in found["studies"]) == 1000
    assert took < 10
