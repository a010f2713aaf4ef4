"""The page of every key says what the config classes say."""

from align.recipe.config.stages import STAGES
from docs.write_reference import REFERENCE, bases, own_fields, reference


def test_the_committed_page_is_what_the_script_writes():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), (
        "write it again: python -m docs.write_reference"
    )


def test_every_key_of_every_stage_has_a_row():
    sections = dict(section.split("\n", 1) for section in reference().split("\n## ")[1:])
    for kind, config in STAGES.items():
        rows = sections[f"stage: {kind}"]
        assert all(f"| `{name}` |" in rows for name in own_fields(config))
        told = {name for part in (config, *bases(config)) for name in own_fields(part)}
        assert told == config.model_fields.keys() - {"stage"}


def test_bounds_references_and_docstrings_are_told():
    row = next(
        line for line in reference().splitlines() if line.startswith("| `min_agreement` | number, above 0.5")
    )
    assert row.endswith(
        "| Two completions are a pair where at least this share of the votes prefer the same one. |"
    )
    assert "| `policy` | a stage that leaves policy | **required** |" in reference()
