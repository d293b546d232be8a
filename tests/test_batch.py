"""Rollouts to padded tensors: what is seen, what was sampled and what is trained are three things."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from turnwise.batch import Row, distinct_rows, micro_batches, pack, rollout_row
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
    assert_array_equal(batch.prompts, [[1, 2], [7, 99]])
    assert_array_equal(batch.prompt_lengths, [2, 1])
    assert_array_equal(batch.prompt_of, [0, 1, 0])
    assert_array_equal(batch.ids, [[3, 4, 99], [3, 99, 99], [3, 4, 5]])


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = [row(length, (length % 3,)) for length in (5, 1, 9, 3, 3, 8, 2, 40, 1, 6)]
    made = list(micro_batches(rows, max_tokens=18, pad_id=0))
    lengths = [batch.attention.sum(1).tolist() for batch in made]
    # longest first: 40 alone; 9 + 8 fill 2 × 9; 6, 5, 3 fill 3 × 6; the rest fits 4 × 3
    assert lengths == [[40], [9, 8], [6, 5, 3], [3, 2, 1, 1]]


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
