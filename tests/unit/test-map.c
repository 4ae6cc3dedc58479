/* SPDX-License-Identifier: BSD-3-Clause */
/* The map against a model that knows every single byte.
 *
 * Link with -Wl,--wrap=malloc,--wrap=realloc,--wrap=calloc.
 * VMREP_TEST_SEED repeats a run, VMREP_TEST_OPS makes it longer.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "journal/map.h"

#define SPACE 16384u

/* Allocation that fails when told.  */

static long allocs_left = -1; /* -1: no limit */

void *__real_malloc (size_t n);
void *__real_realloc (void *p, size_t n);
void *__real_calloc (size_t n, size_t size);
void *__wrap_malloc (size_t n);
void *__wrap_realloc (void *p, size_t n);
void *__wrap_calloc (size_t n, size_t size);

static bool
may_allocate (void)
{
  if (allocs_left < 0)
    return true;
  if (allocs_left == 0)
    return false;
  allocs_left--;
  return true;
}

void *
__wrap_malloc (size_t n)
{
  return may_allocate () ? __real_malloc (n) : NULL;
}

void *
__wrap_realloc (void *p, size_t n)
{
  return may_allocate () ? __real_realloc (p, n) : NULL;
}

void *
__wrap_calloc (size_t n, size_t size)
{
  return may_allocate () ? __real_calloc (n, size) : NULL;
}

/* Random numbers (xorshift64*).  */

static uint64_t rng_state;

static uint64_t
rng (void)
{
  rng_state ^= rng_state >> 12;
  rng_state ^= rng_state << 25;
  rng_state ^= rng_state >> 27;
  return rng_state * UINT64_C (2685821657736338717);
}

static uint64_t
below (uint64_t n)
{
  return rng () % n;
}

static unsigned long
from_environment (const char *name, unsigned long otherwise)
{
  const char *value = getenv (name);

  return value ? strtoul (value, NULL, 0) : otherwise;
}

static int
seed_rng (void **state)
{
  (void) state;
  rng_state = from_environment ("VMREP_TEST_SEED",
                                (unsigned long) time (NULL) * 2654435761u | 1);
  print_message ("VMREP_TEST_SEED=%llu\n", (unsigned long long) rng_state);
  return 0;
}

/* The model.  */

struct byte {
  uint64_t lsn; /* of this byte */
  uint64_t kind;
};

struct pair {
  struct vr_map *map;
  struct byte byte[SPACE];
  uint64_t head; /* next lsn */
};

static struct pair *
new_pair (void)
{
  struct pair *p = calloc (1, sizeof *p);

  assert_non_null (p);
  p->map = vr_map_new ();
  assert_non_null (p->map);
  p->head = 1000;
  return p;
}

static void
free_pair (struct pair *p)
{
  vr_map_free (p->map);
  free (p);
}

static int
insert (struct pair *p, uint64_t offset, uint64_t length, uint64_t kind)
{
  struct vr_extent e = { offset, length, p->head, kind };
  int r = vr_map_insert (p->map, &e);

  if (r < 0)
    return r;
  for (uint64_t i = 0; i < length; i++) {
    p->byte[offset + i].kind = kind;
    p->byte[offset + i].lsn = kind == VR_EXTENT_DATA ? e.lsn + i : e.lsn;
  }
  p->head += 64 + (kind == VR_EXTENT_DATA ? length : 0);
  return 0;
}

static int
remove_older (struct pair *p, uint64_t offset, uint64_t length, uint64_t lsn)
{
  int r = vr_map_remove_older (p->map, offset, length, lsn);

  if (r < 0)
    return r;
  for (uint64_t i = offset; i < offset + length; i++)
    if (p->byte[i].lsn < lsn)
      p->byte[i].kind = 0;
  return 0;
}

/* Walk both in [offset, end); the number of pieces. */
static size_t
compare (const struct pair *p, uint64_t offset, uint64_t end)
{
  struct vr_extent x;
  size_t pieces = 0;

  while (vr_map_next (p->map, offset, end, &x)) {
    assert_true (x.offset >= offset && x.length > 0);
    assert_true (x.length <= end - x.offset);
    for (; offset < x.offset; offset++)
      assert_int_equal (p->byte[offset].kind, 0);
    for (; offset < x.offset + x.length; offset++) {
      uint64_t shift = x.kind == VR_EXTENT_DATA ? offset - x.offset : 0;

      assert_int_equal (p->byte[offset].kind, x.kind);
      assert_int_equal (p->byte[offset].lsn, x.lsn + shift);
    }
    pieces++;
  }
  for (; offset < end; offset++)
    assert_int_equal (p->byte[offset].kind, 0);
  return pieces;
}

static void
compare_all (const struct pair *p)
{
  vr_map_assert_valid (p->map);
  assert_int_equal (compare (p, 0, SPACE), vr_map_count (p->map));
}

static uint64_t
random_length (void)
{
  uint64_t dice = below (100);

  if (dice < 60)
    return 1 + below (8);
  if (dice < 95)
    return 1 + below (100);
  return 1 + below (dice < 99 ? 1000 : SPACE);
}

