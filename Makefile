# SPDX-License-Identifier: BSD-3-Clause
#
# vmrep: plain GNU make.  `make help` lists the targets.
#
# Everything that is built goes below $(BUILD), so that builds with other
# compilers or with sanitizers live side by side:
#
#   make                                      -> build/
#   make BUILD=build-clang CC=clang           -> build-clang/
#   make BUILD=build-asan SAN=address,undefined -> build-asan/

VERSION     = 0.1.0

BUILD      ?= build
SAN        ?=
WERROR     ?= -Werror
CFLAGS     ?= -O2 -g
PKG_CONFIG ?= pkg-config

ifeq ($(origin CC),default)
CC = gcc
endif

prefix    ?= /usr/local
bindir    ?= $(prefix)/bin
mandir    ?= $(prefix)/share/man
# nbdkit only finds a plugin by its short name in this folder.
plugindir ?= $(shell $(PKG_CONFIG) --variable=plugindir nbdkit)
INSTALL   ?= install

# ----------------------------------------------------------------- flags

pkg_cflags = $(shell $(PKG_CONFIG) --cflags $(1))
pkg_libs   = $(shell $(PKG_CONFIG) --libs $(1))

PKGS_ALL = nbdkit libnbd liburing libxxhash jansson inih liblz4

WARNINGS = -Wall -Wextra -Wshadow -Wvla -Wconversion $(WERROR)

# -iquote and not -I: our io.h must never stand in for a system header.
# XXH_INLINE_ALL: the hash of a short record costs less than the call.
ALL_CPPFLAGS := -D_GNU_SOURCE -DXXH_INLINE_ALL \
	-DVMREP_VERSION='"$(VERSION)"' \
	-iquote . -iquote journal -iquote nbd-plugin \
	$(call pkg_cflags,$(PKGS_ALL)) $(CPPFLAGS)

ALL_CFLAGS = -std=gnu11 -fPIC -fvisibility=hidden -pthread \
	$(CFLAGS) $(WARNINGS) $(SAN_CFLAGS)
ALL_LDFLAGS = -pthread $(LDFLAGS) $(SAN_CFLAGS)

ifneq ($(SAN),)
SAN_CFLAGS = -fsanitize=$(SAN) -fno-sanitize-recover=all \
	-fno-omit-frame-pointer
endif

JOURNAL_LIBS := $(call pkg_libs,liburing liblz4 libxxhash)
PLUGIN_LIBS  := $(JOURNAL_LIBS) $(call pkg_libs,libnbd)
VMREP_LIBS   := $(JOURNAL_LIBS) $(call pkg_libs,libnbd jansson inih)
UNIT_LIBS    := $(VMREP_LIBS) $(call pkg_libs,cmocka)

# --------------------------------------------------------------- sources

