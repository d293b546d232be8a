"""What `turnwise inspect` finds in a few questions whose numbers a reader can count."""

import json
from pathlib import Path

import pytest

from turnwise.chat import Chat, byte_chat
from turnwise.cli import main
from turnwise.config import TrainConfig
from turnwise.inspection import inspect_tasks, inspection_lines, rendered
from turnwise.policy import load_policy
from turnwise.types import Message

ARTICLES = [
    {"id": "k", "title": "Kenya", "text": "The capital is Nairobi."},
    {"id": "p", "title": "Peru", "text": "The capital is Lima."},
    {"id": "n", "title": "Norway", "text": "The capital is Oslo."},
]
TRAIN = [
    {"id": "1", "question": "What is the capital of Kenya?", "answers": ["Nairobi", "Nairobi City"], "kind": "city"},
    {"id": "2", "question": "What is the capital of Peru?", "answers": ["Lima"], "kind": "city"},
    {"id": "3", "question": "what is  the capital of Peru?", "answers": ["Lima"]},  # the second one again
    {"id": "4", "question": "Which city has fjords?", "answers": ["Oslo"]},  # an answer that the question does not find
    {"id": "5", "question": "What is the capital of Mars?", "answers": ["Nowhere at all in this corpus of articles"]},
]
HELD = [{"id": "h", "question": "What is the capital of Peru?", "answers": ["Lima"]}]


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path: Path, checkpoint: Path) -> dict:
    return {
        "policy": str(checkpoint),
        "tasks": written(tmp_path / "train.jsonl", TRAIN),
        "validation_tasks": written(tmp_path / "held.jsonl", HELD),
        "corpus": written(tmp_path / "corpus.jsonl", ARTICLES),
        "max_turn_tokens": 24,
    }


def test_every_number_is_that_of_the_files(options: dict):
    found = inspect_tasks(TrainConfig(**options))
    assert found["sources"]["train"] == {
        "tasks": 5,
        "format": "plain",
        "marked_unanswerable": 0,
        "kinds": {"": 3, "city": 2},
    }
    assert found["duplicates"] == {
        "train": 1,
        "validation": 0,
        "shared": 1,
        "examples": ["what is the capital of peru?", "what is the capital of peru?"],
    }
    assert found["answers"]["accepted"] == {"min": 1, "median": 1.0, "p95": 1.75, "max": 2}
    # Found by the bare question: Kenya once, Peru three times; in the corpus Oslo too. The sixth has none.
    assert found["search"]["asked"] == 6
    assert found["search"]["answer_in_results"] == pytest.approx(4 / 6)
    assert found["search"]["answer_in_corpus"] == pytest.approx(5 / 6)
    assert found["tools"] == ["search"]
    assert found["problems"] == []
    assert [note.split(" ")[0] for note in found["notes"]] == ["1", "1", "1", "16.7%"]
    json.dumps(found)


def test_tokens_are_those_of_the_policys_own_chat(options: dict, checkpoint: Path):
    found = inspect_tasks(TrainConfig(**options))
    chat = load_policy(checkpoint).chat
    example = found["examples"][0]
    assert example["prompt"].startswith("<|im_start|>system\nTools:\n")
    assert example["prompt"].endswith("What is the capital of Kenya?<|im_end|>\n<|im_start|>assistant\n")
    assert '{"name": "search"' in example["prompt"]
    system, user = example["prompt"].split("<|im_end|>\n")[:2]
    messages = [
        Message(role="system", content=system.removeprefix("<|im_start|>system\n")),
        Message(role="user", content=user.removeprefix("<|im_start|>user\n")),
    ]
    assert example["tokens"] == len(chat.prompt_ids(messages))
    tokens = found["tokens"]
    assert tokens["prompts"]["min"] <= example["tokens"] <= tokens["prompts"]["max"]
    assert tokens["left_for_results"]["min"] == 1024 - tokens["prompts"]["max"] - 2 * 24 - chat.empty_reply_length
    answers = found["answers"]
    assert answers["tokens"]["min"] == min(len(chat.encode_text(text)) for text in ("Lima", "Oslo", "Nairobi"))
    long = len(chat.encode_text(TRAIN[4]["answers"][0])) + len(chat.encode_text("<answer>\n\n</answer>"))
    assert (long > 24, answers["too_long"]) == (True, 1)


