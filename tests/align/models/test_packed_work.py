"""The work saved, counted: deterministic, on a model with the released one's proportions of FLOPs."""

from trl.trainer import utils

from tests.benchmarks.dpo import counted_flops
from tests.benchmarks.trl_steps import CONTENDERS, WORKLOADS, Clock, make_trainer, trainer_arguments


def flops(workload, contender, folder):
    how = CONTENDERS[workload.kind][contender]
    arguments = trainer_arguments(workload, how, size="prop", steps=1, lora=False, folder=folder)
    trainer = make_trainer(workload, arguments, Clock())
    rows = [trainer.train_dataset[i] for i in range(how.batch_size or workload.batch_size)]
    return counted_flops(trainer, rows)


def test_steps_cost_a_fraction_of_trls(tmp_path, monkeypatch):
    """TRL scores answer positions only here too, as on a GPU. `make bench-dpo` counts more workloads."""
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    workload = WORKLOADS["5s/32"]
    ours = flops(workload, "ours", tmp_path)
    for contender, (least, _) in workload.required.items():
        assert flops(workload, contender, tmp_path) / ours >= least
