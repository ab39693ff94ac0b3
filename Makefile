# Coppice. `make demo` shows it working, `make test` proves it.
# Everything also works with plain `go build ./...` and `go test ./...`.

SHELL := /bin/bash
TOOL := go tool -modfile=tools/go.mod
PKGS := ./...

.PHONY: build demo guest test race lint fuzz soak mutate bench generate ci clean

build: ## static bin/coppice and bin/xe
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/coppice ./cmd/coppice
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/xe ./cmd/xe

demo: build ## back a 24 GiB disk up incrementally, restore it, prove it (STOP=1: stop the server at the end)
	@scripts/need qemu-img:qemu-utils mke2fs:e2fsprogs
	@STOP=$(STOP) scripts/demo

guest: build ## boot a machine from a disk over NBD, snapshot it live, clone, revert, boot again
	@scripts/need qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils nbdcopy:libnbd-bin busybox:busybox-static mke2fs:e2fsprogs
	scripts/guest

test: ## install the test tools, run every test
	@scripts/need qemu-img:qemu-utils mke2fs:e2fsprogs curl:curl vhdiinfo:libvhdi-utils /usr/share/doc/python3-libvhdi:python3-libvhdi systemd-analyze:systemd nbdcopy:libnbd-bin nbdsh:python3-libnbd fio:fio node:nodejs npm:npm script:bsdutils unshare:util-linux
	go test -timeout 20m $(PKGS)

race: ## every test under the race detector, with the self-checks of the invariants tag
	go test -race -tags invariants -timeout 45m $(PKGS)

lint: ## vet, staticcheck, errcheck, gofumpt, modernizers
	go vet $(PKGS)
	go vet -tags invariants $(PKGS)
	$(TOOL) staticcheck $(PKGS)
	$(TOOL) errcheck -ignoretests -exclude tools/errcheck.txt $(PKGS)
	@out="$$($(TOOL) gofumpt -l $$(git ls-files '*.go'))"; test -z "$$out" || { echo "gofumpt would change:"; echo "$$out"; exit 1; }
	@out="$$(go fix -diff $(PKGS))"; test -z "$$out" || { echo "go fix would change:"; echo "$$out"; exit 1; }

fuzz: ## every fuzz target for FUZZTIME (default 60s)
	scripts/fuzz $(or $(FUZZTIME),60s)

soak: ## the engine's long tests for MINUTES (default 60): random operations, power cuts, kills, flips
	scripts/soak $(or $(MINUTES),60)

mutate: ## break one rule of the engine at a time and see which test notices (ONLY=REGEXP: those mutants)
	scripts/mutate "$(ONLY)"

bench: build ## side by side with qemu-img and the limit of the machine; prints a table
	@scripts/need qemu-img:qemu-utils nbdcopy:libnbd-bin nbdkit:nbdkit fio:fio
	go run ./bench

generate: ## regenerate code and documents from the datamodel
	go generate ./...
	go test -run "Document" . -update

ci:
	.ci/run

clean:
	rm -rf bin demo
