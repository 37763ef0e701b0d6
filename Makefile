# Short names for what the scripts do; `make` alone lists them.
.PHONY: help main-job test fast lint format ci bench docs api wheel clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

main-job:        ## install, train the example in bf16 and in FP8, print the table, draw the curves
	bash examples/main_job.sh

test:            ## set up an environment and run all tests
	bash tests/run.sh

fast:            ## tests of one process, with the Python at hand
	python -m pytest -q -m "not dist and not gpu"

lint:            ## form only, with the Python at hand
	ruff check . && ruff format --check . && codespell && mypy && python .ci/unused.py

format:          ## rewrite the code in the house's form
	ruff format . && ruff check --fix .

ci:              ## tests and form, from a fresh environment
	.ci/run

bench:           ## the CPU benchmarks, one after another
	python benchmarks/run.py

docs:            ## the documentation site, in runs/site; a warning is an error
	mkdocs build --strict --quiet

api:             ## docs/api.md, docs/files.md and docs/configuration.md anew, from the code and the schema
	python docs/generate_api.py && python docs/generate_files.py && python schemas/generate_reference.py

wheel:           ## what is published: dist/*.whl of any platform, whose kernels compile at first use
	DS_FP8_BUILD_KERNELS=0 python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	python -m twine check --strict dist/*.whl

clean:           ## what builds and runs leave behind
	rm -rf build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
