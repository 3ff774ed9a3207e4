"""Is this training sound? A finished or running run is examined: what its journal says, what its first steps do when
they are done again, and what its model does under probes. Layer: beside `trained`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.doctor.checks import CHECKS
from gpt2lab.doctor.run import ExaminedRun, Finding, NotExamined
from gpt2lab.store import RunFolder

__all__ = ["CHECKS", "Examination", "ExaminedRun", "Finding", "NotExamined", "examine"]


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
        return {**vars(self), "findings": [finding.to_json() for finding in self.findings]}


def examine(folder: RunFolder, *, progress: Callable[[str], None] | None = None) -> Examination:
    """Put every check to a run; what its components' plug-ins register must be there.

    Raises ConfigError when there is no such run, DataFault when what it wrote is damaged.
    """
    run = ExaminedRun.load(folder)
    findings, sound, unknown = [], [], {}
    for check in CHECKS:
        if progress:
            progress(check.__name__)
        try:
            finding = check(run)
        except NotExamined as reason:
            unknown[check.__name__] = str(reason)
            continue
        if finding is None:
            sound.append(check.__name__)
        else:
            findings.append(finding)
    return Examination(
        run=folder.id, status=folder.status(), step=run.step, findings=findings, sound=sound, unknown=unknown
    )
