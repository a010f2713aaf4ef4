"""Several completions per prompt from the current policy: what annotators will compare.

On-policy, because a policy learns most from its own mistakes (facts: +.13 factuality against +.03 from
template-made pairs). Reads: policy, corpus. Writes: prompts.jsonl, completions.jsonl, left_out.jsonl
(prompts about clips that cannot be read).
    align run recipes/demo --only 3_sample
"""

from __future__ import annotations

from functools import partial
from math import fsum
from pathlib import Path

from align.generation.complete import Completions, RequestSet, complete_all
from align.generation.engine import Decoding, open_engine, request_of
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor, located
from align.models.shards import weights_sha256
from align.recipe.config.preference import SampleConfig
from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import Progress
from preference_data import store
from preference_data.prompts.prompts import refuse_control, texts_of
from preference_data.schema import Completion, Prompt, stable_id


def run(config: SampleConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Complete every prompt of the corpus' preference split; returns counts.

    Raises:
        BadExample: a prompt holds a token that steers the model.
    """
    corpus, policy = inputs[config.corpus], located(inputs[config.policy])
    prompts = store.read(corpus / "prompts.jsonl", Prompt)
    for prompt in prompts:
        refuse_control(prompt.id, *texts_of(prompt))
    groups = _completions(config, policy, corpus, prompts, out)
    left_out = [prompt for prompt, group in zip(prompts, groups, strict=True) if not group]
    prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) if group]
    groups = [group for group in groups if group]
    if left_out and not prompts:
        raise ValueError(
            f"no clip of the {len(left_out)} prompts of {corpus} can be read; the log names them"
        )
    sha = weights_sha256(policy)
    completions = [
        Completion(
            id=stable_id(prompt.id, sha, i, drawn.text),
            prompt_id=prompt.id,
            index=i,
            text=drawn.text,
            policy=sha,
            logp=fsum(drawn.logps),
            n_tokens=len(drawn.token_ids),
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for i, drawn in enumerate(group)
    ]
    store.write(out.path / "prompts.jsonl", prompts)
    store.write(out.path / "completions.jsonl", completions)
    rows = [{"id": prompt.id, "reason": "unreadable_audio", "audios": prompt.audios} for prompt in left_out]
    store.write_rows(out.path / "left_out.jsonl", rows)
    different = sum(len({drawn.text for drawn in group}) for group in groups)
    return {
        "prompts": float(len(prompts)),
        "completions": float(len(completions)),
        "different_per_prompt": different / max(1, len(prompts)),
        **({"left_out_unreadable_audio": float(len(left_out))} if left_out else {}),
    }


def _completions(
    config: SampleConfig, policy: Path | str, corpus: Path, prompts: list[Prompt], out: StageFolder
) -> Completions:
    """Batch by batch, each saved when done, so that a killed run makes only what is missing."""
    clips = ClipFeatures(load_processor(policy), corpus)
    requests = [request_of(prompt) for prompt in prompts]
    with Progress(out.name, len(requests), out.path) as progress:
        return complete_all(
            partial(open_engine, config.engine, policy, clips, out.path.parent),
            [RequestSet("prompts", clips, requests)],
            Decoding(
                config.max_new_tokens,
                config.temperature,
                config.top_p,
                completions=config.completions_per_prompt,
            ),
            seed=config.seed,
            batch_size=config.batch_size,
            folder=out.path / "batches",
            workers=config.workers,
            on_progress=progress.update,
        )["prompts"]
