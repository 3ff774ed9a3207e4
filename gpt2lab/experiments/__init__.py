"""Studies, sweeps and single runs from start to end; here, how each is repeated and limited."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2lab.basics.text import seconds_of
from gpt2lab.errors import ConfigError


def command(verb: str, source: str | Path | None = None, **options: Any) -> str:
    """A command line with its options: None, False and empty values are left out, several values repeat the option."""
    words = ["gpt2lab", verb, *([] if source is None else [str(source)])]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, (list, tuple)):
            words += [word for item in value for word in (option, str(item))]
        elif value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def call(function: str, source: str | Path | Mapping[str, Any], **options: Any) -> str:
    """A Python call, where no command can express the source."""
    arguments = "".join(f", {key}={value!r}" for key, value in options.items() if value)
    return f"gpt2lab.{function}({'{...}' if isinstance(source, Mapping) else repr(str(source))}{arguments})"


def only_scale(scales: Sequence[str]) -> str | None:
    """The scale that a file declares, None where it declares none. Raises ConfigError for several."""
    if len(scales) > 1:
        raise ConfigError(f"several scales are declared: {', '.join(scales)}", where="scales", hint="name one: scale=")
    return next(iter(scales), None)


def budget_seconds(budget: str | None) -> float | None:
    """Seconds of a time such as 6h or 45m. Raises ConfigError."""
    try:
        return seconds_of(budget) if budget else None
    except ValueError as error:
        raise ConfigError(str(error), where="budget") from None
