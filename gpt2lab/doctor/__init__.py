"""Is this training sound? A finished or running run is examined: what its journal says, what its first steps do when
they are done again, and what its model does under probes.

A check asks what a sound training shows, never what a component is called. Layer: beside `trained`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.doctor import journal, probes, steps
from gpt2lab.doctor.findings import Finding, NotExamined, Severity
from gpt2lab.doctor.patient import Patient
from gpt2lab.store import RunFolder

__all__ = ["CHECKS", "Examination", "Finding", "NotExamined", "Patient", "Severity", "examine"]

Check = Callable[[Patient], Finding | None]
CHECKS: tuple[Check, ...] = (
    journal.diverged,
    journal.loss_at_start,
    journal.impossible_loss,
    journal.learned_nothing,
    journal.train_gap,
    journal.learning_rate,
    journal.update_ratio,
    steps.gradient,
    probes.causality,
    probes.softmax_rows,
    probes.attention_scale,
    probes.targets,
    probes.tie,
    probes.decay,
    probes.residual_scaling,
)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found of one run. `sound`: checks that found nothing. `unknown`: check -> why it could not say."""

    run: str
    status: str
    step: int
    findings: Sequence[Finding]
    sound: Sequence[str]
    unknown: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": self.run,
            "status": self.status,
            "step": self.step,
            "findings": [finding.to_json() for finding in self.findings],
            "sound": list(self.sound),
            "unknown": dict(self.unknown),
        }


def examine(run: RunFolder, *, progress: Callable[[str], None] | None = None) -> Examination:
    """Put every check to a run; what its components' plug-ins register must be there.

    Raises ConfigError when there is no such run, DataFault when what it wrote is damaged.
    """
    patient = Patient.admit(run)
    findings, sound, unknown = [], [], {}
    for check in CHECKS:
        if progress:
            progress(check.__name__)
        try:
            finding = check(patient)
        except NotExamined as reason:
            unknown[check.__name__] = str(reason)
            continue
        if finding is None:
            sound.append(check.__name__)
        else:
            findings.append(finding)
    return Examination(
        run=run.id, status=run.status(), step=patient.step, findings=findings, sound=sound, unknown=unknown
    )
