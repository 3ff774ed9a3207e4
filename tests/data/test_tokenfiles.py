"""Tokens that llm.c, modded-nanogpt and nanoGPT keep, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt2lab.config import load_config
from gpt2lab.data import files as hashes
from gpt2lab.data.batches import Batches
from gpt2lab.data.prepared import list_prepared, open_prepared
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError, DataFault

SEPARATOR = 50256


def ids(seed: int, count: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, SEPARATOR, count).astype("<u2")
    found[:: max(1, count // 5)] = SEPARATOR
    return found


def llm_c(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    """As llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def config(*paths: Path, tokenizer: str = "gpt2", **options: object) -> DataConfig:
    chosen = {"name": "tokens", "paths": [str(path) for path in paths], **options}
    return DataConfig.model_validate({"corpus": chosen, "tokenizer": tokenizer})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    llm_c(folder / "fineweb_val_000000.bin", ids(0, 300))
    llm_c(folder / "fineweb_train_000001.bin", ids(1, 1000))
    llm_c(folder / "fineweb_train_000002.bin", ids(2, 700))
    return folder


def test_shards_of_llm_c_are_read_in_place(shards: Path) -> None:
    made = prepare(config(shards / "*.bin"))
    assert made.train[:].tolist() == [*ids(1, 1000), *ids(2, 700)]
    assert made.validation[:].tolist() == ids(0, 300).tolist()
    assert (made.vocab_size, made.manifest["separator"], made.manifest["dtype"]) == (50257, SEPARATOR, "<u2")
    links = [path for path in made.path.iterdir() if path.is_symlink()]
    assert sorted(link.resolve().name for link in links) == sorted(path.name for path in shards.iterdir())
    assert {path.name for path in made.path.iterdir()} - {link.name for link in links} == {"manifest.json"}
    record = made.manifest["splits"]["train"]
    assert record["document_count"] == 10 and [shard["documents"] for shard in record["shards"]] == [5, 5]
    assert record["bytes"] == int(made.byte_lengths[made.train[:]].sum())
    made.verify()
    inputs, targets = Batches(made.train, 16, 4, seed=0).at(3)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_raw_tokens_of_nanogpt_are_the_same_tokens(shards: Path, tmp_path: Path) -> None:
    nano = tmp_path / "owt"
    nano.mkdir()
    ids(1, 1000).tofile(nano / "train.bin")
    ids(0, 300).tofile(nano / "val.bin")
    made = prepare(config(nano / "train.bin", nano / "val.bin"))
    assert made.train[:].tolist() == ids(1, 1000).tolist()
    same = prepare(config(shards / "*_val_*.bin", shards / "*_train_000001.bin"))
    assert same.fingerprint == made.fingerprint and same.path == made.path  # equal tokens, whatever the header


def test_arrays_of_build_nanogpt_are_the_same_tokens(shards: Path, tmp_path: Path) -> None:
    for name, seed, count in (("edufineweb_val_000000", 0, 300), ("edufineweb_train_000001", 1, 1000)):
        np.save(tmp_path / name, ids(seed, count))  # as its fineweb.py writes them
    made = prepare(config(tmp_path / "*.npy"))
    assert made.train[:].tolist() == ids(1, 1000).tolist() and made.validation[:].tolist() == ids(0, 300).tolist()
    assert made.path == prepare(config(shards / "*_val_*.bin", shards / "*_train_000001.bin")).path


@pytest.mark.parametrize(
    ("kind", "is_array"),
    [*((kind, True) for kind in ("<i4", "<i8", "<u4", ">u2", "<i2", "<f4")), ("<i4", False), ("<i8", False)],
)
def test_numbers_of_another_kind_are_refused(shards: Path, kind: str, is_array: bool) -> None:
    file, tokens = shards / "fineweb_train_000003", np.arange(40).astype(kind)
    if is_array:
        np.save(file.with_suffix(".npy"), tokens)
    else:
        tokens.tofile(file.with_suffix(".bin"))
    with pytest.raises(DataFault, match="uint16 is expected" if is_array else "wider than 16 bits") as refused:
        prepare(config(shards / "*train_000003*", shards / "*_val_*.bin"))
    assert "astype('<u2')" in str(refused.value.hint)


@pytest.mark.parametrize("damage", [lambda raw: raw[:9], lambda raw: raw[:-2], lambda raw: raw[:6] + b"\x07" + raw[7:]])
def test_damaged_arrays_are_refused(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    file = shards / "fineweb_train_000003.npy"
    np.save(file, ids(3, 90))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataFault, match=r"header is not|bytes expected"):
        prepare(config(file, shards / "*_val_*.bin"))


