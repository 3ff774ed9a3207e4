"""Blocks against transformers' and against their published formulas, on copied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import B, C, H, T, V, initial, random, site, tokens
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2DecoderLayer
from transformers.models.gptj.modeling_gptj import GPTJBlock, GPTJConfig
from transformers.models.olmo2.modeling_olmo2 import Olmo2Config, Olmo2DecoderLayer

from gpt2lab.components.context import ForwardContext
from gpt2lab.components.position import Position
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT

HIDDEN = 48


def block_of(**choices: Any) -> Any:
    """A block with made-up weights."""
    block = site(**choices).build("residual")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return block.eval()


def stream() -> Tensor:
    return random(B, T, C, seed=6)


def context(depth: int = 0) -> ForwardContext:
    ctx = ForwardContext(torch.zeros(B, T, dtype=torch.int64))
    ctx.enter(depth, Position())
    return ctx


def copied(block: Any, attention: nn.Module, output: str, norms: dict[str, nn.Module]) -> None:
    """Copy attention and norms; Gemma's gains are stored minus one."""
    with torch.no_grad():
        for name, part in zip(("q_proj", "k_proj", "v_proj"), block.attn.c_attn.weight.chunk(3), strict=True):
            getattr(attention, name).weight.copy_(part)
        getattr(attention, output).weight.copy_(block.attn.c_proj.weight)
        for name, norm in norms.items():
            norm.weight.copy_(getattr(block, name).weight - (1 if "Gemma" in type(norm).__name__ else 0))


def gated(block: Any, theirs: Any) -> None:
    with torch.no_grad():
        gate, up = block.mlp.c_fc.weight.chunk(2)
        theirs.gate_proj.weight.copy_(gate)
        theirs.up_proj.weight.copy_(up)
        theirs.down_proj.weight.copy_(block.mlp.c_proj.weight)


def mask() -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1)[None, None]


