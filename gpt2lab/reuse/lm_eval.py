"""Adapter for lm-evaluation-harness: any of its tasks that use likelihoods.

    python -m gpt2lab.reuse.lm_eval --model gpt2lab --model_args source=RUN_OR_FOLDER --tasks arc_easy

The harness has no plug-ins, so this module registers the model and then calls its command line. Needs the extra
`lm-eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.tasks import Encoded, log_likelihoods
from gpt2lab.reuse.load import open_trained
from gpt2lab.store import Store

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("gpt2lab")
class Gpt2labLM(TemplateLM):  # type: ignore[misc]
    """A model by `open_trained`. source: a run, or a folder of weights. runs: the run store's folder. tokens_at_once:
    in one pass; None for the device's default. The harness's batch_size is ignored."""

    def __init__(
        self,
        source: str,
        runs: str = "runs",
        device: str | None = None,
        tokens_at_once: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        available = device and (
            torch.cuda.is_available() or not device.startswith("cuda")
        )  # the harness's default is cuda:0
        chosen = torch.device(device) if device and available else None
        self.trained = open_trained(str(source), Store(runs), device=chosen)
        if self.trained.tokenizer is None:
            raise ConfigError("its tokenizer is not known", where=self.trained.name, hint="gpt2lab data list")
        self.text = self.trained.tokenizer
        self.tokens_at_once = tokens_at_once

    @property
    def eot_token_id(self) -> int:
        """The token for an empty context. Raises ConfigError where documents have no separator."""
        if self.text.separator is None:
            raise ConfigError("its tokenizer has no separator, which an empty context needs", where=self.trained.name)
        return self.text.separator

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.trained.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request cache."""
        return f"gpt2lab-{self.text.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, without special tokens."""
        ids: list[int] = self.text.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        encoded = [Encoded(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        answers = log_likelihoods(
            self.trained.model, encoded, precision=self.trained.precision, tokens_at_once=self.tokens_at_once
        )
        return [(answer.log_likelihood, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not supported: only likelihoods."""
        raise ConfigError("tasks that generate text are not offered", where="lm-eval model gpt2lab")


if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    # under this name the module was run as a script; the harness is to see the class of the module itself
    sys.modules.setdefault("gpt2lab.reuse.lm_eval", sys.modules[__name__])
    cli_evaluate()
