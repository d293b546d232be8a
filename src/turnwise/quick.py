"""Layers of small models on a processor in few operations, which round otherwise than transformers' own.

A layer of a small model is some sixty short operations, most of which pass over as many numbers for little arithmetic,
and after each of them a thread waits for its turn at the interpreter: two threads with operations of 5 µs are slower
than one. Here a layer is two functions around its attention, each compiled by TorchScript, which runs without the
interpreter, and each with a backward pass of its own.
"""

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turnwise.cores import compiled, has_short_operations

MOST_OFF = 1e-4
"""How far results and gradients may be from transformers' own, of their size, in float32."""
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def quicken(model: PreTrainedModel) -> None:
    """Replaces the layers of a small float32 model on a processor that are like Llama's; others stay as they are.

    Each is compared with its own class's before, result and gradients, under weights that are drawn: what today's hide
    (zeros, say) counts as well, and a run that goes on has the same layers. Those with an adapter stay as they are.
    Weights, their names and what is saved stay, too.
    """
    if is_quick(model) or not has_short_operations(model) or model.dtype is not torch.float32:
        return
    gc.collect()  # a quick layer and its forward pass hold each other: a policy let go of is freed by this alone
    vars(model)["is_quick"] = True
    if model.config._attn_implementation != "sdpa":
        return
    for module in model.modules():
        if all(hasattr(module, name) for name in PARTS) and _agrees(module):
            module.forward = functools.partial(_layer, module)


def is_quick(model: torch.nn.Module) -> bool:
    """Whether the model has been quickened, whatever became of its layers: what reads it may round otherwise, too."""
    return vars(model).get("is_quick", False)


def _agrees(layer: Any) -> bool:
    """Whether the quick forward pass gives what the layer's own class gives and its gradients, whatever its weights."""
    drawn = torch.Generator().manual_seed(0)
    try:
        if any(type(each) is not torch.nn.Linear for each in _linear(layer)):
            return False
        other = copy.deepcopy(layer).eval()
        for weight in other.parameters():
            numbers = torch.randn(weight.shape, generator=drawn)
            weight.requires_grad_().data = numbers / weight.shape[-1] ** 0.5 if weight.dim() > 1 else numbers
        width, head = other.input_layernorm.weight.shape[0], other.self_attn.head_dim
        states = torch.randn(1, 7, width, generator=drawn).requires_grad_()
        angles = torch.randn(2, 1, 7, head, generator=drawn)
        grad = torch.randn(1, 7, width, generator=drawn)
        seen: list[list[Tensor]] = []
        for forward in (type(layer).forward, _layer):
            with torch.enable_grad():
                out = forward(other, states, position_embeddings=(angles[0], angles[1]))
                out = out[0] if isinstance(out, tuple) else out
                seen.append([out.detach(), *torch.autograd.grad(out, [states, *other.parameters()], grad)])
    except Exception:  # whatever another family's layers ask for or lack
        return False
    return all(float((a - b).norm()) <= MOST_OFF * float(a.norm()) for a, b in zip(*seen, strict=True))


