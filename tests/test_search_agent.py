"""The search agent's rewards and metrics, by hand, and on the atlas's two-hop questions."""

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from turnwise import atlas
from turnwise.chat import byte_chat
from turnwise.config import TrainConfig
from turnwise.convert import convert
from turnwise.engine import ScriptedEngine
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError
from turnwise.evaluation import mean_metrics, rollout_metrics, summarised
from turnwise.rewards import SEARCH_WEIGHTS, score
from turnwise.rollout import Limits, run_rollout
from turnwise.rundir import read_config
from turnwise.search import load_corpus, open_index, search_tool
from turnwise.setting import ASKED_SHARE, make_setting, named_tasks, training_rank
from turnwise.tasks import load_tasks
from turnwise.tools import Found, Tool, tool, tool_mapping
from turnwise.training import train
from turnwise.types import Rollout, Task

CHAT = byte_chat()
TASK = Task(
    id="dracula",
    question="In which city was the author of Dracula born?",
    answers=("Dublin",),
    metadata={"articles": ["book", "person"]},
)
ARTICLES = {"Dracula": ("book", "A novel by Bram Stoker."), "Stoker": ("person", "Born in DUBLIN."), "Oslo": ("o", "A")}


def search(query: str) -> str:
    """Passages that best match the query."""
    name, text = ARTICLES[query]
    return Found(text, [name])


TOOLS = tool_mapping([tool(search)])


def find(query: str) -> str:
    return f"<think>r</think><search>{query}</search>"


def answer(text: str) -> str:
    return f"<think>r</think><answer>{text}</answer>"


def played(*texts: str, max_turns: int = 6, tools=TOOLS, task: Task = TASK, tokens: int = 200) -> Rollout:
    environment = ToolEnvironment(task, tools, max_turns=max_turns, protocol="search")
    limits = Limits(max_turn_tokens=tokens, context=20_000, max_turns=max_turns)
    return asyncio.run(run_rollout(task, environment, ScriptedEngine(list(texts), CHAT), CHAT, limits=limits))


def scored(*texts: str, **options) -> Rollout:
    return score(TASK, played(*texts, **options), protocol="search")


# ---------------------------------------------------------------------------------- rewards


def test_the_weights_are_the_papers_constants():
    assert SEARCH_WEIGHTS == {
        "retrieval": 0.3,
        "turn_format": 0.1,
        "turn_format_broken": -0.2,
        "search_penalty": -0.1,
        "correct": 1.0,
        "wrong": 0.2,
        "invalid": -1.0,
    }


def test_two_searches_and_the_right_answer_earn_what_the_paper_says():
    rollout = scored(find("Dracula"), find("Stoker"), answer("Dublin"))
    # 1st: no answer found, good format, one search so far:  0 + 0.1 - 0.1.  2nd: found, two so far:  0.3 + 0.1 - 0.2.
    assert rollout.turn_rewards == (
        {"retrieval": 0.0, "turn_format": 0.1, "turn_format_broken": 0.0, "search_penalty": -0.1},
        {"retrieval": 0.3, "turn_format": 0.1, "turn_format_broken": 0.0, "search_penalty": -0.2},
        {},
    )
    assert rollout.outcome_rewards == {"correct": 1.0, "wrong": 0.0, "invalid": 0.0}


def test_the_penalty_of_all_searches_together_grows_with_their_square():
    # 0.1 (1 + 2 + 3 + 4) = 1
    rollout = scored(*[find("Oslo")] * 4, answer("Dublin"))
    assert sum(turn.get("search_penalty", 0.0) for turn in rollout.turn_rewards) == pytest.approx(-1.0)


def test_a_search_that_cannot_be_read_has_a_broken_format_and_counts_as_a_search():
    rollout = scored("<think>r</think><search></search>", find("Stoker"), answer("Oslo"))
    assert rollout.turn_rewards[0] == {
        "retrieval": 0.0,
        "turn_format": 0.0,
        "turn_format_broken": -0.2,
        "search_penalty": -0.1,
    }
    assert rollout.turn_rewards[1]["search_penalty"] == -0.2
    assert rollout.outcome_rewards == {"correct": 0.0, "wrong": 0.2, "invalid": 0.0}


