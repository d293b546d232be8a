"""Where the time of a demo step goes, and the floor of each part: what it computes or moves at this machine's rates.

    python benchmarks/floor.py [--shapes 8x12 16x16] [--steps 4] [--taught 8]

A step of training on the atlas, questions x rollouts, by the real loop on one thread (`turnwise.train`), after a few
steps of teaching so that the policy uses its tool. Each part is timed where it happens (CPU seconds); what no part
holds is "the rest". Beside it stands what had to be done, without padding, and with what is equal counted once:

* prefill, decode, forward, backward: multiplications and additions (`flops` below); and in decoding the keys and values
  that every token reads of the cache, whose bytes take longer than their arithmetic;
* optimiser: AdamW reads weights, gradients and two moments and writes three of them, 28 bytes a float32 weight;
* files: the bytes written, as one write of them takes; tokenisation: one bare call of the tokenizer for the same texts;
* search: one bare call of tantivy for each query; credit: the numbers of the turn table, read and written once.

The floor of arithmetic is operations over the rate of a matrix product of the sizes that the part has: its rows by the
model's widths. A part at 2.0 takes twice its floor.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import append
from transformers import PreTrainedModel

import turnwise.batch
import turnwise.learning
import turnwise.training
from turnwise.chat import Chat
from turnwise.config import TrainConfig
from turnwise.engines.attention import sliding_layers
from turnwise.engines.hf import HFEngine
from turnwise.policy import load_policy
from turnwise.rundir import chosen_checkpoint
from turnwise.search import SearchIndex
from turnwise.setting import Setting

ADAM_BYTES = 28
"""Of a float32 weight: weight, gradient and two moments are read, weight and moments written."""


# ----------------------------------------------------------------------------------- what had to be done


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model's operations follow from."""

    body: int
    """Weights of the linear layers."""
    head: int
    """Weights of the output layer."""
    layers: int
    sliding: int
    """How many of the layers see the last `window` tokens alone."""
    window: int
    width: int
    """Query heads times their size."""
    cached: int
    """Numbers of a key and its value."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        config = model.config
        head: Any = model.get_output_embeddings()
        linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
        return cls(
            body=sum(module.weight.numel() for module in linear),
            head=head.weight.numel(),
            layers=config.num_hidden_layers,
            sliding=len(sliding_layers(model)),
            window=getattr(config, "sliding_window", None) or 0,
            width=config.num_attention_heads * config.head_dim,
            cached=2 * config.num_key_value_heads * config.head_dim,
        )


def seen_keys(start: int, count: int, window: int | None = None) -> int:
    """Keys that the tokens at positions start, ..., start + count - 1 see together: each those up to itself.

    sum of min(p + 1, window) over these positions p.
    """
    positions = np.arange(start, start + count) + 1
    return int(positions.sum() if window is None else np.minimum(positions, window).sum())


def cache_bytes(shape: Shape, *, keys: int, near_keys: int) -> float:
    """Bytes of the float32 keys and values that are read where every token reads its own."""
    return 4.0 * shape.cached * ((shape.layers - shape.sliding) * keys + shape.sliding * near_keys)


def flops(shape: Shape, *, tokens: int, keys: int, near_keys: int, predicted: int) -> float:
    """Multiplications and additions of a forward pass.

        2 body tokens + 2 head predicted + 4 width (full layers x keys + sliding layers x near keys)

    where keys are summed over tokens: a score and a share of a value each take 2 width operations.
    """
    full = shape.layers - shape.sliding
    seen = full * keys + shape.sliding * near_keys
    return 2.0 * shape.body * tokens + 2.0 * shape.head * predicted + 4.0 * shape.width * seen


@dataclass
class Work:
    """What a part had to do."""

    tokens: int = 0
    keys: int = 0
    near_keys: int = 0
    predicted: int = 0

    def add(self, shape: Shape, start: int, count: int, predicted: int) -> None:
        """`count` more tokens of a sequence from position `start` on."""
        self.tokens += count
        self.keys += seen_keys(start, count)
        self.near_keys += seen_keys(start, count, shape.window) if shape.sliding else 0
        self.predicted += predicted

    def flops(self, shape: Shape) -> float:
        return flops(shape, **vars(self))


# -------------------------------------------------------------------------------------- the machine's rates


def best_seconds(work: Callable[[], object], *, repeats: int = 5) -> float:
    """The least CPU time of a few calls."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def gemm_rate(rows: int, model: PreTrainedModel) -> float:
    """Operations a second of products of `rows` states with every linear layer of the decoder."""
    layers = [m.weight.detach() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1]) for weight in layers]
    calls = max(1, 2_000_000_000 // (2 * rows * sum(weight.numel() for weight in layers)))

    def products() -> None:
        for _ in range(calls):
            for states, weight in zip(inputs, layers, strict=True):
                torch.nn.functional.linear(states, weight)

    with torch.no_grad():
        return 2.0 * rows * sum(weight.numel() for weight in layers) * calls / best_seconds(products, repeats=3)


def memory_rate() -> float:
    """Bytes a second of a copy that no cache holds, read and written ones together."""
    source = torch.zeros(64 * 2**20 // 4)
    target = torch.zeros_like(source)
    return 2.0 * source.numel() * 4 / best_seconds(lambda: target.copy_(source))


def write_seconds(count: int, folder: str) -> float:
    """One file of so many bytes, written at once."""
    file, content = Path(folder) / "bytes", os.urandom(count)
    return best_seconds(lambda: file.write_bytes(content))


# --------------------------------------------------------------------------------- the parts of real steps


@dataclass
class Seen:
    """What was noted of the steps, once `counting`."""

    shape: Shape
    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    ids: list[Sequence[int]] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    written: int = 0
    turns: int = 0
    steps: int = 0
    counting: bool = False
    inside: list[str] = field(default_factory=list)
    """The parts that are running; time counts for the innermost."""
    since: float = 0.0

    def switch(self) -> None:
        """Books the time since the last switch for the part that runs."""
        now = time.process_time()
        if self.inside and self.counting:
            name = self.inside[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything in here is that part's, but for parts of its own."""
        self.switch()
        self.inside.append(name)
        try:
            yield
        finally:
            self.switch()
            self.inside.pop()

    def add(self, name: str, start: int, count: int, predicted: int = 0) -> None:
        if self.counting:
            self.work.setdefault(name, Work()).add(self.shape, start, count, predicted)


class Patches:
    """Functions of the package that are timed while this is open; all are put back at its end."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.old = seen, []

    def __enter__(self) -> "Patches":
        seen = self.seen
        for owner, name, part in (
            (turnwise.training._Run, "_train_step", "the rest"),
            (turnwise.training._Run, "_log", "files"),
            (turnwise.training._Run, "_checkpoint", "files"),
            (HFEngine, "_prefill", "prefill"),
            (HFEngine, "_decode", "decode"),
            (SearchIndex, "search", "search"),
            (Chat, "prompt_ids", "tokenisation"),
            (Chat, "reply_ids", "tokenisation"),
            (Chat, "decode", "tokenisation"),
            (Setting, "scored", "credit"),
            (turnwise.training, "credit_rollouts", "credit"),
            (turnwise.learning, "token_states", "forward"),
            (turnwise.learning, "_policy_loss", "forward"),
            (torch.autograd, "backward", "backward"),
            (turnwise.learning, "_stepped", "optimiser"),
        ):
            self.wrap(owner, name, part)
        self.wrap(HFEngine, "_feed_prompts", "prefill", before=self._prompts)
        self.wrap(HFEngine, "_draw", None, before=self._drawn)
        self.wrap(turnwise.learning, "token_states", "forward", before=self._forward)
        self.wrap(Chat, "message_ids", "tokenisation", before=lambda _, message, **__: self._text(message.content))
        self.wrap(Chat, "decode", "tokenisation", before=lambda _, ids: seen.counting and seen.ids.append(ids))
        self.wrap(
            SearchIndex, "search", "search", before=lambda _, query, *__: seen.counting and seen.queries.append(query)
        )
        return self

    def wrap(self, owner: Any, name: str, part: str | None, before: Callable[..., object] | None = None) -> None:
        function, seen = getattr(owner, name), self.seen

        def timed(*args: Any, **options: Any) -> Any:
            if before:
                before(*args, **options)
            if part is None:
                return function(*args, **options)
            with seen.part(part):
                return function(*args, **options)

        self.old.append((owner, name, function))
        setattr(owner, name, timed)

    def __exit__(self, *_: object) -> None:
        for owner, name, function in reversed(self.old):
            setattr(owner, name, function)

    def _text(self, text: str) -> None:
        if self.seen.counting:
            self.seen.texts.append(text)

    def _prompts(self, engine: HFEngine, chunk: np.ndarray) -> None:
        """New tokens of each row that is fed."""
        rows = engine._rows
        for row in chunk.tolist():
            self.seen.add("prefill", int(rows.length[row]), int(rows.start[row] - rows.length[row]))

    def _drawn(self, engine: HFEngine, _: object, active: np.ndarray) -> None:
        """A logit row for each token that is drawn, and in decoding the token before it."""
        part, length = self.seen.inside[-1], engine._rows.length
        if part == "prefill":
            for _ in active:
                self.seen.add(part, 0, 0, 1)
            return
        self.seen.rows.setdefault(part, []).append(len(active))
        for row in active.tolist():
            self.seen.add(part, int(length[row]) - 1, 1, 1)

    def _forward(self, model: object, batch: turnwise.batch.MicroBatch) -> None:
        """Each different stretch of the micro-batch once, and a logit row for each different sampled token."""
        starts = [0]
        for level in batch.levels:
            own = [starts[parent] for parent in level.parent.tolist()]
            for start, length in zip(own, level.lengths.tolist(), strict=True):
                self.seen.add("forward", start, length)
            starts = [start + length for start, length in zip(own, level.lengths.tolist(), strict=True)]
        self.seen.add("forward", 0, 0, len(torch.unique(batch.place[batch.loss])))
        self.seen.turns += int(batch.num_rows)


def measured_steps(config: TrainConfig, warm: int) -> Seen:
    """Steps of the real loop; the first `warm` are not counted."""
    seen = Seen(shape=Shape.of(load_policy(config.policy).model))
    run_class, step = turnwise.training._Run, turnwise.training._Run._train_step
    validate = run_class._validate

    def counted(run: Any) -> Any:
        seen.switch()
        seen.counting = run.step >= warm
        seen.steps += seen.counting
        return step(run)

    run_class._train_step, run_class._validate = counted, lambda *_: None
    try:
        with Patches(seen):
            turnwise.train(config)
    finally:
        run_class._train_step, run_class._validate = step, validate
    (newest,) = sorted((config.out / "checkpoints").glob("step-*"))[-1:]
    lines = [config.out / name for name in ("metrics.jsonl", "rollouts.jsonl")]
    seen.written = (
        sum(f.stat().st_size for f in newest.iterdir()) + sum(f.stat().st_size for f in lines) // config.steps
    )
    return seen


# ------------------------------------------------------------------------------------------------ the table


def floors(seen: Seen, config: TrainConfig) -> dict[str, tuple[float, float, float]]:
    """Each part's seconds of a step, its operations or bytes, and the seconds of its floor."""
    policy = load_policy(config.policy)
    model, shape = policy.model, seen.shape
    forward = seen.work["forward"].flops(shape)
    decode_rows = round(float(np.mean(seen.rows["decode"])))
    wide, narrow = gemm_rate(512, model), gemm_rate(decode_rows, model)
    amounts = {
        "prefill": (seen.work["prefill"].flops(shape), wide),
        "decode": (seen.work["decode"].flops(shape), narrow),
        "forward": (forward, wide),
        "backward": (2 * forward, wide),
    }
    found = {name: (amount, amount / rate) for name, (amount, rate) in amounts.items()}
    rate, drawn = memory_rate(), seen.work["decode"]
    read = cache_bytes(shape, keys=drawn.keys, near_keys=drawn.near_keys)
    products = flops(shape, tokens=drawn.tokens, keys=0, near_keys=0, predicted=drawn.predicted)
    found["decode"] = (amounts["decode"][0], products / narrow + read / rate)
    weights = sum(p.numel() for p in policy.learned)
    stepped = ADAM_BYTES * weights * config.minibatches * seen.steps
    found["optimiser"] = (float(stepped), stepped / rate)
    numbers = 8.0 * 10 * seen.turns * config.max_turns
    found["credit"] = (numbers, numbers / rate)
    with tempfile.TemporaryDirectory() as folder:
        found["files"] = (float(seen.written * seen.steps), write_seconds(seen.written, folder) * seen.steps)
    found["tokenisation"] = (float(sum(map(len, seen.texts))), bare_tokenisation(seen, policy.chat))
    found["search"] = (float(len(seen.queries)), bare_search(seen.queries))
    return {
        name: (seen.seconds.get(name, 0.0) / seen.steps, amount / seen.steps, floor / seen.steps)
        for name, (amount, floor) in found.items()
    } | {"the rest": (seen.seconds.get("the rest", 0.0) / seen.steps, 0.0, 0.0)}


def bare_tokenisation(seen: Seen, chat: Chat) -> float:
    """Each different text encoded once, each message decoded, by the tokenizer itself."""
    backend: Any = chat.tokenizer.backend  # type: ignore[attr-defined]
    texts = list(dict.fromkeys(seen.texts))
    return best_seconds(
        lambda: (
            backend.encode_batch_fast(texts, add_special_tokens=False),
            backend.decode_batch([list(ids) for ids in seen.ids]),
        )
    )


def bare_search(queries: Sequence[str]) -> float:
    """Each different query as tantivy alone answers it."""
    import tantivy

    from turnwise.search import load_corpus

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("text", stored=True, tokenizer_name="en_stem")
    index = tantivy.Index(builder.build())
    writer = index.writer(50_000_000, 1)
    for article in load_corpus("atlas"):
        writer.add_document(tantivy.Document(text=f"{article.title} {article.text}"))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def everything() -> None:
        for query in dict.fromkeys(queries):
            parsed, _ = index.parse_query_lenient(query, ["text"])
            for _, address in searcher.search(parsed, 1).hits:
                searcher.doc(address)

    return best_seconds(everything, repeats=2)


UNITS = {"files": "bytes", "tokenisation": "characters", "search": "queries", "credit": "bytes", "optimiser": "bytes"}


def report(options: argparse.Namespace, shape: str, start: str, folder: str) -> None:
    """Measures one shape, prints and notes it."""
    tasks, size = map(int, shape.split("x"))
    config = TrainConfig(
        policy=start,
        tasks_per_step=tasks,
        group_size=size,
        steps=options.steps + 1,
        out=Path(folder) / shape,
        validation_size=1,
        validate_every=10**6,
        threads=1,
    )
    parts = floors(measured_steps(config, 1), config)
    total = sum(seconds for seconds, _, _ in parts.values())
    floor = sum(least for _, _, least in parts.values())
    print(f"\n{tasks} questions x {size} rollouts: {total:.2f} s a step, floor {floor:.2f} s")
    for name, (seconds, amount, least) in sorted(parts.items(), key=lambda item: -item[1][0]):
        unit = UNITS.get(name, "operations") if amount else ""
        values = {"seconds": seconds, "share": seconds / total, "amount": amount, "unit": unit, "floor_s": least}
        append(options.json, "floor", {"shape": shape, "part": name}, values)
        times = f"{seconds / least:8.1f} x floor" if least else ""
        print(f"  {name:14} {1e3 * seconds:8.1f} ms {100 * seconds / total:5.1f} %  {amount:10.3g} {unit:10} {times}")
    append(options.json, "floor", {"shape": shape, "part": "all"}, {"seconds": total, "floor_s": floor})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["8x12", "16x16"], help="questions x rollouts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--taught", type=int, default=8, help="steps of teaching before")
    parser.add_argument("--json", type=Path, help="file of JSON lines to add to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        teaching = TrainConfig(
            tasks_per_step=8,
            group_size=12,
            steps=options.taught,
            out=Path(folder) / "taught",
            validation_size=1,
            validate_every=10**6,
            threads=1,
        )
        turnwise.train(teaching)
        start = str(chosen_checkpoint(teaching.out, best=False))
        for shape in options.shapes:
            report(options, shape, start, folder)


if __name__ == "__main__":
    main()
