"""Every equation of the library, in plain torch: no state, no Lightning.

- :mod:`~kd_lightning.functional.temperature`: the :class:`Temperature` of a loss term; tempered distributions.
- :mod:`~kd_lightning.functional.logit_losses`: the losses between logits, :func:`kd_loss` first.
- :mod:`~kd_lightning.functional.divergences`: the equation of each on one row, and the closed form of its gradient.
- :mod:`~kd_lightning.functional.rows`: how an equation on rows becomes a loss: layout, masks, scale, reduction,
  and the fast path.
- :mod:`~kd_lightning.functional.feature_losses`: the losses between the features of a layer in each network.
- :mod:`~kd_lightning.functional.ensemble`: what several teachers say together.
- :mod:`~kd_lightning.functional.fused_linear`: the loss from hidden states and heads, without the logits.
- :mod:`~kd_lightning.functional.tokens`: the targets of a causal language model.

Notation used in all docstrings: ``s`` and ``t`` are student and teacher logits, ``T_s`` and ``T_t`` their
temperatures, ``p_s = softmax(s / T_s)``, ``p_t = softmax(t / T_t)``, ``C`` the number of classes.
"""

from kd_lightning.functional.ensemble import (
    confidence_weights,
    entropy_weights,
    mixed_log_softmax,
    mixed_logits,
)
from kd_lightning.functional.feature_losses import (
    attention_kd_loss,
    attention_logits,
    attention_transfer_loss,
    channel_logits,
    channel_wise_kd_loss,
    hint_loss,
    info_nce_logits,
    info_nce_loss,
    relational_loss,
    similarity_kd_loss,
    similarity_logits,
    similarity_preserving_loss,
)
from kd_lightning.functional.fused_linear import FusedTerms, fused_linear_kd_loss, fused_linear_kd_terms
from kd_lightning.functional.logit_losses import (
    Convention,
    bernoulli_kd_loss,
    dist_loss,
    dkd_loss,
    jsd_loss,
    kd_loss,
    mse_logits_loss,
    multi_temperature_kd_loss,
    nkd_loss,
    reverse_kd_loss,
    soft_cross_entropy_loss,
    total_variation_loss,
)
from kd_lightning.functional.rows import Reduction, Scale, loss_scale, without_padding
from kd_lightning.functional.temperature import (
    Temperature,
    as_temperature,
    predictive_entropy,
    tempered_log_softmax,
    tempered_softmax,
)
from kd_lightning.functional.tokens import next_token_targets

__all__ = [
    "Convention",
    "FusedTerms",
    "Reduction",
    "Scale",
    "Temperature",
    "as_temperature",
    "attention_kd_loss",
    "attention_logits",
    "attention_transfer_loss",
    "bernoulli_kd_loss",
    "channel_logits",
    "channel_wise_kd_loss",
    "confidence_weights",
    "dist_loss",
    "dkd_loss",
    "entropy_weights",
    "fused_linear_kd_loss",
    "fused_linear_kd_terms",
    "hint_loss",
    "info_nce_logits",
    "info_nce_loss",
    "jsd_loss",
    "kd_loss",
    "loss_scale",
    "mixed_log_softmax",
    "mixed_logits",
    "mse_logits_loss",
    "multi_temperature_kd_loss",
    "next_token_targets",
    "nkd_loss",
    "predictive_entropy",
    "relational_loss",
    "reverse_kd_loss",
    "similarity_kd_loss",
    "similarity_logits",
    "similarity_preserving_loss",
    "soft_cross_entropy_loss",
    "tempered_log_softmax",
    "tempered_softmax",
    "total_variation_loss",
    "without_padding",
]