static void
random_range (uint64_t *offset, uint64_t *length)
{
  *length = random_length ();
  if (below (3) == 0) { /* "blocks", so that some are replaced exactly */
    *length = 4;
    *offset = below (SPACE / 4) * 4;
  } else
    *offset = below (SPACE - *length + 1);
}

static uint64_t
random_kind (void)
{
  uint64_t dice = below (10);

  if (dice < 8)
    return VR_EXTENT_DATA;
  return dice < 9 ? VR_EXTENT_ZERO : VR_EXTENT_TRIM;
}

static int
random_op (struct pair *p, unsigned inserts_percent)
{
  uint64_t offset, length, back;

  random_range (&offset, &length);
  if (below (100) < inserts_percent)
    return insert (p, offset, length, random_kind ());
  if (below (50) == 0) {
    offset = 0;
    length = SPACE;
  }
  back = below (4) ? below (20000) : 0;
  return remove_older (p, offset, length, p->head > back ? p->head - back : 0);
}

static void
test_empty (void **state)
{
  struct vr_map *m = vr_map_new ();
  struct vr_extent x;

  (void) state;
  assert_non_null (m);
  vr_map_assert_valid (m);
  assert_int_equal (vr_map_count (m), 0);
  assert_true (vr_map_memory (m) > 0);
  assert_false (vr_map_next (m, 0, UINT64_MAX, &x));
  assert_int_equal (vr_map_remove_older (m, 0, UINT64_MAX, 5), 0);
  vr_map_clear (m);
  vr_map_free (m);
  vr_map_free (NULL);
}

static void
test_edges (void **state)
{
  struct vr_map *m = vr_map_new ();
  struct vr_extent top = { UINT64_MAX - 10, 10, 7, VR_EXTENT_ZERO };
  struct vr_extent low = { 0, UINT64_MAX - 5, 9, VR_EXTENT_TRIM };
  struct vr_extent x;

  (void) state;
  assert_int_equal (vr_map_insert (m, &top), 0);
  assert_int_equal (vr_map_insert (m, &low), 0);
  vr_map_assert_valid (m);
  assert_int_equal (vr_map_count (m), 2);
  assert_true (vr_map_next (m, UINT64_MAX - 5, UINT64_MAX, &x));
  assert_int_equal (x.offset, UINT64_MAX - 5);
  assert_int_equal (x.length, 5);
  assert_int_equal (x.lsn, 7);
  assert_true (vr_map_next (m, 100, 101, &x));
  assert_int_equal (x.length, 1);
  assert_int_equal (x.lsn, 9);
  assert_false (vr_map_next (m, 100, 100, &x));
  vr_map_free (m);
}

/* Older is judged byte by byte. */
static void
test_older (void **state)
{
  struct vr_map *m = vr_map_new ();
  struct vr_extent data = { 100, 50, 1000, VR_EXTENT_DATA };
  struct vr_extent zero = { 200, 50, 1000, VR_EXTENT_ZERO };
  struct vr_extent x;

  (void) state;
  vr_map_insert (m, &data);
  vr_map_insert (m, &zero);
  assert_int_equal (vr_map_remove_older (m, 0, 1000, 1000), 0);
  assert_int_equal (vr_map_count (m), 2);
  assert_int_equal (vr_map_remove_older (m, 110, 1000, 1020), 0);
  assert_int_equal (vr_map_count (m), 2);
  assert_true (vr_map_next (m, 0, 1000, &x));
  assert_int_equal (x.offset, 100);
  assert_int_equal (x.length, 10);
  assert_true (vr_map_next (m, 110, 1000, &x));
  assert_int_equal (x.offset, 120);
  assert_int_equal (x.length, 30);
  assert_int_equal (x.lsn, 1020);
  vr_map_free (m);
}

static void
test_random (void **state)
{
  struct pair *p = new_pair ();
  unsigned long ops = from_environment ("VMREP_TEST_OPS", 200000);
  unsigned inserts_percent = 90;
  size_t most = 0;

  (void) state;
  for (unsigned long i = 0; i < ops; i++) {
    uint64_t offset, length;

    if (i % 1000 == 0)
      inserts_percent = below (2) ? 50 + (unsigned) below (51)
                                  : (unsigned) below (101);
    if (below (50000) == 0) {
      vr_map_clear (p->map);
      memset (p->byte, 0, sizeof p->byte);
    }
    assert_int_equal (random_op (p, inserts_percent), 0);
    vr_map_assert_valid (p->map);
    random_range (&offset, &length);
    compare (p, offset, offset + length);
    if (i % 64 == 0)
      compare_all (p);
    if (vr_map_count (p->map) > most)
      most = vr_map_count (p->map);
  }
  compare_all (p);
  print_message ("most extents: %zu\n", most);
  free_pair (p);
}

