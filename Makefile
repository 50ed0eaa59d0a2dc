# make quickstart: set up and train.  make test: set up and test.  Other targets assume one of the two has run.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest

# Where this is set, as in many containers, each of some hundred processes would compile all that it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test unit e2e distributed lint docs reading-your-run bench-cpu bench-gpu bench-ablate bench-docs bench-scale scale-tables bench-zoo bench-diffusion-cpu bench-diffusion-gpu bench-diffusion-rollout bench-diffusion-rollout-gpu torture fuzz clean

quickstart:           ## make .venv, train DPO on the tiny world, show the report's path
	@scripts/setup.sh
	.venv/bin/prefopt train

test:                 ## make .venv with the test extras, run every test
	@scripts/setup.sh test
	.venv/bin/python -c "from prefopt.policies.tiny_lm import ensure_tiny_lm; ensure_tiny_lm()"
	$(PYTEST) -n 2 --dist worksteal tests/unit tests/objectives tests/e2e tests/gpu
	$(PYTEST) -n 2 --dist loadfile tests/distributed

unit e2e distributed: ## one tier of the tests
	$(PYTEST) -n 2 tests/$@

lint:                 ## ruff, with the dev extras
	@scripts/setup.sh dev
	.venv/bin/ruff check .

docs:                 ## regenerate docs/algorithms.md from the registry
	.venv/bin/python scripts/make_docs.py

reading-your-run:     ## make the runs of docs/reading-your-run.md (half an hour), then its figures and the page
	.venv/bin/python scripts/reading_your_run.py

bench-cpu bench-gpu bench-ablate: ## against TRL (an hour on two cores; BENCH=--quick: minutes), or each gain switched off; into docs/performance.md
	@scripts/setup.sh test
	.venv/bin/python scripts/bench.py $(@:bench-%=%) $(BENCH)

bench-diffusion-cpu bench-diffusion-gpu: ## pictures, against the plain loop of public scripts (half an hour; BENCH=--tiny: does it run)
	@scripts/setup.sh test
	.venv/bin/python scripts/bench_diffusion.py $(@:bench-diffusion-%=%) $(BENCH)

bench-diffusion-rollout bench-diffusion-rollout-gpu: ## pictures that teach, against the plain loop of public scripts (ten minutes; BENCH=--tiny: does it run)
	@scripts/setup.sh test
	.venv/bin/python scripts/bench_rollout.py $(if $(findstring gpu,$@),gpu,cpu) $(BENCH)

bench-scale:          ## one process against two, ZeRO's stages side by side (some minutes; BENCH=--quick: does it run)
	.venv/bin/python scripts/bench_scale.py $(BENCH)

scale-tables:         ## what large runs hold and send, and that model against DeepSpeed, into docs/scaling.md (no GPU)
	.venv/bin/python scripts/scale_tables.py

bench-docs:           ## the benchmark's tables and plots anew from docs/bench-*.json
	.venv/bin/python scripts/bench.py docs

bench-zoo:            ## all offline objectives on the tiny world into docs/zoo.md (hours; resumable; ZOO="--hours 1 --methods dpo,ipo")
	.venv/bin/python scripts/zoo.py $(ZOO)

torture:              ## kill runs at random moments, fill their disks, and see that they end as if nothing had been (TORTURE="--kills 30")
	.venv/bin/python scripts/torture.py $(TORTURE)

fuzz:                 ## random command lines and data rows, FUZZ of each kind (10,000: an hour)
	PREFOPT_FUZZ=$(or $(FUZZ),10000) $(PYTEST) tests/unit/test_fuzz.py

clean:                ## remove the environment and build products, never runs
	rm -rf .venv build *.egg-info
