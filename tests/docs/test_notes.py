"""What the notes claim from numbers holds when the numbers are computed again, on small models."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import NOTES, loaded

from gpt2lab.planning.ablation import load_ablation

ROOT = Path(__file__).parents[2]
m = loaded("measures")


def test_the_trainings_that_notes_end_with_can_be_repeated() -> None:
    pinned = re.findall(r"--set (\S+)", (NOTES / "measured.yaml").read_text(encoding="utf-8"))
    loaded_ablation = load_ablation(NOTES / "measured.yaml", overrides=pinned)
    training = loaded_ablation.arms["gpt2"].config.training
    assert (training.steps, training.batch_tokens, loaded_ablation.scale) == (440, 1024, "nano")
    for note in NOTES.glob("*.md"):
        last = note.read_text(encoding="utf-8").rpartition("\n## ")[2]
        assert note.stem == "parametrisation" or last.startswith("Measured effect\n"), note
        assert "440 steps" in last or note.stem == "parametrisation", note


def test_scores_grow_with_the_root_of_their_width_and_the_factor_takes_it_out() -> None:
    widths = [4, 16, 64]
    found = m.score_sizes(widths, keys=256)
    assert found["sd unscaled"] == pytest.approx([math.sqrt(w) for w in widths], rel=0.1)
    assert found["sd"] == pytest.approx([1, 1, 1], rel=0.1)
    assert found["keys"] == pytest.approx([256 * math.exp(-0.5)] * 3, rel=0.05)
    assert found["keys unscaled"][-1] < 4


def test_first_scores_of_gpt2_are_small() -> None:
    assert m.first_scores(m.small(1, 128)) == pytest.approx(m.GPT2_VARIANCE * math.sqrt(32) / math.sqrt(32), rel=0.1)


def test_rotary_scores_depend_on_distance_alone_and_follow_the_sinusoidal_product() -> None:
    assert m.rotary_shift_error(10) < 2e-4 and m.rotary_shift_error(1000) < 2e-3
    scores = m.rotary_scores(200)
    expected = [sum(math.cos(d * 10000 ** (-2 * i / 64)) for i in range(32)) / 32 for d in range(200)]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    torch.testing.assert_close(scores, m.sinusoidal_products(200), atol=1e-4, rtol=0)
    assert scores[100:].mean() < scores[:100].mean() < 1


def test_alibi_halves_at_geometric_distances_and_is_a_gain_of_later_keys() -> None:
    from gpt2lab.components.position import Alibi, alibi_slopes

    factors = m.alibi_factors(256)
    halves = [math.log(2) / slope for slope in alibi_slopes(8)]
    assert halves[0] == pytest.approx(1.386, abs=1e-3) and halves[-1] == pytest.approx(177.4, abs=0.1)
    for row, half in zip(factors, halves, strict=True):
        measured = math.log(2) / -math.log(row[1] / row[0])
        assert measured == pytest.approx(half, rel=1e-3)
    places, scores = torch.arange(16), torch.randn(8, 16, 16, generator=m.generator())
    hidden = torch.full((16, 16), -math.inf).triu(1)
    later = torch.tensor(alibi_slopes(8))[:, None, None] * places
    ours = (scores + Alibi(8).bias(places, places) + hidden).softmax(-1)
    torch.testing.assert_close(ours, (scores + later + hidden).softmax(-1))


@pytest.mark.parametrize("init", ["gpt2", "gpt2_tf"])
def test_pre_norm_gradients_are_inverse_to_the_stream(init: str) -> None:
    config = m.small(12, 96, init=init)
    gradients, sizes = np.array(m.gradients(config)["stream"]), np.array(m.stream_rms(config)[1:])
    product = gradients * sizes
    assert product.max() / product.min() < (1.12 if init == "gpt2" else 1.5)
    assert gradients[0] / gradients[-1] > 2


def test_post_norm_gradients_balance_at_small_weights_and_grow_backward_at_large_ones() -> None:
    flat = m.gradients(m.small(12, 96, residual="post", init="gpt2_tf"))["stream"]
    assert max(flat) / min(flat) < 1.2
    large = m.gradients(m.small(12, 96, residual="post", init="gpt2_tf", variance=2.0))["stream"]
    assert large[0] > 2 * large[-2]


def test_only_pre_norm_gives_deeper_models_smaller_gradients_at_the_top() -> None:
    def last(residual: str, n_layer: int) -> float:
        return float(m.gradients(m.small(n_layer, 96, residual=residual, init="gpt2_tf"))["mlp"][-1])

    assert last("pre", 16) / last("pre", 8) == pytest.approx(2**-0.5, rel=0.1)
    assert last("post", 16) / last("post", 8) == pytest.approx(1, rel=0.1)


def test_gains_of_an_mlp_there_and_back() -> None:
    written, returned = m.mlp_gains()
    assert written == pytest.approx(0.131, abs=1e-3)
    mlp = m.build_model(m.small(1, 192, init="gpt2_tf")).h[0].mlp
    x = torch.randn(512, 192, generator=m.generator(), requires_grad=True)
    y = mlp(x, None)
    assert y.var().item() == pytest.approx(written, rel=0.1)
    back = torch.randn(512, 192, generator=m.generator(1))
    y.backward(back)
    assert x.grad is not None
    assert (x.grad.square().mean() / back.square().mean()).item() == pytest.approx(returned, rel=0.1)


def test_the_stream_grows_by_a_little_more_than_a_root_unless_branches_are_scaled() -> None:
    plain, scaled = ([m.stream_rms(m.small(n, 96, init=i))[-1] for n in (6, 24)] for i in ("gpt2_tf", "gpt2"))
    sizes = m.stream_rms(m.small(12, 96, init="gpt2_tf"))
    slope = math.log(sizes[12] / sizes[1]) / math.log(12)
    assert 0.5 < slope < 0.62
    assert plain[1] / plain[0] == pytest.approx(2, rel=0.15)
    assert scaled[1] / scaled[0] == pytest.approx(1, rel=0.1)
    assert sizes[12] == pytest.approx(math.sqrt(12 * m.mlp_variance()), rel=0.25)


def test_the_first_loss_of_a_tied_head() -> None:
    assert m.tied_first_loss(768) == pytest.approx(10.98, abs=0.005)
    vocabulary, widths = 2000, [64, 256]
    measured = m.first_losses(widths, n_layer=1, vocab_size=vocabulary, rows=16)
    assert measured == pytest.approx([m.tied_first_loss(c, vocab_size=vocabulary) for c in widths], abs=0.03)


def test_the_token_just_read_stands_out_by_what_its_vector_has_in_the_stream() -> None:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 64, "vocab_size": 1000}
    logits = m.first_logits(m.ModelConfig(**sizes, init="zero_projections"))
    assert logits["own"].mean().item() == pytest.approx(256 * 0.02 / math.sqrt(2), rel=0.05)
    assert logits["others"].std().item() == pytest.approx(math.sqrt(256) * 0.02, rel=0.05)


def test_schedules_and_adams_first_steps() -> None:
    assert np.mean(m.rates("cosine", 10_000, 0)) == pytest.approx(0.55, abs=1e-3)
    assert np.mean(m.rates("linear", 10_000, 0)) == pytest.approx(0.5, abs=1e-3)
    sizes = m.adam_update_sizes(40, n_embd=32)
    assert sizes[0] == pytest.approx(1, abs=0.01)
    assert 0.2 < sizes[-1] < 0.35 and sizes[0] > sizes[1] > sizes[9] > sizes[-1]
    assert m.noise_update_size(1) == pytest.approx(1) and m.noise_update_size(500) == pytest.approx(0.2294, abs=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_noise_settles_at_a_height_proportional_to_the_rate(rate: float) -> None:
    assert m.settled_excess(rate, steps=100_000) == pytest.approx(rate / (2 * (2 - rate)), rel=0.1)


def test_where_running_sums_stop() -> None:
    for dtype, stop in ((torch.bfloat16, 256), (torch.float16, 2048)):
        sums = [share * n for n, share in enumerate(m.running_sums(2 * stop, dtype), 1)]
        assert sums[stop - 1] == stop and sums[-1] == pytest.approx(stop)
    assert m.running_sums(4096, torch.float32)[-1] == 1


def test_small_gradients_vanish_in_float16_unless_the_loss_is_scaled() -> None:
    lost = m.flushed_to_zero([2.0**-12, 1.0, 2.0**16], n_embd=64, tokens=512)
    assert lost[0] > 0.5 > lost[1] > lost[2] == 0


def test_only_means_weighted_by_targets_give_the_gradient_of_the_whole() -> None:
    found = m.uneven_parts()
    assert found["sums"] < 1e-5 and found["means"] > 0.1


@pytest.mark.parametrize("note", sorted(NOTES.glob("*.md")), ids=lambda note: note.stem)
def test_every_note_names_its_code_an_ablation_and_a_small_figure(note: Path) -> None:
    text = note.read_text(encoding="utf-8")
    assert re.search(r"\| code \| .*\.\./\.\./gpt2lab/", text)
    ablations = re.findall(r"\(\.\./\.\./(ablations/\w+\.yaml)\)", text)
    assert ablations and all((ROOT / file).exists() for file in ablations)
    figures = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", text)
    assert figures and all((NOTES / figure).stat().st_size < 60_000 for figure in figures)
    script = (NOTES / "figures.py").read_text(encoding="utf-8")
    assert all(f"def {Path(figure).stem}()" in script for figure in figures)


@pytest.mark.slow
def test_the_script_draws_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = loaded("figures")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    figures.main([])
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in NOTES.glob("*.png")}
