"""Commands about trained models: sample, export."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gpt2lab.basics.text import harmless
from gpt2lab.cli.compare import MLFLOW
from gpt2lab.cli.options import RUNS, Json, Model, Plugin, Runs, print_json
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Problem, unknown

if TYPE_CHECKING:
    from gpt2lab.generation import Sampling
    from gpt2lab.reuse.load import Trained
    from gpt2lab.store import Store

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
Layout = Literal["auto", "huggingface", "gpt2lab"]

# sample ---------------------------------------------------------------------------------------------------------------

NEW_TOKENS = 200
"""Tokens per sample where the command does not say how many."""


def sample(
    source: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; empty: start a new one.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Read the prompt from a file, or - from standard input.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Number of samples, generated together.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens per sample; by default 200, or as many as fit.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always take the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the smallest set with this total probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Sample from tokens with at least this share of the top probability."),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", help="Above 1: tokens that have already occurred become less likely."),
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
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Generate text with a model. Streams the text; the speed goes to standard error."""
    problems: list[Problem] = []
    text = read_prompt(prompt, prompt_file, problems)
    settings = read_settings(
        problems, max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    for option, value, supported in (("precision", precision, PRECISIONS), ("device", device, DEVICES)):
        if value is not None and value not in supported:
            problems.append(Problem(f"--{option}", unknown(option, value, supported)))
    if samples < 1:
        problems.append(Problem("--samples", f"{samples} does not fit: it must be at least 1"))
    if problems:
        raise ConfigError(problems)
    assert settings is not None
    from gpt2lab.config import fill_slots
    from gpt2lab.reuse.load import open_trained
    from gpt2lab.store import Store
    from gpt2lab.training.precision import choose_device, set_threads

    set_threads(threads)
    target = choose_device(device)  # type: ignore[arg-type]
    fill_slots(plugin or ())
    trained = open_trained(source, Store(runs), device=target)
    continue_text(
        trained, text, samples, settings, precision, past_end=past_end, window=window, as_json=json_,
        shorten=max_new_tokens is None,
    )  # fmt: skip


def read_prompt(prompt: str | None, file: str | None, problems: list[Problem]) -> str:
    """The prompt's text, from either option."""
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
    """The sampling settings; appends invalid ones to `problems`."""
    from pydantic import ValidationError

    from gpt2lab.generation import Sampling
    from gpt2lab.schema import reason, shown

    try:
        return Sampling(**options)
    except ValidationError as error:
        for invalid in error.errors():
            option = "--" + str(invalid["loc"][0]).replace("_", "-")
            problems.append(Problem(option, f"{shown(invalid['input'])} does not fit: {reason(invalid)}"))
        return None


def write(text: str) -> None:
    """Text of a model to standard output, without what would control a terminal."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def continue_text(
    trained: Trained, prompt: str, samples: int, settings: Sampling, precision: str | None, *, past_end: bool,
    window: bool, as_json: bool, shorten: bool,
) -> None:  # fmt: skip
    """Generate and show; `shorten` the samples to what the model's positions leave room for. Raises
    ConfigError when prompt, tokenizer or context do not allow it."""
    from gpt2lab.generation import Continuation, Reader, encoded, generate, refuse_unless_it_fits
    from gpt2lab.training.precision import memory_guard, set_arithmetic

    model, tokenizer = trained.model, trained.tokenizer
    if tokenizer is None:
        raise ConfigError("its tokenizer is not known, so it can neither read nor write text", where=trained.name)
    tokens = encoded(prompt, tokenizer)
    if not window:
        room = settings.max_new_tokens if model.max_context is None else model.max_context + 1 - len(tokens)
        if shorten and 0 < room < settings.max_new_tokens:
            settings = settings.model_copy(update={"max_new_tokens": room})
        refuse_unless_it_fits(model, len(tokens), settings.max_new_tokens)
        total, trained_at = len(tokens) + settings.max_new_tokens, model.config.block_size
        if total > trained_at:
            warning = (
                f"up to {total:,} tokens: the model's positions continue past the {trained_at:,} that it was trained at"
            )
            print(f"{warning}, where its predictions may be poor; --window stays within them", file=sys.stderr)
    if tokenizer.separator is not None and not past_end:
        settings = settings.model_copy(update={"stop_tokens": (tokenizer.separator,)})
    device = next(model.parameters()).device
    numbers: Any = precision or trained.precision
    if device.type == "cpu" and numbers in ("tf32", "fp16"):  # not supported on CPU
        numbers = "fp32"
    set_arithmetic(numbers, device)
    texts = [Continuation(tokenizer, settings.stop) for _ in range(samples)]
    streams = samples == 1 and not as_json  # several are shown one after another in the end
    began, count = time.perf_counter(), 0
    if streams:
        write(prompt)

    def ended(sample: int, token: int) -> bool:
        text = "" if token in settings.stop_tokens else texts[sample].add(token)
        if streams:
            write(text)
        return texts[sample].stopped

    with memory_guard("sampling", f"{samples} samples", "fewer --samples, or --precision bf16"):
        reader = Reader(model, rows=samples, precision=numbers)
        prompts = [tokens] * samples
        for new in generate(reader, prompts, settings, slide=window, vocab_size=tokenizer.vocab_size, ended=ended):
            count += len(new)
    seconds = time.perf_counter() - began
    for place, text in enumerate(texts, 1):
        rest = text.finish()  # what was held back
        if streams:
            write(f"{rest}\n")
        elif not as_json:
            write(f"--- {place} of {samples} ---\n{prompt}{text.text}\n")
    if as_json:
        record = {
            "source": trained.name, "precision": numbers, "prompt": prompt, "prompt_tokens": len(tokens),
            "settings": settings.model_dump(mode="json"),
            "samples": [{"text": text.text, "tokens": text.tokens} for text in texts], "seconds": seconds,
            "tokens_per_second": count / seconds,
        }  # fmt: skip
        print_json(record)
    else:
        print(f"{count:,} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)


# export ---------------------------------------------------------------------------------------------------------------


def export(
    source: Model,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where to write; an older folder of weights is replaced. mlflow: keeps it with the run there."
        ),
    ],
    layout: Annotated[
        Layout, typer.Option("--layout", help="auto takes Hugging Face's where it holds model and tokenizer.")
    ] = "auto",
    plugin: Plugin = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Write weights for use elsewhere. Uses the layout of transformers, or gpt2lab's, which holds any model, or MLflow,
    as a model that generates text."""
    import tempfile

    import torch

    from gpt2lab.config import fill_slots
    from gpt2lab.pretrained.huggingface import save_gpt2
    from gpt2lab.pretrained.native import save_model
    from gpt2lab.reuse.load import open_trained
    from gpt2lab.store import Store

    fill_slots(plugin or ())
    trained = open_trained(source, Store(runs), device=torch.device("cpu"))
    tokenizer = trained.kept.choice.name if trained.kept else None
    if str(folder) == MLFLOW:
        with tempfile.TemporaryDirectory() as scratch:
            weights = save_model(
                trained.model, Path(scratch) / "weights", tokenizer=trained.kept, precision=trained.precision
            )
            address, uri = log_model(source, Store(runs), weights)
        if json_:
            print_json({"source": trained.name, "model": address, "tracking_uri": uri})
            return
        print(f"{trained.name}: {address}, in MLflow at {uri}")
        print(
            f"MLFLOW_TRACKING_URI={uri} python -c \"import mlflow; print(mlflow.pyfunc.load_model('{address}')"
            ".predict(['To be']))\""
        )
        return
    chosen, reason = choose_layout(layout, trained)
    if chosen == "huggingface":
        save_gpt2(trained.model, folder, gpt2_tokenizer=tokenizer == "gpt2")
        tokenizer = tokenizer if tokenizer == "gpt2" else None
    else:
        save_model(trained.model, folder, tokenizer=trained.kept, precision=trained.precision)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    if json_:
        record = {"source": trained.name, "folder": str(folder), "layout": chosen, "reason": reason}
        print_json({**record, "parameters": parameters, "tokenizer": tokenizer})
        return
    print(f"{trained.name}: {parameters:,} parameters, {f'tokenizer {tokenizer}' if tokenizer else 'no tokenizer'}")
    print(f"written to {folder} in {'Hugging Face' if chosen == 'huggingface' else 'our own'} layout ({reason})")


def log_model(source: str, store: Store, weights: Path) -> tuple[str, str]:
    """Keep a folder of weights with the copy of a run in MLflow; (address of the model, that of MLflow)."""
    from gpt2lab.api import tracker_of
    from gpt2lab.generation import Sampling
    from gpt2lab.reuse import load
    from gpt2lab.tracking.addresses import reason
    from gpt2lab.tracking.follower import runs_of, tracked_records

    run = load.run_of(source, store)
    for record in tracked_records(store) if run else ():
        for arm, seed, other in runs_of(store, record):
            if run is None or other.id != run.id:
                continue
            tracker: Any = tracker_of(store, record["ablation"])()
            if not hasattr(tracker, "log_model"):
                raise ConfigError(
                    "this tracker keeps no models", where="GPT2LAB_TRACKER", hint="gpt2lab export RUN FOLDER"
                )
            options = {k: v for k, v in Sampling().model_dump().items() if isinstance(v, (int, float))}
            try:
                copy = tracker.open_run(record, tracker.open_study(record), arm, seed, run)
                return tracker.log_model(copy, weights, load.__name__, options), tracker.shown_uri
            except Gpt2labError:
                raise
            except Exception as error:
                raise EnvironmentFault(f"tracking does not work: {reason(error)}", where=tracker.shown_uri) from None
    raise ConfigError("only a run of a study or sweep is in MLflow", where=source, hint="gpt2lab runs")


def choose_layout(layout: Layout, trained: Trained) -> tuple[str, str]:
    """(layout, reason)."""
    from gpt2lab.pretrained.huggingface import misfits

    if layout != "auto":
        return layout, "as asked"
    problems = misfits(trained.model.config)
    if problems:
        return "gpt2lab", f"Hugging Face's does not hold it: {'; '.join(map(str, problems))}"
    if trained.kept is not None and trained.kept.choice.name != "gpt2":
        return "gpt2lab", f"Hugging Face's does not hold the tokenizer {trained.kept.choice}"
    return "huggingface", "transformers reads it"
