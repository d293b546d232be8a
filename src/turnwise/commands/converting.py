"""Commands that search and convert: corpora, question files, checkpoints."""

from pathlib import Path
from typing import Literal

from turnwise.commands.terminal import open_console
from turnwise.errors import unknown_name


def search(query: str, /, *, corpus: str = "atlas", k: int = 3) -> None:
    """Search a corpus as the agent's tool does.

    Args:
        query: A question or a few words.
        corpus: "atlas", a JSON-lines file, or a folder of text files.
        k: Most articles to show.
    """
    from rich.text import Text

    from turnwise.report.text import one_line, visible
    from turnwise.search import open_index

    console = open_console()
    whole = not console.is_terminal  # lines of a file or pipe are not broken
    hits = open_index(corpus).search(query, k)
    for number, hit in enumerate(hits, start=1):
        head = f"{number}. {one_line(hit.title) or one_line(hit.id)}"
        console.print(Text.assemble((head, "bold"), (f"  {hit.score:.2f}", "dim")))
        console.print(Text(visible(hit.text)), soft_wrap=whole)
        console.print()
    if not hits:
        console.print("No results.")


def serve_search(
    *, corpus: str = "atlas", host: str = "127.0.0.1", port: int = 8765, token_env: str | None = None
) -> None:
    """Serve a corpus's search over HTTP, in Search-R1's format too. SIGHUP reads the corpus again, while it serves.

    Args:
        corpus: "atlas", a JSON-lines file, or a folder of text files.
        host: Address to listen on; another than this machine's own, such as 0.0.0.0, needs a token.
        port: Port to listen on; 0 takes any free one.
        token_env: The environment variable that holds the token which clients must send.
    """
    from turnwise.search import open_index, search_server
    from turnwise.search.server import heed_signals
    from turnwise.web import check_host, token_in

    token = token_in(token_env)
    check_host(host, token)
    index = open_index(corpus)
    with search_server(index, host=host, port=port, token=token) as server:
        heed_signals(server, lambda: open_index(corpus))
        print(f"{len(index):,} articles on http://{host}:{server.server_address[1]}; Ctrl-C stops")
        print("GET /search?q=...&k=3   POST /retrieve   GET /health", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def convert(source: Path, out: Path, /, *, format: str = "auto") -> None:
    """Make a task file and a corpus from a public question set.

    Args:
        source: The question set's file, or hf:NAME[:CONFIG][:SPLIT].
        out: Task file to write, NAME.jsonl or NAME.jsonl.gz; passages go to NAME.corpus.jsonl.gz.
        format: triviaqa, squad, hotpotqa, musique, popqa, bamboogle, gsm8k, flashrag, or auto.
    """
    from turnwise.convert import FORMATS
    from turnwise.convert import convert as converted

    known = {"auto": "auto", **{name: name for name in FORMATS}}
    if format not in known:
        raise unknown_name("format", format, known)
    done = converted(source, out, known[format])  # pyright: ignore[reportArgumentType]
    skipped = f", {done.skipped:,} without an answer left out" if done.skipped else ""
    print(f"{done.tasks:,} tasks of {done.format} in {done.tasks_path}{skipped}")
    if done.corpus_path:
        print(f"{done.articles:,} passages in {done.corpus_path}")


def convert_weights(weights: Path, tokenizer: Path, out: Path, /) -> None:
    """Make a checkpoint of a small pretrained Llama in llama2.c's legacy layout.

    Args:
        weights: The model's file, such as stories260K.bin.
        tokenizer: The tokenizer's file, such as tokenizer.bin.
        out: The folder to make.
    """
    from turnwise.llama2c import convert_llama2c
    from turnwise.rundir import writing

    with writing(out):
        convert_llama2c(weights, tokenizer, out)
    print(f"The checkpoint is in {out}; `turnwise train --policy {out}` begins with it.")


def export(run: str, /, *, out: Path, checkpoint: Literal["best", "last"] = "best") -> None:
    """Write a run's policy as a plain checkpoint that transformers loads; an adapter is merged into its base model.

    Args:
        run: A run directory or a checkpoint folder.
        out: The folder to make.
        checkpoint: The run's best by validation, or its last.
    """
    from turnwise.exporting import export as exported

    print(f"The checkpoint is in {exported(run, out, checkpoint=checkpoint)}.")
