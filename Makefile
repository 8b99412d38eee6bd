SEED ?= 0
# processes of make test: one more than two cores, as some wait while others compute
WORKERS ?= 3
OUT ?= runs/demo
ROUNDS ?= 3
# of make gpu: cuda or cpu; 12b, or tiny for a CPU; the beginning of a piece's name
DEVICE ?= cuda
SIZE ?= 12b
PIECE ?=

ifdef PY # an interpreter that has everything already: PY=python3 make test
READY :=
else
PY := .venv/bin/python
READY := .venv/ready
endif

.PHONY: help venv demo serve test promises proof chaos operator year lint format bench peers study gpu miniature clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with exactly requirements.lock (again when that changes)

.venv/ready: requirements.lock
	@echo "creating .venv from requirements.lock (minutes, once)"
	@rm -rf .venv
	@python3 -m venv .venv
	@.venv/bin/pip install -qq --disable-pip-version-check -r requirements.lock
	@touch $@

demo: $(READY) ## the whole job on the bundled miniature: SEED=0 OUT=runs/demo
	$(PY) -m flows.pipeline plan=miniature seed=$(SEED) out=$(OUT)

serve: $(READY) ## the Prefect UI on http://127.0.0.1:4200 with everything ready to trigger
	$(PY) -m flows.serve

test: $(READY) ## the tests, several files at a time
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

promises: $(READY) ## one real example of each promise that takes minutes, in two halves side by side: kills, ranks, machines; a browser, an attack, nginx, PostgreSQL
	@mkdir -p runs; $(PY) -m pytest -m ci --ignore=tests/flows >runs/promises.log 2>&1 & rest=$$!; \
	$(PY) -m pytest -m ci tests/flows; flows=$$?; wait $$rest; rest=$$?; cat runs/promises.log; exit $$((flows + rest))

proof: $(READY) ## the longer proofs: numerics, kill series and the whole of make operator
	$(PY) -m pytest -m slow
	$(MAKE) operator

chaos: $(READY) ## kill every stage some hundred and fifty times at random moments: SEED=0
	SEED=$(SEED) $(PY) -m pytest -m chaos tests/stages/test_chaos.py

operator: $(READY) ## make serve, killed and restarted, a browser, nginx and PostgreSQL (from Debian): half an hour; screenshots in runs/screenshots
	$(PY) -m pytest -m operator tests/flows

year: $(READY) ## 52 recurring recoveries in accelerated time, with kills, damaged shards and a regression: SEED=0
	SEED=$(SEED) $(PY) -m pytest -m year tests/flows/test_year.py

lint: $(READY) ## ruff's rules and format, mypy's types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## put imports and layout in order
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

bench: $(READY) ## measure the training step, checkpoints and the stream
	@set -e; for name in dev2pro.training.step dev2pro.training.checkpoint data.loading.stream data.loading.order data.index flows.ui.progress; do echo "== $$name"; $(PY) -m bench.$$name; done
	$(PY) -m bench.train recover --size miniature
	$(PY) -m bench.train lora --size miniature

peers: $(READY) ## measure our LoRA and full steps against diffusers' own scripts and a bare loop: ROUNDS=3
	$(PY) -m bench.peers $(ROUNDS)

study: $(READY) ## every way to train a LoRA on every kind of base, each part within an hour: BASE=outside SEED=0, all of them without
	$(PY) -m bench.study $(if $(BASE),--base $(BASE)) $(if $(filter file,$(origin SEED)),,--seed $(SEED))
	$(PY) -m bench.study_tables

gpu: $(READY) ## on a machine with a GPU: the tests marked gpu, then 12 B weights through every hardware= file; DEVICE=cuda SIZE=12b PIECE=
	$(PY) -m bench.gpu --device $(DEVICE) --size $(SIZE) --piece "$(PIECE)"

miniature: $(READY) ## build data/miniature again from nothing
	$(PY) -m flows.miniature

clean: ## remove the tools' caches; what stages made in runs/ stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
