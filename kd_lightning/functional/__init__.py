"""Every equation of the library, in plain torch: no state, no Lightning.

Losses between logits (``*_losses.py``) are a divergence on rows (``*divergences.py``) and one call of
:func:`~kd_lightning.functional.row_loss.row_loss`, which has their options. Losses between features are made of these.

Notation used in all docstrings: ``s`` and ``t`` are student and teacher logits, ``T_s`` and ``T_t`` their
temperatures, ``p_s = softmax(s / T_s)``, ``p_t = softmax(t / T_t)``, ``C`` the number of classes.
"""

from kd_lightning.functional.calibration import fit_temperature
from kd_lightning.functional.class_losses import dkd_loss, hard_label_loss, nkd_loss
from kd_lightning.functional.correlation_losses import dist_loss
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
)
from kd_lightning.functional.fused_linear import FusedTerms, fused_linear_kd_loss, fused_linear_kd_terms
from kd_lightning.functional.logit_losses import (
    bernoulli_kd_loss,
    jsd_loss,
    kd_loss,
    mse_logits_loss,
    multi_temperature_kd_loss,
    reverse_kd_loss,
    soft_cross_entropy_loss,
    total_variation_loss,
)
from kd_lightning.functional.mixed_losses import (
    alpha_beta_kd_loss,
    entropy_gated_kd_loss,
    skew_kd_loss,
    symmetric_kd_loss,
    todi_loss,
)
from kd_lightning.functional.similarity_losses import (
    info_nce_logits,
    info_nce_loss,
    relational_loss,
    similarity_kd_loss,
    similarity_logits,
    similarity_preserving_loss,
)
from kd_lightning.functional.sparse import Sparse
from kd_lightning.functional.suggest import suggest_temperature
from kd_lightning.functional.temperature import (
    Temperature,
    predictive_entropy,
    tempered_log_softmax,
    tempered_softmax,
)
from kd_lightning.functional.tokens import next_token_targets

__all__ = [
    "FusedTerms",
    "Sparse",
    "Temperature",
    "alpha_beta_kd_loss",
    "attention_kd_loss",
    "attention_logits",
    "attention_transfer_loss",
    "bernoulli_kd_loss",
    "channel_logits",
    "channel_wise_kd_loss",
    "confidence_weights",
    "dist_loss",
    "dkd_loss",
    "entropy_gated_kd_loss",
    "entropy_weights",
    "fit_temperature",
    "fused_linear_kd_loss",
    "fused_linear_kd_terms",
    "hard_label_loss",
    "hint_loss",
    "info_nce_logits",
    "info_nce_loss",
    "jsd_loss",
    "kd_loss",
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
    "skew_kd_loss",
    "soft_cross_entropy_loss",
    "suggest_temperature",
    "symmetric_kd_loss",
    "tempered_log_softmax",
    "tempered_softmax",
    "todi_loss",
    "total_variation_loss",
]
