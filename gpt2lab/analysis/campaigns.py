"""Campaigns: every hypothesis that was declared in a line of research, in order, with what came of it.

A campaign is named by `campaign: NAME` in ablation files or the project file; without a name it is the whole store. The
ledger (store/ledger.py) has a line when a study is declared and one for its verdicts. A declared contrast gets the next
number of its campaign, and with it its level in the control of false discoveries (analysis/online.py). A contrast of
arms that were declared before keeps its number while it shares seeds with that declaration; on fresh seeds it is
another test. Screens are listed without a number, since they claim nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.alternatives import claim
from gpt2lab.analysis.online import levels
from gpt2lab.analysis.verdicts import Contrast, Declared, as_json
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import plural
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.records import Effect, StudyRecord, run_ids
from gpt2lab.store import Store
from gpt2lab.store.files import sha256, to_json
from gpt2lab.store.ledger import DECLARED, VERDICT, Ledger, Line, append, read_ledger


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One contrast of the ledger, as its latest declaration and verdict have it."""

    number: int | None
    """within its campaign; None for a screen"""
    level: float | None
    """p up to which the campaign supports a claim; fixed when it was declared"""
    campaign: str
    study: str
    declaration: str
    """hash of the declaration"""
    declared: str
    """when it was first declared"""
    line: int
    """of its first declaration"""
    arm: str
    against: str
    seeds: tuple[int, ...]
    luck: float
    """probability of a false "better", at most, by its study's own level"""
    word: str | None = None
    """None while there is no verdict"""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """of the test that decided, on the scale of its study's alpha where looks share that"""
    supported: bool | None = None
    """whether the campaign's level supports the claim; None where nothing is claimed"""

    @property
    def claim(self) -> str:
        """better, worse, or "" where no difference is claimed."""
        return claim(self.word or "")


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A campaign as far as a ledger has it: its hypotheses in order, and the seconds that its runs have trained."""

    name: str
    hypotheses: Sequence[Hypothesis]
    seconds: float

    @property
    def tried(self) -> list[Hypothesis]:
        """Those that are no screens."""
        return [hypothesis for hypothesis in self.hypotheses if hypothesis.number is not None]

    def count(self, claim: str) -> int:
        """Hypotheses called better, or worse."""
        return sum(hypothesis.claim == claim for hypothesis in self.tried)

    @property
    def luck(self) -> float:
        """How many would be called better by luck, at most, if none had an effect."""
        return sum(hypothesis.luck for hypothesis in self.tried if hypothesis.word)

    @property
    def label(self) -> str:
        """`the campaign rope`, or `this store`."""
        return f"the campaign {self.name}" if self.name else "this store"

    def sentences(self, places: str = "") -> list[str]:
        """What was tried, what came out, and what that is worth. places: begins them, as `Hypothesis 3 of the `."""
        judged = [hypothesis for hypothesis in self.tried if hypothesis.word]
        screened, open_ = len(self.hypotheses) - len(self.tried), len(self.tried) - len(judged)
        count = len(self.tried)
        tried = f"{places}{count if places else hypotheses(count)} tried in {self.label}"
        tried += f", and {screened} only screened" if screened else ""
        tried += f", {open_} without a verdict yet" if open_ else ""
        counts = f"{self.count('better')} called better and {self.count('worse')} worse"
        chance = f"; if none had an effect, at most {self.luck:.2g} of each would be expected by chance"
        sentences = [f"{tried}: {'of all, ' if places else ''}{counts}{chance if judged else ''}."]
        if claimed := [hypothesis for hypothesis in judged if hypothesis.claim]:
            supported = sum(bool(hypothesis.supported) for hypothesis in claimed)
            hold = "holds" if supported == 1 else "hold"
            sentences.append(
                f"Of the {len(claimed)} called better or worse, {supported} still {hold} when all that was tried is "
                "taken into account; of those that do, at most 5 % are expected to be false."
            )
        return sentences


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a study stands: its own hypotheses, and the campaign up to its latest line. `problems`: of the ledger."""

    own: Sequence[Hypothesis]
    campaign: Campaign
    problems: Sequence[str] = ()

    @property
    def alone(self) -> bool:
        """Whether nothing but this study was tried so far, so that its own family is all that there is to correct."""
        return len(self.campaign.tried) <= sum(hypothesis.number is not None for hypothesis in self.own)

    def unsupported(self, contrast: Contrast) -> str:
        """What the campaign says against a claim of the study; "" where nothing."""
        if self.alone:
            return ""
        named = (contrast.arm, contrast.against)
        hypothesis = next((h for h in self.own if (h.arm, h.against) == named), None)
        if hypothesis is None or hypothesis.supported is not False or hypothesis.p is None or hypothesis.level is None:
            return ""
        return f"not supported over {self.campaign.label}: p {hypothesis.p:.2g}, its level {hypothesis.level:.2g}"

    def sentences(self) -> list[str]:
        """Which of the campaign's hypotheses these are, and what became of all so far."""
        numbers = sorted(hypothesis.number for hypothesis in self.own if hypothesis.number is not None)
        if not numbers or len(self.campaign.tried) == 1:
            return self.campaign.sentences()
        row = numbers[-1] - numbers[0] == len(numbers) - 1 > 1
        places = " to ".join(map(str, numbers[:: len(numbers) - 1])) if row else listed(map(str, numbers))
        return self.campaign.sentences(f"Hypothes{'is' if len(numbers) == 1 else 'es'} {places} of the ")


