"""How much arithmetic an update takes: a count to compare methods by, not a measurement.

    forward pass                     2 N    operations for each position
    backward pass                    4 N    2 N for the gradients of the inputs, 2 N for those of the weights
    update                           6 N

N is the number of weights that multiply: all but input embeddings that are not the output layer's too. A position is a
token of a sequence; a beginning that sequences of a micro-batch share is computed, and counted, once, and so are equal
sequences; rollouts without credit are not computed (see `batch`). Padding, attention's sums over positions, and the
optimiser are left out. With LoRA the weights that stay as they are have no gradient: 4 N and 2 for each learned one.
Recomputation, a reference, and a critic add their passes.
"""

from transformers import PreTrainedModel

from turnwise.config import TrainConfig
from turnwise.critic import Critic
from turnwise.policy import Policy


def multiplying_weights(model: PreTrainedModel) -> int:
    """Weights that multiply: all parameters, those used twice once, but an input embedding of its own."""
    total = sum(p.numel() for p in model.parameters())
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = outputs is not None and inputs.weight is outputs.weight
    return total if is_shared else total - sum(p.numel() for p in inputs.parameters())


def update_flops(policy: Policy, critic: Critic | None, positions: float, config: TrainConfig, step: int) -> float:
    """Operations of a step's update over so many positions, all passes and minibatches together.

    A critic's values before the update are a forward pass over the positions of one pass. While it warms up, the policy
    computes nothing, or the states that a shared critic reads.
    """
    n, learned = multiplying_weights(policy.model), sum(p.numel() for p in policy.learned)
    learns = critic is None or step >= config.critic_warmup_steps
    each = 0.0
    if learns:
        each += 4 * n + 2 * min(learned, n)
        each += 2 * n * (config.gradient_checkpointing + (config.kl_coef != 0))
    if critic:
        trunk = n if critic.shared else multiplying_weights(critic.trunk)
        each += 2 * trunk / config.passes
        if not critic.shared:
            each += 6 * trunk + 2 * trunk * config.gradient_checkpointing
        elif not learns:
            each += 2 * n
    return each * positions
