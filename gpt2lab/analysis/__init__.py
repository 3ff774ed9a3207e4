"""From final values to verdicts: `compare` reads a table, judges the contrasts of its arms and words the result.

Parts of scipy are written `scipy.special` and the like, because they are then imported at their first use: commands
that judge nothing need not wait for them.
"""

from gpt2lab.analysis.compare import compare
from gpt2lab.analysis.verdicts import ArmResult, Contrast, Noise, Verdicts
from gpt2lab.analysis.wording import in_words

__all__ = ["ArmResult", "Contrast", "Noise", "Verdicts", "compare", "in_words"]
