"""The LightningModules: with a teacher, and without."""

from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.distillation import DistillationModule
from kd_lightning.modules.sharded import ShardedDistillationModule
from kd_lightning.modules.supervised import SupervisedModule

__all__ = ["ClassificationModule", "DistillationModule", "ShardedDistillationModule", "SupervisedModule"]
