"""Small models in fewer operations: the same numbers but for rounding, or the model's own way."""

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from families import EACH_FAMILY, VOCAB, tiny
from test_policy import branching_rows, gradient, plain_logprobs
from turnwise import cores, quick
from turnwise.batch import pack
from turnwise.config import TrainConfig
from turnwise.cores import compiled
from turnwise.devices import recomputing, set_computation
from turnwise.engine import Sampling
from turnwise.engines import attention, cache, sampling
from turnwise.engines.attention import Stretches, processor_attention
from turnwise.evaluation import make_engine, place
from turnwise.lora import add_lora
from turnwise.policy import Policy, load_policy, tiny_policy, token_logprobs, token_states
from turnwise.quick import is_quick, quicken

LIKE_LLAMA = ("llama", "qwen", "mistral", "granite")


def replaced(model: torch.nn.Module) -> int:
    """How many layers have another forward pass."""
    return sum(getattr(vars(m).get("forward"), "func", None) is quick._layer for m in model.modules())


def perturbed(model: torch.nn.Module) -> None:
    """Norms' weights and biases are all 1 and 0 at first; not any more."""
    drawn = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=drawn)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_familys_quick_layers_give_its_own_numbers_and_gradients(family: str):
    model = tiny(family, dtype=torch.float32, initializer_range=0.1)
    perturbed(model)
    ids = torch.arange(14).reshape(2, 7) % VOCAB
    names = [name for name, _ in model.named_parameters()]

    def found() -> list[torch.Tensor]:
        logits = model(input_ids=ids).logits
        weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
        grads = torch.autograd.grad((weights * logits).sum(), list(model.parameters()), allow_unused=True)
        return [logits.detach(), *(g if g is not None else torch.zeros(()) for g in grads)]

    plain = found()
    quicken(model)
    assert is_quick(model)
    # SmolLM's second layer has no rotary embedding, so it is not like Llama's
    assert replaced(model) == (2 if family.startswith(LIKE_LLAMA) else 1 if family == "smollm3" else 0)
    for name, one, other in zip(["logits", *names], plain, found(), strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(one.norm()) + 1e-6, name
    assert [name for name, _ in model.named_parameters()] == names


def test_biases_of_the_heads_have_gradients():
    model = tiny("qwen2", dtype=torch.float32, initializer_range=0.1)
    perturbed(model)
    bias = model.model.layers[0].self_attn.q_proj.bias
    ids = torch.arange(7)[None]
    plain = torch.autograd.grad(model(input_ids=ids).logits.square().sum(), bias)[0]
    quicken(model)
    assert_close(torch.autograd.grad(model(input_ids=ids).logits.square().sum(), bias)[0], plain, rtol=1e-4, atol=1e-4)
    assert plain.norm() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},  # of the output too
        {"mlp_bias": True},
    ],
)
def test_a_layer_that_differs_keeps_its_own_pass(options: dict[str, Any]):
    model = tiny("llama", dtype=torch.float32, **options)
    perturbed(model)
    ids = torch.arange(7)[None]
    plain = model(input_ids=ids).logits
    quicken(model)
    assert replaced(model) == 0
    assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"hidden_act": "gelu"}, ("gate_proj", "up_proj", "down_proj")),
        ({"attention_bias": True}, ("bias",)),
        ({"mlp_bias": True}, ("bias",)),
    ],
)
def test_what_todays_weights_hide_counts(options: dict[str, Any], hidden: tuple[str, ...]):
    model = tiny("llama", dtype=torch.float32, **options)
    for name, weight in model.named_parameters():
        if any(part in name for part in hidden):
            weight.data.zero_()
            weight.requires_grad_("bias" not in hidden)
    quicken(model)
    assert replaced(model) == 0


@pytest.mark.parametrize("scale", [10.0, 1e8, float("nan")])
def test_which_layers_are_quick_does_not_depend_on_what_was_learned(scale: float):
    for family in ("llama", "qwen2", "qwen3"):
        model = tiny(family, dtype=torch.float32)
        for weight in model.parameters():
            weight.data *= scale
        quicken(model)
        assert replaced(model) == 2