def test_a_failed_search_finds_nothing_whatever_its_text_says():
    rollout = scored(find("Dublin"), answer("Dublin"))  # the tool raises KeyError: 'Dublin'
    assert rollout.turns[0].result is not None
    assert "Dublin" in rollout.turns[0].result.text
    assert rollout.turn_rewards[0]["retrieval"] == 0.0
    assert rollout.turn_rewards[0]["turn_format"] == 0.1


@pytest.mark.parametrize(
    "texts",
    [
        ["<answer>Dublin</answer>"],
        ["<think>a</think>So <answer>Dublin</answer>"],
        [find("Stoker"), "<think>a</think><think>b</think><answer>Dublin</answer>"],
        [find("Stoker"), "Dublin"],
    ],
)
def test_an_answer_of_invalid_format_is_invalid_even_if_right(texts: list[str]):
    assert scored(*texts).outcome_rewards == {"correct": 0.0, "wrong": 0.0, "invalid": -1.0}


def test_a_rollout_that_was_cut_off_is_invalid_and_keeps_the_turns_before():
    searching = scored(find("Stoker"), find("Dracula"), max_turns=2)
    assert searching.stop == "max_turns"
    assert searching.turn_rewards == ({**searching.turn_rewards[0], "retrieval": 0.3, "search_penalty": -0.1}, {})
    assert searching.outcome_rewards["invalid"] == -1.0
    cut = scored(find("Stoker"), answer("Dublin"), tokens=36)
    assert (cut.stop, cut.outcome_rewards["invalid"]) == ("max_tokens", -1.0)


def test_an_answer_that_was_cut_off_after_its_last_tag_is_invalid():
    # 40 bytes are the whole text and leave no room for the token that ends the message
    text = answer("Dublin")
    cut = scored(text, tokens=len(text))
    assert (cut.stop, cut.turns[0].text, cut.answer) == ("max_tokens", text, None)
    assert cut.outcome_rewards["invalid"] == -1.0


def test_the_configured_definition_of_exact_match_decides_what_is_right():
    rollout = played(answer("the Dublin"))
    assert score(TASK, rollout, protocol="search").outcome_rewards["correct"] == 1.0
    assert score(TASK, rollout, protocol="search", definition="paper").outcome_rewards["wrong"] == 0.2


def test_every_constant_is_a_weight_of_its_own():
    rollout = played(find("Stoker"), answer("Dublin"))
    paid = score(TASK, rollout, {"retrieval": 2.0, "search_penalty": -0.5, "correct": 3.0}, protocol="search")
    assert paid.turn_rewards == ({"retrieval": 2.0, "search_penalty": -0.5}, {})
    assert paid.outcome_rewards == {"correct": 3.0}


def test_the_first_versions_components_read_the_protocols_own_tags():
    rollout = played(find("Stoker"), answer("Dublin"))
    names = ("tool_execution", "answer_in_results", "answer_presence", "exact_match", "xml_format", "tag_usage")
    paid = score(TASK, rollout, dict.fromkeys(names, 1.0), protocol="search")
    assert paid.turn_rewards == ({"tool_execution": 1.0, "answer_in_results": 1.0}, {})
    # no tag has a line of its own: 0.4 + 0 + 0.2 + 0.2
    assert paid.outcome_rewards == {
        "answer_presence": 1.0,
        "exact_match": 1.0,
        "xml_format": pytest.approx(0.8),
        "tag_usage": 1.0,
    }


# ---------------------------------------------------------------------------------- metrics


