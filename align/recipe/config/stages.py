"""The list of stages. Adding one takes its config class, its file in `align/stages`, and a line here."""

from __future__ import annotations

from align.recipe.config.alignment import DPOConfig, GRPOConfig, KTOConfig, RewardModelConfig
from align.recipe.config.base import StageConfig
from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.evaluation import EvaluateConfig, GateConfig, PromoteConfig
from align.recipe.config.preference import (
    AnnotateConfig,
    LabelsConfig,
    PairsConfig,
    RoundsConfig,
    SampleConfig,
    ScoreConfig,
)
from align.recipe.config.training import PretrainConfig, SFTConfig

STAGES: dict[str, type[StageConfig]] = {
    config.kind(): config
    for config in (
        CorpusConfig,
        PretrainConfig,
        SFTConfig,
        SampleConfig,
        AnnotateConfig,
        ScoreConfig,
        PairsConfig,
        LabelsConfig,
        DPOConfig,
        RoundsConfig,
        KTOConfig,
        RewardModelConfig,
        GRPOConfig,
        EvaluateConfig,
        GateConfig,
        PromoteConfig,
    )
}
"""What `stage:` may say -> its config; `align.stages.<stage>` runs it."""
