"""Training health on the page: the numbers by hand, words for what broke off, and what is missing said."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_study import BATCH_TOKENS, EVERY, STEPS, run_id, write
from matplotlib.figure import Figure
from page_reader import assert_shown_as_text

from gpt2lab.analysis.results import StudyRun
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.reports import style
from gpt2lab.reports.read import read_study
from gpt2lab.reports.sections import health
from gpt2lab.reports.study import write_report
from gpt2lab.training import guard
from gpt2lab.training.diagnostics import build, diagnose

MakeStudy = Callable[..., dict[str, Any]]
LAYERS = 3
TIME = {
    "data": 1.0,
    "forward": 30.0,
    "backward": 55.0,
    "optimizer": 4.0,
    "evaluation": 8.0,
    "saving": 1.5,
    "other": 0.5,
}
MEASURED = {
    "time": TIME, "mfu": 0.412, "peak_flops": 9.9e14, "peak_from": "a data sheet", "skipped_steps": 0, "spikes": [],
    "notes": [],
}  # fmt: skip
HOSTILE = '<script>alert("1")</script>'


def journal(scale: float = 1.0, until: int = STEPS) -> list[dict[str, Any]]:
    """Rows as the trainer writes them; every number is `scale` times a simple function of the step."""
    rows = []
    for step in range(0, until + 1, 10):
        metrics = {"train/grad_norm": scale * (1 + 100 / step)} if step else {}
        if step % EVERY == 0:
            metrics |= {
                "val/loss": 2.0,
                "diag/logit_rms": scale * 2,
                "diag/attention_logit_max": scale * (5 + step / 100),
            }
            metrics |= {f"diag/activation_rms/{i}": scale * (i + 1) * (1 + step / 800) for i in range(LAYERS)}
            metrics |= {"diag/update_ratio": scale * 1e-3, "diag/update_ratio/mlp": scale * 2e-3} if step else {}
        rows.append({"step": step, "tokens": step * BATCH_TOKENS, "seconds": step / 18, "metrics": metrics})
    return rows


def leave(runs: Path, arm: str, seed: int, scale: float = 1.0, **result: Any) -> None:
    """Give a run of the made-up study a journal with diagnostics, and a result that has what newer ones have."""
    folder = runs / run_id(arm, seed)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal(scale)))
    before = json.loads((folder / "result.json").read_text()) | {"metrics": {"val/loss": 2.0}}
    write(folder / "result.json", before | MEASURED | result)


def written(runs: Path) -> str:
    """The report's HTML, its entities read."""
    return html.unescape(write_report(read_study("posenc", runs), runs.parent / "reports").read_text())


@pytest.fixture
def study(make_study: MakeStudy, tmp_path: Path) -> Path:
    """runs/ of two arms and three seeds, of which one diverged and one had spikes and skipped steps."""
    make_study({"learned": 2.15, "rotary": 1.9})
    runs = tmp_path / "runs"
    for seed, scale in enumerate((1.0, 2.0, 3.0)):
        leave(runs, "learned", seed, scale)
    spikes = [{"step": step, "loss": 3.25, "threshold": 2.5} for step in (210, 400, 500)]
    leave(runs, "rotary", 0, 4.0, spikes=spikes, skipped_steps=2)
    leave(runs, "rotary", 1, 4.0, notes=["bf16 is emulated here"])
    where = {"seed": 2, "epoch": 1, "first_tokens": [512, 7_000, 3, 9]}
    broken = {"step": 1_120, "lr": 4e-3, "loss": math.nan, "grad_norm": math.inf, "batch": where}
    leave(runs, "rotary", 2, 4.0, status="diverged", reason="step 1120: loss nan", divergence=broken)
    return runs


def table_of(read: Any) -> dict[str, dict[str, tuple[str, str]]]:
    table = health.table(read)
    titles = [column.title for column in table.columns]
    return {
        row.cells[0].text: {t: (c.text, c.detail) for t, c in zip(titles, row.cells, strict=True)} for row in table.rows
    }


