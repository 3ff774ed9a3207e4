"""The sections of the pages, a file for each subject: it reads, tabulates and draws its own part, and registers its
sections with `@section`; see docs/report.md."""

import importlib
import pkgutil


def load() -> None:
    """Import every file of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