def hypotheses(count: int) -> str:
    """`1 hypothesis`, `3 hypotheses`."""
    return f"{count} hypothes{'is' if count == 1 else 'es'}"


def declare(record: StudyRecord, store: Store) -> tuple[StudyRecord, Sequence[str]]:
    """Write the declaration of a study into the ledger, unless it is there; -> the record, which names its line, and
    what is wrong with the ledger. Studies without contrasts have none. Raises EnvironmentFault, DataFault."""
    if not record.contrasts:
        return record, ()
    found: list[Ledger] = []

    def make(ledger: Ledger) -> Line | None:
        found.append(ledger)
        latest = _latest(ledger, DECLARED, {"campaign": record.campaign, "study": _named(record)["study"]})
        return None if latest and latest["declaration"] == record.hash else _declaration(record, ledger)

    line = append(store.root, make) or _line_of(record, found[-1])
    assert line is not None
    return record.with_(ledger=line["hash"]), found[-1].problems


def conclude(record: StudyRecord, verdicts: Verdicts, store: Store) -> None:
    """Write the verdicts of a declared study into the ledger, unless the latest line of it says the same."""

    def make(ledger: Ledger) -> Line | None:
        declared = _line_of(record, ledger)
        if declared is None:
            return None
        seconds = _seconds(record, store)
        judged = {(contrast.arm, contrast.against): contrast for contrast in verdicts.contrasts}
        pairs = [(entry, judged.get((entry["arm"], entry["against"]))) for entry in declared["contrasts"]]
        contrasts = [_verdict(entry, contrast, verdicts.alpha) for entry, contrast in pairs if contrast]
        line = {"kind": VERDICT, **_named(record), "contrasts": as_json(contrasts), "runs": seconds}
        before = _latest(ledger, VERDICT, _named(record))
        return None if before and line.items() <= before.items() else line

    append(store.root, make)


def _line_of(record: StudyRecord, ledger: Ledger) -> Line | None:
    """The line of a record's declaration, None where there is none."""
    return _latest(ledger, DECLARED, _named(record))


def _latest(ledger: Ledger, kind: str, named: Mapping[str, str]) -> Line | None:
    """The last line of a kind that has all of `named`."""
    lines = (line for line in reversed(ledger.lines) if line["kind"] == kind and named.items() <= line.items())
    return next(lines, None)


def _named(record: StudyRecord) -> dict[str, str]:
    """What all lines of a declaration have in common."""
    study = f"{record.ablation}@{record.scale}"  # the name of an earlier declaration has a number
    return {"campaign": record.campaign, "study": study, "declaration": record.hash}


def _declaration(record: StudyRecord, ledger: Ledger) -> Line:
    contrasts = [_entry(record, contrast) for contrast in record.contrasts]
    campaign = [line for line in ledger.lines if line["campaign"] == record.campaign]
    numbered = [(entry, line) for line in campaign if line["kind"] == DECLARED for entry in line["contrasts"]
                if entry["hypothesis"] is not None]  # fmt: skip
    new = []
    for entry in contrasts if not record.screen else ():
        same = [e for e, line in numbered if e["key"] == entry["key"] and set(line["seeds"]) & set(record.seeds)]
        if same:
            entry |= {key: same[-1][key] for key in ("hypothesis", "level")}
        else:
            new.append(entry)
    first = 1 + max((entry["hypothesis"] for entry, _ in numbered), default=0)
    for place, level in enumerate(levels(first, len(new), *_discoveries(campaign))):
        new[place] |= {"hypothesis": first + place, "level": float(level)}
    return {
        "kind": DECLARED, **_named(record), "question": record.question, "seeds": list(record.seeds),
        "alpha": record.alpha, "screen": record.screen, "contrasts": contrasts,
    }  # fmt: skip


