"""What is shown of URIs: everything but their secrets. Whatever prints, logs, stores or raises text from outside passes
it through `masked`; `shown` is for a URI that is going to be used."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(pass(word|wd|phrase|code)?|pwd|secret|token|credentials?|sig(nature)?|auth(orization)?|jwt|key|session)$",
    re.IGNORECASE,
)
"""Names of parameters that are secret, by how they end: `password`, `access_token`, `X-Amz-Signature`."""
SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
TOKEN_AS_USER = ("http", "https")
"""Schemes in which a name without a password, or beside a dummy, is as a rule a token."""
OURS = "mlflow"
"""What precedes a URI, as in GPT2LAB_TRACKER, or a study in `mlflow:posenc@nano`."""
SHORTEST, WITHIN_WORDS = 3, 6
"""Characters that a part of a secret must have to be hidden by itself, and to be hidden inside longer words, too."""
LIKE_A_TOKEN = re.compile(r".*\d|.{20}", re.DOTALL)
"""A user's name that may be one. Others may be common words, so they are hidden in their URI alone."""

_SETTING = re.compile(r"(?<![\w-])(password|passwd|pwd)=([^\s&]+)", re.IGNORECASE)
_PARAMETER = re.compile(r"[?&;#]([^\s=&;#?/]+)=([^&]*)")

_remembered: set[str] = set()


def masked(text: str) -> str:
    """`text` with the secrets in its URIs replaced by ***, and those of every URI that was `shown`, wherever they are:
    libraries quote parts of a URI in their errors."""
    text = _SETTING.sub(rf"\1={HIDDEN}", re.sub(r"\S+", lambda found: _without_secrets(found[0]), text))
    secrets = _remembered | {form for name in SECRET_VARIABLES for form in _forms(os.environ.get(name, ""))}
    for secret in sorted(secrets, key=len, reverse=True):
        if secret in text:
            edges = (r"((?<!\w)|(?<=%..))", r"(?!\w)") if len(secret) < WITHIN_WORDS else ("", "")
            text = re.sub(edges[0] + re.escape(secret) + edges[1], HIDDEN, text)
    return text


def shown(uri: str) -> str:
    """A URI without its secrets, which `masked` hides from now on. It may hold blanks: all of it is one URI."""
    clear = _without_secrets(uri)
    public = set(re.findall(r"\w+", clear))
    secrets = (uri[begin:end] for _, begin, end in _secrets(uri))
    _remembered.update(form for secret in secrets for form in _forms(secret) if form not in public)
    return clear


def _without_secrets(uri: str) -> str:
    for begin, _, end in reversed(_secrets(uri)):
        uri = uri[:begin] + HIDDEN + uri[end:]
    return uri


def _secrets(uri: str) -> list[tuple[int, int, int]]:
    """Where the secrets of one URI begin, where of each that begins which is hidden outside the URI too, and where they
    end. With a scheme or without: before the last @, since a secret may hold any character, and in the parameters
    behind it."""
    at = uri.rfind("@")
    begin, everywhere = _after_user(uri[:at]) if at >= 0 else (at, at)
    spans = [(begin, everywhere, at)] if begin < at else []
    for parameter in _PARAMETER.finditer(uri, at if spans else 0):
        if SECRET_NAME.search(unquote(parameter[1])):
            spans.append((parameter.start(2), *parameter.span(2)))
    return spans


def _after_user(before: str) -> tuple[int, int]:
    """How much may be shown of what a URI has before its @: in the URI, and elsewhere."""
    scheme, colon, rest = before.partition(":")
    if not colon:  # an address of mail, or //token@host
        begin = len(before) if "//" not in before else before.rindex("//") + 2
        return begin, begin
    if scheme.endswith(OURS):
        begin, everywhere = _after_user(rest)
        return len(before) - len(rest) + begin, len(before) - len(rest) + everywhere
    name = rest.lstrip("/")
    user, colon, _ = name.partition(":")
    begin = len(before) - len(name)
    password = begin + len(user) + len(colon)
    if not scheme.lower().endswith(TOKEN_AS_USER):
        return (begin, begin) if len(name) == len(rest) else (password, password)
    return begin, password if colon and not LIKE_A_TOKEN.match(user) else begin


def _forms(secret: str) -> set[str]:
    """A secret as libraries may show it: quoted, unquoted, and cut where a URI is cut."""
    plain = {secret, unquote(secret), unquote_plus(secret)}
    quoted = {form for text in plain for form in (quote(text, safe=""), quote(text), quote_plus(text))}
    cut = {part for text in plain for part in re.split(r"[/@:?#&;=\s\[\]]+", text)}
    return {form for form in plain | quoted | cut if len(form) >= SHORTEST}
