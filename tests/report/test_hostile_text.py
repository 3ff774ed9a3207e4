"""Text that tries to run code, in every field that a page shows, in a browser without the page's own protection."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_study import run_id
from made_up_sweep import search, sweep

import gpt2lab as g
from gpt2lab.records import SweepRecord
from gpt2lab.reports.front import write_front
from gpt2lab.reports.index import write_index
from gpt2lab.reports.page import publish
from gpt2lab.reports.read import read_study, read_sweep
from gpt2lab.reports.study import write_report
from gpt2lab.reports.sweep import write_sweep_report
from gpt2lab.store import Store

RUN = "window.parent.ran()"
TAGS = [
    f"<script>{RUN}</script>", f"<ScRiPt>{RUN}</sCrIpT>", f"<script>{RUN}//", f"<script/x>{RUN}</script>",
    f"</script><script>{RUN}</script>", f"</title><script>{RUN}</script>", f"</style><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>", f"</pre></code><script>{RUN}</script>", f"--><script>{RUN}</script>",
    f"<!--><script>{RUN}</script>", f"]]><script>{RUN}</script>", f"<![CDATA[<script>{RUN}</script>]]>",
    f"</svg><script>{RUN}</script>", f"<svg><script>{RUN}</script></svg>", f"<svg onload={RUN}>",
    f"<svg><style><img src=x onerror={RUN}></style>", f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><set onbegin={RUN} attributename=x>", f"<math><mtext><script>{RUN}</script></mtext></math>",
    f"<math><mglyph><style><!--</style><img title='--><img src=1 onerror={RUN}>'>", f"<img src=x onerror={RUN}>",
    f"<img/src=x/onerror={RUN}>", f"<image src=x onerror={RUN}>", f"<body onload={RUN}>", f"<body onpageshow={RUN}>",
    f"<input autofocus onfocus={RUN}>", f"<select autofocus onfocus={RUN}>", f"<details open ontoggle={RUN}>",
    f"<video><source onerror={RUN}></video>", f"<audio src=x onerror={RUN}>", f"<object data=x onerror={RUN}>",
    f"<iframe srcdoc='<script>{RUN}</script>'></iframe>", f"<iframe src=javascript:{RUN}></iframe>",
    f"<object data='javascript:{RUN}'>", f"<embed src='javascript:{RUN}'>", f"<base href='javascript:{RUN}//'>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>", f"<link rel=stylesheet href=x onerror={RUN}>",
    f"<template><script>{RUN}</script></template><img src=x onerror={RUN}>", f"<style onload={RUN}></style>",
]  # fmt: skip
OUT_OF_ATTRIBUTES = [
    f"\" onerror={RUN} x=\"", f"' onload='{RUN}", f"\"><img src=x onerror={RUN}>", f"'><img src=x onerror={RUN}>",
    f"` onmouseover={RUN} `", f"\" style=animation-name:x onanimationstart={RUN} \"", f"javascript:{RUN}",
    f"data:text/html,<script>{RUN}</script>", f"[x](javascript:{RUN})", f"{{{{ {RUN} }}}}<% {RUN} %>",
]  # fmt: skip
HOSTILE = [*TAGS, *OUT_OF_ATTRIBUTES]
ALL = "\n".join(HOSTILE)
WATCH = "<script>window.ran = () => document.documentElement.setAttribute('data-ran', '1')</script>"


def ran(page: str, folder: Path) -> bool:
    """Whether any code of a page runs once its own policy, which forbids all code, is taken away."""
    browser = shutil.which("chromium")
    assert browser, "needs chromium"
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (folder / "page.html").write_text(source.replace("<head>", f"<head>{WATCH}", 1))
    options = ["--headless=new", "--no-sandbox", "--virtual-time-budget=5000", f"--user-data-dir={folder}/profile"]
    command = [browser, *options, "--dump-dom", (folder / "page.html").as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=170).stdout
    assert 'data-ran="1"' in shown or len(shown) > len(source) / 2, "the browser has not shown the page"
    return 'data-ran="1"' in shown


def hostile(record: Any, kept: tuple[str, ...] = ("name", "ablation", "scale", "baseline", "metric")) -> Any:
    """A record with every free text replaced by all hostile ones."""
    texts = {"question", "caveat", "reproduce", "created", "expected", "data", "optimizer", "preset", "device_name",
             "python", "platform", "git_commit"}  # fmt: skip
    if isinstance(record, dict):
        return {key: ALL if key in texts and key not in kept else hostile(value) for key, value in record.items()}
    return record


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Every kind of page, of studies whose texts are all hostile."""
    from made_up_study import declare

    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gpt2lab.reports.style.saved", lambda *_, **__: b"")
        made: dict[str, str] = {}
        for number in range(0, len(HOSTILE), 10):  # as names of arms, ten at a time
            root, names = folder / f"runs{number}", HOSTILE[number : number + 10]
            means = {name: 2.1 + 0.05 * place for place, name in enumerate(names)}
            study = hostile(declare(root, means, baseline=names[0]))
            for name, arm in study["arms"].items():
                arm |= {"changes": {f"model.{ALL}": ALL}, "components": {"position": name, ALL: ALL}}
            (root / "studies" / "posenc@nano.json").write_text(json.dumps(study))
            store = Store(root)
            store.conclude(store.study("posenc@nano"), ALL)
            for name in names:
                run = store.run(run_id(name, 0))
                run.write_samples({ALL: ALL})
                run.remark(tags=[ALL], note=ALL)
            made[f"study {number}"] = write_report(read_study("posenc", root), folder / f"out{number}").read_text()
        made["index"] = write_index(root, folder / "index").read_text()
        publish(folder / f"out{number}" / "posenc@nano", folder / "published")
        made["front"] = write_front(folder / "published").read_text()
        choices = {"name": "model.norm", "kind": "categorical", "low": None, "high": None, "log": False, "step": None,
                   "choices": HOSTILE, "when": None}  # fmt: skip
        declared = hostile(sweep({name: search(name, space=(choices,), trials=12) for name in HOSTILE[:6]}))
        store.write_sweep(SweepRecord.read(declared, "made up"))
        made["sweep"] = write_sweep_report(read_sweep(declared["name"], root), folder / "sweep").read_text()
        shown = [g.load_study("posenc", root), g.load_study("posenc", root).verdicts]
        made["notebook"] = f"<html><head></head><body>{''.join(one._repr_html_() for one in shown)}</body></html>"
        yield made


@pytest.mark.service
def test_no_text_runs_as_code(pages: dict[str, str], tmp_path: Path) -> None:
    assert len(HOSTILE) >= 50
    for name, page in pages.items():
        assert RUN in page and not ran(page, tmp_path), name


@pytest.mark.service
@pytest.mark.parametrize("text", [TAGS[0], TAGS[15], TAGS[21], TAGS[28]])
def test_code_that_does_run_is_noticed(text: str, tmp_path: Path) -> None:
    assert ran(f"<html><head></head><body>{text}</body></html>", tmp_path)
