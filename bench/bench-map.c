/* SPDX-License-Identifier: BSD-3-Clause */
/* Nanoseconds per operation of journal/map, on 4 KiB extents in 2 GiB.
 *
 * Usage: bench-map [SECONDS-PER-CASE]
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "journal/map.h"

#define BLOCK UINT64_C (4096)
#define BLOCKS (UINT64_C (2) << 30) / BLOCK
#define BATCH 4096

static uint64_t rng_state = UINT64_C (88172645463325252);
static uint64_t next_lsn = 4096;
static uint32_t order[BLOCKS]; /* all blocks, shuffled; the first n are in */

static uint64_t
rng (void)
{
  rng_state ^= rng_state << 13;
  rng_state ^= rng_state >> 7;
  rng_state ^= rng_state << 17;
  return rng_state;
}

static void
shuffle (void)
{
  for (uint32_t i = 0; i < BLOCKS; i++) {
    uint32_t j = (uint32_t) (rng () % (i + 1));

    order[i] = order[j];
    order[j] = i;
  }
}

static uint64_t
now_ns (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
}

static void
insert (struct vr_map *m, uint64_t offset, uint64_t length)
{
  struct vr_extent e = { offset, length, next_lsn, VR_EXTENT_DATA };

  if (vr_map_insert (m, &e) < 0)
    abort ();
  next_lsn += length + 64;
}

static void
drop (struct vr_map *m, uint64_t offset, uint64_t length)
{
  if (vr_map_remove_older (m, offset, length, next_lsn) < 0)
    abort ();
}

/* Each case times BATCH operations on a map of n extents, and brings the map
   back to n.  */

static uint64_t
insert_new (struct vr_map *m, uint32_t n)
{
  uint64_t begin = now_ns (), ns;

  for (uint32_t i = 0; i < BATCH; i++)
    insert (m, order[n + i] * BLOCK, BLOCK);
  ns = now_ns () - begin;
  for (uint32_t i = 0; i < BATCH; i++)
    drop (m, order[n + i] * BLOCK, BLOCK);
  return ns;
}

static uint64_t
remove_older (struct vr_map *m, uint32_t n)
{
  uint64_t begin;

  for (uint32_t i = 0; i < BATCH; i++)
    insert (m, order[n + i] * BLOCK, BLOCK);
  begin = now_ns ();
  for (uint32_t i = 0; i < BATCH; i++)
    drop (m, order[n + i] * BLOCK, BLOCK);
  return now_ns () - begin;
}

static uint64_t
replace (struct vr_map *m, uint32_t n)
{
  uint64_t begin = now_ns ();

  for (uint32_t i = 0; i < BATCH; i++)
    insert (m, order[rng () % n] * BLOCK, BLOCK);
  return now_ns () - begin;
}

/* Random sectors: every second insert splits, trims or removes. */
static uint64_t
insert_askew (struct vr_map *m, uint32_t n)
{
  uint64_t begin, ns, saved = rng_state;

  begin = now_ns ();
  for (uint32_t i = 0; i < BATCH; i++)
    insert (m, (rng () % (BLOCKS - 1)) * BLOCK + 512, BLOCK);
  ns = now_ns () - begin;
  rng_state = saved;
  for (uint32_t i = 0; i < BATCH; i++) {
    uint64_t block = rng () % (BLOCKS - 1);

    drop (m, block * BLOCK, 2 * BLOCK);
  }
  for (uint32_t i = 0; i < n; i++)
    insert (m, order[i] * BLOCK, BLOCK);
  return ns;
}

static uint64_t
look_up (struct vr_map *m, uint32_t n)
{
  struct vr_extent x;
  uint64_t begin = now_ns ();

  for (uint32_t i = 0; i < BATCH; i++) {
    uint64_t offset = order[rng () % n] * BLOCK;

    if (!vr_map_next (m, offset, offset + BLOCK, &x))
      abort ();
  }
  return now_ns () - begin;
}

static uint64_t
look_up_any (struct vr_map *m, uint32_t n)
{
  struct vr_extent x;
  uint64_t begin = now_ns ();
  volatile bool found = false;

  (void) n;
  for (uint32_t i = 0; i < BATCH; i++) {
    uint64_t offset = rng () % BLOCKS * BLOCK;

    found = vr_map_next (m, offset, offset + BLOCK, &x);
  }
  (void) found;
  return now_ns () - begin;
}

static void
run (const char *name, uint64_t (*work) (struct vr_map *, uint32_t),
     struct vr_map *m, uint32_t n, double seconds)
{
  uint64_t until = now_ns () + (uint64_t) (seconds * 1e9);
  uint64_t best = UINT64_MAX, sum = 0, batches = 0;

  do {
    uint64_t ns = work (m, n);

    sum += ns;
    batches++;
    if (ns < best)
      best = ns;
  } while (now_ns () < until);
  printf ("%8u %-14s %8.1f ns mean %8.1f ns best\n", n, name,
          (double) sum / (double) (batches * BATCH), (double) best / BATCH);
}

static void
run_all (uint32_t n, double seconds)
{
  struct vr_map *m = vr_map_new ();
  uint64_t begin = now_ns ();

  if (!m)
    abort ();
  for (uint32_t i = 0; i < n; i++)
    insert (m, order[i] * BLOCK, BLOCK);
  printf ("%8u %-14s %8.1f ns mean %8.1f bytes per extent\n", n, "fill",
          (double) (now_ns () - begin) / n, (double) vr_map_memory (m) / n);
  run ("insert-new", insert_new, m, n, seconds);
  run ("replace", replace, m, n, seconds);
  run ("look-up", look_up, m, n, seconds);
  run ("look-up-any", look_up_any, m, n, seconds);
  run ("remove-older", remove_older, m, n, seconds);
  run ("insert-askew", insert_askew, m, n, seconds);
  begin = now_ns ();
  drop (m, 0, BLOCKS * BLOCK);
  printf ("%8u %-14s %8.1f ns per extent\n", n, "drain",
          (double) (now_ns () - begin) / n);
  vr_map_free (m);
}

int
main (int argc, char **argv)
{
  double seconds = argc > 1 ? strtod (argv[1], NULL) : 1.0;

  shuffle ();
  run_all (10000, seconds);
  run_all (100000, seconds);
  run_all (260000, seconds);
  return 0;
}