def test_partial_rotary_embeddings_go_the_layers_own_way():
    config = transformers.Glm4MoeConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "first_k_dense_replace": 1, "pad_token_id": 0},
    )
    model, ids = transformers.Glm4MoeForCausalLM(config).eval(), torch.arange(7)[None]
    plain = model(input_ids=ids).logits
    quicken(model)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_an_adapter_before_keeps_its_layers_own_pass():
    model = tiny("llama", dtype=torch.float32, hidden_act="gelu")
    add_lora(model, rank=2, alpha=4.0, targets=["k_proj"], seed=0, base="b")
    quicken(model)
    assert replaced(model) == 0


def test_a_failure_of_a_compiled_function_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        attention._seen(torch.zeros(2, 3), torch.zeros(5, 4))
    assert "must match" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_granites_scaled_residuals_are_its_own():
    model = tiny("granite", dtype=torch.float32, residual_multiplier=0.5)
    quicken(model)
    assert replaced(model) == 0


def test_only_small_float32_models_on_a_processor_with_sdpa_are_quick(monkeypatch: pytest.MonkeyPatch):
    on_another: Any = tiny("llama", dtype=torch.float32).to("meta")  # pyright: ignore[reportArgumentType]
    for model in (tiny("llama"), tiny("llama", dtype=torch.bfloat16), on_another):
        quicken(model)
        assert not is_quick(model)
        assert replaced(model) == 0
    eager = tiny("llama", dtype=torch.float32, attention="eager")
    quicken(eager)
    assert replaced(eager) == 0
    monkeypatch.setattr(cores, "SMALL", 1)
    large = tiny("llama", dtype=torch.float32)
    quicken(large)
    assert not is_quick(large)


def test_a_set_size_of_micro_batches_keeps_every_bit(checkpoint):
    own, open_ = (place(load_policy(checkpoint), TrainConfig(micro_batch_tokens=size)) for size in (2048, None))
    assert not is_quick(own.model)
    assert is_quick(open_.model)
    assert replaced(open_.model) == open_.model.config.num_hidden_layers
    plain, ids = load_policy(checkpoint), torch.arange(9)[None]
    logits = [policy.model(input_ids=ids).logits for policy in (own, plain, open_)]
    assert torch.equal(logits[0], logits[1])
    assert_close(logits[2], logits[1])


def test_adapters_mixed_precision_dropout_and_another_dtype_go_the_layers_own_way():
    ids = torch.arange(7)[None]
    model, plain = (tiny("qwen3", dtype=torch.float32) for _ in range(2))
    quicken(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    for each in (model, plain):
        each.train()
        for layer in each.model.layers:
            layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    dropped = model(input_ids=ids).logits
    torch.manual_seed(0)
    assert torch.equal(dropped, plain(input_ids=ids).logits)
    for each in (model, plain):
        each.eval()
    unadapted = plain(input_ids=ids).logits
    for each in (model, plain):
        add_lora(each, rank=2, alpha=4.0, targets=["k_proj", "up_proj"], seed=0, base="b")
        for name, weight in each.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.1)
    adapted = [each(input_ids=ids).logits for each in (model, plain)]
    assert torch.equal(*adapted)
    assert not torch.allclose(adapted[0], unadapted)
    model, plain = (tiny("qwen3", dtype=torch.float32) for _ in range(2))
    quicken(model)
    assert torch.equal(model.double()(input_ids=ids).logits, plain.double()(input_ids=ids).logits)


def test_a_copy_of_a_quick_model_has_its_own_weights():
    model = tiny("qwen3", dtype=torch.float32)
    quicken(model)
    copied, ids = copy.deepcopy(model), torch.arange(7)[None]
    assert is_quick(copied)
    assert replaced(copied) == 2
    before = model(input_ids=ids).logits
    for weight in copied.parameters():
        weight.data *= 1.1
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(copied(input_ids=ids).logits, before)
    layer = pickle.loads(pickle.dumps(model.model.layers[0]))
    states = torch.randn(1, 3, 32)
    angles = (torch.randn(1, 3, 128), torch.randn(1, 3, 128))
    assert torch.equal(*(x(states, position_embeddings=angles) for x in (layer, model.model.layers[0])))


