"""The page of published results, and what authors conclude."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from many_studies import record
from page_reader import Reader, assert_harmless

from gpt2lab.errors import DataFault
from gpt2lab.reports.front import write_front
from gpt2lab.reports.page import publish
from gpt2lab.reports.read import read_study
from gpt2lab.reports.study import write_report
from gpt2lab.store import Store

POSENC = {"learned": 2.2, "rotary": 2.15, "none": 2.2003}
pytestmark = pytest.mark.usefixtures("no_figures")
NAMES = ("posenc@gpt2-124m", "posenc@micro")
SAID = "Rotary wins; <b>none</b> is open."


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Published pages of one ablation at two scales, one of them with a conclusion."""
    root = tmp_path / "runs"
    record(root, means=POSENC)
    record(root, scale="micro", means={**POSENC, "rotary": 2.3})
    Store(root).conclude(Store(root).study("posenc@micro"), SAID)
    for name in NAMES:
        publish(write_report(read_study(name, root), tmp_path / "reports").parent, tmp_path / "published")
    return tmp_path / "published"


def test_every_question_has_its_answer_at_each_scale(place: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs")  # as in a clone
    page = write_front(place)
    shown, markdown = Reader(page.read_text()), (place / "README.md").read_text()
    assert "1 question, 2 studies, 4 contrasts" in shown.text
    assert shown.text.index("micro") < shown.text.index("gpt2-124m")  # the smaller scale first
    assert f"At micro (12.3 M parameters, 1,000 tokens): {SAID}" in shown.text
    large, small = (json.loads((place / name / "verdicts.json").read_text()) for name in NAMES)
    words = [{c["arm"]: c["word"] for c in of_page["contrasts"]} for of_page in (large, small)]
    assert [said["rotary"] for said in words] == ["better", "worse"]
    assert large["answer"] in shown.text and small["answer"] not in shown.text  # where nothing is concluded
    row = next(line for line in markdown.splitlines() if line.startswith("| rotary"))
    assert "![What was decided](overview.svg)" in markdown
    assert row.index("**worse**") < row.index("**better**") and "2.759 against 2.809 nats" in row
    for name in NAMES:
        assert f"{name.replace('@', '%40')}/index.html" in shown.links()
    assert_harmless(page.read_text(), r"#|README\.md$|predictions\.json$|posenc%40[a-z0-9-]+/index\.html$")


def test_no_difference_is_shown_with_its_bound_where_the_page_has_one(place: Path) -> None:
    file = place / "posenc@micro" / "verdicts.json"
    page = json.loads(file.read_text())
    none = next(c for c in page["contrasts"] if c["arm"] == "none")
    none |= {"word": "no difference larger than 0.05", "difference": 0.001, "low": -0.11, "high": 0.11}
    for most, shown in ((0.0287, "+0.001, at most 0.029 in size"), (None, "0.00 \\[−0.11, +0.11\\]")):
        file.write_text(json.dumps(page | {"contrasts": [none | {"at_most": most}]}))
        write_front(place)
        row = next(line for line in (place / "README.md").read_text().splitlines() if line.startswith("| none"))
        assert shown in row.replace("\\+", "+"), row


def test_an_earlier_edition_of_a_page_counts_for_nothing(place: Path) -> None:
    shown = write_front(place).read_text()
    edition = next(place.glob("*/verdicts.json")).parent
    shutil.copytree(edition, edition.with_name(f"{edition.name}~1"))
    assert write_front(place).read_text() == shown


def test_ablations_with_one_question_have_their_names_in_the_titles(tmp_path: Path) -> None:
    root, place = tmp_path / "runs", tmp_path / "published"
    for name in ("posenc", "short"):
        record(root, ablation=name, scale="micro", means=POSENC, question="Which one?")
        publish(write_report(read_study(f"{name}@micro", root), tmp_path / "reports").parent, place)
    titles = [line for line in write_front(place).with_name("README.md").read_text().splitlines() if "?" in line[:20]]
    assert [title for title in titles if title[:3] == "## "] == ["## Which one? (posenc)", "## Which one? (short)"]


def test_a_conclusion_is_of_the_runs_that_it_was_drawn_from(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    record(root, means=POSENC)
    name = "posenc@gpt2-124m"
    Store(root).conclude(Store(root).study(name), SAID)
    text = write_report(read_study(name, root), tmp_path / "reports").read_text()
    assert f"The author concludes: {SAID}" in Reader(text).text
    study = Store(root).study(name)
    arms = {arm: entry.with_(runs={}) if arm == "rotary" else entry for arm, entry in study.arms.items()}
    Store(root).write_study(study.with_(arms=arms))
    assert read_study(name, root).conclusion == ""


def test_a_file_of_another_kind_is_named(place: Path) -> None:
    (place / "posenc@micro" / "verdicts.json").write_text("{}")
    with pytest.raises(DataFault, match="not as a page writes it") as refused:
        write_front(place)
    assert refused.value.hint == "gpt2lab report posenc@micro --publish"
