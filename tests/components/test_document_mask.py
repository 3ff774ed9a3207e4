"""Documents that do not see each other: a token's loss depends on its own document alone."""

from __future__ import annotations

import pytest
import torch
from small import initial
from torch import Tensor

from gpt2lab.components.attend import Mask
from gpt2lab.components.context import Cache, ForwardContext
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window
from gpt2lab.model import GPT

END = 50


def model() -> GPT:
    made = initial(mask={"name": "documents", "separator": END})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():  # a fresh model hardly looks at its context
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def text(seed: int, length: int) -> Tensor:
    return torch.randint(0, END, (1, length), generator=torch.Generator().manual_seed(seed))


def test_who_sees_whom_by_hand() -> None:
    tokens = torch.tensor([[3, END, 4, 5, END, END, 6]])
    allowed = Mask(separator=END).allowed(ForwardContext(tokens))[0, 0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    near = Mask(window=2, separator=END).allowed(ForwardContext(tokens))[0, 0].int().tolist()
    assert near[3] == [0, 0, 1, 1, 0, 0, 0]


def test_a_tokens_loss_does_not_depend_on_the_document_before() -> None:
    second = torch.cat([torch.tensor([[END]]), text(7, 8)], 1)
    targets = torch.cat([torch.full((1, 7), -100), text(8, 9)], 1)  # those of the second document alone

    def loss(made: GPT, first: Tensor) -> float:
        return made.loss(torch.cat([first, second], 1), targets).item()

    masked, open_ = model(), initial()
    open_.load_state_dict(masked.state_dict())
    assert loss(masked, text(1, 7)) == pytest.approx(loss(masked, text(2, 7)), abs=1e-6)
    assert abs(loss(open_, text(1, 7)) - loss(open_, text(2, 7))) > 1e-3


def test_it_is_what_documents_handed_over_give_and_holds_with_a_cache() -> None:
    made = model()
    tokens = torch.cat([text(1, 5), torch.tensor([[END]]), text(2, 6), torch.tensor([[END]]), text(3, 3)], 1)
    given = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
    plain = initial()
    plain.load_state_dict(made.state_dict())
    assert torch.allclose(made(tokens), plain(tokens, documents=given), atol=1e-6)
    cache = Cache()
    with torch.no_grad():
        pieces = [made(piece, cache=cache) for piece in tokens.split([4, 3, 1, 5, 3], 1)]
    assert torch.allclose(torch.cat(pieces, 1), made(tokens), atol=1e-5)


def test_evaluations_keep_to_documents_as_well() -> None:
    """One window over two documents scores as the second does behind another first one, but for the first's part."""
    made, second = model(), torch.cat([torch.tensor([END]), text(5, 10)[0]])

    def nats(first: Tensor) -> float:
        """Of the second document alone, by what evaluations report."""
        whole, alone = torch.cat([first, second]).numpy(), torch.cat([first, second[:1]]).numpy()
        config, sums = EvaluationConfig(tokens="all"), []
        for tokens in (whole, alone):
            record, _ = evaluate_by_window(made, tokens, config, block_size=16, batch_sequences=1)
            sums.append(record["metrics"]["val/loss"] * record["targets"])
        return sums[0] - sums[1]

    assert nats(text(1, 6)[0]) == pytest.approx(nats(text(2, 6)[0]), abs=1e-4)


def test_the_separator_must_be_the_tokenizers() -> None:
    assert load_config("gpt2-124m", ["model.mask=documents"]).model.mask[0].options["separator"] == 50256
    bpe = ["data.tokenizer={name: bpe, vocab_size: 4096}", "model.vocab_size=4096"]
    assert load_config("gpt2-124m", [*bpe, "model.mask={name: documents, separator: 4095}"])
    with pytest.raises(ConfigError, match=r"token 7, and tokenizer bpe ends them with 4095"):
        load_config("gpt2-124m", [*bpe, "model.mask={name: documents, separator: 7}"])
    with pytest.raises(ConfigError, match="tokenizer bytes has no separator"):
        load_config("nano", ["model.mask={name: documents, separator: 7}"])
    with pytest.raises(ConfigError, match="has separator 50256, but vocab_size is 4096"):
        load_config("gpt2-124m", [*bpe, "model.mask=documents"])


def test_the_row_before_is_that_of_the_same_document() -> None:
    documents, x = torch.tensor([[0, 0, 1, 1, 1, 2]]), torch.arange(1.0, 7).view(1, 6, 1)
    cache, pieces = Cache(), []
    for part in (slice(0, 3), slice(3, 5), slice(5, 6)):
        ctx = ForwardContext(documents[:, part], documents=documents[:, part], cache=cache)
        pieces.append(ctx.previous("x", x[:, part]))
        cache.length += part.stop - part.start
    whole = ForwardContext(documents, documents=documents).previous("x", x)
    assert whole.flatten().tolist() == torch.cat(pieces, 1).flatten().tolist() == [0, 1, 0, 3, 4, 0]