def test_recomputed_layers_have_the_same_gradient():
    model, ids = tiny("qwen3", dtype=torch.float32), torch.arange(14).reshape(2, 7)
    quicken(model)
    grads = []
    for recompute in (False, True):
        set_computation(model, dtype="float32", recompute=recompute)
        with recomputing(model):
            logits = model(input_ids=ids).logits
        grads.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
        assert replaced(model) == 2
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_a_quick_policys_completions_are_its_own_where_nothing_is_near_a_tie(checkpoint):
    def drawn(size: int | None) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        engine = make_engine(place(load_policy(checkpoint), TrainConfig(micro_batch_tokens=size)))

        async def everything() -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
            prompts = [[3 + (7 * i + j) % 40 for i in range(100)] for j in range(2)]
            asked = [
                engine.generate(prompt, Sampling(max_tokens=12, seed=seed), session=(j, seed))
                for j, prompt in enumerate(prompts)
                for seed in range(5)
            ]
            return [(c.token_ids, c.logprobs) for c in await asyncio.gather(*asked)]

        return asyncio.run(everything())

    for (tokens, logprobs), (others, other_logprobs) in zip(drawn(2048), drawn(None), strict=True):
        assert tokens == others
        assert logprobs == pytest.approx(other_logprobs, abs=1e-4)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Pieces of 3 queries, or 2 near ones; the list gets how many queries and keys each product of scores has."""
    seen: list[tuple[int, int]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return plain(query, key, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "QUERIES", 3)
    monkeypatch.setattr(attention, "NEAR_QUERIES", 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama"])
def test_long_stretches_in_pieces_are_the_same(short_pieces, bpe_chat, family: str, window: int | None):
    if family == "llama" and window:
        pytest.skip("Llama's layers see everything")
    options: dict[str, Any] = {} if family == "llama" else {"sliding_window": window}
    if window and family == "qwen3":
        options |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny(family, vocab=300, initializer_range=0.1, **options)
    vars(model)["is_quick"] = True
    policy, made = Policy(model, bpe_chat), branching_rows()
    batch = pack(made, pad_id=0)
    short_pieces.clear()
    states = token_states(model, batch)
    assert max(queries for queries, _ in short_pieces) <= 4, "a stretch of 9 tokens in three pieces, of 4 in one"
    if window in (1, 2, 3):
        assert (2, 1 + window) in short_pieces
    found, _ = token_logprobs(model, batch, batch.attention, states=states)
    expected = torch.cat([plain_logprobs(policy, row) for row in made])
    assert_close(found, expected, atol=1e-5, rtol=0, check_dtype=False)
    weights = torch.linspace(-1, 2, len(found))
    pieces, plain = (gradient(policy, (weights * x).sum()) for x in (found, expected))
    assert_close(pieces, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-4)


def test_another_mask_or_special_attention_is_left_to_transformers():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.full((1, 1, 3, 3), -1e30).triu(1)
    other = torch.zeros(1, 1, 3, 3)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore
    plain = [processor_attention(module, query, key.clone(), key, m, scaling=0.5)[0] for m in (mask, other)]
    vars(key)["stretches"] = Stretches(mask)
    for given, expected in zip((mask, other), plain, strict=True):
        assert_close(processor_attention(module, query, key, key, given, scaling=0.5)[0], expected)
    with pytest.raises(ValueError, match="softcap"):  # which transformers' sdpa does not know
        processor_attention(module, query, key, key, mask, scaling=0.5, softcap=30.0)


def test_what_runs_without_the_interpreter_does_on_a_processor():
    functions = (
        *(attention._seen, attention._by_families, cache._write, cache._gathered, sampling.drawn_tokens),
        *(quick._heads, quick._heads_back, quick._rest, quick._rest_back),
    )
    for function in functions:
        script = [
            c.cell_contents for c in function.__closure__ or () if isinstance(c.cell_contents, torch.jit.ScriptFunction)
        ]
        assert len(script) == 1, f"{function.__name__} is interpreted"


def test_a_function_that_cannot_be_compiled_is_interpreted():
    def interpreted(x: torch.Tensor) -> torch.Tensor:
        return eval("x + 1")

    assert compiled(interpreted) is interpreted
    written: Any = cache._gathered
    run = compiled(written.__wrapped__)
    stored = torch.arange(24.0).view(2, 2, 3, 2)
    rows, positions = torch.tensor([[1], [0]]), torch.tensor([[0, 2], [1, 1]])
    expected = stored.transpose(1, 2)[rows, positions].transpose(1, 2)
    assert torch.equal(run(stored, rows, positions), expected)
    assert run(stored.to("meta"), rows.to("meta"), positions.to("meta")).shape == expected.shape


def test_the_embedded_policy_has_three_quick_layers(bpe_chat):
    assert replaced(place(load_policy("embedded"), TrainConfig()).model) == 3
    fresh = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
    quicken(fresh.model)
    assert replaced(fresh.model) == 2
