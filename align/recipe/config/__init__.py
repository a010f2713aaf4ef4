"""What every stage can be told, typed and bounded. Imports no torch, so a recipe is checked in a blink.

A stage file names its stage (`stage: dpo`) and earlier stages as inputs (`policy: 2_sft`). Fields that
name an earlier stage are marked with `Needs(kind)`; each stage declares the kind it `produces`.
Values are those of the file: nothing here rewrites them.
"""

from __future__ import annotations

from align.recipe.config.base import (
    AnnotationsRef,
    CheckpointRef,
    CompletionsRef,
    Config,
    CorpusRef,
    EvaluationRef,
    Needs,
    OutputKind,
    Outside,
    OutsideFolder,
    PairsRef,
    PolicyRef,
    StageConfig,
    VerdictRef,
)
from align.recipe.config.corpus import ClipCounts, CorpusConfig, DataSetShare
from align.recipe.config.evaluation import (
    EvaluateConfig,
    GateConfig,
    JudgeLimits,
    JudgeModel,
    Margin,
    PromoteConfig,
    Thresholds,
)
from align.recipe.config.preference import AnnotateConfig, PairsConfig, SampleConfig
from align.recipe.config.training import (
    Assemble,
    Augment,
    Choose,
    DPOConfig,
    Filters,
    Hardware,
    Lesson,
    LoRA,
    ModelPart,
    ModelShape,
    Objective,
    PretrainConfig,
    SFTConfig,
    StartingModel,
    TrainingConfig,
)

CONFIGS: dict[str, type[StageConfig]] = {
    "corpus": CorpusConfig,
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "sample": SampleConfig,
    "annotate": AnnotateConfig,
    "pairs": PairsConfig,
    "dpo": DPOConfig,
    "evaluate": EvaluateConfig,
    "gate": GateConfig,
    "promote": PromoteConfig,
}
TRL_CONFIGS = {"pretrain": "SFTConfig", "sft": "SFTConfig", "dpo": "DPOConfig"}
"""The TRL config class whose names a stage's `trl:` mapping may use."""

__all__ = [
    "CONFIGS",
    "TRL_CONFIGS",
    "AnnotateConfig",
    "AnnotationsRef",
    "Assemble",
    "Augment",
    "CheckpointRef",
    "Choose",
    "ClipCounts",
    "CompletionsRef",
    "Config",
    "CorpusConfig",
    "CorpusRef",
    "DPOConfig",
    "DataSetShare",
    "EvaluateConfig",
    "EvaluationRef",
    "Filters",
    "GateConfig",
    "Hardware",
    "JudgeLimits",
    "JudgeModel",
    "Lesson",
    "LoRA",
    "Margin",
    "ModelPart",
    "ModelShape",
    "Needs",
    "Objective",
    "OutputKind",
    "Outside",
    "OutsideFolder",
    "PairsConfig",
    "PairsRef",
    "PolicyRef",
    "PretrainConfig",
    "PromoteConfig",
    "SFTConfig",
    "SampleConfig",
    "StageConfig",
    "StartingModel",
    "Thresholds",
    "TrainingConfig",
    "VerdictRef",
]
