"""Campaigns: numbers and levels of hypotheses, what becomes of them, and what a page says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_study import declare, typed

from gpt2lab.analysis import campaigns
from gpt2lab.analysis.campaigns import Campaign, campaign_of, conclude, standing_of
from gpt2lab.analysis.online import ALPHA, levels, weight
from gpt2lab.analysis.studies import judge
from gpt2lab.records import StudyRecord
from gpt2lab.reports.page import render_markdown
from gpt2lab.reports.read import read_study
from gpt2lab.reports.study import build
from gpt2lab.store import Store, write_json
from gpt2lab.store.ledger import FILE, read_ledger

MEANS = {"learned": 2.15, "rotary": 1.89, "none": 2.15}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[StudyRecord, Store]]:
    """A study of the campaign rope that is declared and judged; keywords change its record."""
    store = Store(tmp_path)
    before = declare(tmp_path, MEANS, seeds=5)

    def study(**changes: Any) -> tuple[StudyRecord, Store]:
        record = typed(before | {"campaign": "rope"} | changes)
        record = record.with_(arms={name: arm.with_(settings=f"s-{name}") for name, arm in record.arms.items()})
        record, _ = campaigns.declare(record, store)
        write_json(tmp_path / "studies" / f"{record.name}.json", record.plain())
        conclude(record, judge(record, store), store)
        return record, store

    return study


def rope(store: Store) -> Campaign:
    return campaign_of(read_ledger(store.root), "rope")


def test_a_study_has_its_numbers_levels_and_verdicts(made: Callable[..., Any]) -> None:
    record, store = made()
    rotary, none = rope(store).hypotheses
    assert (rotary.number, rotary.arm, none.number, none.arm) == (1, "rotary", 2, "none")
    assert [rotary.level, none.level] == pytest.approx(ALPHA / 2 * weight([1, 2]))
    assert rotary.word == "better" and rotary.p is not None and rotary.p < 1e-4 and rotary.supported
    assert none.word and not none.claim and none.supported is None
    assert (rope(store).count("better"), rope(store).luck) == (1, pytest.approx(0.025))
    assert rope(store).seconds == pytest.approx(15 * 800 / 18, rel=0.01)
    lines = len(read_ledger(store.root).lines)
    again, _ = campaigns.declare(record.with_(ledger=""), store)
    conclude(again, judge(again, store), store)
    assert again.ledger == record.ledger and len(read_ledger(store.root).lines) == lines == 2


def test_numbers_continue_and_discoveries_raise_later_levels(made: Callable[..., Any]) -> None:
    made()
    _, store = made(name="other@nano", ablation="other", hash="6f" * 8, contrasts=[["none", "rotary"]])
    third = rope(store).hypotheses[2]
    assert third.number == 3 and third.level == pytest.approx(levels(3, 1, [2], [1])[0])
    assert third.level > ALPHA / 2 * float(weight(3))
    assert third.word == "worse" and rope(store).count("worse") == 1 and rope(store).luck == pytest.approx(0.05)


def test_the_same_contrast_is_one_test_until_its_seeds_are_fresh(made: Callable[..., Any]) -> None:
    first, store = made(seeds=[0, 1, 2])
    _, store = made(seeds=[0, 1, 2, 3, 4], hash="6f" * 8, contrasts=[["learned", "rotary"]])
    assert [one.number for one in rope(store).hypotheses] == [1, 2]  # whichever of the two is the arm
    assert rope(store).hypotheses[0].word == "worse" and rope(store).hypotheses[0].seeds == (0, 1, 2, 3, 4)
    made(seeds=[3, 4], hash="70" * 8, name="again@nano", ablation="again")
    assert [one.number for one in rope(store).hypotheses] == [1, 2, 3]
    _, store = made(seeds=[0, 1, 2, 3, 4], hash="71" * 8, campaign="other", name="third@nano", ablation="third")
    assert [one.number for one in campaign_of(read_ledger(store.root), "other").hypotheses] == [1, 2]
    assert first.ledger


def test_screens_are_listed_without_a_number(made: Callable[..., Any]) -> None:
    _, store = made(screen=True)
    assert [(one.number, one.level) for one in rope(store).hypotheses] == [(None, None)] * 2
    assert rope(store).hypotheses[0].word == "exploratory"
    made(seeds=[3, 4], hash="6f" * 8)
    assert [one.number for one in rope(store).hypotheses] == [None, None, 1, 2]
    assert "2 hypotheses tried in the campaign rope, and 2 only screened" in rope(store).sentences()[0]


def test_a_claim_above_its_level_is_marked_and_the_word_stays(made: Callable[..., Any]) -> None:
    made(name="other@nano", ablation="other", hash="6f" * 8, contrasts=[["none", "rotary"]])
    record, store = made()
    lines = [json.loads(line) for line in (store.root / FILE).read_text().splitlines()]
    assert lines[-1]["contrasts"][0]["supported"] is True
    standing = standing_of(record, store)
    assert standing is not None and not standing.problems
    weak = replace(standing.own[0], p=0.02, supported=False)
    read = replace(read_study(record.name, store.root), standing=replace(standing, own=[weak, *standing.own[1:]]))
    shown = render_markdown(build(read))
    assert f"not supported over the campaign rope: p 0.02, its level {weak.level:.2g}" in shown
    assert read.verdicts.contrasts[0].word == "better"
    assert (
        "Hypotheses 2 and 3 of the 3 tried in the campaign rope: of all, 1 called better and 1 worse; if none had an "
        "effect, at most 0.05 of each would be expected by chance. Of the 2 called better or worse, 2 still hold when"
        in shown
    )


def test_a_first_study_has_no_mark_of_its_campaign(made: Callable[..., Any]) -> None:
    """Its own family is all that was tried, and is corrected for already; the section lists the levels."""
    record, store = made()
    standing = standing_of(record, store)
    assert standing is not None and standing.alone
    weak = replace(standing.own[0], p=0.02, supported=False)
    read = replace(read_study(record.name, store.root), standing=replace(standing, own=[weak, *standing.own[1:]]))
    shown = render_markdown(build(read))
    assert "not supported over" not in shown and "Hypotheses 1 and 2 of the 2 tried in the campaign rope: " in shown


def test_a_page_says_what_was_tried_by_then(made: Callable[..., Any]) -> None:
    record, store = made()
    before = standing_of(record, store)
    made(name="other@nano", ablation="other", hash="6f" * 8, contrasts=[["none", "rotary"]])
    assert standing_of(record, store) == before
    shown = json.loads(build(read_study(record.name, store.root)).json({}))
    assert shown["campaign"]["tried"] == 2 and shown["campaign"]["hypotheses"][0]["supported"] is True


def test_a_line_that_was_changed_or_removed_is_named_by_commands(
    made: Callable[..., Any], gpt2lab: Callable[..., Any], tmp_path: Path
) -> None:
    record, store = made()
    listed = json.loads(gpt2lab("ledger", "--runs", tmp_path, "--json").out)
    [campaign] = listed["campaigns"]
    assert campaign["name"] == "rope" and campaign["hypotheses"][0]["claim"] == "better" and not listed["problems"]
    head = json.loads(gpt2lab("register", record.name, "--runs", tmp_path, "--json").out)["head"]
    line = gpt2lab("register", record.name, "--runs", tmp_path).out
    assert line.startswith("gpt2lab posenc@nano declared ") and line.endswith(f"{head}\n") and record.hash in line
    assert gpt2lab("ledger", "rope", "--registered", head, "--runs", tmp_path).code == 0
    assert gpt2lab("ledger", "rope", "--registered", "1:00", "--runs", tmp_path).code == 4
    assert gpt2lab("ledger", "ropes", "--runs", tmp_path).code == 2
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)

    def said(content: str) -> Mapping[str, str]:
        (tmp_path / FILE).write_text(content)
        answers = {name: gpt2lab(name, "--runs", tmp_path) for name in ("ledger", "doctor")}
        assert answers["ledger"].code == 4 and answers["doctor"].code == 3
        return {name: " ".join((answer.out + answer.err).split()) for name, answer in answers.items()}

    changed = said(lines[0] + lines[1].replace('"better"', '"worse"'))
    assert all("line 2 (posenc@nano, verdict" in text for text in changed.values())
    cut = said("")
    assert all("the line of posenc@nano's declaration is missing" in text for text in cut.values())
    page = render_markdown(build(read_study(record.name, store.root)))
    assert "is damaged, so none of this can be trusted: the line of posenc@nano's declaration" in page
