"""Search over a folder of documents: write the documents and questions, look at them, train, ask.

Every step is a command that a shell would run. `python examples/documents.py` prints what each says.
"""

import argparse
import json
import tempfile
from pathlib import Path

from turnwise.cli import main as turnwise

ISLANDS = {
    "Madeira": ("Portugal", "Funchal"),
    "Corsica": ("France", "Ajaccio"),
    "Sardinia": ("Italy", "Cagliari"),
    "Sicily": ("Italy", "Palermo"),
    "Crete": ("Greece", "Heraklion"),
    "Rhodes": ("Greece", "Rhodes"),
    "Corfu": ("Greece", "Corfu"),
    "Gotland": ("Sweden", "Visby"),
    "Bornholm": ("Denmark", "Rønne"),
    "Funen": ("Denmark", "Odense"),
    "Saaremaa": ("Estonia", "Kuressaare"),
    "Hokkaido": ("Japan", "Sapporo"),
    "Okinawa": ("Japan", "Naha"),
    "Java": ("Indonesia", "Jakarta"),
    "Bali": ("Indonesia", "Denpasar"),
    "Sumatra": ("Indonesia", "Medan"),
    "Tasmania": ("Australia", "Hobart"),
    "Zanzibar": ("Tanzania", "Zanzibar City"),
    "Hainan": ("China", "Haikou"),
    "Lanzarote": ("Spain", "Arrecife"),
    "Ibiza": ("Spain", "Ibiza Town"),
    "Menorca": ("Spain", "Mahón"),
    "Tenerife": ("Spain", "Santa Cruz"),
    "Skye": ("Scotland", "Portree"),
}
"""An island, whose it is, and its main town."""


def write_documents(folder: Path) -> None:
    """One Markdown file per island, as notes in a folder are."""
    folder.mkdir()
    for name, (country, town) in ISLANDS.items():
        text = f"# {name}\n\n{name} is an island of {country}. The capital is {town}. It has many beaches.\n"
        (folder / f"{name.lower()}.md").write_text(text, encoding="utf-8")


def write_questions(path: Path) -> None:
    """JSON lines with columns of their own names, which `--columns` says."""
    rows = [{"prompt": f"What is the capital of {name}?", "gold": town} for name, (_, town) in ISLANDS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="documents-"))
    documents, questions, run = folder / "notes", folder / "questions.jsonl", folder / "run"
    write_documents(documents)
    write_questions(questions)
    about = [f"--tasks={questions}", f"--validation-tasks={questions}", f"--corpus={documents}"]
    about += ["--columns=question=prompt,answers=gold"]
    sizes = [f"--steps={options.steps}", f"--validate-every={options.steps}", "--tasks-per-step=6", "--group-size=8"]
    for command in (
        ["search", "capital of Corsica", f"--corpus={documents}", "--k=1"],
        ["inspect", *about],
        ["train", *about, *sizes, "--minibatches=2", f"--out={run}"],
        ["ask", str(run), "What is the capital of Gotland?"],
    ):
        print("$ turnwise", " ".join(command), flush=True)
        if code := turnwise(command):
            raise SystemExit(code)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (r["metrics"]["exact_match"] for r in records if r["split"] == "validation")
    print(f"exact match: {before:.0%} of {len(ISLANDS)} questions before, {after:.0%} after training")


if __name__ == "__main__":
    main()
