"""A trained model in MLflow's own format: whoever loads it there gets text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_study import Lab, Look

from gpt2lab.generation import Sampling
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained.native import save_model
from gpt2lab.reuse import load as trained
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


def test_what_is_loaded_by_mlflow_writes_what_the_model_writes(
    lab: Lab, sink_factory: Callable[[], MlflowTracker], look: Look, tmp_path: Path
) -> None:
    import mlflow

    torch.manual_seed(0)
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=256))
    weights = save_model(model, tmp_path / "weights", tokenizer="bytes")
    sink = sink_factory()
    copy = sink.open_run(lab.record, sink.open_study(lab.record), "learned", "0", lab.train(lab.run()))
    address = sink.log_model(copy, weights, trained.__name__, {"max_new_tokens": 100, "temperature": 1.0, "seed": 0})
    (kept,) = look.client.search_logged_models([look.experiment])
    assert (kept.source_run_id, kept.status, kept.model_uri) == (copy.id, "READY", address)
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(sink.uri)
        loaded = mlflow.pyfunc.load_model(address)
    finally:
        mlflow.set_tracking_uri(before)
    expected = trained.open_trained(str(weights), lab.store).continued(
        ["To be", "x"], Sampling(max_new_tokens=9, seed=4)
    )
    options = {"max_new_tokens": 9, "seed": 4}
    assert loaded.predict(["To be", "x"], params=options) == expected
    assert loaded.predict(pd.DataFrame({"prompt": ["To be", "x"]}), params=options) == expected
    assert loaded.predict(["To be"], params={"max_new_tokens": 9}) != [expected[0]]
