"""The estimators that training offers, by their published names."""

from collections.abc import Callable

from turnwise.credit.mt_grpo import mt_grpo
from turnwise.credit.parts import Credit
from turnwise.credit.trajectory import grpo_mr, grpo_or

ESTIMATORS: dict[str, Callable[..., Credit]] = {
    "grpo-or": grpo_or,
    "grpo-mr": grpo_mr,
    "mt-grpo": mt_grpo,
}
"""The estimators by their published names."""
