"""Credit, prefix trees, packing and one pure jitted step."""

from forgejax.learner.credit.credit import CreditConfig, assign_credit, make_judge
from forgejax.learner.digest import digest_arrays
from forgejax.learner.learner import Learner
from forgejax.learner.pack import PackGroups, TrainingBatch, pack
from forgejax.learner.packing.batch import PackedBatch, PackedStep, PackStats, Placement
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.drift import count_drift
from forgejax.learner.packing.lay import lay_empty
from forgejax.learner.packing.samples import Sample, make_supervised_sample
from forgejax.learner.step.corrections import CorrectionConfig
from forgejax.learner.step.losses import LossConfig
from forgejax.learner.step.optimizer import OptimizerConfig
from forgejax.learner.step.train_step import Metrics, StepConfig, TrainState, TrainStep, make_train_step

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
    "assign_credit",
    "count_drift",
    "digest_arrays",
    "lay_empty",
    "make_judge",
    "make_supervised_sample",
    "make_train_step",
    "pack",
]
