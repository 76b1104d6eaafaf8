"""L0/L3: the torch model follows the equations, the chunk semantics and the ways of transformers."""

import pytest
import torch
from conftest import random_model
from tolerances import TORCH, assert_close, assert_greedy
from transformers import AutoConfig, AutoModelForCausalLM

from melt_layers import Gate, GateLinear
from melt_models import GATE_KINDS, KVCache, MeltCausalLM, MeltConfig
from melt_models.modeling import GATE_INIT_STD


def ids(length: int = 21, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 703, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive_logits(model: MeltCausalLM, tokens: torch.Tensor, loops: int, chunk: int) -> torch.Tensor:
    """The equations once more, token by token and head by head, without cache classes or fused attention."""
    config, body = model.config, model.model
    layers = range(config.num_hidden_layers)
    per_loop = config.gate_kind == "none"
    final: dict[tuple[int, int], list] = {}  # (loop, layer) -> [(key, value)] of earlier chunks, each [Hk, dh]

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        half = config.head_dim // 2
        angle = position / config.rope_theta ** (torch.arange(half).double() * 2 / config.head_dim)
        cos, sin = angle.cos().float(), angle.sin().float()
        return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)

    out = []
    for start in range(0, len(tokens), chunk):
        piece = range(start, min(start + chunk, len(tokens)))
        x = {i: body.embed_tokens(tokens[i]) for i in piece}
        h = {(i, n): torch.zeros(config.hidden_size) for i in piece for n in layers}
        for loop in range(loops):
            for n in layers:
                layer, rows = body.layers[n], {}
                a = {i: layer.input_layernorm(x[i]) for i in piece}
                for i in piece:
                    h[i, n] = gate_by_the_paper(layer.gate, a[i], h[i, n], loop + 1)
                    key = layer.self_attn.k_proj(h[i, n]).view(-1, config.head_dim)
                    value = layer.self_attn.v_proj(h[i, n]).view(-1, config.head_dim)
                    rows[i] = (rotate(key, i), value)
                past = final.get((loop if per_loop else 0, n), [])
                for i in piece:
                    seen = past + [rows[j] for j in piece if j <= i]
                    query = rotate(layer.self_attn.q_proj(a[i]).view(-1, config.head_dim), i)
                    heads = []
                    for head in range(config.num_attention_heads):
                        group = head * config.num_key_value_heads // config.num_attention_heads
                        keys = torch.stack([key[group] for key, _ in seen])
                        values = torch.stack([value[group] for _, value in seen])
                        heads.append(torch.softmax(keys @ query[head] / config.head_dim**0.5, 0) @ values)
                    x[i] = x[i] + layer.input_layernorm_2(layer.self_attn.o_proj(torch.cat(heads)))
                    x[i] = x[i] + layer.post_attention_layernorm_2(layer.mlp(layer.post_attention_layernorm(x[i])))
                if per_loop or loop == loops - 1:
                    final[(loop if per_loop else 0, n)] = past + [rows[i] for i in piece]
            x = {i: body.norm(x[i]) for i in piece}
        out += [model.lm_head(x[i]) for i in piece]
    return torch.stack(out)


def gate_by_the_paper(gate: Gate, a: torch.Tensor, h: torch.Tensor, t: int) -> torch.Tensor:
    if gate.kind in ("none", "last"):
        return a
    if gate.kind == "mean":
        return (h * (t - 1) + a) / t
    z = gate.ema if gate.kind == "ema" else torch.sigmoid(gate.w_z(a) + gate.u_z(h))
    return z * h + (1 - z) * a


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize(("loops", "chunk"), [(4, 5), (3, 1), (1, 32)])
def test_forward_follows_the_equations(kind, loops, chunk):
    model, tokens = random_model(gate_kind=kind), ids(13, 1)
    with torch.no_grad():
        actual = model(tokens, loops=loops, chunk_size=chunk).logits[0]
    assert_close(actual, naive_logits(model, tokens[0], loops, chunk), TORCH)