def _entry(record: StudyRecord, contrast: list[str] | Effect) -> dict[str, Any]:
    """A contrast with a key that is the same wherever the same settings are compared by the same metric."""
    declared = contrast if isinstance(contrast, Effect) else Declared.pair(*contrast)
    weights = declared.weights.items()
    sides = sorted((record.arms[name].settings or f"{record.name} {name}", weight) for name, weight in weights)
    alike = [(settings, weight / sides[0][1]) for settings, weight in sides]  # the same either way round
    key = sha256(to_json([record.metric, record.evaluation.key, record.scope.data, alike]).encode())[:16]
    return {"arm": declared.arm, "against": declared.against, "key": key, "hypothesis": None, "level": None}


def _discoveries(campaign: Iterable[Line]) -> tuple[list[int], list[int]]:
    """(number of the last hypothesis that was declared then, discoveries) for each line that had new ones."""
    last, discovered = 0, set[int]()
    known, discoveries = list[int](), list[int]()
    for line in campaign:
        numbers = [entry["hypothesis"] for entry in line["contrasts"] if entry["hypothesis"] is not None]
        if line["kind"] == DECLARED:
            last = max([last, *numbers])
            continue
        new = {entry["hypothesis"] for entry in line["contrasts"] if entry.get("supported")} - discovered
        discovered |= new
        if new:
            known.append(last)
            discoveries.append(len(new))
    return known, discoveries


def _verdict(entry: Mapping[str, Any], contrast: Contrast, alpha: float) -> dict[str, Any]:
    """What came of a declared contrast."""
    p = min(1.0, contrast.p * alpha / contrast.alpha) if math.isfinite(contrast.p) else None
    judged = claim(contrast.word) and entry["level"] is not None
    supported = bool(p is not None and p <= entry["level"]) if judged else None
    named = {key: entry[key] for key in ("arm", "against", "key", "hypothesis", "level")}
    numbers = {key: getattr(contrast, key) for key in ("word", "difference", "low", "high")}
    return {**named, **numbers, "p": p, "n": [contrast.n_arm, contrast.n_against], "supported": supported}


def _seconds(record: StudyRecord, store: Store) -> dict[str, float]:
    """Run id -> seconds of training, of every run of a study and of the searches that it rests on."""
    ids = run_ids(record)
    for sweep in {arm.tuned.sweep for arm in record.arms.values() if arm.tuned}:
        try:
            ids += run_ids(store.sweep(sweep))
        except (ConfigError, DataFault):  # without a record of the search, its cost is not known
            continue
    return {run: seconds for run in dict.fromkeys(ids) if (seconds := trained_seconds(store, run))}


def trained_seconds(store: Store, run: str) -> float:
    """Seconds that a run has trained so far, 0 where none are known."""
    try:
        rows = store.run(run).rows()
    except DataFault:
        return 0.0
    return round(float(rows[-1].get("seconds") or 0.0), 1) if rows else 0.0


def campaign_of(ledger: Ledger, name: str, last: int | None = None) -> Campaign:
    """A campaign as the ledger has it, up to line number `last`; "" for studies that name none."""
    lines = [line for line in ledger.lines if line["campaign"] == name and line["number"] <= (last or math.inf)]
    found: dict[Any, Hypothesis] = {}
    runs: dict[str, float] = {}
    for line in lines:
        declared = line["kind"] == DECLARED
        for entry in line["contrasts"]:
            screen = (line["study"], line["declaration"], entry["key"])
            key = screen if entry["hypothesis"] is None else entry["hypothesis"]
            if declared:
                before = found.get(key)
                found[key] = Hypothesis(
                    number=entry["hypothesis"], level=entry["level"], campaign=line["campaign"], study=line["study"],
                    declaration=line["declaration"], declared=before.declared if before else line["at"],
                    line=before.line if before else line["number"], arm=entry["arm"], against=entry["against"],
                    seeds=tuple(line["seeds"]), luck=line["alpha"] / 2 / len(line["contrasts"]),
                )  # fmt: skip
            elif key in found and found[key].declaration == line["declaration"]:
                new = {name: entry[name] for name in ("word", "difference", "low", "high", "p", "supported")}
                found[key] = replace(found[key], **new)
        runs |= {} if declared else line.get("runs", {})
    return Campaign(name=name, hypotheses=list(found.values()), seconds=sum(runs.values()))


