"""Builds one frozen, typed `Config` from YAML and overrides; one error reports everything that is wrong."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, field_validator

from gpt2lab.components.base import Dims
from gpt2lab.config.fitting import Complaint, check, error_of, located
from gpt2lab.config.source import MAX_VALUES, Place, YamlSource, overlay, read_file, read_mapping, read_override
from gpt2lab.data.shards import DataConfig
from gpt2lab.data.tokenizers import GPT2_SIZE
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.evaluation.validation import EvaluationConfig
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig
from gpt2lab.optim.groups import OptimConfig, freeze_problems
from gpt2lab.pretrained.origin import is_weights, origin_of
from gpt2lab.registry import SLOTS, Choice, load_entry_points, load_plugin, unmet_needs
from gpt2lab.schema import Settings, shown
from gpt2lab.training.settings import TrainingConfig

PRESETS = Path(__file__).parents[1] / "presets"
BRANCH = re.compile(r"[0-9a-f]{16}@\d{1,12}")
WEIGHTS = re.compile(r"(.+)#[0-9a-f]{16}")
RUNS = Path("runs")
"""Folder of the runs to branch from, unless a path is given."""
ALIASES = {
    "gpt2": "gpt2-124m",
    "gpt2-small": "gpt2-124m",
    "gpt2-medium": "gpt2-355m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
}


class ScaleConfig(Settings):
    """How results at this scale are interpreted."""

    smallest_effect: float = Field(0.005, gt=0)
    """Smallest difference of interest in validation loss at this scale, in nats."""
    caveat: str | None = None
    """A caveat in every report at this scale; null for none."""


class Config(Settings):
    """Everything about one training; the defaults are the GPT-2 124M recipe."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    seed: int = Field(0, ge=0)
    """Sets initial weights, data order and dropout together."""
    repeat: int = Field(0, ge=0)
    """Number of the repeat, to distinguish repeats with one seed."""
    branch: str | None = None
    """What this training starts from: the checkpoint of a run and step, as 0123456789abcdef@1000, or weights, as their
    path or name with a digest of them behind a #; null starts from scratch."""
    branch_takes: Literal["all", "weights"] = "all"
    """What a branch takes from the checkpoint: all of it, or the weights that fit by name and shape. Those begin at
    step 0 with a new optimizer, beside new values of the others."""

    @field_validator("branch")
    @classmethod
    def _origin(cls, value: str | None) -> str | None:
        if value is not None and not (BRANCH.fullmatch(value) or WEIGHTS.fullmatch(value)):
            raise ValueError("RUN@STEP is expected, such as 0123456789abcdef@1000")
        return value

    @property
    def from_weights(self) -> bool:
        """Whether training starts from weights alone."""
        return self.branch is not None and WEIGHTS.fullmatch(self.branch) is not None

    @property
    def first_step(self) -> int:
        """The step that training starts from."""
        if self.branch is None or self.from_weights or self.branch_takes != "all":
            return 0
        return int(self.branch.partition("@")[2])

    def tree(self) -> dict[str, Any]:
        """Plain mappings, lists and scalars, choices written short; reading it back gives an equal config."""
        return dict(_written(self))

    def to_yaml(self) -> str:
        """`tree` as YAML."""
        return yaml.dump(self.tree(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)

    def over_preset(self, name: str) -> dict[str, Any]:
        """A file's tree for this config: the differences from the shipped preset of that name, or the whole config
        where there is no such preset."""
        if name not in preset_names():
            return self.tree()
        base = load_config(name)
        preset = _by_section(base.tree())
        changed = {key: value for key, value in _by_section(self.tree()).items() if value != preset.get(key)}
        return {"extends": name, **changed} if base.with_changes(changed) == self else self.tree()

    def with_changes(self, changes: Mapping[str, Any], source: str = "change") -> Config:
        """This config with changes by dotted key; `source` names their origin in errors."""
        place = Place(f"{source} ")
        written = [(key, YamlSource(value, {(): place})) for key, value in changes.items()]
        return resolve(overlay(YamlSource(self.tree(), {}), written))


def load_config(name: str | Path, overrides: Sequence[str] = (), *, plugins: Sequence[str | Path] = ()) -> Config:
    """The preset `name`, or the YAML file there, with overrides (`model.n_layer=6`) over it.

    plugins: Python files that register components. Raises ConfigError with everything that is wrong.
    """
    fill_slots(plugins)
    return resolve(overlay(preset_source(name), read_overrides(overrides)))


def config_from_text(text: str, file: str = "config.yaml") -> Config:
    """The config that `Config.to_yaml` wrote. Plug-ins with its components must be loaded before."""
    fill_slots()
    return resolve(read_mapping(text, file, max_values=10 * MAX_VALUES))


def resolve(source: YamlSource) -> Config:
    """A whole tree as a config. Raises one ConfigError with every value and every combination that does not fit."""
    config, complaints = examine(source)
    if config is None or complaints:
        raise error_of(located(source, complaint) for complaint in complaints)
    return config


def examine(source: YamlSource) -> tuple[Config | None, list[Complaint]]:
    """A config and its problems; combinations that involve a value that is itself wrong are not reported."""
    config, complaints = check(Config, source)
    if config is None:
        return None, complaints
    wrong = {key[:2] for complaint in complaints for key in complaint.keys}
    conflicting = [c for c in conflicts(config) if not wrong & set(c.keys)]
    return config, [*complaints, *conflicting]


def fill_slots(plugins: Sequence[str | Path] = ()) -> None:
    """Register the components of installed packages and of plug-in files; ours are registered by the imports above."""
    _load_installed()
    for plugin in plugins:
        load_plugin(plugin)


_load_installed = cache(load_entry_points)  # looking through installed packages takes a while


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def preset_name(name: str | Path) -> str:
    """The name under which results of this preset or file are stored: aliases resolved, files without folder and
    suffix."""
    text = str(name)
    return ALIASES.get(text, text if text in preset_names() else Path(text).stem)


def preset_source(
    name: str | Path, folder: Path | None = None, *, where: str = "", visited: tuple[str, ...] = ()
) -> YamlSource:
    """A preset's or file's tree over those that it extends. A file is looked for in `folder`, if given. where: the
    place of the name, for errors. Raises ConfigError.
    """
    text = str(name)
    preset = ALIASES.get(text, text)
    if preset in preset_names():
        path, file = PRESETS / f"{preset}.yaml", f"gpt2lab/presets/{preset}.yaml"
    elif text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text or os.path.isfile(text):
        path = (folder or Path()) / text
        file = str(path)
    else:
        names = [*preset_names(), *ALIASES]
        hint = "a name from this list, or a file such as ./mine.yaml"
        raise ConfigError(unknown("preset", text, names), where=where, hint=hint)
    identity = str(path.absolute())
    if identity in visited:
        raise ConfigError("extends itself", where=file)
    source = read_file(path)
    if file != str(path):  # name presets independently of the installation path
        places = {key: Place(f"{file}:{place.line}: ", place.line) for key, place in source.places.items()}
        source = YamlSource(source.tree, places, file)
    base = source.tree.pop("extends", None)
    lower = None
    if base is not None:
        where = source.place(("extends",)).prefix + "extends"
        if not isinstance(base, str):
            raise ConfigError("the name of a preset or file is expected", where=where)
        lower = preset_source(base, path.parent, where=where, visited=(*visited, identity))
    if isinstance(source.tree.get("branch"), dict):
        return _branched(source, lower)
    return source if lower is None else overlay(lower, [(key, source.part((key,))) for key in source.tree])


def _branched(source: YamlSource, lower: YamlSource | None) -> YamlSource:
    """`branch: {from: RUN@STEP, take: ..., set: {...}}`: the config of that run, with those changes, then with the
    other keys of the file. RUN is an id in ./runs, or the path of a run's folder.

    `branch: {from: WEIGHTS, ...}`: the model of these weights, all else from `lower`, which the file extends.
    """
    written, place = source.part(("branch",)), source.place(("branch",))
    where = place.prefix + "branch"
    changes = written.tree.get("set") or {}
    if written.tree.keys() - {"from", "take", "set"} or not isinstance(changes, dict):
        raise ConfigError("{from: RUN@STEP, take: all or weights, set: {key: value}} is expected", where=where)
    run, _, step = str(written.tree.get("from", "")).rpartition("@")
    rest = [(key, source.part((key,))) for key in source.tree if key != "branch"]
    changed = [(key, written.part(("set", key))) for key in changes]
    changed += [("branch_takes", written.part(("take",)))] if "take" in written.tree else []
    folder = Path(run) if "/" in run else RUNS / run
    origin, listed = f"{folder.name}@{step}", "gpt2lab runs lists what there is"
    if not BRANCH.fullmatch(origin) and is_weights(str(written.tree.get("from", ""))):
        start = origin_of(str(written.tree["from"]))
        above = {"model": _written(start.model), "branch": start.branch}
        above |= {"data": {"tokenizer": start.tokenizer}} if start.tokenizer else {}
        base = (lower or YamlSource({}, {})).without([("model",)])
        taken = [(key, YamlSource(value, {(): place})) for key, value in above.items()]
        return overlay(base, [*taken, *changed, *rest])
    if not BRANCH.fullmatch(origin):
        raise ConfigError(
            f"{shown(written.tree.get('from', ''))} is not RUN@STEP, such as 0123456789abcdef@1000, nor weights",
            where=f"{where}.from",
            hint=listed,
        )
    if lower is not None:
        raise ConfigError("a branch extends the run that it comes from, and nothing else", where=where)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"there is no run {folder.name} in {folder.parent}", where=f"{where}.from", hint=listed)
    return overlay(read_file(folder / "config.yaml"), [*changed, *rest, ("branch", YamlSource(origin, {(): place}))])


