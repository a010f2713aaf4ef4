"""What every stage can be told, typed and bounded. Imports no torch, so a recipe is checked in a blink.

A stage file names its stage (`stage: dpo`) and earlier stages as inputs (`policy: 2_sft`). Fields that
name an earlier stage are marked with `Needs(kind)`; each stage declares the kind it `produces`.
Values are those of the file: nothing here rewrites them.
"""

from __future__ import annotations

from align.recipe.config.base import StageConfig
from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.evaluation import EvaluateConfig, GateConfig, PromoteConfig
from align.recipe.config.preference import AnnotateConfig, PairsConfig, SampleConfig
from align.recipe.config.training import DPOConfig, PretrainConfig, SFTConfig

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
