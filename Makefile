# make demo          run the whole comparison on a small dataset that needs no download, and plot it
# make test          lint, then run all tests
# make test-lowest   run all tests with the lowest allowed versions (Python 3.10 to 3.12)
# make figures       rebuild every picture and table of README and docs from the committed logs
# make faults        kill runs, fill disks, damage files, try random command lines: ~16 minutes
# make lint          check code and formatting with ruff
# make format        let ruff fix and format
# make clean         remove the environments, the demo's results and caches
#
# Each target first creates the environment that it needs.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_DIR = experiments/demo
LOWEST = .venv-lowest

.PHONY: demo test test-lowest figures faults lint format clean

# One run at a time and the speed of attention on its own, so that no figure of speed is disturbed.
demo: $(VENV)/installed
	$(BIN)/python run_experiments.py --gpus 0 --dataset digits --expansion_steps '[1, 2]' --output_dir $(DEMO_DIR) -- \
		--model vit_micro --img_size 16 --patch_size 2 --pool mean --epochs 12 --batch_size 32 --lr 2e-3 --dropout 0 --weight_decay 0.05
	$(BIN)/python benchmark.py --quick --output $(DEMO_DIR)/attention_speed.json
	$(BIN)/python plot_result.py --results_path $(DEMO_DIR)/digits --benchmark $(DEMO_DIR)/attention_speed.json

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest

# Reports of other levels than attention and model have no pictures. Each page of results names the
# command that makes it.
figures: $(VENV)/installed
	$(BIN)/python masks.py --expansion_step 2 --picture docs/masks.png \
		--mask_types '["full", "1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors"]'
	$(BIN)/python masks.py --expansion_step 2 --picture docs/patterns.png
	set -e; for report in experiments/benchmark/attention_*.json experiments/benchmark/model_*.json; do \
		$(BIN)/python benchmark.py --plot $$report; done
	set -e; for results in experiments/logs/*/results.md; do \
		$(BIN)/python $$(sed -n 's/^Rebuild with `python \(.*\)`\.$$/\1/p' $$results); done
	$(BIN)/python experiments/overview.py
	$(BIN)/python docs/speed_tables.py
	$(BIN)/python docs/result_tables.py

faults: $(VENV)/installed-dev
	FAULTS=long $(BIN)/python -m pytest tests/faults

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# These marker files make a changed requirement install again.
$(VENV)/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Every >= of the requirements becomes an == that pip must satisfy.
$(LOWEST)/installed: requirements.txt requirements-dev.txt requirements-slurm.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed -n 's/>=/==/p' $^ > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -r requirements-dev.txt -c $(LOWEST)/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(DEMO_DIR) .pytest_cache .ruff_cache .hypothesis