JOURNAL_SRC  := $(wildcard journal/*.c)
MEMSYNC_SRC  := $(wildcard memsync/*.c)
# What both plugins share lies directly in nbd-plugin/.
COMMON_SRC   := $(wildcard nbd-plugin/*.c)
PRIMARY_SRC  := $(wildcard nbd-plugin/primary/*.c)
BACKUP_SRC   := $(wildcard nbd-plugin/backup/*.c)
RECOVERY_SRC := $(wildcard recovery/*.c)
UNIT_SRC     := $(wildcard tests/unit/test-*.c)
# Other files in tests/unit/ are helpers of every unit test.
UNITLIB_SRC  := $(filter-out $(UNIT_SRC),$(wildcard tests/unit/*.c))
TOOLS_SRC    := $(wildcard tests/tools/*.c)
BENCH_SRC    := $(wildcard bench/*.c)
FUZZ_SRC     := $(wildcard tests/fuzz/*.c)
MAN_PAGES    := $(wildcard man/*.[1-8])

objs = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))

LIB     := $(if $(JOURNAL_SRC),$(BUILD)/libvmrep-journal.a)
MEMSYNC := $(if $(MEMSYNC_SRC),$(BUILD)/libvmrep-memsync.a)
PLUGINS := $(strip $(if $(PRIMARY_SRC),$(BUILD)/nbdkit-vmrep-plugin.so) \
	$(if $(BACKUP_SRC),$(BUILD)/nbdkit-vmrep-backup-plugin.so))
VMREP   := $(if $(RECOVERY_SRC),$(BUILD)/vmrep)
UNIT    := $(patsubst tests/unit/%.c,$(BUILD)/unit/%,$(UNIT_SRC))
TOOLS   := $(patsubst tests/tools/%.c,$(BUILD)/tools/%,$(TOOLS_SRC))
BENCHES := $(patsubst bench/%.c,$(BUILD)/bench/%,$(BENCH_SRC))

# Functions that one unit test replaces, by the name of the test:
#   test-index_WRAP = malloc realloc
# links it with -Wl,--wrap=malloc -Wl,--wrap=realloc.
wrap = $(patsubst %,-Wl$(comma)--wrap=%,$($(1)_WRAP))
comma := ,

-include tests/unit/wrap.mk

# --------------------------------------------------------------- targets

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all programs check check-unit check-asan check-valgrind \
	asan-build bench fuzz fuzz-programs install uninstall clean \
	distclean help FORCE

all: $(LIB) $(MEMSYNC) $(PLUGINS) $(VMREP)

# What the tests and the benches need besides.
programs: all $(UNIT) $(TOOLS) $(BENCHES)

help:
	@echo 'make                  the library, both plugins and vmrep, in $(BUILD)/'
	@echo 'make programs         also unit tests, test helpers and benches'
	@echo 'make check            all tests (PATTERN=GLOB: only those that match)'
	@echo 'make check-unit       only the unit tests'
	@echo 'make check-asan       all tests, with address and UB sanitizers'
	@echo 'make check-valgrind   all tests, under valgrind'
	@echo 'make bench            measure; the benches say what they write'
	@echo 'make fuzz             fuzz decoders, with clang (FUZZ_SECONDS=30 each)'
	@echo 'make install          prefix=/usr/local, DESTDIR=, plugindir= (nbdkit'"'"'s)'
	@echo 'make uninstall        takes the same variables'
	@echo 'make clean            remove $(BUILD)/, but for the downloaded guest'
	@echo 'make distclean        remove every build folder'
	@echo
	@echo 'Variables: BUILD=build CC=gcc CFLAGS="-O2 -g" WERROR=-Werror'
	@echo '           SAN= (for example address,undefined)'

# A change of compiler or flags rebuilds everything.
FLAGS_NOW = $(CC) $(ALL_CPPFLAGS) $(ALL_CFLAGS) $(ALL_LDFLAGS)
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@printf '%s\n' $(call quote,$(FLAGS_NOW)) | cmp -s - $@ || \
	  printf '%s\n' $(call quote,$(FLAGS_NOW)) > $@
quote = '$(subst ','\'',$(1))'

$(BUILD)/obj/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(ALL_CPPFLAGS) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

# Removed first, so that no object of a deleted source stays in it; the list
# of members is a dependency for the same reason.
$(BUILD)/libvmrep-journal.a: $(call objs,$(JOURNAL_SRC))
$(BUILD)/libvmrep-memsync.a: $(call objs,$(MEMSYNC_SRC))
$(BUILD)/libvmrep-%.a: $(BUILD)/members
	rm -f $@
	$(AR) rcs $@ $(filter %.o,$^)

MEMBERS = $(JOURNAL_SRC) $(MEMSYNC_SRC)
$(BUILD)/members: FORCE
	@mkdir -p $(@D)
	@echo '$(MEMBERS)' | cmp -s - $@ || echo '$(MEMBERS)' > $@

# --exclude-libs keeps the journal's symbols from being exported.
link_plugin = $(CC) $(ALL_LDFLAGS) -shared -Wl,--exclude-libs,ALL \
	-o $@ $(filter %.o,$^) $(LIB) $(PLUGIN_LIBS)

$(BUILD)/nbdkit-vmrep-plugin.so: $(call objs,$(PRIMARY_SRC) $(COMMON_SRC)) \
		$(LIB)
	$(link_plugin)

$(BUILD)/nbdkit-vmrep-backup-plugin.so: \
		$(call objs,$(BACKUP_SRC) $(COMMON_SRC)) $(LIB)
	$(link_plugin)

$(BUILD)/vmrep: $(call objs,$(RECOVERY_SRC)) $(LIB)
	$(CC) $(ALL_LDFLAGS) -o $@ $(filter %.o,$^) $(LIB) $(VMREP_LIBS)

$(BUILD)/unit/%: $(BUILD)/obj/tests/unit/%.o $(call objs,$(UNITLIB_SRC)) \
		$(MEMSYNC) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(ALL_LDFLAGS) $(call wrap,$*) -o $@ $(filter %.o,$^) \
	  $(MEMSYNC) $(LIB) $(UNIT_LIBS)

$(BUILD)/tools/%: $(BUILD)/obj/tests/tools/%.o $(MEMSYNC) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(ALL_LDFLAGS) -o $@ $(filter %.o,$^) $(MEMSYNC) $(LIB) $(VMREP_LIBS)

$(BUILD)/bench/%: $(BUILD)/obj/bench/%.o $(MEMSYNC) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(ALL_LDFLAGS) -o $@ $(filter %.o,$^) $(MEMSYNC) $(LIB) $(VMREP_LIBS)

# Runs as init's child in the test guest, which has no shared libraries of
# ours and no sanitizer runtime.
$(BUILD)/guest/workload: tests/guest/workload.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -D_GNU_SOURCE $(CFLAGS) $(WARNINGS) -static -o $@ $<

# ----------------------------------------------------------------- tests

PATTERN ?=

check: programs
	BUILD=$(BUILD) tests/run $(PATTERN)

check-unit: programs
	BUILD=$(BUILD) tests/run --unit $(PATTERN)

asan-build:
	$(MAKE) BUILD=build-asan SAN=address,undefined CFLAGS='-O1 -g' \
	  programs build-asan/no-freelocale.so

# Without the sanitizer: it is preloaded before the sanitizer's runtime is up.
$(BUILD)/no-freelocale.so: tests/asan/no-freelocale.c
	@mkdir -p $(@D)
	$(CC) -D_GNU_SOURCE -O2 -fPIC -shared $(WARNINGS) -o $@ $<

check-asan: asan-build
	BUILD=build-asan ASAN=1 tests/run $(PATTERN)

check-valgrind: programs
	BUILD=$(BUILD) VALGRIND=1 tests/run $(PATTERN)

bench: programs
	@if [ -x bench/run ]; then BUILD=$(BUILD) bench/run; \
	else for b in $(BENCHES); do echo "== $$b"; $$b || exit 1; done; fi

# libFuzzer targets, built apart with clang.
FUZZERS = $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(FUZZ_SRC))
FUZZ_SECONDS ?= 30

fuzz:
	$(MAKE) BUILD=build-fuzz CC=clang SAN=fuzzer-no-link,address,undefined \
	  CFLAGS='-O1 -g' fuzz-programs
	for f in $(FUZZ_SRC:tests/fuzz/%.c=build-fuzz/fuzz/%); do \
	  mkdir -p $$f.corpus && \
	  $$f -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=$$f. \
	    $$f.corpus || exit 1; \
	done

fuzz-programs: $(FUZZERS)

$(BUILD)/fuzz/%: $(BUILD)/obj/tests/fuzz/%.o $(MEMSYNC) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(ALL_LDFLAGS) -fsanitize=fuzzer -o $@ $(filter %.o,$^) $(MEMSYNC) \
	  $(LIB) $(VMREP_LIBS)

# --------------------------------------------------------------- install

install: all
	$(INSTALL) -d $(DESTDIR)$(bindir) $(DESTDIR)$(plugindir)
	$(if $(PLUGINS),$(INSTALL) -m 755 $(PLUGINS) $(DESTDIR)$(plugindir))
	$(if $(VMREP),$(INSTALL) -m 755 $(VMREP) $(DESTDIR)$(bindir))
	for m in $(MAN_PAGES); do \
	  $(INSTALL) -D -m 644 $$m $(DESTDIR)$(mandir)/man$${m##*.}/$${m##*/} \
	    || exit 1; \
	done

uninstall:
	rm -f $(DESTDIR)$(plugindir)/nbdkit-vmrep-plugin.so \
	  $(DESTDIR)$(plugindir)/nbdkit-vmrep-backup-plugin.so \
	  $(DESTDIR)$(bindir)/vmrep
	for m in $(MAN_PAGES); do \
	  rm -f $(DESTDIR)$(mandir)/man$${m##*.}/$${m##*/}; \
	done

# The guest's kernel is kept: it is a download, not a build.
clean:
	if [ -d $(BUILD) ]; then \
	  find $(BUILD) -mindepth 1 -maxdepth 1 ! -name guest \
	    -exec rm -rf {} +; \
	fi

distclean:
	rm -rf build build-*

-include $(patsubst %.c,$(BUILD)/obj/%.d,$(JOURNAL_SRC) $(MEMSYNC_SRC) \
	$(COMMON_SRC) $(FUZZ_SRC) \
	$(PRIMARY_SRC) $(BACKUP_SRC) $(RECOVERY_SRC) $(UNIT_SRC) \
	$(UNITLIB_SRC) $(TOOLS_SRC) $(BENCH_SRC))
