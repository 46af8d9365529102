# `make help` lists what there is. Every target sets up what it needs by itself.

ARGS ?=
FUZZ_SECONDS ?= 60
RUNS ?= 20
SEED ?= 1
CLIENTS ?= 8
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-versions e2e e2e-cluster-up e2e-cluster-down charts bench lint fuzz chaos

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18
	@echo
	@echo "make demo ARGS='--switchovers 5 --crashes 5 --seed 7' passes options on to helios demo."

demo: ## open transactions that survive switchovers and crashes, and the count of what was lost
	@scripts/setup.sh demo
	cargo build --release -p helios
	@"$${CARGO_TARGET_DIR:-target}/release/helios" demo $(ARGS)

test: ## all tests, the client programs among them
	@scripts/setup.sh clients >/dev/null
	@scripts/test.sh

test-versions: ## a short round of the tests on every PostgreSQL from 15 to 18 that can be had
	@scripts/setup.sh demo
	@scripts/test-versions.sh

e2e: ## the operator on the Kubernetes of KUBECONFIG, or on one built from Debian's packages (as root)
	@scripts/kubernetes.sh test $(ARGS)

e2e-cluster-up: ## that Kubernetes, to keep: prints the path of its kubeconfig
	@scripts/kubernetes.sh up

e2e-cluster-down: ## ends it
	@scripts/kubernetes.sh down

charts: ## the charts: values, schemas, alerts, and what is generated
	@scripts/charts.sh

bench: ## pgbench on PostgreSQL, PgBouncer and the proxy; writes docs/benchmarks.md
	@scripts/setup.sh bench
	cargo build --release -p helios
	@python3 benches/run.py $(ARGS)

lint: ## formatting, clippy, documentation, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	@scripts/tool.sh cargo-deny deny check bans licenses sources

fuzz: ## the wire protocol under random input, FUZZ_SECONDS in all
	@scripts/fuzz.sh $(FUZZ_SECONDS)

chaos: ## RUNS experiments from SEED with CLIENTS, JOBS at a time: faults under every workload, judged by a checker
	@scripts/setup.sh demo
	cargo build --release -p helios -p helios-e2e --bin helios --bin chaos
	@"$${CARGO_TARGET_DIR:-target}/release/chaos" --runs $(RUNS) --seed $(SEED) --clients $(CLIENTS) --jobs $(JOBS) $(ARGS)
