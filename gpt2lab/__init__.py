"""gpt2lab: ablations of GPT-2 with verdicts one can trust.

    import gpt2lab as g
    config = g.load_config("gpt2-124m", ["model.position=rotary"])
    model = g.build_model(config.model)
    logits = model(tokens)                       # (B, T) int64 -> (B, T, V)
    verdicts = g.compare(g.load_results("posenc"), baseline="learned", smallest_effect=0.05)

Names are imported when they are first used, so that what needs no torch does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.analysis import compare
    from gpt2lab.config import load_config
    from gpt2lab.evaluation import Task, choose, complete, fill, metric, task, written
    from gpt2lab.model import GPT, ModelConfig, build_model
    from gpt2lab.pretrained import load_gpt2, load_model, save_gpt2, save_model
    from gpt2lab.results import load_results, tokens_to

__version__ = "0.1.0"
_HOME = {
    "GPT": "gpt2lab.model",
    "ModelConfig": "gpt2lab.model",
    "Task": "gpt2lab.evaluation",
    "build_model": "gpt2lab.model",
    "choose": "gpt2lab.evaluation",
    "compare": "gpt2lab.analysis",
    "complete": "gpt2lab.evaluation",
    "fill": "gpt2lab.evaluation",
    "load_config": "gpt2lab.config",
    "load_gpt2": "gpt2lab.pretrained",
    "load_model": "gpt2lab.pretrained",
    "load_results": "gpt2lab.results",
    "metric": "gpt2lab.evaluation",
    "save_gpt2": "gpt2lab.pretrained",
    "save_model": "gpt2lab.pretrained",
    "task": "gpt2lab.evaluation",
    "tokens_to": "gpt2lab.results",
    "written": "gpt2lab.evaluation",
}
__all__ = [
    "GPT",
    "ModelConfig",
    "Task",
    "build_model",
    "choose",
    "compare",
    "complete",
    "fill",
    "load_config",
    "load_gpt2",
    "load_model",
    "load_results",
    "metric",
    "save_gpt2",
    "save_model",
    "task",
    "tokens_to",
    "written",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2lab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
