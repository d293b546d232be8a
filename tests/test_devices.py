"""Devices, dtypes, mixed precision and recomputation."""

import asyncio
import copy

import pytest
import torch
from torch.testing import assert_close

from turnwise import devices
from turnwise.batch import pack, rollout_row
from turnwise.config import TrainConfig
from turnwise.devices import check_device, chosen_device, compute_dtype, placed
from turnwise.engine import Sampling
from turnwise.errors import ConfigError
from turnwise.evaluation import make_engine
from turnwise.policy import Policy, tiny_policy, token_logprobs, token_states
from turnwise.types import Action, Rollout, Turn

PROMPT = (3, 4, 5, 6)


def batch():
    """Three rows that share a prompt, two of them a turn: three levels."""

    def turn(*ids: int) -> Turn:
        return Turn(action_ids=ids, sampling_logprobs=(-1.0,) * len(ids), text="", action=Action(), reply_ids=(9, 8))

    played = [
        (turn(10, 11, 12), turn(20, 21)),
        (
            turn(10, 11, 12),
            turn(
                22,
            ),
        ),
        (turn(13, 14), turn(23, 24, 25)),
    ]
    rollouts = [Rollout(task_id="t", group=0, prompt_ids=PROMPT, turns=turns, stop="answer") for turns in played]
    return pack([rollout_row(r, [1.0, 2.0], [True, True]) for r in rollouts], pad_id=0)


def fresh(tiny: Policy, **options) -> Policy:
    return Policy(placed(copy.deepcopy(tiny.model), **options), tiny.chat)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    made = batch()
    logprobs, entropy = token_logprobs(policy.model, made, made.loss)
    assert logprobs.dtype == entropy.dtype == torch.float32
    policy.model.zero_grad()
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def test_a_small_model_stays_on_the_processor_and_a_large_one_takes_a_gpu(monkeypatch: pytest.MonkeyPatch):
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(5000, 5000, device="meta")
    for gpu, kind in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "is_available", lambda: True)
            assert [chosen_device("auto", m).type for m in (small, large)] == ["cpu", gpu]
            check_device(gpu)
    assert chosen_device("auto", large).type == "cpu"
    assert chosen_device("cuda", small).type == "cuda"  # whoever names it gets it


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match=r"device must be one that torch offers on this machine; got cuda; take cpu"):
        check_device("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be a known name; got 'float16'"),
        ({"device": "gpu"}, "device must be a known name; got 'gpu'"),
        ({"gradient_checkpointing": "yes"}, "gradient-checkpointing must be true or false; got 'yes'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_weights_go_to_bfloat16_and_rotary_frequencies_do_not(tiny: Policy):
    model = fresh(tiny, dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_small_part_that_learns_stays_in_float32(tiny: Policy):
    model = copy.deepcopy(tiny.model).requires_grad_(False)
    model.get_decoder().norm.weight.requires_grad_(True)
    placed(model, dtype="bfloat16")
    kept = {name: p.dtype for name, p in model.named_parameters()}
    assert kept.pop("model.norm.weight") == torch.float32
    assert set(kept.values()) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_bfloat16_comes_near_float32(tiny: Policy, dtype):
    exact, near = gradients(tiny), fresh(tiny, dtype=dtype)
    found = gradients(near)
    assert compute_dtype(near.model) == torch.bfloat16
    assert {g.dtype for g in found.values()} == {torch.float32 if dtype == "mixed" else torch.bfloat16}
    for name, gradient in found.items():
        assert (gradient.float() - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-3, name


def test_mixed_precision_follows_the_weights_after_a_step(tiny: Policy):
    policy = fresh(tiny, dtype="mixed")
    made = batch()
    before, _ = token_logprobs(policy.model, made, made.loss)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(2)
    after, _ = token_logprobs(policy.model, made, made.loss)
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("window", [2, 100])
def test_recomputed_layers_give_the_same_gradients(bpe_chat, window: int):
    policy = tiny_policy(bpe_chat, seed=1, hidden=16, layers=3)
    policy.model.config.sliding_window = window
    plain, again = gradients(policy), fresh(policy, recompute=True)
    for name, gradient in gradients(again).items():
        assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)
    assert not any("forward" in vars(layer) for layer in again.model.get_decoder().layers)


def test_recomputation_keeps_less(tiny: Policy):
    def kept(policy: Policy) -> int:
        sizes = {}

        def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            states = token_states(policy.model, batch())
        del states
        return sum(sizes.values())

    assert kept(fresh(tiny, recompute=True)) < 0.7 * kept(tiny)


def test_everything_that_is_made_for_a_model_is_made_on_its_device(tiny: Policy):
    # on `meta` tensors have no content; operations across devices are refused there as they are on a GPU
    model, made = copy.deepcopy(tiny.model).to("meta"), batch()
    states = token_states(model, made.to(torch.device("meta")))
    assert states.device.type == "meta"
    assert states.shape == token_states(tiny.model, made).shape
    assert made.to(torch.device("cpu")) is made


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_the_engine_samples_with_nearly_the_probabilities_that_training_computes(tiny: Policy, dtype):
    policy = fresh(tiny, dtype=dtype)
    engine = make_engine(policy)

    async def drawn():
        return await engine.generate(PROMPT, Sampling(max_tokens=12, seed=1), session=0)

    done = asyncio.run(drawn())
    turn = Turn(action_ids=done.token_ids, sampling_logprobs=done.logprobs, text="", action=Action(), reply_ids=())
    rollout = Rollout(task_id="t", group=0, prompt_ids=PROMPT, turns=(turn,), stop="answer")
    made = pack([rollout_row(rollout, [1.0], [True])], pad_id=0)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy.model, made, made.loss)
    assert_close(logprobs, torch.tensor(done.logprobs), atol=0.05, rtol=0)


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "_limit", lambda file: 12345)
    assert devices.device_memory(cpu) == 12345
    monkeypatch.setattr(devices, "_limit", lambda file: None)
    assert (devices.device_memory(cpu) or 0) > 2**30