/* Up, down, and in steps: what the splits are tuned for. */
static void
test_runs (void **state)
{
  struct pair *p = new_pair ();

  (void) state;
  for (uint64_t i = 0; i < SPACE / 2; i++)
    assert_int_equal (insert (p, 2 * i, 1, VR_EXTENT_DATA), 0);
  compare_all (p);
  assert_int_equal (vr_map_count (p->map), SPACE / 2);
  for (uint64_t i = SPACE; i > 0; i--)
    assert_int_equal (insert (p, i - 1, 1, VR_EXTENT_DATA), 0);
  compare_all (p);
  assert_int_equal (vr_map_count (p->map), SPACE);
  assert_int_equal (insert (p, 1, SPACE - 2, VR_EXTENT_ZERO), 0);
  compare_all (p);
  assert_int_equal (vr_map_count (p->map), 3);
  for (uint64_t i = 0; i < SPACE / 4; i++)
    assert_int_equal (insert (p, i * 4948 % SPACE, 2, VR_EXTENT_DATA), 0);
  compare_all (p);
  for (uint64_t lsn = 0; lsn < p->head; lsn += 5000) {
    assert_int_equal (remove_older (p, 0, SPACE, lsn), 0);
    compare_all (p);
  }
  assert_int_equal (remove_older (p, 0, SPACE, p->head), 0);
  assert_int_equal (vr_map_count (p->map), 0);
  free_pair (p);
}

/* No memory: an operation fails as a whole, and the map goes on. */
static void
test_no_memory (void **state)
{
  struct pair *p = new_pair ();
  unsigned failed = 0;

  (void) state;
  for (unsigned i = 0; i < 20000; i++) {
    allocs_left = 0;
    if (random_op (p, 95) < 0) {
      failed++;
      allocs_left = -1;
      compare_all (p);
      assert_int_equal (vr_map_reserve (p->map, 1), 0);
    }
    allocs_left = -1;
  }
  compare_all (p);
  assert_true (failed > 0);
  free_pair (p);

  for (long n = 0; n < 4; n++) {
    allocs_left = n;
    assert_null (vr_map_new ());
  }
  allocs_left = -1;
}

static void
test_reserve_random (void **state)
{
  struct pair *p = new_pair ();

  (void) state;
  for (unsigned round = 0; round < 200; round++) {
    uint64_t n = 1 + below (below (2) ? 10 : 3000);
    unsigned inserts_percent = (unsigned) below (101);

    assert_int_equal (vr_map_reserve (p->map, n), 0);
    assert_int_equal (vr_map_reserve (p->map, below (n)), 0);
    allocs_left = 0;
    while (n-- > 0)
      assert_int_equal (random_op (p, inserts_percent), 0);
    allocs_left = -1;
    compare_all (p);
    if (below (10) == 0)
      remove_older (p, 0, SPACE, p->head);
  }
  free_pair (p);
}

/* Every leaf full, then a split of each as soon as possible, from the end and
   from the middle. */
static void
test_reserve_worst (void **state)
{
  (void) state;
  for (uint64_t step = 1; step <= 128; step += step < 8 ? 1 : 20) {
    struct vr_map *m = vr_map_new ();
    uint64_t leaves = 200, n = leaves * 128 / step;

    for (uint64_t i = 0; i < leaves * 128; i++) {
      struct vr_extent e = { i * 100, 90, 1, VR_EXTENT_ZERO };

      assert_int_equal (vr_map_insert (m, &e), 0);
    }
    assert_int_equal (vr_map_reserve (m, n), 0);
    allocs_left = 0;
    for (uint64_t i = 0; i < n; i++) {
      struct vr_extent e = { i * 100 * step + 40, 10, 2, VR_EXTENT_ZERO };

      assert_int_equal (vr_map_insert (m, &e), 0);
    }
    allocs_left = -1;
    vr_map_assert_valid (m);
    vr_map_free (m);
  }
}

/* A drained map gives its memory back. */
static void
test_memory (void **state)
{
  struct vr_map *m = vr_map_new ();
  size_t before = vr_map_memory (m), full;

  (void) state;
  for (uint64_t i = 0; i < 100000; i++) {
    struct vr_extent e = { i * 4096, 4096, i, VR_EXTENT_ZERO };

    assert_int_equal (vr_map_insert (m, &e), 0);
  }
  full = vr_map_memory (m);
  assert_true (full < 100000 * 48);
  for (uint64_t i = 0; i < 100000; i++)
    if (i % 200 != 0)
      assert_int_equal (vr_map_remove_older (m, i * 4096, 4096, i + 1), 0);
  vr_map_assert_valid (m);
  assert_int_equal (vr_map_count (m), 500);
  assert_true (vr_map_memory (m) < before + full / 10);
  vr_map_clear (m);
  vr_map_assert_valid (m);
  assert_int_equal (vr_map_count (m), 0);
  vr_map_free (m);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_empty),
    cmocka_unit_test (test_edges),
    cmocka_unit_test (test_older),
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_runs),
    cmocka_unit_test (test_no_memory),
    cmocka_unit_test (test_reserve_random),
    cmocka_unit_test (test_reserve_worst),
    cmocka_unit_test (test_memory),
  };

  return cmocka_run_group_tests_name ("map", tests, seed_rng, NULL);
}