def test_every_number_of_the_table_by_hand(study: Path) -> None:
    shown = table_of(read_study("posenc", study))
    late = statistics.median(1 + 100 / step for step in range(730, 801, 10))  # the last tenth of 80 steps, mean scale 2
    assert shown["learned"] == {
        "Arm": ("learned", ""),
        "Gradient norm": (f"{2 * late:.3g}", "up to 33"),
        "Attention logit": ("26", "up to 39"),
        "Logit rms": ("4", "up to 6"),
        "Activation rms": ("4 to 12", ""),
        "Update ratio": ("0.002", "mlp 0.004"),
        "Spikes": ("0", ""),
        "Skipped steps": ("0", ""),
        "Diverged": ("0", ""),
    }
    assert shown["rotary"]["Spikes"] == ("3", "in 1 of 3 runs")
    assert shown["rotary"]["Skipped steps"] == ("2", "in 1 of 3 runs")
    assert shown["rotary"]["Diverged"] == ("1", "in 1 of 3 runs")


def test_diagnostics_of_plug_ins_have_figures_over_blocks_and_over_tokens(study: Path) -> None:
    file = study / run_id("learned", 0) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["metrics"] |= {
            "diag/entropy/1": 1.0,  # block 0 has no attention
            "diag/entropy/2": 2.0,
            "diag/sharpness": row["step"],
            "diag/norm/wte": 3.0,
        }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_study("posenc", study)
    (first, *_) = read.once(health.health)["learned"]
    assert health._curve(first, "diag/entropy", over_blocks=True) == ([1.0, 2.0], [1.0, 2.0])
    assert first.last("diag/sharpness") == rows[-1]["step"] and first.last("diag/norm/wte") == 3.0
    panels = {(panel.title, panel.over_blocks) for panel in health.panels_of(read.once(health.health))}
    assert panels >= {
        ("entropy", True),
        ("sharpness", False),
        ("norm/wte", False),
        ("rms of the residual stream", True),
    }


def test_means_leave_out_what_did_not_finish(study: Path) -> None:
    leave(study, "rotary", 2, 1000.0, status="diverged")
    assert table_of(read_study("posenc", study))["rotary"]["Logit rms"] == ("8", "up to 2e+03")
    for seed in (0, 1):
        leave(study, "rotary", seed, 1000.0, status="diverged")  # with nothing else to show, that is shown
    assert table_of(read_study("posenc", study))["rotary"]["Logit rms"] == ("2e+03", "up to 2e+03")


def test_the_page_and_its_twin_tell_what_broke_off_and_what_jumped(study: Path, tmp_path: Path) -> None:
    index = write_report(read_study("posenc", study), tmp_path / "reports")
    source, twin = index.read_text(), (index.parent / "report.md").read_text()
    said = (
        "Training health (3 spikes, 2 skipped steps, 1 run diverged)", "41.2 %",
        "rotary: bf16 is emulated here.", "Steps skipped because their numbers were not finite: 2 in rotary.",
    )  # fmt: skip
    plain = re.sub(r"\\(.)", r"\1", twin)
    for sentence in said:
        assert sentence in source, sentence
        assert sentence in plain, sentence
    source = source.partition("</nav>")[2]
    places = [source.index(part) for part in ("Verdicts", "What it costs", "Training health", 'id="health-title"',
                                              "How to reproduce")]  # fmt: skip
    assert places == sorted(places)  # verdicts first; a training's health is far down, folded
    health_part = source[places[2] : source.index("Runs</h2>")]
    assert not any(word.lower() in re.sub(r"<[^>]+>", " ", health_part).lower() for word in ("better", "worse"))
    figures = sorted(path.stem for path in (index.parent / "figures").glob("*.svg"))
    assert "health" in figures
    assert sorted(re.findall(r"\(figures/([^)]+)\.svg\)", twin)) == figures


