"""From final values to verdicts: `compare` reads a table, judges the contrasts of its arms and words the result."""

from gpt2lab.analysis.compare import compare
from gpt2lab.analysis.verdicts import ArmResult, Contrast, Noise, Verdicts
from gpt2lab.analysis.wording import in_words

__all__ = ["ArmResult", "Contrast", "Noise", "Verdicts", "compare", "in_words"]
