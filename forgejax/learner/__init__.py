"""Credit, prefix trees, packing and one pure jitted step."""

from forgejax.learner.batch import PackedBatch, PackedStep, PackStats, Placement
from forgejax.learner.corrections import CorrectionConfig
from forgejax.learner.credit import CreditConfig, credit, judge
from forgejax.learner.drift import drift_tokens
from forgejax.learner.learner import Learner
from forgejax.learner.losses import LossConfig
from forgejax.learner.optimizer import OptimizerConfig
from forgejax.learner.pack_config import PackConfig
from forgejax.learner.packing import empty_batch, pack
from forgejax.learner.pipeline import PackGroups, TrainingBatch
from forgejax.learner.samples import Sample, supervised_sample
from forgejax.learner.step import Metrics, StepConfig, TrainState, TrainStep, make_train_step

__all__ = [
    "CorrectionConfig",
    "CreditConfig",
    "Learner",
    "LossConfig",
    "Metrics",
    "OptimizerConfig",
    "PackConfig",
    "PackGroups",
    "PackStats",
    "PackedBatch",
    "PackedStep",
    "Placement",
    "Sample",
    "StepConfig",
    "TrainState",
    "TrainStep",
    "TrainingBatch",
    "credit",
    "drift_tokens",
    "empty_batch",
    "judge",
    "make_train_step",
    "pack",
    "supervised_sample",
]