def test_what_keeps_training_from_starting_is_a_problem(options: dict, tmp_path: Path):
    rows = [*TRAIN, {"id": "1", "question": "Again?", "answers": ["x"]}, {"id": "9", "question": "No answer?"}]
    written(tmp_path / "train.jsonl", rows)
    found = inspect_tasks(TrainConfig(**options, max_turns=40))
    faults, room = found["problems"]
    assert "2 records are no tasks; the first:" in faults
    assert "train.jsonl:6: field 'id' must be unique" in faults
    assert room.startswith("6 prompts leave no room for 40 turns of 24 tokens in a context of 1024")
    written(tmp_path / "corpus.jsonl", [{"id": "x", "title": "", "text": "nothing"}])
    written(tmp_path / "train.jsonl", TRAIN)
    (problem,) = inspect_tasks(TrainConfig(**options))["problems"]
    assert "holds no answer of any task" in problem


def test_own_tools_are_shown_and_not_searched(options: dict, tmp_path: Path):
    (tmp_path / "tools.py").write_text('def area(width: float) -> float:\n    """Area."""\n    return width\n')
    found = inspect_tasks(TrainConfig(**options, tools=tmp_path / "tools.py"))
    assert found["search"] is None
    assert found["tools"] == ["area"]
    assert '{"name": "area"' in found["examples"][0]["prompt"]


def test_without_validation_tasks_a_part_is_held_out(options: dict, tmp_path: Path):
    rows = [{"id": f"{i}", "question": f"Number {i}?", "answers": ["Lima"]} for i in range(60)]
    found = inspect_tasks(TrainConfig(**{**options, "tasks": written(tmp_path / "t.jsonl", rows)}, seed=1))
    assert found["sources"]["validation"]["tasks"] == 1  # of validation_tasks
    options = {**options, "tasks": str(tmp_path / "t.jsonl"), "validation_tasks": None}
    sources = inspect_tasks(TrainConfig(**options))["sources"]
    assert sources["train"]["tasks"] + sources["validation"]["tasks"] == 60
    assert 0 < sources["validation"]["tasks"] < 20


def test_the_prompts_beginning_is_written_once_and_no_control_character_reaches_the_terminal(options, tmp_path: Path):
    rows = [{**TRAIN[0], "question": "What \x1b[2J is the capital of Kenya?"}, *TRAIN[1:]]
    written(tmp_path / "train.jsonl", rows)
    text = "\n".join(inspection_lines(inspect_tasks(TrainConfig(**options))))
    assert "\x1b" not in text
    assert text.count('"name": "search"') == 1
    assert text.count("Task ") == 5
    assert "How all 5 prompts begin:" in text
    assert "search            66.7% of 6 bare questions bring an answer" in text


def test_the_command_takes_trainings_options_and_file_and_tells_problems_by_its_exit_code(
    options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "o.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in options.items()))
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["max_turn_tokens"] == 24
    assert main(["inspect", str(file), "--max-turn-tokens", "1000"]) == 2
    assert "problem: 6 prompts leave no room" in capsys.readouterr().out


def test_columns_are_those_of_the_file(options: dict, tmp_path: Path):
    rows = [{"prompt": row["question"], "gold": row["answers"]} for row in TRAIN]
    path = written(tmp_path / "t.jsonl", rows)
    options = {**options, "tasks": path, "validation_tasks": path, "columns": "question=prompt,answers=gold"}
    assert inspect_tasks(TrainConfig(**options))["sources"]["train"]["tasks"] == 5


def test_special_tokens_are_written_out_whatever_the_tokenizer(bpe_chat: Chat):
    message = Message(role="user", content="é <|im_end|> in text")
    for chat in (bpe_chat, byte_chat()):
        expected = "<|im_start|>user\né <|im_end|> in text<|im_end|>\n<|im_start|>assistant\n"
        assert rendered(chat, chat.prompt_ids([message])) == expected


DATA = Path(__file__).parents[2] / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_forty_thousand_real_passages_and_their_questions():
    found = inspect_tasks(
        TrainConfig(
            tasks=str(DATA / "trivia/train.jsonl"),
            validation_tasks=str(DATA / "trivia/validation.jsonl"),
            corpus=str(DATA / "trivia/wikipedia.jsonl.gz"),
            search_results=3,
            result_chars=1500,
        )
    )
    assert found["sources"]["train"]["tasks"] + found["sources"]["validation"]["tasks"] == 4770
    assert found["search"]["answer_in_corpus"] == 1.0  # every question has an answer-bearing passage
    assert 0.6 < found["search"]["answer_in_results"] < 0.8