def standing_of(record: StudyRecord, store: Store) -> Standing | None:
    """Where a study stands in its campaign; None where the ledger does not have it."""
    ledger = read_ledger(store.root)
    declared = _line_of(record, ledger)
    if declared is None and not record.ledger:  # of an older version
        return None
    if declared is None:
        lost = f"the line of {record.name}'s declaration is missing or was changed"
        return Standing(own=(), campaign=campaign_of(ledger, record.campaign), problems=[lost, *ledger.problems])
    named = _named(record)
    last = max(line["number"] for line in ledger.lines if named.items() <= line.items())
    campaign = campaign_of(ledger, record.campaign, last)
    hypotheses = [h for h in campaign.hypotheses if (h.study, h.declaration) == (named["study"], record.hash)]
    return Standing(own=hypotheses, campaign=campaign, problems=ledger.problems)


def tests_of(record: StudyRecord) -> list[str]:
    """A name for each test that a study declares: what is compared, and its first seed."""
    return [f"{_entry(record, contrast)['key']}:{min(record.seeds)}" for contrast in record.contrasts]


def tests_so_far(store: Store, campaign: str) -> set[str]:
    """The tests that a campaign has declared, named likewise; screens among them."""
    lines = [line for line in read_ledger(store.root).lines if (line["kind"], line["campaign"]) == (DECLARED, campaign)]
    return {f"{entry['key']}:{min(line['seeds'])}" for line in lines for entry in line["contrasts"]}


def new_hypotheses(record: StudyRecord, store: Store) -> list[int]:
    """The numbers that the contrasts of a declaration would take in its campaign; nothing where it was declared."""
    ledger = read_ledger(store.root)
    campaign = [line for line in ledger.lines if (line["kind"], line["campaign"]) == (DECLARED, record.campaign)]
    before = {entry["hypothesis"] for line in campaign for entry in line["contrasts"]} | {None}
    numbers = [entry["hypothesis"] for entry in _declaration(record, ledger)["contrasts"]]
    return [number for number in numbers if number not in before]


def counted(record: StudyRecord, numbers: Sequence[int]) -> str:
    """A sentence on new hypotheses; "" where there is none."""
    if not numbers:
        return ""
    count = f"{plural(len(numbers), 'contrast')} count{'s' if len(numbers) == 1 else ''}"
    as_new = "as a new hypothesis" if len(numbers) == 1 else "as new hypotheses"
    which = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else listed(map(str, numbers))
    label = Campaign(name=record.campaign, hypotheses=(), seconds=0.0).label
    return f"{count} {as_new} of {label} ({which}); the same declaration again does not count"


def campaigns_of(store: Store) -> dict[str, Campaign]:
    """Every campaign of a store by name, in the order in which they began; "" for studies that name none."""
    ledger = read_ledger(store.root)
    return {name: campaign_of(ledger, name) for name in dict.fromkeys(line["campaign"] for line in ledger.lines)}


def registration(record: StudyRecord, store: Store) -> dict[str, str]:
    """What to publish of a declaration: `line`, and its parts. Raises ConfigError for a study that is not
    in the ledger."""
    ledger = read_ledger(store.root)
    declared = _line_of(record, ledger)
    if declared is None:
        hint = record.reproduce if record.contrasts else "a study that compares something"
        raise ConfigError("is not in the ledger", where=record.name, hint=hint)
    parts = {key: str(declared[key]) for key in ("study", "declaration", "at")}
    head = f"{declared['number']}:{declared['hash']}"
    line = f"gpt2lab {parts['study']} declared {parts['at']} as {parts['declaration']}, ledger {head}"
    return {"line": line, **parts, "head": head}


def problems_of(store: Store) -> list[str]:
    """What is wrong with the ledger of a store: lines that were changed or are missing, and studies whose declaration
    is not in it any more."""
    ledger = read_ledger(store.root)
    known = {line["hash"] for line in ledger.lines}
    problems = list(ledger.problems)
    for name in (*store.earlier(), *store.studies()):
        try:
            record = store.study(name)
        except DataFault:  # other commands name it
            continue
        if record.ledger and record.ledger not in known:
            problems.append(f"the line of {name}'s declaration is missing or was changed")
    return problems
