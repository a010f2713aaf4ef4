"""The README.md of an exported model: its use, its ancestry, its evaluation, its limits and licences.

Everything in it is read from the run's manifests; what they do not say is called unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.release import ancestry, evaluations
from align.release.evaluations import Evaluation
from align.release.policy_files import PolicyFiles
from preference_data.dataset.dataset import Dataset

_HEAD = """---
library_name: transformers
pipeline_tag: audio-text-to-text
tags: [qwen2_audio]
---"""
_LIMITS = """- Scores hold for the benchmark's questions, languages and recordings, and for nothing else.
- The model also answers fluently where there is nothing to hear; do not use it where a wrong answer harms."""
_LICENCE = """The weights inherit the terms of the models they started from and of the data named above. The
run records no models' licences; whoever publishes the weights must look up what is missing here."""
_USE = """```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER)
model = AutoModelForMultimodalLM.from_pretrained(FOLDER, dtype="auto")
chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What do you hear?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=text, audio=[samples], sampling_rate=16000, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]))
```"""
_VLLM = """vLLM: it should serve this folder as Qwen2AudioForConditionalGeneration (`vllm serve FOLDER
--limit-mm-per-prompt '{"audio": 2}'`; vLLM with its audio extra installed). That has not been tried with this
export; compare a few answers with transformers' first, because a reader that drops the audio answers too."""


def write(policy: PolicyFiles, heard_s: float, n_parameters: int, checked: str) -> str:
    """The card's Markdown.

    Args:
        policy: the exported policy.
        heard_s: longest clip that the model hears, seconds.
        n_parameters: of the merged model.
        checked: the result of the check of the exported folder, one sentence.
    """
    stage = policy.stage
    parts = [
        _HEAD,
        f"# {_line(policy.name)}",
        f"A Qwen2-Audio of {n_parameters:,} parameters: hears clips of up to {heard_s:g} s at 16 kHz and "
        "answers in text.",
        "## Use",
        _USE,
        f"Give the audio as `audio=`; another name fails or, in older versions, is ignored. {checked}",
        _VLLM,
        "## Made from",
        *(_history(stage) if stage else _registered(policy.tags)),
        "## Evaluation",
        *(_evaluation(stage) if stage else _decided(policy.tags)),
        "## Limits",
        f"- The processor cuts clips longer than {heard_s:g} s without a word.\n{_LIMITS}",
        "## Licence",
        _LICENCE,
        *(_licences(stage) if stage else ()),
    ]
    return "\n\n".join(parts) + "\n"


def _history(stage: Path) -> Iterator[str]:
    """Stages and datasets with their digests."""
    history = ancestry.ancestry(stage)
    rows = [
        [
            ancestor.name,
            ancestor.manifest.get("kind", "from elsewhere"),
            ancestor.digest[:16],
            ancestor.manifest.get("git_commit"),
            ancestor.manifest.get("seed"),
        ]
        for ancestor in history.ancestors
    ]
    yield _table(["stage", "kind", "sha256", "commit", "seed"], rows)
    data = [[name, digest[:16]] for name, digest in history.datasets().items()]
    yield _table(["data", "sha256 as it was used"], data) if data else "Data: none is recorded."
    if history.unknown:
        yield f"Not made in this run, so their data is unknown: {', '.join(map(_line, history.unknown))}."
    versions = history.ancestors[0].manifest.get("versions", {})
    yield "Software: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _licences(stage: Path) -> Iterator[str]:
    """The licences that the prepared data sets of the corpora state, as far as they are still on disk."""
    rows = []
    for corpus in ancestry.ancestry(stage).corpora().values():
        for source in corpus.manifest["config"].get("sources", []):
            about = Dataset(Path(source["folder"]).expanduser()).about
            rows.append([about.get("name", source["folder"]), about.get("licence", "unknown")])
    if rows:
        yield _table(["data set", "licence"], rows)


def _registered(tags: Mapping[str, str]) -> Iterator[str]:
    if not tags:
        yield "A folder without a manifest: what it was made from is unknown."
        return
    data = [[name.removeprefix("dataset."), digest] for name, digest in tags.items() if "dataset." in name]
    yield f"Version {tags['version']} of the registry, weights sha256 {tags['weights.sha256']}."
    yield _table(["data", "sha256"], data) if data else "Data: none is recorded."


def _decided(tags: Mapping[str, str]) -> Iterator[str]:
    if "gate.verdict" not in tags:
        yield "None is known."
        return
    judge = tags.get("judge.model") or tags.get("judge.name", "unknown")
    yield f"Gate: {tags['gate.verdict']}. Judge: {_line(judge)}. Scores are in the run that was promoted."


def _evaluation(stage: Path) -> Iterator[str]:
    """The judge, the verdict with its reasons, and the differences with their intervals."""
    evaluation = next(
        (item for item in evaluations.find(stage.parent) if stage.name in item.scores.get("policies", {})),
        None,
    )
    if evaluation is None:
        yield "It has not been evaluated."
        return
    judge = evaluation.scores.get("judge", {})
    yield f"Judge: {_line(judge.get('model') or judge.get('name', 'unknown'))}" + (
        ", which knows the facts the benchmark was made from: nobody's opinion, and no human's."
        if judge.get("shares_ground_truth")
        else ". A judge model is not a person; its scores compare only with its own, under one prompt."
    )
    yield f"Split: {evaluation.scores.get('split')}, {evaluation.scores.get('n')} questions."
    if evaluation.scores.get("after") == stage.name:
        yield _differences(evaluation)
    gate = ancestry.gate(stage, evaluation.folder)
    if gate is None:
        yield "No gate has judged it."
        return
    yield f"Gate: **{gate.verdict}**" + ("." if gate.is_current else ", of an earlier evaluation.")
    yield "\n".join(f"- {_line(reason)}" for reason in gate.reasons)


def _differences(evaluation: Evaluation) -> str:
    rows = [
        [
            name,
            f"{row['before']:.3f}" if "before" in row else "",
            f"{row['after']:.3f}" if "after" in row else "",
            f"{row['ci_low']:+.3f} to {row['ci_high']:+.3f}",
        ]
        for name, row in evaluation.scores.get("comparison", {}).items()
    ]
    return _table(["", f"before ({evaluation.scores['before']})", "after", "difference, 95 % interval"], rows)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [" | ".join(map(_line, head)), " | ".join(["---"] * len(head))]
    lines += [" | ".join(map(_line, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _line(value: Any) -> str:
    """A value as one line that Markdown takes for text."""
    text = " ".join(str("" if value is None else value).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "] (")