@pytest.mark.usefixtures("no_figures")
def test_results_from_before_are_said_to_lack_it(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    source = written(tmp_path / "runs")
    assert health.NOTHING in source
    assert ">MFU<" not in source
    assert health.drawn(read_study("posenc", tmp_path / "runs").once(health.health), {}) == []
    leave(tmp_path / "runs", "rotary", 1)
    source = written(tmp_path / "runs")
    assert health.NOTHING not in source


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("value", [None, "much", [], {}, [None, 3], {"data": None}, True, math.nan, -1])
def test_no_value_of_a_record_costs_the_page(make_study: MakeStudy, tmp_path: Path, value: Any) -> None:
    make_study({"learned": 2.15, "rotary": 1.9}, seeds=1)
    keys = (*MEASURED, "divergence")
    leave(tmp_path / "runs", "learned", 0, **dict.fromkeys(keys, value))
    leave(tmp_path / "runs", "rotary", 0, spikes=[{"step": value}], divergence={"step": value, "batch": value})
    folder = tmp_path / "runs" / run_id("learned", 0)
    rows = [row | {"metrics": {name: value for name in row["metrics"] if name != "val/loss"}} for row in journal()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_study("posenc", tmp_path / "runs")
    found = read.once(health.health)
    with style.drawing():
        assert health.drawn(found, read.styles)
        assert health.training_health(read).table is not None
    assert "nan" not in " ".join(health.deviations(found))


@pytest.mark.usefixtures("no_figures")
def test_words_of_a_record_cannot_become_markup(study: Path, tmp_path: Path) -> None:
    leave(study, "learned", 0, notes=[HOSTILE], peak_from=HOSTILE, divergence={"step": HOSTILE, "batch": {HOSTILE: 1}})
    assert_shown_as_text(write_report(read_study("posenc", study), tmp_path / "reports").parent, [HOSTILE])


@pytest.mark.parametrize("count", [1, 59, 60, 61, 4_001])
def test_a_long_curve_is_thinned_to_medians_and_keeps_its_end(count: int) -> None:
    x, y = health.thinned((list(map(float, range(count))), [float(i % 7) for i in range(count)]))
    assert len(x) == len(y) == min(count, health.MOST_POINTS)
    assert x[-1] == count - 1
    if count == 4_001:
        assert y[0] == statistics.median(i % 7 for i in range(67))


@pytest.mark.parametrize("values", [[1.0, 2.0], [1e-3, 1e3], [0.0, 50.0], [-1.0, 5.0], [1.0], [math.nan], [1e-9, 1e9]])
def test_figures_can_be_drawn_from_anything(values: list[float]) -> None:
    look = style.styles_of(["a", HOSTILE], "a")
    curves = [health.Curves(arm, [(list(map(float, range(len(values)))), values)]) for arm in look]
    with style.drawing():
        figure: Figure = health.draw([health.Panel("rms", True, curves), health.Panel("x", False, curves)], look)
        alone, _ = style.render(figure, "name", "title", "words")
    assert "<script" not in alone
    assert "mathdefault" not in alone  # matplotlib's own labels of a logarithmic axis are TeX


def test_the_page_reads_what_the_training_measures() -> None:
    model = build_model(ModelConfig(n_layer=12, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    row = {"step": 1, "tokens": 8, "metrics": diagnose(model, torch.zeros(1, 8, dtype=torch.int64), "fp32")}
    for diagnostic in build():
        diagnostic.before_update(model.params())
        diagnostic.after_update(model.params())
        row["metrics"] |= diagnostic.metrics()
    row["metrics"] |= {"train/grad_norm": 1.0}
    run = health.of_run(StudyRun(arm="a", seed=0, id="0" * 16, status="finished"), [row])
    names: Mapping[str, float] = row["metrics"]
    blocks = run.by_block(health.ACTIVATIONS)
    assert list(blocks) == list(range(12))  # by number, not by letter
    assert blocks == {i: names[f"diag/activation_rms/{i}"] for i in range(12)}
    assert run.parts(health.UPDATES).keys() == {"embedding", "position", "attention", "mlp", "vector"}
    of_all = (health.GRADIENT, health.SCORES, health.LOGITS, health.UPDATES)
    assert all(run.last(metric) == names[metric] for metric in of_all)


def test_the_note_says_when_a_spike_is_one() -> None:
    assert f"more than {guard.SIGMAS:g} standard deviations" in health.NOTE
    assert f"up to {guard.WINDOW} losses" in health.NOTE


def test_a_peak_of_the_gradient_norm_is_not_thinned_away() -> None:
    steps = [float(i) for i in range(1000)]
    run = health.RunHealth(run=StudyRun(arm="a", seed=0, id="0", status="finished"), curves={
        health.GRADIENT: (steps, [108.0 if i == 14 else 0.6 for i in range(1000)]),
        health.LOGITS: (steps, [108.0 if i == 14 else 0.6 for i in range(1000)]),
    })  # fmt: skip
    assert max(health._curve(run, health.GRADIENT, over_blocks=False)[1]) == 108
    assert max(health._curve(run, health.LOGITS, over_blocks=False)[1]) == 0.6
