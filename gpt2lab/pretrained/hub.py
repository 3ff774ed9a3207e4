"""Weights by their name on the Hugging Face hub, through the optional package huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path

from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.pretrained.files import WEIGHTS, shard_names

TOKENIZER = ("vocab.json", "tokenizer.json")
ELSEWHERE = "download it where there is a network, and give the folder"


def fetched(name: str) -> Path:
    """The folder in the hub's cache with config and weights of `name`, fetched if need be.

    Raises EnvironmentFault when the package is missing or the hub does not answer, ConfigError when it has no such
    model.
    """
    where = f"'{name}' (no folder here, so a name on the Hugging Face hub)"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise EnvironmentFault(
            "reading from the hub needs huggingface_hub", where=where, hint="pip install huggingface_hub"
        ) from None
    away = not answers()

    def file(wanted: str) -> Path | None:
        """Where it lies now; None when the hub, or without a network its cache, has no such file."""
        try:
            return Path(hf_hub_download(name, wanted, local_files_only=away))
        except EntryNotFoundError:
            return None

    try:
        config = file("config.json")
        weights = next(filter(None, map(file, WEIGHTS)), None) if config else None
        if weights is not None and weights.name.endswith(".json"):
            weights = weights if all(map(file, shard_names(weights))) else None
        if config and weights:
            for wanted in TOKENIZER:
                file(wanted)
            return config.parent
    except RepositoryNotFoundError:
        raise ConfigError("neither here nor on the hub", where=where, hint="the name of a folder") from None
    except Exception as error:  # whatever a network does, through several libraries
        raise EnvironmentFault(
            f"the hub cannot be read: {str(error).partition(chr(10))[0]}", where=where, hint=ELSEWHERE
        ) from error
    if away:
        raise EnvironmentFault(
            "the hub cannot be read: it does not answer, and its cache does not hold this", where=where, hint=ELSEWHERE
        )
    raise ConfigError(f"the hub has no config.json with weights ({', '.join(WEIGHTS)})", where=where)


def answers() -> bool:
    """Whether the hub can be reached; the package itself would try again and again for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever a network does
        return False
    return True
