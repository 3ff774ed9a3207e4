"""Where a study stands in its campaign: which of its hypotheses these are, and which claims hold over all of it."""

from __future__ import annotations

from gpt2lab.analysis.campaigns import Hypothesis
from gpt2lab.basics.text import DASH, plural, time_taken
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.tables import Cell, tabulate

NOTE = (
    "Every declared contrast gets the next level of its campaign, which falls with every attempt and rises with every "
    "supported claim (LORD++). p is that of the contrast alone. The verdicts above are those of this study alone and "
    "do not change."
)


@section(order=14, title="In its campaign")
def campaign(read: StudyRead) -> Section | None:
    standing = read.standing
    if standing is None:
        return None
    damaged = [f"The ledger of this store is damaged, so none of this can be trusted: {problem}."
               for problem in standing.problems[:1]]  # fmt: skip
    sentences = " ".join(standing.sentences())
    spent = f"{time_taken(standing.campaign.seconds)} of training so far."
    table = tabulate([hypothesis for hypothesis in standing.own if hypothesis.number is not None], _cells)
    counts = {claim: standing.campaign.count(claim) for claim in ("better", "worse")}
    data = {
        "name": standing.campaign.name, "tried": len(standing.campaign.tried), **counts, "luck": standing.campaign.luck,
        "hypotheses": [
            {key: getattr(hypothesis, key) for key in ("number", "arm", "against", "level", "p", "supported")}
            for hypothesis in standing.own
        ],
    }  # fmt: skip
    return Section(lead=[*damaged, f"{sentences} {spent}"], table=table, note=NOTE, data={"campaign": data})


def _cells(hypothesis: Hypothesis) -> dict[str, Cell | str | None]:
    supported = {
        True: Cell("supported", chip="better"),
        False: Cell("not supported", chip="tentative"),
        None: Cell(DASH),
    }
    return {
        "Hypothesis:number": f"{hypothesis.number}",
        "Contrast": Cell(hypothesis.arm, f"against {hypothesis.against}; {plural(len(hypothesis.seeds), 'seed')}"),
        "p:number": DASH if hypothesis.p is None else f"{hypothesis.p:.2g}",
        "Level:number": DASH if hypothesis.level is None else f"{hypothesis.level:.2g}",
        "Over the campaign": supported[hypothesis.supported],
    }