def unrotated() -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angle zero."""
    return torch.ones(1, T, C // H), torch.zeros(1, T, C // H)


COMMON: dict[str, Any] = {
    "hidden_size": C, "intermediate_size": HIDDEN, "num_attention_heads": H, "num_key_value_heads": H,
    "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "attn_implementation": "eager", "vocab_size": V,
}  # fmt: skip
GATED = {"ratio": HIDDEN / C, "two_thirds": False}


def test_output_is_olmo_2s_block() -> None:
    block = block_of(residual="output", norm="rmsnorm", bias=False, mlp={"name": "swiglu", **GATED})
    theirs = Olmo2DecoderLayer(Olmo2Config(**COMMON), 0).eval()
    theirs.self_attn.q_norm = theirs.self_attn.k_norm = nn.Identity()  # over all heads together, ours over each
    norms = {"ln_1": theirs.post_attention_layernorm, "ln_2": theirs.post_feedforward_layernorm}
    copied(block, theirs.self_attn, "o_proj", norms)
    gated(block, theirs.mlp)
    expected = theirs(stream(), attention_mask=mask(), position_embeddings=unrotated())
    assert torch.allclose(block(stream(), context()), expected, atol=1e-5)


def test_sandwich_is_gemma_2s_block() -> None:
    block = block_of(residual="sandwich", norm="rmsnorm", bias=False, mlp={"name": "geglu", **GATED})
    config = Gemma2Config(
        **COMMON, head_dim=C // H, query_pre_attn_scalar=C // H, attn_logit_softcapping=None, hidden_activation="gelu"
    )
    theirs = Gemma2DecoderLayer(config, 0).eval()
    norms = {
        "ln_1": theirs.input_layernorm,
        "ln_1_out": theirs.post_attention_layernorm,
        "ln_2": theirs.pre_feedforward_layernorm,
        "ln_2_out": theirs.post_feedforward_layernorm,
    }
    copied(block, theirs.self_attn, "o_proj", norms)
    gated(block, theirs.mlp)
    expected = theirs(stream(), position_embeddings=unrotated(), attention_mask=mask())
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(block(stream(), context()), expected, atol=1e-5)


def test_parallel_is_gpt_js_block() -> None:
    block = block_of(residual="parallel")
    config = GPTJConfig(
        n_embd=C, n_head=H, n_layer=2, rotary_dim=C // H, n_positions=T, vocab_size=V,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = GPTJBlock(config, 0).eval()
    copied(block, theirs.attn, "out_proj", {"ln_1": theirs.ln_1})
    with torch.no_grad():
        theirs.ln_1.bias.copy_(block.ln_1.bias)
        for ours, other in ((block.mlp.c_fc, theirs.mlp.fc_in), (block.mlp.c_proj, theirs.mlp.fc_out)):
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)
        block.attn.c_attn.bias.zero_()  # GPT-J's attention has no biases
        block.attn.c_proj.bias.zero_()
    # all tokens at position 0, where its rotation is none
    expected = theirs(stream(), attention_mask=mask(), position_ids=torch.zeros(B, T, dtype=torch.int64))[0]
    assert torch.allclose(block(stream(), context()), expected, atol=1e-5)
    assert block.ln_2 is None


def test_branches_by_their_formulas() -> None:
    x = stream()

    def both(block: Any, first: Any, second: Any, depth: int = 0) -> Tensor:
        ctx = context(depth)
        y = first(x, lambda h: block.attn(h, ctx), block.ln_1)
        return second(y, lambda h: block.mlp(h, ctx), block.ln_2)  # type: ignore[no-any-return]

    block = block_of(residual={"name": "layerscale", "start": 1e-3})
    a, b = block.gain
    expected = both(block, lambda x, f, n: x + a * f(n(x)), lambda x, f, n: x + b * f(n(x)))
    assert torch.allclose(block(x, context()), expected, atol=1e-6)

    block = block_of(residual="rezero")
    a, b = block.scale
    expected = both(block, lambda x, f, n: x + a * f(x), lambda x, f, n: x + b * f(x))
    assert torch.allclose(block(x, context()), expected, atol=1e-6)

    block = block_of(residual="scaled_residual")
    scaled = lambda x, f, n: x + f(n(x) / 2)  # noqa: E731 - layer 4, counted from 1
    assert torch.allclose(block(x, context(3)), both(block, scaled, scaled, 3), atol=1e-6)

    block = block_of(residual={"name": "parallel", "two_norms": True})
    expected = x + block.attn(block.ln_1(x), context()) + block.mlp(block.ln_2(x), context())
    assert torch.allclose(block(x, context()), expected, atol=1e-6)


def test_rezero_starts_as_the_identity() -> None:
    model = initial(residual="rezero", position="none")
    assert torch.equal(model(tokens()), model.wte.unembed(model.wte.weight[tokens()]))
    assert not any(name.split(".")[-2].startswith("ln") for name, _ in model.named_parameters())


@pytest.mark.parametrize("dynamic", [True, False])
def test_hyper_connections_start_as_pre(dynamic: bool) -> None:
    choice = {"name": "hyper_connections", "streams": 3, "dynamic": dynamic}
    norm = {"name": "layernorm", "eps": 1e-12}  # the sum of three equal streams is three times that of `pre`
    plain, streams = (initial(norm=norm, residual=r) for r in ("pre", choice))
    assert torch.allclose(plain(tokens()), streams(tokens()), atol=1e-5)


def test_a_hyper_connection_by_its_formula() -> None:
    n, block = 3, block_of(residual={"name": "hyper_connections", "streams": 3})
    connection, x = block.connections[0], random(B, 3, T, C, seed=1)
    block.mlp, block.ln_2 = None, None
    block.connections = block.connections[:1]
    found = block(x, context())
    for b, t in ((0, 0), (1, 4)):
        change = torch.tanh(connection.norm(x[b, :, t]) @ connection.change.T).T  # (n + 2, n)
        weights = connection.static + torch.cat([change[:-1] * connection.size[0], change[-1:] * connection.size[1]])
        mixed = weights[:-1] @ x[b, :, t]  # (n + 1, C)
        # attention of this token reads all earlier ones, so their inputs are needed as well
        read = torch.stack([_read(connection, x[b, :, s]) for s in range(T)])[None]
        out = block.attn(block.ln_1(read), _one(context()))[0, t]
        for j in range(n):
            assert torch.allclose(found[b, j, t], mixed[1 + j] + weights[-1, j] * out, atol=1e-5)


def _read(connection: Any, x: Tensor) -> Tensor:
    change = torch.tanh(connection.norm(x) @ connection.change.T).T
    return (connection.static[0] + change[0] * connection.size[0]) @ x  # type: ignore[no-any-return]


def _one(ctx: ForwardContext) -> ForwardContext:
    ctx.tokens = ctx.tokens[:1]
    return ctx


def test_streams_must_pass_through_every_layer() -> None:
    with pytest.raises(ConfigError, match="its streams pass through all blocks"):
        load_config("nano", ["model.residual=[pre, hyper_connections]"])


def test_placements_may_differ_by_layer() -> None:
    model = initial(residual=["pre", "post"])
    assert [type(block).__name__ for block in model.h] == ["Pre", "Post"]
    assert isinstance(model.ln_f, nn.Identity)  # the last block normalises the stream itself
    assert model(tokens()).isfinite().all()


def test_a_branch_that_is_off_has_no_parameters() -> None:
    def names(model: GPT) -> set[str]:
        return {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("h.1.")}

    assert names(initial(attention=["mha", "none"])) == {"ln_2", "mlp"}
    assert names(initial(mlp="none")) == {"ln_1", "attn"}
    model = initial(attention="none", position="none")
    changed = tokens()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert torch.equal(model(tokens())[:, 1:], model(changed)[:, 1:])  # tokens exchange nothing


@pytest.mark.parametrize(("what", "shared"), [("attention", "attn"), ("mlp", "mlp")])
def test_one_branch_alone_can_be_shared(what: str, shared: str) -> None:
    model = initial(n_layer=4, stack=[{"name": "shared_layers", "what": what}])
    assert len(model.h) == 4
    assert len({id(getattr(block, shared)) for block in model.h}) == 1
    assert len({id(block.ln_1) for block in model.h}) == 4
    names = {name.split(".")[1] for name, _ in model.named_parameters() if f".{shared}." in name}
    assert names == {"0"}


@pytest.mark.parametrize("every", [1, 2])
def test_layers_in_turns_share_weights(every: int) -> None:
    model = initial(n_layer=6, stack=[{"name": "shared_layers", "every": every}])
    assert len(model.h) == every
    assert model.block_of == [layer % every for layer in range(6)]
