# Two commands on a fresh machine with Python >= 3.11, make and git: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ANNOTATION := .venv/.annotation-ready
VLLM := .venv/.vllm-ready
SEEDS ?= 0 1 2
WORKERS ?= 2
DIGITS ?= data/free-spoken-digit-dataset

export MLFLOW_DISABLE_TELEMETRY := true
export OMP_WAIT_POLICY := PASSIVE
unexport PYTHONDONTWRITEBYTECODE # or each of the many processes would compile our modules again

.PHONY: demo demo-rl demo-seeds digits bench-dpo bench-rl gpu-check test test-slow check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(ANNOTATION): $(READY) ui_annotation/server/requirements.lock
	$(BIN)/align annotate install
	touch $@

$(VLLM): $(READY) align/generation/vllm/requirements.lock  # where it has no build, its tests are skipped
	-$(BIN)/align engine install && touch $@

demo: $(ANNOTATION)  ## the whole loop on made audio: pre-train, SFT, annotate, DPO, gate, promote
	$(BIN)/align run recipes/demo

demo-seeds: $(ANNOTATION)  ## the demo once per seed, then one table
	for seed in $(SEEDS); do \
	  $(BIN)/align run recipes/demo --set '*.seed='$$seed --out runs/demo-seed-$$seed || exit $$?; \
	done
	$(BIN)/align compare $(foreach seed,$(SEEDS),runs/demo-seed-$(seed)) --seeds

demo-rl: $(READY)  ## reinforcement learning from the demo's SFT policy, which is made if it is not there
	mkdir -p runs/demo_rl
	for stage in 0_corpus 1_pretrain 2_sft; do \
	  test -d runs/demo_rl/$$stage || ! test -d runs/demo/$$stage || cp -al runs/demo/$$stage runs/demo_rl/; \
	done
	$(BIN)/align run recipes/demo_rl

digits: $(ANNOTATION)  ## the same stages on recorded human speech; DIGITS= its folder
	$(BIN)/align run recipes/spoken_digits --set corpus.dir=$(DIGITS)

bench-dpo: $(READY)  ## FLOPs, time and memory of DPO and SFT steps: TRL, TRL tuned, ours; runs/bench/dpo.json
	$(BIN)/python -m tests.benchmarks.dpo

bench-rl: $(READY)  ## FLOPs and time of GRPO's passes and rollouts: stock and ours; runs/bench/rl.json
	$(BIN)/python -m tests.benchmarks.rl

gpu-check: $(if $(GPU_PYTHON),,$(READY))  ## evidence from an H100 or H200 in ten minutes; GPU_PYTHON= where torch is there
	$(or $(GPU_PYTHON),$(BIN)/python) -m tests.benchmarks.gpu_check

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: check $(ANNOTATION)  ## the longest files begin, each in one worker; then the tests that want to be alone
	$(PYTEST) -m "not alone and not slow" $(PARALLEL)
	$(PYTEST) -m "alone and not slow"

test-slow: $(ANNOTATION) $(VLLM)  ## what rarely breaks and takes long
	$(PYTEST) -m "slow and not alone" $(PARALLEL)
	$(PYTEST) -m "slow and alone"

clean:  ## what can be made again; runs/ stays, people's annotations may be in it
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
