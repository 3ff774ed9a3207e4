"""What fits by itself and not together: found in the config, before data or model is built, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gpt2lab.components.base import Dims
from gpt2lab.data.tokenizers import GPT2_SIZE
from gpt2lab.errors import Problem
from gpt2lab.reading.fitting import Complaint
from gpt2lab.reading.source import Key
from gpt2lab.registry import SLOTS, Choice, unmet_needs

if TYPE_CHECKING:
    from gpt2lab.config import Config


def clashes(config: Config) -> list[Complaint]:
    """Every combination in `config` that cannot work, with the keys involved."""
    return [*_sizes(config), *_patterns(config), *_limits(config), *_needs(config), *_lengths(config)]


def vocabulary(choice: Choice) -> int | None:
    """How many ids a tokenizer has, as far as its choice tells."""
    known = {"bytes": 256, "gpt2": GPT2_SIZE}
    size = choice.options.get("vocab_size")
    return known.get(choice.name, size if isinstance(size, int) else None)


def separator(choice: Choice) -> int | None:
    """The id with which a tokenizer ends documents, as far as its choice tells: the last of all."""
    size = vocabulary(choice)
    return None if size is None or choice.name == "bytes" else size - 1


def _sizes(config: Config) -> Iterator[Complaint]:
    model, tokenizer = config.model, config.data.tokenizer
    if model.n_embd % model.n_head:
        yield _complaint(f"n_embd {model.n_embd} is no multiple of n_head {model.n_head}", "model.n_embd model.n_head")
    size = vocabulary(tokenizer)
    if size is not None and size > model.vocab_size:
        what = f"tokenizer {tokenizer} has {size} ids and the model rows for {model.vocab_size}: write {size} or more"
        yield _complaint(what, "model.vocab_size data.tokenizer")
    for choice in dict.fromkeys(model.mask):
        asked = choice.options.get("separator")
        if size is not None and asked is not None and asked != separator(tokenizer):
            ends = f"ends them with {separator(tokenizer)}" if separator(tokenizer) is not None else "has no separator"
            what = f"mask {choice} tells documents apart by token {asked}, and tokenizer {tokenizer} {ends}"
            yield _complaint(what, "model.mask data.tokenizer")


def _patterns(config: Config) -> Iterator[Complaint]:
    """Per-layer patterns must fill the layers; lists of parts have their own rules."""
    model = config.model
    for slot, choices in model.choices().items():
        path = SLOTS[slot].path
        if SLOTS[slot].arity == "per_layer" and not choices:
            yield _complaint(f"an empty list: write at least one {slot}", path)
        elif SLOTS[slot].arity == "per_layer" and model.n_layer % len(choices):
            what = f"a pattern of {len(choices)} does not fill {model.n_layer} layers evenly (model.n_layer)"
            yield _complaint(what, f"{path} model.n_layer")
    if not model.objective:
        yield _complaint("an empty list: there is nothing to train for", "model.objective")
    tables = ["table" in SLOTS["embedding"][part.name].can for part in model.embedding]
    if not tables or not tables[0] or any(tables[1:]):
        able = ", ".join(c.name for c in SLOTS["embedding"] if "table" in c.can)
        yield _complaint(f"its first part, and no other, must look tokens up in a table ({able})", "model.embedding")


def _limits(config: Config) -> Iterator[Complaint]:
    """What the chosen components themselves say about these sizes."""
    for section in (config.model, config.data, config.optim):
        around = tuple(f"model.{size}" for size in Dims.model_fields) if section is config.model else ()
        for choice in dict.fromkeys(_choices(section)):
            test = SLOTS[choice.slot][choice.name].check
            for what in test(section, choice.options) if test else []:
                yield _complaint(what, " ".join([SLOTS[choice.slot].path, *around]))


def _needs(config: Config) -> Iterator[Complaint]:
    """Components that need what a neighbour lacks."""
    choices = [choice for section in (config.model, config.data, config.optim) for choice in _choices(section)]
    for path, what in unmet_needs(choices):
        needed = (SLOTS[slot].path for c in choices for slot in SLOTS[c.slot][c.name].needs if c.slot == _slot(path))
        yield _complaint(what, " ".join(dict.fromkeys([path, *needed])))


def _lengths(config: Config) -> Iterator[Complaint]:
    """Steps, batches and contexts."""
    training, evaluation, block_size = config.training, config.evaluation, config.model.block_size
    yield from _told(training.problems(block_size), "model.block_size")
    yield from _told(config.optim.problems(training.steps), "training.steps")
    if config.branch and config.first_step >= training.steps:
        what = f"it starts from step {config.first_step} and ends at step {training.steps}: nothing is left to train"
        yield _complaint(what, "training.steps branch")
    yield from _told(evaluation.problems(block_size), "evaluation.contexts model.block_size")
    if evaluation.tokens < block_size:
        what = f"{evaluation.tokens} are too few: the context has {block_size} (model.block_size)"
        yield _complaint(what, "evaluation.tokens model.block_size")
    sequences, micro = training.batch_tokens // block_size, training.micro_batch_sequences
    if micro is not None and sequences and sequences % micro:
        what = f"a step has {sequences} sequences (batch_tokens / block_size), which is no multiple of {micro}"
        yield _complaint(what, "training.micro_batch_sequences training.batch_tokens model.block_size")


def _told(problems: Iterable[Problem], others: str) -> Iterator[Complaint]:
    """What a section says about itself and a neighbour's value."""
    for problem in problems:
        yield _complaint(problem.what, f"{problem.where} {others}")


def _choices(section: Any) -> Iterator[Choice]:
    """Every component chosen in a section."""
    for _, value in section:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Choice):
                yield item


def _slot(path: str) -> str:
    return path.rpartition(".")[2]


def _complaint(what: str, keys: str) -> Complaint:
    return Complaint(what, tuple(_key(key) for key in keys.split()))


def _key(key: str) -> Key:
    return tuple(key.split("."))
