"""Small pretrained Llamas in the format of llama2.c (`stories260K.bin` and its like) as Hugging Face checkpoints.

The *legacy* layout is seven little-endian int32 (hidden size, MLP size, layers, heads, key-value heads, vocabulary,
longest sequence; a negative vocabulary says that the output layer has weights of its own), then float32 tensors:
embeddings; of all layers norms, queries, keys, values, outputs, norms, gates, downs, ups; the last norm; two tables of
angles, which follow from the rest; the output layer. Rotary pairs are neighbours there and halves of a head in
`transformers`, so the rows of queries and keys change places.

The tokenizer's file is an int32 (the longest token) and per token a float32 score, an int32 length and the bytes: a
SentencePiece BPE, whose merges follow from the scores. ChatML's three tokens are put behind it, with the mean of the
embeddings, so that the checkpoint is a policy that training can start from.
"""

import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turnwise.chat import END, PAD, SPECIALS, BPETokenizer, Chat
from turnwise.errors import InputError
from turnwise.policy import Policy, save_policy

BOS_ID, EOS_ID, FIRST_BYTE_ID = 1, 2, 3
"""As in every SentencePiece vocabulary of Llama; 0 is unknown, and 256 bytes begin at 3."""
SPACE = "▁"


def convert_llama2c(weights: Path, tokenizer: Path, out: Path) -> Path:
    """Writes the model and its tokenizer to the new folder `out`. Raises InputError for files of another layout."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out must name a new or empty folder; {out} holds files; choose another")
    model = read_llama2c(weights)
    backend = read_tokenizer(tokenizer, model.config.vocab_size)
    model.resize_token_embeddings(backend.get_vocab_size(), mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for table in (layer.weight for layer in layers):
            table[-len(SPECIALS) :] = table[: -len(SPECIALS)].mean(0)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END, "pad_token": PAD}
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    out.mkdir(parents=True, exist_ok=True)
    save_policy(Policy(model, Chat(BPETokenizer(backend)), {name: text.encode() for name, text in files.items()}), out)
    return out


def read_llama2c(path: Path) -> LlamaForCausalLM:
    """The model in a file of llama2.c's legacy layout, without the tokens of ChatML."""
    data = _read(path)
    dim, hidden, layers, heads, kv_heads, vocab, context = (
        struct.unpack_from("<7i", data) if len(data) >= 28 else [0] * 7
    )
    tied, vocab = vocab > 0, abs(vocab)
    sizes = (dim, hidden, layers, heads, kv_heads, vocab, context)
    if not 1 <= min(sizes) <= max(sizes) <= len(data) / 4 or dim % heads or heads % kv_heads:
        raise InputError(f"{path} must begin with the seven sizes of a Llama in llama2.c's legacy layout; got {sizes}")
    head = dim // heads
    shapes = {
        "model.embed_tokens.weight": (vocab, dim),
        **_stacked(layers, "input_layernorm", dim),
        **_stacked(layers, "self_attn.q_proj", heads * head, dim),
        **_stacked(layers, "self_attn.k_proj", kv_heads * head, dim),
        **_stacked(layers, "self_attn.v_proj", kv_heads * head, dim),
        **_stacked(layers, "self_attn.o_proj", dim, heads * head),
        **_stacked(layers, "post_attention_layernorm", dim),
        **_stacked(layers, "mlp.gate_proj", hidden, dim),
        **_stacked(layers, "mlp.down_proj", dim, hidden),
        **_stacked(layers, "mlp.up_proj", hidden, dim),
        "model.norm.weight": (dim,),
        "angles": (context, head),
        **({} if tied else {"lm_head.weight": (vocab, dim)}),
    }
    numbers = np.frombuffer(data, "<f4", offset=28) if not len(data) % 4 else np.zeros(0, "<f4")
    needed = sum(map(np.prod, shapes.values()))
    if len(numbers) != needed:
        raise InputError(
            f"{path} must hold {needed:,} numbers of four bytes for sizes {sizes}; it has {(len(data) - 28) / 4:,}; it "
            "is cut off, or of another layout"
        )
    ends = itertools.accumulate(int(np.prod(shape)) for shape in shapes.values())
    tensors = {
        name: torch.from_numpy(numbers[end - int(np.prod(shape)) : end].reshape(shape).copy())
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    del tensors["angles"]
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = tensor.view(-1, head // 2, 2, dim).transpose(1, 2).reshape(-1, dim)
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
    )
    model.load_state_dict(tensors)
    return model.eval()


def _stacked(layers: int, name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.{name}.weight": shape for i in range(layers)}


def read_tokenizer(path: Path, vocab: int) -> Any:
    """The `tokenizers.Tokenizer` of a file with `vocab` tokens, with ChatML's behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [_piece(token) for token in _tokens(path, vocab)]
    pieces[:FIRST_BYTE_ID] = ["<unk>", "<s>", "</s>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=_merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [*pieces[:FIRST_BYTE_ID], *SPECIALS]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def _tokens(path: Path, vocab: int) -> Iterator[bytes]:
    """The bytes of each token, in order."""
    data, at = _read(path), 4
    for token in range(vocab):
        size = struct.unpack_from("<i", data, at + 4)[0] if at + 8 <= len(data) else -1
        if size < 0 or at + 8 + size > len(data):
            raise InputError(f"{path} must hold {vocab} tokens, as many as the model has; it ends at token {token}")
        yield data[at + 8 : at + 8 + size]
        at += 8 + size
    if at != len(data):
        raise InputError(f"{path} must hold {vocab} tokens, as many as the model has; it holds more")


def _piece(token: bytes) -> str:
    return token.decode("utf-8", "replace").replace(" ", SPACE)


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in SentencePiece's order: what is made has a lower id."""
    pairs = (
        (ids[piece], piece[:cut], piece[cut:])
        for piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: (pair[0], ids[pair[1]], ids[pair[2]]))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} must be a readable file; got {error.strerror}; check the path") from error
