"""Shared fixtures: a tiny random policy with a tokenizer that is trained in the test."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("turnwise", deadline=None)  # no test depends on the clock
settings.load_profile("turnwise")

TEXTS = [
    "<reasoning>\nI look it up.\n</reasoning>\n<tool>\n"
    '{"name": "search", "args": {"query": "Kenya"}}\n</tool>\n<answer>\nNairobi\n</answer>',
    "system user assistant\nTools:\nWork in five steps, in this order: think, call one tool, once, answer",
    "<result>\nThe capital of Kenya is Nairobi.\n</result> What is the capital of Peru? Lima.",
] * 5
"""What the tests' tokenizer learns its merges from."""


def bpe_backend(*, special: bool = True):
    """A byte-level BPE tokenizer of 400 tokens with the ChatML tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from turnwise.chat import SPECIALS

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS) if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if not special:
        backend.add_tokens([AddedToken(token, special=False) for token in SPECIALS])
    return backend


@pytest.fixture(scope="session")
def bpe_chat():
    """A chat over the tests' BPE tokenizer."""
    from turnwise.chat import BPETokenizer, Chat

    return Chat(BPETokenizer(bpe_backend()))


@pytest.fixture(scope="session")
def tiny(bpe_chat):
    """A random policy of two layers; tests leave its weights as they are."""
    from turnwise.policy import tiny_policy

    return tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy as a checkpoint folder."""
    from turnwise.policy import save_policy

    folder = tmp_path_factory.mktemp("policy")
    save_policy(tiny, folder)
    return folder
