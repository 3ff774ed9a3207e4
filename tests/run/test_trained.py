"""Models opened by name, wherever they lie, and taken elsewhere by the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.pretrained.native import save_model
from gpt2lab.reuse.load import open_trained
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


def equal(a: GPT, b: GPT) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def small(vocab_size: int = 50257) -> GPT:
    return build_model(ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=vocab_size), seed=1)


@pytest.fixture
def runs(tiny: Path, gpt2lab: Call, inline: list[str], once: Any) -> list[str]:
    """The ids of a learned and a rotary run, trained to their end in ./runs."""

    def train() -> None:
        for position in ("learned", "rotary"):
            code, printed = gpt2lab("train", "tiny.yaml", "--no-tracking", "--set", f"model.position={position}")
            assert code == 0, printed

    once("two positions", tiny.parent, train)
    return [run.id for run in sorted(Store("runs").runs(), key=lambda run: "position: rotary" in str(run.config()))]


def test_a_run_by_its_id_and_by_its_beginning(runs: list[str]) -> None:
    store = Store("runs")
    found = open_trained(runs[0], store, device=CPU)
    (file,) = Path("runs", runs[0], "checkpoints").glob("*/model.safetensors")
    kept = load_file(file)
    assert found.model.state_dict().keys() == kept.keys()
    assert all(torch.equal(found.model.state_dict()[name], kept[name]) for name in kept)
    assert found.name == runs[0] and found.precision == "fp32" and not found.model.training
    assert found.tokenizer is not None and found.tokenizer.decode(found.tokenizer.encode("noble")) == "noble"
    assert equal(open_trained(runs[0][:9], store, device=CPU).model, found.model)
    assert equal(open_trained(f"runs/{runs[0]}", Store("elsewhere"), device=CPU).model, found.model)
    assert not equal(open_trained(runs[1], store, device=CPU).model, found.model)


def test_a_run_that_is_not_finished_says_so(runs: list[str]) -> None:
    other = "f" * 16
    shutil.copytree(Path("runs", runs[0]), Path("runs", other))
    Path("runs", other, "result.json").unlink()
    folder = Store("runs").run(other)
    folder.write_config(str(folder.config()).replace("steps: 24\n", "steps: 48\n", 1))
    found = open_trained(other, Store("runs"), device=CPU)
    assert found.name == f"{other} (not finished: step 24 of 48)"
    assert equal(found.model, open_trained(runs[0], Store("runs"), device=CPU).model)
    shutil.rmtree(Path("runs", other, "checkpoints"))
    with pytest.raises(ConfigError, match="without a checkpoint"):
        open_trained(other, Store("runs"), device=CPU)


def test_a_run_without_good_weights(runs: list[str]) -> None:
    (file,) = Path("runs", runs[0], "checkpoints").glob("*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataFault, match="damaged"):
        open_trained(runs[0], Store("runs"), device=CPU)
    folder = Store("runs").run(runs[1])
    folder.finish({**(folder.result() or {}), "status": "diverged"})
    with pytest.raises(ConfigError, match="diverged"):
        open_trained(runs[1], Store("runs"), device=CPU)


def test_what_is_nowhere(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for wrong, words in (
        ("zzz", r"neither a run in runs begins with 'zzz', nor is there a folder of that name$"),
        ("weihgts", "did you mean 'weights'"),
        (runs[0][:-2] + "zz", f"did you mean '{runs[0]}'"),
        ("weights/x", "nor is there a folder"),
        ("", "neither a run"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_trained(wrong, Store("runs"), device=CPU)
    shutil.copytree(Path("runs", runs[0]), Path("runs", runs[0][:-1] + ("0" if runs[0][-1] != "0" else "1")))
    with pytest.raises(ConfigError, match="begins 2 run ids"):
        open_trained(runs[0][:-1], Store("runs"), device=CPU)


def test_hub_names_are_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("gpt2", "someone/tiny"):
        with pytest.raises(EnvironmentFault, match="hub cannot be read"):
            open_trained(name, Store(tmp_path / "runs"), device=CPU)


def test_folders_with_and_without_gpt2s_tokenizer(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    hello = [15496, 11, 995]  # "Hello, world", as OpenAI's encoder has it
    for size in (50257, 50304):
        save_gpt2(small(size), tmp_path / f"hf{size}")
        tokenizer = open_trained(str(tmp_path / f"hf{size}"), store, device=CPU).tokenizer
        assert tokenizer is not None and tokenizer.encode("Hello, world").tolist() == hello
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf50257")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "hf50257" / file).unlink()
    theirs.save_pretrained(tmp_path / "hf50257")  # as one tokenizer.json
    assert not (tmp_path / "hf50257" / "vocab.json").exists()
    assert open_trained(str(tmp_path / "hf50257"), store, device=CPU).tokenizer is not None
    (tmp_path / "hf50257" / "tokenizer.json").unlink()
    assert open_trained(str(tmp_path / "hf50257"), store, device=CPU).tokenizer is not None
    (tmp_path / "hf50257" / "vocab.json").write_text('{"Hallo": 0}')  # a GPT-2 of another language
    assert open_trained(str(tmp_path / "hf50257"), store, device=CPU).tokenizer is None
    save_gpt2(small(40), tmp_path / "hf40")
    assert open_trained(str(tmp_path / "hf40"), store, device=CPU).tokenizer is None
    save_model(small(), tmp_path / "own", tokenizer="gpt2", precision="bf16")
    own = open_trained(str(tmp_path / "own"), store, device=CPU)
    assert own.precision == "bf16" and own.tokenizer is not None and own.tokenizer.encode("Hello").tolist() == hello[:1]


def test_export_takes_the_layout_that_holds_everything(runs: list[str], gpt2lab: Call, tmp_path: Path) -> None:
    code, printed = gpt2lab("export", runs[0], "out")
    assert code == 0 and "does not hold the tokenizer bytes" in printed and "our own layout" in printed
    found, again = (open_trained(name, Store("runs"), device=CPU) for name in (runs[0], "out"))
    assert equal(found.model, again.model) and again.tokenizer is not None and again.tokenizer.vocab_size == 256
    code, printed = gpt2lab("export", runs[0], "hf", "--layout", "huggingface", "--json")
    assert code == 0 and json.loads(printed)["layout"] == "huggingface" and json.loads(printed)["tokenizer"] is None
    theirs = AutoModelForCausalLM.from_pretrained("hf").eval()
    tokens = torch.arange(16)[None]
    assert (theirs(tokens).logits - found.model(tokens)).abs().max() < 1e-5
    code, printed = gpt2lab("export", runs[1], "rotary", "--layout", "huggingface")
    assert code == 2 and "model.position: rotary" in printed and "Traceback" not in printed
    code, printed = gpt2lab("export", runs[1], "rotary")
    assert code == 0 and "model.position: rotary" in printed
    save_gpt2(small(), "weights")
    code, printed = gpt2lab("export", "weights", "copy")
    assert code == 0 and "tokenizer gpt2" in printed and Path("copy", "vocab.json").exists()
    assert Path("copy", "model.safetensors").read_bytes() == Path("weights", "model.safetensors").read_bytes()


def test_a_learned_tokenizer_goes_along_until_its_data_is_gone(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    preset = tiny.parent / "tiny.yaml"
    preset.write_text(preset.read_text().replace("256, dropout", "280, dropout").replace(
        "tokenizer: bytes", "tokenizer: {name: bpe, vocab_size: 280}"))  # fmt: skip
    code, printed = gpt2lab("train", "tiny.yaml", "--no-tracking")
    assert code == 0, printed
    found = open_trained(inline[0], Store("runs"), device=CPU)
    code, printed = gpt2lab("export", inline[0], "out")
    assert code == 0 and "tokenizer bpe" in printed
    shutil.rmtree(tiny.parent / "data-home")
    (tiny.parent / "text.txt").unlink()
    assert open_trained(inline[0], Store("runs"), device=CPU).tokenizer is None
    again = open_trained("out", Store("runs"), device=CPU).tokenizer
    assert again is not None and found.tokenizer is not None
    assert len(again.encode("noble queen")) < len("noble queen") and again.decode(again.encode("noble")) == "noble"
