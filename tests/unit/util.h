/* SPDX-License-Identifier: BSD-3-Clause */
/* What several unit tests share: environments, randomness, small logs. */
#ifndef VR_TEST_UTIL_H
#define VR_TEST_UTIL_H

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "journal/log.h"

/* ---- Randomness --------------------------------------------------------- */

/* xorshift64* (Vigna 2014).  The state must not be 0. */
uint64_t next_random (uint64_t *rng);
uint64_t below (uint64_t *rng, uint64_t n); /* [0, n) */
bool chance (uint64_t *rng, unsigned percent);
void fill_random (uint64_t *rng, void *buf, size_t n);

/* A state for next_random; the same for the same seed. */
uint64_t seeded (uint64_t seed);

/* The number in environment variable name, or otherwise. */
uint64_t env_number (const char *name, uint64_t otherwise);

/* ---- Environments ------------------------------------------------------- */

struct env {
  struct vr_io *io;
  bool sim;
  char dir[64]; /* "." in a simulated one, else a temporary folder */
};

/* cmocka fixtures; *state becomes a struct env. */
int setup_real (void **state);
int setup_sim (void **state);
int teardown_env (void **state);

#define ON_REAL(test)                                                         \
  cmocka_unit_test_setup_teardown (test, setup_real, teardown_env)
#define ON_SIM(test)                                                          \
  cmocka_unit_test_setup_teardown (test, setup_sim, teardown_env)

/* DIR/NAME, in one of four static buffers that take turns. */
const char *in_dir (const struct env *e, const char *name);

/* All of a file, size into *ret_size; free it. */
uint8_t *read_file (struct vr_io *io, const char *path, uint64_t *ret_size);

/* A file with these contents, replacing any, durable. */
void write_file (struct vr_io *io, const char *path, const void *buf,
                 uint64_t size);

/* ---- Logs --------------------------------------------------------------- */

/* Configuration of a primary's small log of VM "vm", disk "d". */
struct vr_log_config small_config (uint64_t disk_size, uint64_t segment_size,
                                   uint64_t segment_count);

/* Open with a cache of so many segments; fails the test if it cannot. */
struct vr_log *open_log (struct vr_io *io, const char *path, unsigned cache);

/* The error of opening, after checking what an error must bring along. */
int open_log_error (struct vr_io *io, const char *path,
                    struct vr_log_problem *problem);

#endif /* VR_TEST_UTIL_H */
