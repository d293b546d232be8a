"""Rollouts to padded tensors: what is seen, what was sampled and what is trained are three things."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from turnwise.batch import MicroBatch, Row, distinct_rows, micro_batches, on_sampled, pack, rollout_row, weighted
from turnwise.types import Action, Rollout, Turn


def turn(action: tuple[int, ...], reply: tuple[int, ...] = ()) -> Turn:
    logprobs = tuple(-0.1 * i for i in action)
    return Turn(action_ids=action, sampling_logprobs=logprobs, text="", action=Action(), reply_ids=reply)


def rollout(*turns: Turn, prompt: tuple[int, ...] = (1, 2)) -> Rollout:
    return Rollout(task_id="t", group=0, prompt_ids=prompt, turns=turns, stop="answer")


def row(length: int, prompt: tuple[int, ...] = (1, 2)) -> Row:
    return rollout_row(rollout(turn(tuple(range(3, 3 + length))), prompt=prompt), [1.0], [True])


def test_each_turns_advantage_lies_on_its_own_sampled_tokens():
    #        turn 0       reply   turn 1
    #   ids  10 11        20 21   12
    made = rollout_row(rollout(turn((10, 11), (20, 21)), turn((12,))), [0.5, -1.0], [True, True])
    assert made.prompt_ids == (1, 2)
    assert made.ids == (10, 11, 20, 21, 12)
    assert_array_equal(made.action, [True, True, False, False, True])
    assert_array_equal(made.advantages, np.float32([0.5, 0.5, 0, 0, -1]))
    assert_array_equal(made.sampling_logprobs, np.float32([-1.0, -1.1, 0, 0, -1.2]))


def test_the_three_masks_say_different_things():
    made = rollout_row(rollout(turn((10, 11), (20,)), turn((12,))), [0.5, -1.0], [False, True])
    batch = pack([made, row(1)], pad_id=0)
    assert_array_equal(batch.attention, [[1, 1, 1, 1], [1, 0, 0, 0]])  # replies are seen, padding is not
    assert_array_equal(batch.action, [[1, 1, 0, 1], [1, 0, 0, 0]])  # replies were not sampled
    assert_array_equal(batch.loss, [[0, 0, 0, 1], [1, 0, 0, 0]])  # and the first turn is not trained


def test_nothing_follows_the_last_sampled_token():
    made = rollout_row(rollout(turn((10,), (20, 21))), [1.0], [True])
    assert made.ids == (10,)
    assert len(made.action) == len(made.loss) == len(made.advantages) == len(made.sampling_logprobs) == 1


def test_equal_prompts_are_kept_once():
    batch = pack([row(2, (1, 2)), row(1, (7,)), row(3, (1, 2))], pad_id=99)
    prompts, turns = batch.levels
    assert_array_equal(prompts.ids, [[1, 2], [7, 99]])
    assert_array_equal(prompts.lengths, [2, 1])
    assert_array_equal(turns.ids, [[3, 4, 99], [3, 99, 99], [3, 4, 5]])
    assert_array_equal(turns.parent, [0, 1, 0])
    assert_array_equal(batch.ids, [[3, 4, 99], [3, 99, 99], [3, 4, 5]])


def test_equal_first_turns_with_equal_replies_are_kept_once():
    #   prompt 1 2 ── 10 11 | 20 ──── 12          two rollouts that make the same call and answer differently,
    #             │            └───── 13 14       one whose call meets another reply, from which nobody parts,
    #             ├── 10 11 | 21 12               one that answers at once
    #             └── 15
    call, reply, other = (10, 11), (20,), (21,)
    played = [
        rollout(turn(call, reply), turn((12,))),
        rollout(turn(call, reply), turn((13, 14))),
        rollout(turn(call, other), turn((12,))),
        rollout(turn((15,))),
    ]
    batch = pack([rollout_row(r, [1.0] * len(r.turns), [True] * len(r.turns)) for r in played], pad_id=0)
    prompts, first, second = batch.levels
    assert_array_equal(prompts.ids, [[1, 2]])
    assert_array_equal(first.ids, [[10, 11, 20, 0], [10, 11, 21, 12], [15, 0, 0, 0]])
    assert_array_equal(first.lengths, [3, 4, 1])
    assert_array_equal(second.ids, [[12, 0], [13, 14]])
    assert_array_equal(second.parent, [0, 0])
    # the prompt has places 0 and 1, the next level the 3 × 4 after them, the last those from 14 on
    assert_array_equal(batch.place, [[2, 3, 4, 14, 0], [2, 3, 4, 16, 17], [6, 7, 8, 9, 0], [10, 0, 0, 0, 0]])


def test_what_all_prompts_begin_with_is_a_level():
    batch = pack([row(2, (1, 2, 3, 4)), row(1, (1, 2, 7)), row(1, (1, 2, 3, 4))], pad_id=0)
    shared, prompts, turns = batch.levels
    assert_array_equal(shared.ids, [[1, 2]])
    assert_array_equal(prompts.ids, [[3, 4], [7, 0]])
    assert_array_equal(prompts.parent, [0, 0])
    assert_array_equal(turns.parent, [0, 1, 0])
    beginning = pack([row(1, (1, 2)), row(1, (1, 2, 3))], pad_id=0)  # something is left of every prompt
    assert [level.ids.tolist() for level in beginning.levels] == [[[1]], [[2, 0], [2, 3]], [[3], [3]]]


def test_a_rollout_that_ends_where_another_goes_on_parts_from_it():
    longer, shorter = rollout(turn((10,), (20,)), turn((11,))), rollout(turn((10,), (20,)))
    rows = [rollout_row(r, [1.0] * len(r.turns), [True] * len(r.turns)) for r in (longer, shorter)]
    assert rows[1].ids == (10,)  # nothing follows the last sampled token, so these differ in their first turn
    batch = pack([rows[0], dataclasses.replace(rows[0], ids=(10, 20), action=np.array([True, False]))], pad_id=0)
    assert [level.ids.tolist() for level in batch.levels] == [[[1, 2]], [[10, 20]], [[11]]]


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = [row(length, (length % 3,)) for length in (5, 1, 9, 3, 3, 8, 2, 40, 1, 6)]
    made = list(micro_batches(rows, max_tokens=18, pad_id=0))
    assert sorted(n for batch in made for n in batch.attention.sum(1).tolist()) == [1, 1, 2, 3, 3, 5, 6, 8, 9, 40]
    sizes = [sum(level.ids.numel() for level in batch.levels) for batch in made]
    assert [size for size in sizes if size > 18] == [41]  # a row beyond the budget stands alone
    # equal rows cost nothing: prompt 1 + 3, prompt 1 + 1
    assert [batch.num_rows for batch in micro_batches([row(3)] * 50, max_tokens=5, pad_id=0)] == [50]


def even(rows: Sequence[Row]) -> list[MicroBatch]:
    return list(micro_batches(rows, max_tokens=2048, pad_id=0, even=True))


def sizes(batches: Sequence[MicroBatch]) -> list[int]:
    return [sum(level.ids.numel() for level in batch.levels) for batch in batches]


@pytest.mark.parametrize(("count", "batches"), [(12, 2), (20, 2), (30, 2), (48, 4), (120, 6)])
def test_even_micro_batches_are_even_in_number_and_size(count: int, batches: int):
    # a prompt of 2 and 100 tokens each: 1202, 2002, 3004, 4806 and 12012 positions: 1, 1, 2, 3 and 6 of at most 2048
    rows = [row(100 + i % 2, (1, 2)) for i in range(count)]
    rows = [dataclasses.replace(r, ids=(100 + i, *r.ids[1:])) for i, r in enumerate(rows)]
    made = even(rows)
    assert len(made) == batches
    assert sum(batch.num_rows for batch in made) == count
    assert max(sizes(made)) - min(sizes(made)) <= count // batches  # one more where one has 101 tokens


def test_rows_with_a_long_beginning_stay_together():
    # a prompt of 1,500 and 20 answers of 20 are 1,900 positions; in two micro-batches they were 3,400
    rows = [row(20, tuple(range(1500))) for _ in range(20)]
    rows = [dataclasses.replace(r, ids=(100 + i, *r.ids[1:])) for i, r in enumerate(rows)]
    assert sizes(even(rows)) == [1900]


def test_equal_rows_a_single_one_and_few_short_ones_are_one_micro_batch():
    assert [batch.num_rows for batch in even([row(3)] * 50)] == [50]
    assert [batch.num_rows for batch in even([row(3000)])] == [1]
    assert [batch.num_rows for batch in even([row(n) for n in (100, 99)])] == [2]
    assert not even([])


def test_even_micro_batches_keep_to_the_budget_however_much_padding_there_is():
    # 160 rollouts, each 16 with one call; of each 16 one answers in 600 tokens, the others in 6
    played = [
        rollout(turn((10 + i // 16,), (20,)), turn((i, *range(600 if i % 16 == 0 else 5))), prompt=(1, 2, i // 16))
        for i in range(160)
    ]
    rows = [rollout_row(r, [1.0, 1.0], [True, True]) for r in played]
    plain = list(micro_batches(rows, max_tokens=2048, pad_id=0))
    assert max(sizes(even(rows))) <= 2048
    assert sum(sizes(even(rows))) <= 1.1 * sum(sizes(plain))


def test_rows_that_begin_alike_stand_together():
    answers = [(30,), (31, 32), (33,)]
    calls = [(10,), (11,)]
    played = [rollout(turn(call, (20, 21)), turn(answer)) for answer in answers for call in calls]
    rows = [rollout_row(r, [1.0, 1.0], [True, True]) for r in played]
    # one call with all its answers: prompt 2 + call and reply 3 + answers 3 × 2
    for batch in micro_batches(rows, max_tokens=11, pad_id=0):
        assert batch.num_rows == 3
        assert batch.levels[1].ids.shape == (1, 3)


def test_a_flag_or_advantage_too_few_is_refused():
    with pytest.raises(ValueError, match="2 turns, got 1 and 2"):
        rollout_row(rollout(turn((1,), (2,)), turn((3,))), [1.0], [True, True])


def test_rows_that_say_and_earn_the_same_are_one_row_that_counts_for_all():
    same, other_prompt, longer = row(2), row(2, (9,)), row(3)
    played = rollout(turn((3, 4)))
    punished = rollout_row(played, [-1.0], [True])
    untrained = rollout_row(played, [1.0], [False])
    merged = distinct_rows([same, longer, row(2), punished, other_prompt, row(2), untrained])
    assert [r.count for r in merged] == [3, 1, 1, 1, 1]
    assert pack(merged, pad_id=0).counts.tolist() == [3, 1, 1, 1, 1]
    assert sum(r.count for r in distinct_rows([*merged, row(2)])) == 8


def test_rows_that_say_the_same_and_have_other_value_targets_stay_apart():
    def valued(target: float, old: float = 0.0) -> Row:
        one = row(2)
        return dataclasses.replace(
            one,
            values=on_sampled(one, np.array([[old], [old]])),
            returns=on_sampled(one, np.array([[target], [np.nan]]), fill=np.nan),
        )

    merged = distinct_rows([valued(1.0), valued(2.0), valued(1.0), valued(1.0, old=0.5)])
    assert [r.count for r in merged] == [2, 1, 1]
    batch = pack(merged, pad_id=0)
    assert batch.returns is not None
    assert batch.values is not None
    assert batch.values.shape == batch.returns.shape == (3, 2, 1)
    assert_array_equal(batch.returns[:, :, 0], np.float32([[1, np.nan], [2, np.nan], [1, np.nan]]))


def test_numbers_of_sampled_tokens_lie_on_them():
    made = rollout_row(rollout(turn((10,), (20, 21)), turn((12,))), [0.0, 0.0], [True, True])
    assert_array_equal(on_sampled(made, np.array([[1.0, 2], [3, 4]])), [[1, 2], [0, 0], [0, 0], [3, 4]])
    assert_array_equal(on_sampled(made, np.array([1.0, 3]), fill=np.nan), [1, np.nan, np.nan, 3])


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        # a rollout of turns of 1 and 3 tokens with a reply between, and one of a turn of 1 token
        ("sequence-mean", [1 / 8, 0, 1 / 8, 1 / 8, 1 / 8], [1 / 2]),
        ("token-mean", [1 / 5, 0, 1 / 5, 1 / 5, 1 / 5], [1 / 5]),
        ("turn-mean", [1 / 3, 0, 1 / 9, 1 / 9, 1 / 9], [1 / 3]),
        ("constant", [1 / 20, 0, 1 / 20, 1 / 20, 1 / 20], [1 / 20]),  # 2 rollouts x length 10
    ],
)
def test_weights_are_those_of_the_whole_minibatch(aggregation, first, second):
    played = [rollout(turn((10,), (20,)), turn((12, 13, 14))), rollout(turn((11,)))]
    rows = [rollout_row(r, [1.0] * len(r.turns), [True] * len(r.turns)) for r in played]
    found = weighted(rows, aggregation, length=10)
    np.testing.assert_allclose(found[0].weights, first, rtol=1e-6)
    np.testing.assert_allclose(found[1].weights, second, rtol=1e-6)
    untrained = [rollout_row(played[0], [1.0, 1.0], [False, True]), rows[1]]
    assert weighted(untrained, "sequence-mean")[0].weights.tolist() == pytest.approx([0, 0, 1 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        # shares of 1/4 and 1/2 of rollouts of 4 and of 1 token, 2 turns and 1: a third and two thirds
        ("sequence-mean", 1 / 12, 2 / 3),
        ("token-mean", 1 / 6, 1 / 3),  # 4/4 + 1/2 tokens: (1/4) / (3/2)
        ("turn-mean", 1 / 8, 1 / 2),  # 2/4 + 1/2 turns of 2, 2 and 1 tokens
        ("constant", 1 / 30, 1 / 15),  # length 10
    ],
)
def test_rows_count_by_their_shares(aggregation, first, second):
    pair = [rollout(turn((10, 11), (20,)), turn((12, 13))), rollout(turn((11,)))]
    shared = zip(pair, (1 / 4, 1 / 2), strict=True)
    rows = [rollout_row(r, [1.0] * len(r.turns), [True] * len(r.turns), share=share) for r, share in shared]
    found = weighted(rows, aggregation, length=10)
    np.testing.assert_allclose(found[0].weights, [first, first, 0, first, first], rtol=1e-6)
    np.testing.assert_allclose(found[1].weights, [second], rtol=1e-6)