def test_searches_are_measured_by_the_articles_that_they_brought():
    rollout = played(find("Dracula"), find("Dracula"), find("Oslo"), find("Stoker"), find("nowhere"), answer("Dublin"))
    found = rollout_metrics(TASK, rollout, "search")
    # useful: the 1st and the 4th; redundant: the 2nd; the 3rd is new but not gold; the 5th was not executed
    assert found["searches"] == 4
    assert found["useful_searches"] == 2
    assert found["redundant_searches"] == 1
    assert found["gold_found"] == 1.0
    assert found["well_called"] == 4 / 5


def test_a_search_without_results_is_redundant_and_half_of_the_gold_is_half():
    def search(query: str) -> str:
        """Passages."""
        return Found("No results.", []) if query == "x" else Found("A novel.", ["book", "other"])

    rollout = played(find("x"), find("y"), answer("Dublin"), tools=tool_mapping([tool(search)]))
    found = rollout_metrics(TASK, rollout, "search")
    assert (found["gold_found"], found["useful_searches"], found["redundant_searches"]) == (0.5, 1, 1)


def test_what_is_not_known_of_a_rollout_is_absent_and_not_zero():
    about_search = {"searches", "gold_found", "useful_searches", "redundant_searches"}

    def search(query: str) -> str:
        """Passages."""
        return query

    untold = rollout_metrics(TASK, played(find("x"), answer("a"), tools=tool_mapping([tool(search)])), "search")
    assert not about_search & set(untold)
    assert untold["well_called"] == 1.0
    plain = dataclasses.replace(TASK, metadata={})
    assert not about_search & set(rollout_metrics(plain, played(find("Stoker"), answer("a")), "search"))
    uncalled = rollout_metrics(TASK, played(answer("a")), "search")
    assert "well_called" not in uncalled
    assert (uncalled["searches"], uncalled["gold_found"]) == (0, 0)


def test_means_are_over_the_rollouts_that_have_the_metric():
    called, uncalled = played(find("Stoker"), answer("Dublin")), played(answer("Dublin"))
    means = mean_metrics([(TASK, called), (TASK, uncalled)], "search")
    assert (means["well_called"], means["gold_found"]) == (1.0, 0.25)
    other = dataclasses.replace(TASK, id="other")
    estimates = summarised("x", "greedy", [(TASK, called), (other, uncalled)], "search").metrics
    assert (estimates["well_called"].n, estimates["gold_found"].n) == (1, 2)
    samples = summarised("x", "sampled", [(TASK, called), (TASK, uncalled)], "search").metrics
    assert (samples["gold_found"].mean, samples["gold_found"].n) == (0.25, 1)  # one question, its mean over samples


def test_format_metrics_are_the_protocols_own():
    good = rollout_metrics(TASK, played(find("Stoker"), answer("Dublin")), "search")
    bad = rollout_metrics(TASK, played(find("Stoker"), "<answer>Dublin</answer>"), "search")
    assert (good["turn_format"], good["final_format"]) == (1.0, 1.0)
    assert (bad["turn_format"], bad["final_format"]) == (0.5, 0.0)
    assert not {"xml_format", "tag_usage"} & set(good)
    tools = rollout_metrics(TASK, played(answer("Dublin")))
    assert {"xml_format", "tag_usage"} <= set(tools)
    assert not {"turn_format", "final_format"} & set(tools)


# ----------------------------------------------------------------------- two-hop questions

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_article_of_a_two_hop_question_names_the_bridge_and_the_second_holds_the_answer(split: atlas.Split):
    articles = {article.id: article for article in atlas.articles()}
    tasks = named_tasks("atlas-two-hop", split)
    assert len(tasks) > 1000
    for task in tasks:
        first, second = (articles[name] for name in task.metadata["articles"])
        bridge = task.metadata["linked"]
        assert bridge in first.text
        assert bridge.lower() not in task.question.lower()
        assert second.title == bridge
        assert any(gold in second.text for gold in task.answers)


