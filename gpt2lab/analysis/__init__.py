"""From final values to verdicts: statistics, the words they allow, and `compare`, which joins the two. No torch."""

from gpt2lab.analysis.compare import Verdicts, compare
from gpt2lab.analysis.prose import in_words
from gpt2lab.analysis.verdicts import Arm, Contrast, Noise

__all__ = ["Arm", "Contrast", "Noise", "Verdicts", "compare", "in_words"]
