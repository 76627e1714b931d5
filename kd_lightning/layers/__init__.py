"""Distillation between layers: hooks that read features, and terms of the loss between them."""

from kd_lightning.layers.extractor import FeatureExtractor
from kd_lightning.layers.terms import LayerResult, LayerTerm, LayerTerms

__all__ = ["FeatureExtractor", "LayerResult", "LayerTerm", "LayerTerms"]