def _linear(layer: Any) -> list[Any]:
    """The linear layers: queries', keys', values' and output's; gate's, values' and output's."""
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _layer(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The forward pass of Llama's layer and its kin; a layer that an adapter has changed takes its own."""
    attention, linear = layer.self_attn, _linear(layer)
    mixed = hidden_states.dtype is not torch.float32 or torch.is_autocast_enabled("cpu")
    dropout = attention.training and attention.attention_dropout
    whole = position_embeddings is not None and position_embeddings[0].shape[-1] == attention.head_dim  # not partial
    if mixed or dropout or not whole or any(type(each) is not torch.nn.Linear for each in linear):
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **options,
        )
    assert position_embeddings is not None
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    epsilon = 0.0 if norms[0] is None else norms[0].variance_epsilon
    query, key, value = _applied(
        _Heads,
        _heads,
        3,
        hidden_states,
        *position_embeddings,
        attention.head_dim,
        layer.input_layernorm.variance_epsilon,
        epsilon,
        layer.input_layernorm.weight,
        *(None if norm is None else norm.weight for norm in norms),
        *(each.weight for each in linear[:3]),
        *(each.bias for each in linear[:3]),
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    window = getattr(attention, "sliding_window", None)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    attended, _ = attend(
        attention, query, key, value, attention_mask, scaling=attention.scaling, sliding_window=window, **options
    )
    norm = layer.post_attention_layernorm
    weights = (norm.weight, *(each.weight for each in linear[3:]))
    (states,) = _applied(_Rest, _rest, 1, hidden_states, attended.flatten(2), norm.variance_epsilon, *weights)
    return states


def _applied(
    function: type[torch.autograd.Function], forward: Callable[..., Any], results: int, *given: Any
) -> tuple[Tensor, ...]:
    """What `forward` gives first, with its backward pass where gradients are wanted."""
    if not torch.is_grad_enabled():
        return forward(*given)[:results]
    made: Any = function.apply(*given)
    return made if isinstance(made, tuple) else (made,)


class _Heads(torch.autograd.Function):
    """`_heads`, with gradients."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = _heads(*given)
        _, cos, sin, ctx.width, *_ = given
        ctx.save_for_backward(cos, sin, *found[3:], *given[6:])
        return found[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_query, of_key, of_value = grads
        found = _heads_back(of_query, of_key, of_value, ctx.width, *ctx.saved_tensors)
        return found[0], None, None, None, None, None, *found[1:]


class _Rest(torch.autograd.Function):
    """`_rest`, with gradients."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = _rest(*given)
        ctx.save_for_backward(given[1], *found[1:], *given[3:])
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, attended, *weights = _rest_back(grads[0], *ctx.saved_tensors)
        return states, attended, None, *weights


# What follows is compiled, and typed as the compiler wants it. Shapes: B rows of T tokens, N = B T, d wide; H heads of
# queries, K of keys and as many of values, D wide.


def _inverse(states: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean square + epsilon) over the last axis, which is kept."""
    norm = torch.linalg.vector_norm(states, 2.0, [-1], True)
    return norm.square_().mul_(1.0 / states.shape[-1]).add_(epsilon).rsqrt_()


def _through_norm(grad: Tensor, normal: Tensor, inverse: Tensor) -> Tensor:
    """The gradient with respect to x of `normal`, which is x times `inverse`; overwrites `grad`."""
    along = (grad * normal).sum([-1], True).mul_(-1.0 / normal.shape[-1])
    return grad.addcmul_(normal, along).mul_(inverse)


def _turn(states: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    """Rotary embedding of (B, T, N, D) at angles (B, T, 1, D) into `out`; with sign -1 its transpose."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    of_first, of_second = sin[..., :half], sin[..., half:]
    if sign < 0:
        of_first, of_second = of_second, of_first
    torch.mul(states, cos, out=out)
    out[..., :half].addcmul_(second, of_first, value=-sign)
    out[..., half:].addcmul_(first, of_second, value=sign)
    return out


@compiled
def _heads(
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    width: int,
    epsilon: float,
    head_epsilon: float,
    norm: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries (B, H, T, D), keys and values (B, K, T, D) of states (B, T, d); and for the backward pass the states by
    their sizes (N, d) with 1 / sizes, and the heads by theirs."""
    flat = states.flatten(0, 1)
    inverse = _inverse(flat, epsilon)
    normal = flat * inverse
    scaled = normal * norm
    q, k, v = w_q.shape[0], w_k.shape[0], w_v.shape[0]
    made = states.new_empty([flat.shape[0], q + k + v])
    torch.mm(scaled, w_q.t(), out=made[:, :q])
    torch.mm(scaled, w_k.t(), out=made[:, q : q + k])
    torch.mm(scaled, w_v.t(), out=made[:, q + k :])
    if b_q is not None:
        made[:, :q] += b_q
    if b_k is not None:
        made[:, q : q + k] += b_k
    if b_v is not None:
        made[:, q + k :] += b_v
    heads = made.view(states.shape[0], states.shape[1], -1, width)
    queries, keys = q // width, k // width
    turning = heads[:, :, : queries + keys]
    head_normal: Tensor | None = None
    head_inverse: Tensor | None = None
    if query_norm is not None and key_norm is not None:
        by_head = _inverse(turning, head_epsilon)
        turning = turning * by_head
        head_normal, head_inverse = turning, by_head
        turning = turning * torch.cat([query_norm.expand(queries, -1), key_norm.expand(keys, -1)])
    turned = states.new_empty([states.shape[0], states.shape[1], queries + keys, width])
    _turn(turning, cos.unsqueeze(2), sin.unsqueeze(2), 1, turned)
    query, key = turned[:, :, :queries].transpose(1, 2), turned[:, :, queries:].transpose(1, 2)
    value = heads[:, :, queries + keys :].transpose(1, 2)
    return query, key, value, normal, inverse, head_normal, head_inverse


@compiled
def _heads_back(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    width: int,
    cos: Tensor,
    sin: Tensor,
    normal: Tensor,
    inverse: Tensor,
    head_normal: Tensor | None,
    head_inverse: Tensor | None,
    norm: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of the states and, in the order of `_heads`, of its weights."""
    q, k, v = w_q.shape[0], w_k.shape[0], w_v.shape[0]
    rows, tokens = of_query.shape[0], of_query.shape[2]
    queries, keys = q // width, k // width
    heads = of_query.new_empty([rows, tokens, (q + k + v) // width, width])
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    _turn(of_query.transpose(1, 2), cos, sin, -1, heads[:, :, :queries])
    _turn(of_key.transpose(1, 2), cos, sin, -1, heads[:, :, queries : queries + keys])
    heads[:, :, queries + keys :].copy_(of_value.transpose(1, 2))
    of_query_norm: Tensor | None = None
    of_key_norm: Tensor | None = None
    if head_normal is not None and head_inverse is not None and query_norm is not None and key_norm is not None:
        turned = heads[:, :, : queries + keys]
        by_head = (turned * head_normal).flatten(0, 1).sum(0)
        of_query_norm, of_key_norm = by_head[:queries].sum(0), by_head[queries:].sum(0)
        scale = torch.cat([query_norm.expand(queries, -1), key_norm.expand(keys, -1)])
        turned.copy_(_through_norm(turned * scale, head_normal, head_inverse))
    flat = heads.view(rows * tokens, -1)
    of_q, of_k, of_v = flat[:, :q], flat[:, q : q + k], flat[:, q + k :]
    states = torch.mm(of_q, w_q * norm)
    states.addmm_(of_k, w_k * norm)
    states.addmm_(of_v, w_v * norm)
    unscaled = torch.mm(flat.t(), normal)  # the gradients of weights times `norm`
    of_norm = torch.zeros_like(norm)
    of_weights: list[Tensor | None] = []
    of_biases: list[Tensor | None] = []
    first = 0
    for weight, bias in [(w_q, b_q), (w_k, b_k), (w_v, b_v)]:
        part = unscaled[first : first + weight.shape[0]]
        of_norm += (part * weight).sum(0)
        of_weights.append(part * norm)
        of_biases.append(None if bias is None else flat[:, first : first + weight.shape[0]].sum(0))
        first += weight.shape[0]
    states = _through_norm(states, normal, inverse).view(rows, tokens, -1)
    found: list[Tensor | None] = [states, of_norm, of_query_norm, of_key_norm]
    found.extend(of_weights)
    found.extend(of_biases)
    return found


@compiled
def _rest(
    states: Tensor, attended: Tensor, epsilon: float, norm: Tensor, w_o: Tensor, w_g: Tensor, w_u: Tensor, w_d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer's states (B, T, d) after what was attended (B, T, H D); and for the backward pass the states between, by
    their sizes (N, d), with 1 / sizes, and the gate, the values and their product."""
    between = torch.addmm(states.flatten(0, 1), attended.flatten(0, 1), w_o.t())
    inverse = _inverse(between, epsilon)
    normal = between * inverse
    scaled = normal * norm
    gate, values = torch.mm(scaled, w_g.t()), torch.mm(scaled, w_u.t())
    product = torch.nn.functional.silu(gate).mul_(values)
    return between.addmm_(product, w_d.t()).view_as(states), normal, inverse, gate, values, product


@compiled
def _rest_back(
    grad: Tensor,
    attended: Tensor,
    normal: Tensor,
    inverse: Tensor,
    gate: Tensor,
    values: Tensor,
    product: Tensor,
    norm: Tensor,
    w_o: Tensor,
    w_g: Tensor,
    w_u: Tensor,
    w_d: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the states, of what was attended and, in the order of `_rest`, of its weights."""
    flat, given = grad.flatten(0, 1), attended.flatten(0, 1)
    of_d = torch.mm(flat.t(), product)
    of_product = torch.mm(flat, w_d)
    of_values = torch.nn.functional.silu(gate).mul_(of_product)
    of_gate = torch.ops.aten.silu_backward(of_product.mul_(values), gate)
    of_normal = torch.mm(of_gate, w_g * norm).addmm_(of_values, w_u * norm)
    of_g, of_u = torch.mm(of_gate.t(), normal), torch.mm(of_values.t(), normal)
    of_norm = (of_g * w_g).add_(of_u * w_u).sum(0)
    between = _through_norm(of_normal, normal, inverse).add_(flat)
    of_o = torch.mm(between.t(), given)
    of_attended = torch.mm(between, w_o).view_as(attended)
    return between.view_as(grad), of_attended, of_norm, of_o, of_g.mul_(norm), of_u.mul_(norm), of_d
