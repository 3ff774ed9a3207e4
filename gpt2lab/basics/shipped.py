"""Ablations and sweeps that come with the package: beside it in a checkout, in share/gpt2lab where it is installed."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path, PurePosixPath

FOLDERS = ("ablations", "sweeps")


@functools.cache
def shipped_folder() -> Path | None:
    """The folder of `ablations/` and `sweeps/`; None where the package came without them."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / FOLDERS[0]).is_dir():
        return checkout
    try:
        installed = files("gpt2lab") or []
    except PackageNotFoundError:
        return None
    for file in installed:
        if PurePosixPath(file).parts[-4:-1] == ("share", "gpt2lab", FOLDERS[0]):
            return Path(str(file.locate())).resolve().parents[1]
    return None


def shipped_names() -> list[str]:
    """`posenc` for ablations/posenc.yaml, and so on."""
    root = shipped_folder()
    return sorted(path.stem for folder in FOLDERS for path in (root / folder).glob("*.yaml")) if root else []


def found(path: str | Path) -> Path:
    """The file itself where there is one; else the shipped file of that name, `posenc` or `ablations/posenc.yaml`,
    where there is one."""
    file, root = Path(path), shipped_folder()
    if root is None or file.is_absolute() or ".." in file.parts or file.exists():
        return file
    names = [file, *(Path(folder, f"{file}.yaml") for folder in FOLDERS if len(file.parts) == 1)]
    return next((root / name for name in names if name.parts[0] in FOLDERS and (root / name).is_file()), file)
