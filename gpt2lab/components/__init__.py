"""Every swappable part of the model, one file per slot. Importing this package fills the slots."""

from gpt2lab.components.attention import attention
from gpt2lab.components.embedding import embedding
from gpt2lab.components.head import head
from gpt2lab.components.init import init
from gpt2lab.components.linear import linear
from gpt2lab.components.mask import mask
from gpt2lab.components.mlp import mlp
from gpt2lab.components.norm import norm
from gpt2lab.components.objective import objective
from gpt2lab.components.parametrization import parametrization
from gpt2lab.components.position import position
from gpt2lab.components.residual import residual
from gpt2lab.components.scores import scores
from gpt2lab.components.stack import stack

__all__ = [
    "attention",
    "embedding",
    "head",
    "init",
    "linear",
    "mask",
    "mlp",
    "norm",
    "objective",
    "parametrization",
    "position",
    "residual",
    "scores",
    "stack",
]