def test_a_closed_gate_in_one_chunk_is_a_looplm():
    """With z = 0 a MELT layer is exactly an Ouro layer; inside one chunk the caches are the same too."""
    melt, looplm = random_model(gate_kind="elementwise"), random_model(gate_kind="none")
    looplm.load_state_dict({k: v for k, v in melt.state_dict().items() if ".gate." not in k})
    for layer in melt.model.layers:
        torch.nn.init.constant_(layer.gate.w_z.bias, -1e9)
    tokens = ids()
    assert_close(melt(tokens, chunk_size=64).logits, looplm(tokens, chunk_size=64).logits, TORCH)


def test_a_continued_cache_equals_one_pass():
    model, tokens = random_model(), ids(24)
    cache = KVCache(model.config)
    parts = [model(part, past_key_values=cache, chunk_size=8).logits for part in tokens.split(16, dim=1)]
    assert_close(torch.cat(parts, 1), model(tokens, chunk_size=8).logits, TORCH)
    assert cache.length == 24


def test_cache_slots():
    for kind, slots in (("elementwise", 1), ("none", 4)):
        model = random_model(gate_kind=kind)
        output = model(ids())
        assert output.cache is output.past_key_values
        assert output.cache.length == ids().shape[1]
        assert len(output.cache.slots) == slots * model.config.num_hidden_layers


def test_new_gates_start_near_zero():
    model = MeltCausalLM(MeltConfig(**{**random_model().config.to_dict(), "gate_bias_init": -4.0}))
    gates = [module for module in model.modules() if isinstance(module, GateLinear)]
    assert len(gates) == 2 * model.config.num_hidden_layers
    for gate in gates:
        assert gate.weight.std() < 2 * GATE_INIT_STD
        assert gate.bias is None or torch.all(gate.bias == -4.0)


def test_loss_is_next_token_cross_entropy():
    model, tokens = random_model(), ids()
    labels = tokens.clone()
    labels[:, :10] = -100
    out = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten())
    assert_close(out.loss, expected, TORCH)


def test_gradients_reach_every_parameter_through_the_cache():
    model, tokens = random_model(), ids()
    model(tokens, chunk_size=4).logits[:, -1].square().sum().backward()
    unused = {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None or not parameter.grad.any()) == (name in unused), name


@pytest.mark.parametrize("tied", [False, True])
def test_auto_classes_round_trip(tmp_path, tied):
    model = random_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MeltConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MeltCausalLM)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokens = ids()
    assert loaded(tokens).logits.equal(model(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_kind": "maybe"}, "gate_kind must be 'none', 'elementwise'"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"total_ut_steps": 0}, "total_ut_steps must be at least 1, got 0"),
        ({"chunk_size": -1}, "chunk_size must be at least 1, got -1"),
        ({"gate_ema": 1.5}, "gate_ema must be at most 1, got 1.5"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}}, "rope_type must be 'default'"),
        ({"sliding_windows": 4}, r"unknown configuration keys \['sliding_windows'\]"),
    ],
)
def test_bad_configurations_name_field_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        MeltConfig(**{**{"hidden_size": 64, "num_attention_heads": 4}, **changes})


def test_a_greedy_continuation_uses_the_cache():
    """Token by token equals the whole text again: a cache that were lost would go unnoticed otherwise."""
    model, tokens = random_model(), ids(9)
    new = model.generate_greedy(tokens, 8, chunk_size=1)
    assert_greedy(model, tokens[0].tolist(), new[0].tolist(), chunk_size=1)


def test_forward_refuses_a_cache_of_another_kind():
    with pytest.raises(TypeError, match="past_key_values must be a KVCache or None, got tuple"):
        random_model()(ids(), past_key_values=())


@pytest.mark.parametrize("name", ["loops", "chunk_size"])
def test_forward_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        random_model()(ids(), **{name: 0})