def test_which_file_is_for_what(tmp_path: Path) -> None:
    for name, seed in (("part_a.bin", 1), ("part_b.bin", 2)):
        llm_c(tmp_path / name, ids(seed, 100))
    with pytest.raises(ConfigError, match=r"'part_a\.bin' does not say whether it is for training or validation"):
        prepare(config(tmp_path / "*.bin"))
    made = prepare(config(tmp_path / "*.bin", validation_paths=[str(tmp_path / "part_b.bin")]))
    assert (made.train[:].tolist(), made.validation[:].tolist()) == (ids(1, 100).tolist(), ids(2, 100).tolist())
    llm_c(tmp_path / "x_train.bin", ids(3, 100))
    with pytest.raises(ConfigError, match="no file for validation among 1"):
        prepare(config(tmp_path / "x_train.bin"))


def test_other_formats_and_damage_are_refused(shards: Path) -> None:
    file = shards / "fineweb_train_000001.bin"
    good = file.read_bytes()
    llm_c(file, ids(1, 1000), magic=20240801)
    cases = [(file.read_bytes(), "holds llm.c's tokens of Llama 3, not of GPT-2")]
    llm_c(file, ids(1, 1000), version=2)
    cases.append((file.read_bytes(), "version 2 of llm.c's format, not 1"))
    llm_c(file, ids(1, 1000), count=999)
    cases.append((file.read_bytes(), "3,022 bytes expected (999 tokens), 3,024 found"))
    cases.append((good[:-7], "3,024 bytes expected (1,000 tokens), 3,017 found"))
    cases.append((good[:100], "version 1 of llm.c's format"))
    cases.append((good[1024:-1], "1,999 bytes are no whole number of 16-bit tokens"))
    for content, said in cases:
        file.write_bytes(content)
        with pytest.raises(DataFault) as caught:
            prepare(config(shards / "*.bin"))
        assert said in caught.value.render() and str(file) in caught.value.render()
    wrong = ids(1, 1000)
    wrong[777] = 50257
    llm_c(file, wrong)
    said = r"fineweb_train_000001\.bin: token id 50257 at offset 777 is outside the vocabulary of 50257"
    with pytest.raises(DataFault, match=said):
        prepare(config(shards / "*.bin"))
    assert list_prepared() == []


def test_characters_of_nanogpt_are_no_gpt2_tokens(tmp_path: Path) -> None:
    for name in ("train", "val"):
        np.arange(60, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(DataFault, match=r"meta\.pkl shows that its ids are not GPT-2's"):
        prepare(config(tmp_path / "train.bin", tmp_path / "val.bin"))


def test_only_gpt2s_tokenizer_fits() -> None:
    with pytest.raises(ConfigError, match="holds tokens of gpt2, not of bytes"):
        load_config("gpt2-124m", ["data.corpus={name: tokens, paths: [x.bin]}", "data.tokenizer=bytes"])


def test_later_damage_and_moved_files_are_found(shards: Path) -> None:
    made = prepare(config(shards / "*.bin"))
    file = shards / "fineweb_train_000002.bin"
    good = file.read_bytes()
    file.write_bytes(good[:1030] + b"\x01" + good[1031:])
    with pytest.raises(DataFault, match=r"train_001\.bin: damaged"):
        made.verify()
    file.write_bytes(good[:-2])
    with pytest.raises(DataFault, match=r"2,424 bytes expected \(700 tokens of <u2 behind 1,024 bytes\), 2,422 found"):
        open_prepared(made.path)
    file.unlink()
    ((_, found),) = list_prepared()
    assert "missing: it is a link to" in str(found)


def test_hashes_are_remembered_until_a_file_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = hashes.file_sha256

    def counted(path: Path, *rest: object, **options: object) -> str:
        read.append(path)
        return real(path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hashes, "file_sha256", counted)
    for path in shards.iterdir():
        os.utime(path, (1, 1))
    first = prepare(config(shards / "*.bin"))
    assert len(read) == 3
    assert prepare(config(shards / "*.bin")).path == first.path
    assert len(read) == 3
    llm_c(shards / "fineweb_train_000002.bin", ids(9, 700))
    assert prepare(config(shards / "*.bin")).path != first.path
    assert len(read) == 5  # once for the identity, once for verification: changed just now, it might change again
    prepare(config(shards / "*.bin"))
    assert len(read) == 7
