"""The pipeline: one file per kind of stage, each with `run(config, inputs, out) -> metrics`.

`inputs` maps every stage name in the config to its finished folder (a policy from elsewhere: to its path or
Hub id), `out` is where to write. The list of stages stands in `align/recipe/config/stages.py`.
"""
