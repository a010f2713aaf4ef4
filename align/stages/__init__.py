"""The pipeline: one file per kind of stage, imported only when it runs.

Each has `run(config, inputs, out) -> metrics`: `inputs` maps every stage name in the config to its
finished folder (a policy from elsewhere: to its path or Hub id), `out` is where to write.
"""

STAGES: dict[str, str] = {
    "corpus": "align.stages.corpus",
    "pretrain": "align.stages.pretrain",
    "sft": "align.stages.sft",
    "sample": "align.stages.sample",
    "annotate": "align.stages.annotate",
    "pairs": "align.stages.pairs",
    "dpo": "align.stages.dpo",
    "evaluate": "align.stages.evaluate",
    "gate": "align.stages.gate",
    "promote": "align.stages.promote",
}
