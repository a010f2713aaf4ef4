"""Direct preference optimisation (arXiv:2305.18290) through TRL, on audio.

Differs from the paper: every pair's loss is weighted by the objective's axes that prefer it, and of the
checkpoints the one that answers dev questions best is kept, because DPO over-optimises long before its
training loss says so. Reads: policy (also the reference), pairs, corpus. Writes: model/, metrics.jsonl.
    align run recipes/demo --only 6_dpo
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from datasets import Dataset
from trl import DPOConfig as TRLConfig

from align.evaluation import scores
from align.evaluation.benchmarks import air_bench
from align.evaluation.judges.facts import FactJudge
from align.generation.generate import Decoding, Request, Sampler, complete_all, flatten
from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.training import Choose, DPOConfig
from align.run_folder.artifacts import StageFolder, read_json, write_json
from align.stages.tuning import tuning_of
from align.training import ranks
from align.training.arguments import arguments
from align.training.checkpoints import AtomicCheckpoints, checkpoints, step_of
from align.training.collate import PreferenceCollator, SFTCollator
from align.training.divergence import kl_per_answer
from align.training.fit import fit
from align.training.lengths import Lengths
from align.training.memory import job_of, plan_passes, told
from align.training.preflight import check_heard
from align.training.publish import as_policy, publish
from align.training.reference import ReferenceStore
from align.training.trainers import AudioDPOTrainer
from preference_data import store
from preference_data.dataset.dataset import Dataset as Corpus
from preference_data.preferences.pairs import weigh
from preference_data.schema import AudioClip, Axis, PreferencePair


def run(config: DPOConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train on weighted pairs, choose a checkpoint; returns the last logged metrics and the choice."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_heard(Corpus(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    features = ClipFeatures(processor, corpus)
    dataset = _dataset(config, inputs[config.pairs])
    tuning = tuning_of(config)
    model = tuning.load(policy)
    tuning.prepare(model)
    lengths = Lengths(corpus, processor)
    settings = {"precompute_ref_log_probs": True, **config.trl}
    second = tuning.lora is None and not settings["precompute_ref_log_probs"]
    plan = plan_passes(
        model,
        tuning,
        config.trl,
        name=out.name,
        batch_size=config.batch_size,
        job=job_of(tuning, pairs=True, with_reference=second),
        longest=lambda job, shape: lengths.longest_pair(dataset, job, shape, tuning.strategy),
    )
    trainer = AudioDPOTrainer(
        model=model,
        args=TRLConfig(
            **arguments(
                out.path,
                steps=math.ceil(len(dataset) * config.epochs / config.batch_size),
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                save_steps=config.save_steps,
                seed=config.seed,
                tuning=tuning,
                plan=plan,
                passed_on=settings,
            ),
            loss_type=[config.loss],
            beta=config.beta,
        ),
        train_dataset=dataset,
        data_collator=PreferenceCollator(processor, features, tuning.packed),
        processing_class=processor,
        peft_config=tuning.peft_config,
        cost=lengths.cost,
        reference=_reference(dataset, corpus, out),
    )
    trainer.strategy = tuning.strategy
    if config.choose is None:
        trainer.keep = AtomicCheckpoints.keep  # the last one is taken
    metrics = {**fit(trainer, out, tuning.modules), **told(plan), "pairs": float(len(dataset))}
    if not ranks.is_first():
        return metrics
    saved = checkpoints(out.path / "checkpoints")
    if config.choose is None:
        publish(saved[-1], policy, processor, out.path)
        return metrics
    found = _score_checkpoints(config.choose, policy, corpus, features, out)
    best = max(found, key=lambda step: found[step]["dev/score"])
    publish(out.path / "checkpoints" / f"checkpoint-{best}", policy, processor, out.path)
    return {**metrics, "chosen_step": float(best), **found[best]}


def _dataset(config: DPOConfig, pairs: Path) -> Dataset:
    """Rows question, chosen, rejected, audios, weight. The `sft` loss has no pairs to weigh: all count 1."""
    objective: dict[Axis, float] = {
        "factuality": config.objective.factuality,
        "behaviour": config.objective.behaviour,
    }
    weighted = weigh(store.read(pairs / "pairs.jsonl", PreferencePair), objective)
    if not weighted:
        raise ValueError(f"{pairs} holds no pair that objective {config.objective} prefers: nothing to learn")
    return Dataset.from_list(
        [
            {
                "question": pair.question,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "audios": list(pair.audios),
                "weight": 1.0 if config.loss == "sft" else weight,
            }
            for pair, weight in weighted
        ]
    )


def _reference(dataset: Dataset, corpus: Path, out: StageFolder) -> ReferenceStore:
    """The run's store: what the reference said stays known when only `beta` or a rate is changed."""
    used = {path for audios in dataset["audios"] for path in audios}
    clips = {clip.path: clip.sha256 for clip in Corpus(corpus).table(AudioClip) if clip.path in used}
    return ReferenceStore(out.path.parent / ".reference", clips)


def _score_checkpoints(
    choose: Choose, policy: Path | str, corpus: Path, features: ClipFeatures, out: StageFolder
) -> dict[int, dict[str, float]]:
    """Dev metrics of every checkpoint by step; each is computed once, whatever gets killed."""
    reference = Sampler(policy, corpus, features=features)
    found: dict[int, dict[str, float]] = {}
    for checkpoint in checkpoints(out.path / "checkpoints"):
        saved = out.path / "dev" / f"{checkpoint.name}.json"
        if not saved.exists():
            with as_policy(checkpoint, policy, reference.processor) as folder:
                write_json(saved, _dev_metrics(choose, folder, reference, corpus))
        found[step_of(checkpoint)] = read_json(saved)
        out.log(step_of(checkpoint), found[step_of(checkpoint)])
    return found


def _dev_metrics(choose: Choose, candidate: Path, reference: Sampler, corpus: Path) -> dict[str, float]:
    everything = air_bench.read(corpus / "dev")
    drawn = np.random.default_rng(0).permutation(len(everything))[: choose.questions]
    items = [everything[i] for i in sorted(drawn)]
    clips = [f"dev/{item.audio}" for item in items]
    sampler = Sampler(candidate, corpus, features=reference.features)
    requests = [Request(item.question, (clip,)) for item, clip in zip(items, clips, strict=True)]
    how = Decoding(choose.max_new_tokens)
    answers = flatten(complete_all(sampler, requests, how, seed=0, batch_size=128))
    judgements = FactJudge(corpus / "phrasebook.yaml").judge(items, answers)
    overall = scores.summary(judgements, answers)
    rows = [
        {"messages": [user(item.question, 1), assistant(answer)], "audios": [clip], "draw": 0}
        for item, clip, answer in zip(items, clips, answers, strict=True)
    ]
    batch = SFTCollator(sampler.processor, reference.features)(rows)
    batch = {name: value.to(sampler.device) for name, value in batch.items()}
    kl = kl_per_answer(sampler.model, reference.model, batch)
    names = ("factuality", "behaviour", "score", "asked", "over_abstention", "words")
    return {**{f"dev/{name}": overall[name] for name in names}, "dev/kl": float(kl.mean())}
