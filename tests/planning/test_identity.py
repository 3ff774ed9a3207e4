"""A run's id changes with all that can change its weights, and with nothing else."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import identity as identities
from gpt2lab.config import Config, load_config
from gpt2lab.identity import component_code, core_code, digest, reached, run_id, run_identity, settings
from gpt2lab.model import ModelConfig
from gpt2lab.optim.groups import OptimConfig
from gpt2lab.registry import PLUGINS, SLOTS, Choice, Component, load_plugin
from gpt2lab.schema import Settings
from gpt2lab.training.settings import TrainingConfig

REPOSITORY = Path(__file__).parents[2]
OUTSIDE: dict[str, Any] = {"data": "d" * 64, "device": "cpu", "threads": 1, "torch_version": "2.13.0"}

WEIGHTS = [
    "model.n_layer=2", "model.n_head=8", "model.n_embd=64", "model.block_size=64", "model.vocab_size=300",
    "model.bias=false", "model.dropout=0.1", "model.mlp_ratio=2", "model.position=rotary",
    "model.position={name: rotary, fraction: 0.5}", "model.norm=rmsnorm", "model.norm=[layernorm, rmsnorm]",
    "model.residual=post", "model.attention=gqa", "model.mask={name: sliding_window, window: 8}",
    "model.scores.qk_norm=true", "model.mlp=relu2", "model.mlp=moe", "model.linear=bitnet",
    "model.embedding=[plain, smear]",
    "model.stack=value_residual", "model.head=untied", "model.objective=[cross_entropy, z_loss]",
    "model.init=zero_projections", "model.parametrization=mup",
    "optim.lr=1e-3", "optim.warmup_steps=3", "optim.grad_clip=0.5",
    "optim.optimizer.weight_decay=0", "optim.optimizer.betas=[0.9, 0.99]", "optim.schedule=linear",
    "optim.schedule.final_fraction=0", "optim.averaging=ema", "optim.freeze=['wte.*']",
    "training.steps=641", "training.batch_tokens=2048",
    "training.micro_batch_sequences=4", "training.precision=bf16",
    "training.nonfinite=skip", "training.max_skipped_steps=3", "training.deterministic=true", "seed=1", "repeat=1",
]  # fmt: skip
NOT_WEIGHTS = [
    "evaluation.every_steps=7", "evaluation.tokens=1024", "evaluation.contexts=[0.5]",
    "evaluation.context_tokens=2048", "evaluation.curve_tokens=1024",
    "evaluation.tasks=[hellaswag]", "evaluation.task_documents=7",
    "training.log_every_steps=5", "training.checkpoint_every_steps=3",
    "training.keep_checkpoints=3", "training.keep_best=true", "training.milestone_every_steps=9",
    "training.rank_timeout_seconds=9", "training.compile=on", "training.threads=2",
    "training.device=cuda", "scale.smallest_effect=1", "scale.caveat=none",
]  # fmt: skip


def id_of(config: Config, **outside: Any) -> str:
    return run_id(run_identity(config, **{**OUTSIDE, **outside}))


@pytest.mark.parametrize("change", WEIGHTS)
def test_what_can_change_weights_changes_the_id(change: str) -> None:
    assert id_of(load_config("nano", [change])) != id_of(load_config("nano"))


@pytest.mark.parametrize("change", NOT_WEIGHTS)
def test_what_cannot_change_weights_leaves_the_id(change: str) -> None:
    changed, plain = load_config("nano", [change]), load_config("nano")
    assert changed != plain
    assert id_of(changed) == id_of(plain)


def test_every_setting_is_on_one_of_the_lists() -> None:
    """A new field must be put on one of them by whoever adds it."""
    listed = {change.partition("=")[0] for change in (*WEIGHTS, *NOT_WEIGHTS)}
    sections: dict[str, type[Settings]] = {"model": ModelConfig, "optim": OptimConfig, "training": TrainingConfig}
    fields = {f"{section}.{name}" for section, kind in sections.items() for name in kind.model_fields}
    options = {"model.scores": "model.scores.qk_norm", "optim.optimizer": "optim.optimizer.betas"}
    assert {field for field in fields if options.get(field, field) not in listed} == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", "e" * 64), ("device", "cuda"), ("threads", 2), ("torch_version", "2.13.1"), ("compiled", True)],
)
def test_data_and_machine_change_the_id(name: str, value: Any) -> None:
    config = load_config("nano")
    assert id_of(config, **{name: value}) != id_of(config)


def test_every_option_of_every_component_counts() -> None:
    config = load_config("nano")

    def told(section: str, component: Component, options: dict[str, Any]) -> str:
        choice = Choice(component.slot, component.name, options)
        part = getattr(config, section).model_copy(update={component.slot: choice})
        return digest(settings(config.model_copy(update={section: part})))

    checked = 0
    for slot in SLOTS.values():
        section = slot.path.partition(".")[0]
        for component in slot if section in ("model", "optim") else ():
            plain = component.defaults()
            for option in component.parameters:
                changed = {**plain, option: "another"}
                assert told(section, component, changed) != told(section, component, plain), (component.name, option)
                checked += 1
    assert checked > 15
    assert settings(config)["optim"]["optimizer"] == {
        "name": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1,
    }  # fmt: skip


def test_an_option_written_out_with_its_default_is_no_difference() -> None:
    written = [
        "model.position={name: learned}", "model.mlp=[gelu_tanh]", "model.scores={name: plain, qk_norm: false}",
        "optim.lr=0.004", "optim.optimizer={name: adamw, eps: 1e-8, betas: [0.90, 0.95], weight_decay: 0.10}",
    ]  # fmt: skip
    assert id_of(load_config("nano", written)) == id_of(load_config("nano"))


def test_the_id_is_sixteen_hexadecimal_digits_of_all_parts() -> None:
    parts = run_identity(load_config("nano"), **OUTSIDE)
    assert set(parts) == {
        "settings", "seed", "repeat", "data", "torch", "device", "threads", "compiled", "core", "components",
    }  # fmt: skip
    assert len(run_id(parts)) == 16
    assert int(run_id(parts), 16) >= 0
    ids = {run_id({**parts, name: "another"}) for name in parts}
    assert len(ids) == len(parts) and run_id(parts) not in ids


# The code's part.


def test_the_core_is_the_same_in_every_process() -> None:
    """Sets of names are walked on the way: their order must not show."""
    script = (
        "import gpt2lab.optim; from gpt2lab.identity import core_code, component_code; from gpt2lab.registry import *\n"
        "print(core_code(), *(component_code(Choice(s.name, c.name)) for s in SLOTS.values() for c in s))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    found = done.stdout.split()
    ours = [component_code(Choice(slot.name, c.name)) for slot in SLOTS.values() for c in slot]
    assert found[0] == core_code()
    assert set(found[1:]) <= set(ours) and len(found) > 30


def test_a_change_of_what_trains_every_run_is_intended() -> None:
    """After it, every finished run of every user counts as another one. If that is meant, say so in the changelog."""
    assert core_code() == "8bf7f214c14852d08866e0260ac6b047b6986e16db2d488817d2322c9ed247a3"


QUOTED = r"""
f"{a['name']} here"            f"{a['name']} here"
f'{a["name"]} here'            f"{a['name']} here"
f"{a}"                         f'{a}'
f"it's {a!r:>{width}}"         f"it's {a!r:>{width}}"
f"{{{a}}}\n"                   f'{{{a}}}\n'
f"{(b if c else d):,}"         f'{(b if c else d):,}'
f"{ {1: 2}[1]}"                f'{ {1: 2}[1]}'
f"{', '.join(f'{x}' for x in a)}"  f"{', '.join((f'{x}' for x in a))}"
f"{a}'{b['c']}\""              f'''{a}'{b['c']}"'''
"""


def test_code_is_hashed_alike_by_every_python() -> None:
    """From 3.12 on, ast.unparse quotes f-strings in another way; 3.11 is the outside reference where it runs."""
    for line in QUOTED.strip().splitlines():
        source, expected = line.split("  ", 1)
        assert ast.unparse(identities.Quoted().visit(ast.parse(source))) == expected.strip(), source
    if sys.version_info < (3, 12):
        for file in (REPOSITORY / "gpt2lab" / "training").glob("*.py"):
            tree = ast.parse(file.read_text())
            assert ast.unparse(tree) == ast.unparse(identities.Quoted().visit(tree)), file


def test_the_core_holds_what_trains_and_nothing_that_only_looks_on() -> None:
    modules = {key.partition(":")[0] for key in reached(identities.ROOTS)}
    assert {"gpt2lab.model", "gpt2lab.data.batches", "gpt2lab.training.loop", "gpt2lab.optim.groups"} <= modules
    beside = ("registry", "errors", "schema", "store", "tracking", "report", "analysis", "evaluation", "cli", "plan")
    assert not [m for m in modules if m.split(".")[1] in beside]
    chosen = ("mlp", "norm", "attention", "mask", "scores", "residual", "head", "init", "stack", "objective")
    assert not [m for m in modules if m.startswith("gpt2lab.components.") and m.split(".")[2] in chosen]


def test_every_component_has_code_of_its_own() -> None:
    components = [c for slot in SLOTS.values() if slot.path.startswith(("model.", "optim.")) for c in slot]
    codes = {(c.slot, c.name): component_code(Choice(c.slot, c.name)) for c in components}
    assert digest({}) not in codes.values()
    assert len(set(codes.values())) == len(codes) > 25


PARTS = '''
import torch
from torch import nn

import gpt2lab.components.attention
from gpt2lab.components.mlp import MLP, mlp

FREQUENCY = 1.0
TABLE = {"low": 1.0}
SETTINGS = []


def bend(u):
    """Bend it."""
    return torch.sin(FREQUENCY * u + TABLE["low"] + len(SETTINGS))


def idle(u):
    return u


class Sine(nn.Module):
    """A sine."""

    amplitude = 1.0
    """Of the sine."""

    def forward(self, u):
        # what it is all about
        return self.amplitude * bend(u)


@mlp.register("sine", source="a test")
def sine(site):
    """One hidden layer with a sine."""
    return MLP(site, Sine())


@mlp.register("other", source="a test")
def other(site):
    """Something else."""
    return MLP(site, idle)
'''


@pytest.fixture
def code_of(tmp_path: Path) -> Callable[..., str]:
    """The code hash of one component of a plug-in, each time from a file in another folder; nothing stays loaded."""
    counter = iter(range(100))

    def code(text: str = PARTS, name: str = "sine", file: str = "parts.py", **beside: str) -> str:
        folder = tmp_path / f"place {next(counter)}"
        folder.mkdir()
        for module, content in beside.items():
            (folder / f"{module}.py").write_text(content)
        plugin = folder / file
        plugin.write_text(text)
        sys.path.insert(0, str(folder))
        try:
            loaded = load_plugin(plugin)
            return component_code(Choice("mlp", name))
        finally:
            sys.path.remove(str(folder))
            for component in loaded:
                del SLOTS[component.slot]._components[component.name]
                sys.modules.pop(component.factory.__module__, None)
            for module in beside:
                sys.modules.pop(module, None)
            PLUGINS.remove(str(plugin.resolve()))
            identities.parse.cache_clear()

    return code


def edited(*changes: tuple[str, str]) -> str:
    text = PARTS
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


SAME = {
    "nothing but the place": edited(),
    "docstring": edited(("One hidden layer with a sine.", "Sines, sines, sines.")),
    "docstring of a helper": edited(('    """Bend it."""\n', "")),
    "docstring of an attribute": edited(("Of the sine.", "How high it goes.")),
    "comment": edited(("# what it is all about", "# something else")),
    "layout": edited(("FREQUENCY * u +", "FREQUENCY\n        * u\n        +")),
    "source and examples": edited(('@mlp.register("sine", source="a test")',
                                   '@mlp.register("sine", source="a book", examples=({},))')),
    "another component": edited(('"""Something else."""\n    return MLP(site, idle)',
                                 '"""Something else."""\n    return MLP(site, torch.relu)')),
    "a helper that only another reaches": edited(("    return u\n", "    return 2 * u\n")),
    "a third component": PARTS + '\n\n@mlp.register("third", source="x")\ndef third(site):\n    """A third."""\n',
}  # fmt: skip
DIFFERENT = {
    "body": edited(("return MLP(site, Sine())", "return MLP(site.at(gain=2.0), Sine())")),
    "method": edited(("self.amplitude * bend(u)", "self.amplitude + bend(u)")),
    "attribute": edited(("amplitude = 1.0", "amplitude = 2.0")),
    "helper": edited(("torch.sin(", "torch.cos(")),
    "constant": edited(("FREQUENCY = 1.0", "FREQUENCY = 2.0")),
    "constant raised later": PARTS + "\nFREQUENCY += 1.0\n",
    "constant changed in place": PARTS + '\nTABLE["low"] = 2.0\n',
    "constant changed by a method": PARTS + "\nSETTINGS.append(1)\n",
    "constant set in a branch": PARTS + "\nif torch.__version__ > '2':\n    FREQUENCY = 3.0\n",
    "constant set in a loop": PARTS + "\nfor FREQUENCY in (1.0, 2.0):\n    pass\n",
    "helper replaced in a branch": PARTS + "\ntry:\n    1\nfinally:\n    def bend(u):\n        return u\n",
    "decorator that does something": edited(("class Sine", "@torch.jit.ignore\nclass Sine")),
}


@pytest.fixture(scope="module")
def plain_code(tmp_path_factory: pytest.TempPathFactory) -> str:
    plugin = tmp_path_factory.mktemp("plain") / "parts.py"
    plugin.write_text(PARTS)
    loaded = load_plugin(plugin)
    found = component_code(Choice("mlp", "sine"))
    for component in loaded:
        del SLOTS["mlp"]._components[component.name]
    PLUGINS.remove(str(plugin.resolve()))
    return found


@pytest.mark.parametrize("edit", SAME)
def test_an_edit_that_changes_no_computation_leaves_the_code(
    edit: str, plain_code: str, code_of: Callable[..., str]
) -> None:
    assert code_of(SAME[edit]) == plain_code


@pytest.mark.parametrize("edit", DIFFERENT)
def test_an_edit_that_may_change_a_computation_changes_the_code(
    edit: str, plain_code: str, code_of: Callable[..., str]
) -> None:
    assert code_of(DIFFERENT[edit]) != plain_code


@pytest.mark.parametrize("file", ["renamed.py", "my-parts.py", "parts v2.py", "parts.v2.py"])
def test_the_name_of_a_plugin_file_does_not_count(file: str, plain_code: str, code_of: Callable[..., str]) -> None:
    assert code_of(file=file) == plain_code


def test_code_beside_a_plugin_counts(code_of: Callable[..., str]) -> None:
    text = edited(("import torch\n", "import torch\nfrom beside_it import wave\n"), ("torch.sin(", "wave("))
    helper = "import torch\n\ndef wave(u):\n    return torch.sin(u)\n\ndef idle(u):\n    return u\n"
    plain = code_of(text, beside_it=helper)
    assert code_of(text, beside_it=helper.replace("sin", "cos")) != plain
    assert code_of(text, beside_it=helper.replace("return u", "return 0")) == plain
    starred = text.replace("from beside_it import wave", "from beside_it import *")
    assert code_of(starred, beside_it=helper) != code_of(starred, beside_it=helper.replace("sin", "cos"))
    called = text.replace("from beside_it import wave", "import beside_it").replace("wave(", "beside_it.wave(")
    assert code_of(called, beside_it=helper) != code_of(called, beside_it=helper.replace("sin", "cos"))


def test_a_component_without_a_definition_of_its_own_counts_with_its_whole_file(code_of: Callable[..., str]) -> None:
    text = PARTS + (
        "\n\ndef made(gain):\n    def factory(site):\n        '''Made in a loop.'''\n"
        "        return MLP(site, Sine())\n    return factory\n\n"
        "for gain in (1, 2):\n    mlp.register(f'made{gain}', source='a test')(made(gain))\n"
    )
    plain = code_of(text, "made1")
    assert code_of(text, "made1") == plain
    for old, new in (("MLP(site, Sine())\n    return factory", "0\n    return factory"), ("(1, 2)", "(2, 1)")):
        assert code_of(text.replace(old, new), "made1") != plain


def test_a_chain_of_modules_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "chained.py").write_text(
        "import gpt2lab.components.attention\nfrom gpt2lab.components import mlp as mlps\n\n"
        "def build(site):\n    return gpt2lab.components.attention.mha(site), mlps.MLP(site, None)\n"
    )
    importlib.import_module("chained")
    found = reached([("chained", "build")])
    assert {"gpt2lab.components.attention:GroupedAttention", "gpt2lab.components.mlp:MLP"} <= found.keys()


def test_the_package_of_an_installed_component_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points give modules of packages, which import one another by relative names."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(
        "from .waves import bend\nfrom . import waves\nimport json\n\n"
        "def sine(site):\n    return bend, waves.other, json.dumps\n"
    )

    def found(waves: str) -> dict[str, str]:
        (package / "waves.py").write_text(waves)
        for module in [name for name in sys.modules if name.startswith("their_package")]:
            del sys.modules[module]
        identities.parse.cache_clear()
        importlib.invalidate_caches()
        importlib.import_module("their_package.parts")
        return reached([("their_package.parts", "sine")])

    plain = found("def bend(u):\n    return u\n\ndef other(u):\n    return u\n")
    assert plain.keys() == {"their_package.parts:sine", "their_package.waves:bend", "their_package.waves:other"}
    assert found("def bend(u):\n    return 2 * u\n\ndef other(u):\n    return u\n") != plain
    assert found("def bend(u):\n    return u\n\ndef other(u):\n    return u + 1\n") != plain
    identities.parse.cache_clear()
