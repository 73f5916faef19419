# make demo · make test · make notebooks · make docs · make tiny · make results · make clean. Each sets itself up in .venv.
PYTHON ?= python3
VENV ?= .venv
SECONDS ?= 0
RUN ?= $(if $(filter-out 0,$(SECONDS)),runs/quick,runs/demo)
SEED ?= 0

bin := $(VENV)/bin
ready := $(VENV)/.ready

.PHONY: demo test notebooks docs tiny results clean

demo: $(ready)
	$(bin)/fuselip-edu demo --run $(RUN) --seconds $(SECONDS) --seed $(SEED)

test: $(ready)
	$(bin)/python .ci/notebooks.py check
	$(bin)/python .ci/notebooks.py test
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -q -n 2 --dist loadfile tests

# Executes every chapter in place, keeps the outputs, cleans them, and writes README.md from index.ipynb.
notebooks: $(ready)
	$(bin)/nbdev_export
	$(bin)/python .ci/notebooks.py execute $(CHAPTERS)
	$(bin)/nbdev_clean
	$(bin)/python .ci/notebooks.py readme

# Builds the book as a site in _docs/, to be read in a browser or put on a server.
docs: $(ready)
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,notebooks,docs]'
	$(bin)/python .ci/notebooks.py site

# Repeats the training of the tokenizer that ships in data/tiny.
tiny: $(ready)
	rm -rf runs/tiny-tokenizer
	$(bin)/fuselip-edu train-tokenizer --preset tiny --run runs/tiny-tokenizer --export data/tiny

# Repeats the committed results from scratch: the demo, the comparison of models, the ladder of speed, and the small real sets that FUSELIP_DATA names.
results: $(ready)
	rm -rf runs/results
	$(bin)/fuselip-edu demo --run runs/results/demo --seed $(SEED)
	cp runs/results/demo/results.json data/results/demo.json
	$(bin)/fuselip-edu reproduce --preset tiny --seeds 3 --run runs/results/reproduce
	cp runs/results/reproduce/results.json data/results/reproduce.json
	$(bin)/fuselip-edu reproduce --preset tiny --models fuselip,filip,vectors,ett,sf,mlf --seeds 1 --run runs/results/neighbours
	cp runs/results/neighbours/results.json data/results/neighbours.json
	$(bin)/fuselip-edu reproduce --preset tiny --ablations --steps 900 --tokenizer-steps 1600 --run runs/results/ablations
	cp runs/results/ablations/results.json data/results/ablations.json
	$(bin)/fuselip-edu benchmark --preset fuselip-s --device cpu --steps 3 --json data/results/scaling.json
	for set in nlvr emoji4 grocery starved; do $(bin)/python examples/$$set.py --out runs/results/$$set && cp runs/results/$$set/results.json data/results/$$set.json || exit 1; done

# Leaves runs/, which holds what was trained.
clean:
	rm -rf $(VENV) *.egg-info _docs

$(ready): settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,notebooks]'
	touch $@
