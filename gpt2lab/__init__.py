"""gpt2lab: ablations of GPT-2 with verdicts one can trust.

    import gpt2lab as g
    study = g.run_ablation("ablations/posenc.yaml", scale="nano")     # what `gpt2lab run` does, silently
    for contrast in study.verdicts.contrasts:
        print(contrast.verdict)

    config = g.load_config("gpt2-124m", ["model.position=rotary"])
    model = g.build_model(config.model)
    logits = model(tokens)                                             # (B, T) int64 -> (B, T, V)

    verdicts = g.compare(table, baseline="learned", smallest_effect=0.05)

Names are imported at their first use, because torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.analysis import compare
    from gpt2lab.analysis.results import load_results, tokens_to
    from gpt2lab.api import (
        RunResult,
        StudyResult,
        SweepResult,
        describe_machine,
        difference,
        load_model,
        load_study,
        plan,
        report,
        run_ablation,
        run_sweep,
        studies,
        train,
    )
    from gpt2lab.basics.progress import Event, Message, Progress, show_progress
    from gpt2lab.config import load_config
    from gpt2lab.evaluation.metrics import metric
    from gpt2lab.evaluation.tasks import Task, choose, complete, fill, task, written
    from gpt2lab.model import GPT, ModelConfig, build_model
    from gpt2lab.planning.ablation import scales_of
    from gpt2lab.pretrained.huggingface import load_gpt2, save_gpt2
    from gpt2lab.pretrained.native import save_model
    from gpt2lab.training.diagnostics import Diagnostic, diagnostic

__version__ = "0.1.0"
_MODULES = {
    "gpt2lab.analysis": ("compare",),
    "gpt2lab.api": (
        "RunResult",
        "StudyResult",
        "SweepResult",
        "describe_machine",
        "difference",
        "load_model",
        "load_study",
        "plan",
        "report",
        "run_ablation",
        "run_sweep",
        "studies",
        "train",
    ),
    "gpt2lab.config": ("load_config",),
    "gpt2lab.evaluation.metrics": ("metric",),
    "gpt2lab.evaluation.tasks": ("Task", "choose", "complete", "fill", "task", "written"),
    "gpt2lab.basics.progress": ("Event", "Message", "Progress", "show_progress"),
    "gpt2lab.model": ("GPT", "ModelConfig", "build_model"),
    "gpt2lab.planning.ablation": ("scales_of",),
    "gpt2lab.pretrained.huggingface": ("load_gpt2", "save_gpt2"),
    "gpt2lab.pretrained.native": ("save_model",),
    "gpt2lab.analysis.results": ("load_results", "tokens_to"),
    "gpt2lab.training.diagnostics": ("Diagnostic", "diagnostic"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "GPT",
    "Diagnostic",
    "Event",
    "Message",
    "ModelConfig",
    "Progress",
    "RunResult",
    "StudyResult",
    "SweepResult",
    "Task",
    "build_model",
    "choose",
    "compare",
    "complete",
    "describe_machine",
    "diagnostic",
    "difference",
    "fill",
    "load_config",
    "load_gpt2",
    "load_model",
    "load_results",
    "load_study",
    "metric",
    "plan",
    "report",
    "run_ablation",
    "run_sweep",
    "save_gpt2",
    "save_model",
    "scales_of",
    "show_progress",
    "studies",
    "task",
    "tokens_to",
    "train",
    "written",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2lab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