def test_training_asks_about_a_share_of_the_entities_and_never_about_held_out_ones():
    train = named_tasks("atlas-two-hop", "train")
    assert {atlas.entities()[task.metadata["entity"]].split for task in train} == {"train"}
    assert {atlas.entities()[task.metadata["linked"]].split for task in train} == {"train"}
    assert max(training_rank(task.metadata["entity"]) for task in train) < ASKED_SHARE
    held = named_tasks("atlas-two-hop", "validation")
    assert {atlas.entities()[task.metadata["entity"]].split for task in held} == {"validation"}


def test_a_second_search_finds_the_second_article_once_the_first_has_named_the_bridge():
    index = open_index("atlas")
    tools: dict[str, Tool] = {"search": search_tool(index)}
    tasks = named_tasks("atlas-two-hop", "test")[::40]
    pairs = [
        (
            task,
            played(
                find(task.metadata["entity"]),
                find(task.metadata["linked"]),
                answer(task.answers[0]),
                tools=tools,
                task=task,
            ),
        )
        for task in tasks
    ]
    means = mean_metrics(pairs, "search")
    assert means["gold_found"] > 0.98
    assert means["useful_searches"] > 1.96
    assert means["exact_match"] == 1.0
    question = played(find(tasks[0].question), answer("?"), tools=tools, task=tasks[0])
    assert rollout_metrics(tasks[0], question, "search")["gold_found"] == 0.5


# --------------------------------------------------------------------------------- settings


def test_a_setting_writes_out_the_weights_of_its_protocol():
    setting = make_setting(TrainConfig(protocol="search", tasks="atlas-two-hop", max_turns=4))
    assert setting.config.reward_weights == SEARCH_WEIGHTS
    assert make_setting(TrainConfig()).config.reward_weights == {
        "tool_execution": 0.2,
        "answer_in_results": 0.5,
        "answer_presence": 0.5,
        "exact_match": 1.0,
        "xml_format": 0.2,
        "tag_usage": 0.2,
    }
    mixed = make_setting(TrainConfig(protocol="search", reward_weights={"exact_match": 1.0, "search_penalty": -0.05}))
    assert mixed.config.reward_weights == {"exact_match": 1.0, "search_penalty": -0.05}
    task = setting.validation[0]
    assert "<search>" in setting.environment(task).start()[0].content


def test_a_tools_file_that_the_protocol_cannot_call_is_refused(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text('def lookup(word: str) -> str:\n    """Looks a word up."""\n    return word\n')
    with pytest.raises(ConfigError, match="protocol 'search' must have one tool, named 'search'; got lookup"):
        make_setting(TrainConfig(protocol="search", tools=file))


# -------------------------------------------------------------------------------- real input

MULTIHOP = Path(__file__).parents[2] / "shared/data/multihop"


@pytest.mark.skipif(not MULTIHOP.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["hotpotqa", "musique"])
def test_a_public_multi_hop_set_converts_is_searched_and_trained_on(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = convert(MULTIHOP / f"{name}_100_questions.json", tmp_path / "t.jsonl")
    assert done.corpus_path is not None
    titles = {article.id: article.title for article in load_corpus(done.corpus_path)}
    tools: dict[str, Tool] = {"search": search_tool(open_index(done.corpus_path), k=3)}
    pairs = []
    for task in load_tasks(done.tasks_path):
        asked = [find(titles[article]) for article in task.metadata["articles"]]
        pairs.append((task, played(*asked, answer(task.answers[0]), tools=tools, task=task)))
    means = mean_metrics(pairs, "search")
    assert means["gold_found"] > 0.95, "each gold article is found by its title"
    assert means["exact_match"] == 1.0
    result = train(
        policy=str(checkpoint),
        tasks=str(done.tasks_path),
        corpus=str(done.corpus_path),
        protocol="search",
        max_turns=3,
        max_turn_tokens=8,
        steps=2,
        tasks_per_step=2,
        group_size=2,
        minibatches=1,
        validation_size=2,
        out=tmp_path / "run",
    )
    assert result.finished
    assert read_config(tmp_path / "run").reward_weights == SEARCH_WEIGHTS
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    assert {"gold_found", "useful_searches", "redundant_searches", "final_format"} <= set(last)
