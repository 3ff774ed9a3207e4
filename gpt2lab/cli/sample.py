"""The command that lets a model go on with a text: sample."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gpt2lab.cli.run import Json, Plugin, Runs
from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    from gpt2lab.generation import Continuation, Sampling
    from gpt2lab.model import GPT
    from gpt2lab.pretrained.load import Trained
    from gpt2lab.training.precision import Precision

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(sample)


def sample(
    source: Annotated[
        str, typer.Argument(help="A run id or its first digits, a folder, a nanoGPT checkpoint, or a name on the hub.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; empty: start a new one.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Read the prompt from a file, or - from standard input.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Number of samples, generated together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens per sample.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always take the best token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k best tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the smallest set with this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Sample from tokens with this share of the best one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens that occurred become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the samples.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends a sample; may be repeated.")] = None,
    past_end: Annotated[bool, typer.Option("--past-end", help="Continue after the end-of-text token.")] = False,
    window: Annotated[
        bool, typer.Option("--window", help="Beyond the context, drop the older half of the text and continue.")
    ] = False,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, tf32, bf16 or fp16; by default as trained.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)] = None,
    plugin: Plugin = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Generate text with a model. Streams the text; the speed goes to standard error."""
    problems: list[Problem] = []
    text = read_prompt(prompt, prompt_file, problems)
    settings = read_settings(
        problems, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    for option, value, known in (("precision", precision, PRECISIONS), ("device", device, DEVICES)):
        if value is not None and value not in known:
            problems.append(Problem(f"--{option}", unknown(option, value, known)))
    if samples < 1:
        problems.append(Problem("--samples", f"{samples} does not fit: it must be at least 1"))
    if problems:
        raise ConfigError(problems)
    assert settings is not None
    from gpt2lab.config import fill_slots
    from gpt2lab.pretrained.load import open_trained
    from gpt2lab.store import Store
    from gpt2lab.training.precision import choose_device, set_threads

    set_threads(threads)
    place = choose_device(device)  # type: ignore[arg-type]
    fill_slots(plugin or ())
    trained = open_trained(source, Store(runs), device=place)
    say(trained, text, samples, settings, precision, past_end=past_end, window=window, as_json=json_)


def read_prompt(prompt: str | None, file: str | None, problems: list[Problem]) -> str:
    """The prompt's text, from whichever option has it."""
    if prompt is not None and file is not None:
        problems.append(Problem("--prompt-file", "the prompt is in --prompt already"))
    if file is None:
        return prompt or ""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        problems.append(Problem(f"--prompt-file {file}", f"it cannot be read: {error.strerror}"))
    except UnicodeDecodeError as error:
        problems.append(Problem(f"--prompt-file {file}", f"it is not UTF-8: byte {error.start}"))
    return ""


def read_settings(problems: list[Problem], **options: Any) -> Sampling | None:
    """How to sample; what does not fit goes to `problems`."""
    from pydantic import ValidationError

    from gpt2lab.generation import Sampling
    from gpt2lab.schema import reason, shown

    try:
        return Sampling(**options)
    except ValidationError as error:
        for one in error.errors():
            option = "--" + str(one["loc"][0]).replace("_", "-")
            problems.append(Problem(option, f"{shown(one['input'])} does not fit: {reason(one)}"))
        return None


def say(
    trained: Trained, prompt: str, samples: int, settings: Sampling, precision: str | None, *, past_end: bool,
    window: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate and show. Raises ConfigError when prompt, tokenizer or context do not allow it."""
    from gpt2lab.generation import Continuation, Reader, encoded, generate, refuse_unless_it_fits
    from gpt2lab.training.precision import memory_guard, set_arithmetic

    model, tokenizer = trained.model, trained.tokenizer
    if tokenizer is None:
        raise ConfigError("its tokenizer is not known, so it can neither read nor write text", where=trained.name)
    tokens = encoded(prompt, tokenizer)
    if not window:
        refuse_unless_it_fits(model, len(tokens), settings.max_new_tokens)
        warn_past_training(model, len(tokens) + settings.max_new_tokens)
    if tokenizer.separator is not None and not past_end:
        settings = settings.model_copy(update={"stop_tokens": (tokenizer.separator,)})
    place = next(model.parameters()).device
    numbers = usable(precision or trained.precision, place.type)
    set_arithmetic(numbers, place)
    said = [Continuation(tokenizer, settings.stop) for _ in range(samples)]
    screen = None if as_json else Screen(prompt, said, sys.stdout)
    began, count = time.perf_counter(), 0

    def ended(sample: int, token: int) -> bool:
        last = token in settings.stop_tokens
        text = "" if last else said[sample].add(token)
        if screen is not None:
            screen.more(sample, text, last=last or said[sample].stopped)
        return said[sample].stopped

    with memory_guard("sampling", f"{samples} samples", "fewer --samples, or --precision bf16"):
        reader = Reader(model, rows=samples, precision=numbers)
        prompts = [tokens] * samples
        for new in generate(reader, prompts, settings, slide=window, vocab_size=tokenizer.vocab_size, ended=ended):
            count += len(new)
    if screen is not None:
        screen.close()
    seconds = time.perf_counter() - began
    if as_json:
        print(json.dumps(record(trained, prompt, len(tokens), settings, said, numbers, seconds, count)))
    else:
        print(f"{count:,} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)


def usable(precision: str, device: str) -> Precision:
    """What this device has of a precision that was asked for or trained in."""
    return "fp32" if device == "cpu" and precision in ("tf32", "fp16") else precision  # type: ignore[return-value]


def warn_past_training(model: GPT, tokens: int) -> None:
    """Said before, where positions have an end further on than training had, or none."""
    if tokens > model.config.block_size:
        told = (
            f"up to {tokens:,} tokens: the model's positions go on past the {model.config.block_size:,} that it was "
            "trained at, but it may not know how; --window keeps to them"
        )
        print(told, file=sys.stderr)


class Screen:
    """Samples on a terminal or in a pipe: the first that has not ended is shown as it grows, the next after it.

    alive: samples that have not ended.
    """

    def __init__(self, prompt: str, said: Sequence[Continuation], out: TextIO) -> None:
        self.prompt, self.said, self.out = prompt, said, out
        self.alive = set(range(len(said)))
        self.current = 0
        self._begin()

    def more(self, sample: int, text: str, *, last: bool) -> None:
        """A sample goes on, or ends with this text."""
        if sample == self.current:
            self._write(text)
        if last:
            self._end(sample)

    def close(self) -> None:
        """All samples end here."""
        for sample in sorted(self.alive):
            self._end(sample)

    def _end(self, sample: int) -> None:
        self.alive.discard(sample)
        rest = self.said[sample].finish()  # what was held back is certain now
        if sample == self.current:
            self._write(rest)
        while self.current < len(self.said) and self.current not in self.alive:
            self._write("\n")
            self.current += 1
            if self.current < len(self.said):
                self._begin()

    def _begin(self) -> None:
        head = f"--- {self.current + 1} of {len(self.said)} ---\n" if len(self.said) > 1 else ""
        self._write(head + self.prompt + self.said[self.current].text)

    def _write(self, text: str) -> None:
        self.out.write(harmless(text) if self.out.isatty() else text)
        self.out.flush()


def harmless(text: str) -> str:
    """Without the control characters by which a model could move a terminal's cursor or change its colours."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
                   for c in text)  # fmt: skip


def record(
    trained: Trained, prompt: str, prompt_tokens: int, settings: Sampling, said: Sequence[Continuation],
    precision: str, seconds: float, count: int,
) -> dict[str, Any]:  # fmt: skip
    """All of it for programs."""
    texts = []
    for one in said:
        one.finish()
        texts.append({"text": one.text, "tokens": one.tokens})
    return {
        "source": trained.name, "precision": precision, "prompt": prompt, "prompt_tokens": prompt_tokens,
        "settings": settings.model_dump(mode="json"), "samples": texts, "seconds": seconds,
        "tokens_per_second": count / seconds,
    }  # fmt: skip
