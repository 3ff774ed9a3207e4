"""Metrics that say where the loss lies: by how frequent a token is in the training text, and by document.

The third of them, by position in the context, needs no more than a model and is beside the plain metrics.
"""

from __future__ import annotations

from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.metrics import Subject, means, metric
from gpt2lab.evaluation.parts import GROUPS, MOST_DOCUMENTS, by_document, by_frequency, named_documents, token_counts


@metric.register("frequency_loss", source="textbook")
def frequency_loss(subject: Subject, *, groups: int = GROUPS) -> dict[str, float]:
    """Mean loss in nats by how frequent the predicted token is in the training text.

    groups: how many, each with about an equal share of the training text; fewer where a few tokens make up most of it.
            Named by rank, from 1 for the most frequent token.
    """
    if groups < 1:
        raise ConfigError(f"at least 1 group is needed, not {groups}", where="metric frequency_loss")
    data = _data(subject, "frequency_loss")
    return means(subject, by_frequency(token_counts(data.train, data.vocab_size), groups))


@metric.register("document_loss", source="textbook")
def document_loss(subject: Subject, *, most: int = MOST_DOCUMENTS) -> dict[str, float]:
    """Mean loss in nats of each document of the validation text.

    most: how many of the longest stand by themselves; the others are taken together.
    """
    if most < 1:
        raise ConfigError(f"at least 1 document is needed, not {most}", where="metric document_loss")
    starts, names = named_documents(_data(subject, "document_loss"))
    return means(subject, by_document(starts, names, len(subject.tokens), most))


def _data(subject: Subject, name: str) -> Prepared:
    if subject.data is None:
        raise ConfigError("needs the prepared data, which are not known here", where=f"metric {name}")
    return subject.data