def read_overrides(overrides: Sequence[str]) -> list[tuple[str, YamlSource]]:
    """`key=value` strings as changes. Raises one ConfigError with all that are invalid."""
    changes: list[tuple[str, YamlSource]] = []
    problems: list[Problem] = []
    for index, override in enumerate(overrides):
        try:
            changes.append(read_override(override, index))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return changes


def _by_section(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` -> value; other values under their own key."""
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inner | {key: value for key, value in tree.items() if key not in sections}


def _written(value: Any) -> Any:
    if isinstance(value, Settings):
        return {name: _written(inner) for name, inner in value}
    if isinstance(value, Choice):
        return value.written()
    if isinstance(value, tuple):
        items = [_written(item) for item in value]
        return items[0] if len(items) == 1 and isinstance(value[0], Choice) else items
    return value


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, which our reader rejects."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# --- combinations of settings ---


def conflicts(config: Config) -> list[Complaint]:
    """Every invalid combination of settings in `config` that are valid individually, with the keys involved."""
    complaints = [*_sizes(config), *_patterns(config), *_limits(config), *_needs(config), *_lengths(config)]
    return complaints or list(_frozen(config))


def vocabulary(choice: Choice) -> int | None:
    """Number of ids of a tokenizer, if its choice determines it."""
    sizes = {"bytes": 256, "gpt2": GPT2_SIZE}
    size = choice.options.get("vocab_size")
    return sizes.get(choice.name, size if isinstance(size, int) else None)


def separator(choice: Choice) -> int | None:
    """The id with which a tokenizer ends documents, the last one; None without one, or if the choice does not tell."""
    size = vocabulary(choice)
    return None if size is None or choice.name == "bytes" else size - 1


def _sizes(config: Config) -> Iterator[Complaint]:
    model, tokenizer = config.model, config.data.tokenizer
    if model.n_embd % model.n_head:
        yield _complaint(f"n_embd {model.n_embd} is no multiple of n_head {model.n_head}", "model.n_embd model.n_head")
    size = vocabulary(tokenizer)
    if size is not None and size > model.vocab_size:
        problem = (
            f"tokenizer {tokenizer} has {size} ids and the model rows for {model.vocab_size}: write {size} or more"
        )
        yield _complaint(problem, "model.vocab_size data.tokenizer")
    for choice in dict.fromkeys(model.mask):
        marker = choice.options.get("separator")
        if size is not None and marker is not None and marker != separator(tokenizer):
            ends = f"ends them with {separator(tokenizer)}" if separator(tokenizer) is not None else "has no separator"
            problem = f"mask {choice} tells documents apart by token {marker}, and tokenizer {tokenizer} {ends}"
            yield _complaint(problem, "model.mask data.tokenizer")


def _patterns(config: Config) -> Iterator[Complaint]:
    """Lengths of per-layer patterns, and the rules for lists of parts."""
    model = config.model
    for slot, choices in model.choices().items():
        path = SLOTS[slot].path
        if SLOTS[slot].arity == "per_layer" and not choices:
            yield _complaint(f"an empty list: write at least one {slot}", path)
        elif SLOTS[slot].arity == "per_layer" and model.n_layer % len(choices):
            problem = f"a pattern of {len(choices)} does not fill {model.n_layer} layers evenly (model.n_layer)"
            yield _complaint(problem, f"{path} model.n_layer")
    determined: dict[str, str] = {}
    for part in config.data.batches:
        for word in SLOTS["batches"][part.name].can:
            twin = determined.setdefault(word, part.name)
            if twin is not part.name or config.data.batches.count(part) > 1:
                yield _complaint(f"{twin} and {part.name} both determine the {word} of sequences", "data.batches")
    if not model.objective:
        yield _complaint("an empty list: there is nothing to train for", "model.objective")
    tables = ["table" in SLOTS["embedding"][part.name].can for part in model.embedding]
    if not tables or not tables[0] or any(tables[1:]):
        tables_available = ", ".join(c.name for c in SLOTS["embedding"] if "table" in c.can)
        yield _complaint(
            f"its first part, and no other, must look tokens up in a table ({tables_available})", "model.embedding"
        )


def _limits(config: Config) -> Iterator[Complaint]:
    """The chosen components' own checks of these sizes."""
    for section in (config.model, config.data, config.optim):
        sizes = tuple(f"model.{size}" for size in Dims.model_fields) if section is config.model else ()
        for choice in dict.fromkeys(_choices(section)):
            test = SLOTS[choice.slot][choice.name].check
            for problem in test(section, choice.options) if test else []:
                yield _complaint(problem, " ".join([SLOTS[choice.slot].path, *sizes]))


def _needs(config: Config) -> Iterator[Complaint]:
    """Capabilities that a component needs and another one lacks."""
    choices = [choice for section in (config.model, config.data, config.optim) for choice in _choices(section)]
    for path, problem in unmet_needs(choices):
        components = [SLOTS[c.slot][c.name] for c in choices if c.slot == path.rpartition(".")[2]]
        needed = (SLOTS[slot].path for component in components for slot in component.needs)
        yield _complaint(problem, " ".join(dict.fromkeys([path, *needed])))


def _lengths(config: Config) -> Iterator[Complaint]:
    """Steps, batches and contexts."""
    training, evaluation, block_size = config.training, config.evaluation, config.model.block_size
    yield from _problems(training.problems(block_size), "model.block_size")
    for too_long in config.optim.problems(training.steps):
        tenth = training.steps // 10
        advice = f"; optim.warmup_steps={tenth} {'would be a tenth' if tenth else 'leaves it out'}"
        yield _complaint(too_long.what + advice, f"{too_long.where} training.steps")
    if config.branch and config.first_step >= training.steps:
        problem = f"it starts from step {config.first_step} and ends at step {training.steps}: nothing is left to train"
        yield _complaint(problem, "training.steps branch")
    yield from _problems(evaluation.problems(block_size), "evaluation.contexts model.block_size")
    for key in ("tokens", "curve_tokens"):
        count = getattr(evaluation, key)
        if isinstance(count, int) and count < block_size:
            problem = f"{count} are too few: the context has {block_size} (model.block_size)"
            yield _complaint(problem, f"evaluation.{key} model.block_size")
    sequences, micro = training.batch_tokens // block_size, training.micro_batch_sequences
    if micro is not None and sequences and sequences % micro:
        problem = f"a step has {sequences} sequences (batch_tokens / block_size), which is no multiple of {micro}"
        yield _complaint(problem, "training.micro_batch_sequences training.batch_tokens model.block_size")


def _frozen(config: Config) -> Iterator[Complaint]:
    """Patterns of frozen parameters that fit none, or all."""
    if config.optim.freeze:
        with torch.device("meta"):
            names = [name for name, _ in GPT(config.model).named_parameters()]
        yield from _problems(freeze_problems(config.optim.freeze, names), " ".join(f"model.{s}" for s in MODEL_SLOTS))


def _problems(problems: Iterable[Problem], neighbours: str) -> Iterator[Complaint]:
    """Problems reported by a section about its values and a neighbour's."""
    for problem in problems:
        yield _complaint(problem.what, f"{problem.where} {neighbours}")


def _choices(section: Any) -> Iterator[Choice]:
    """Every component chosen in a section."""
    for _, value in section:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Choice):
                yield item


def _complaint(what: str, keys: str) -> Complaint:
    return Complaint(what, tuple(tuple(key.split(".")) for key in keys.split()))
