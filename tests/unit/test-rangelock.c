/* SPDX-License-Identifier: BSD-3-Clause */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "journal/rangelock.h"

static struct vr_rangelock lock;

static int
set_up (void **state)
{
  (void) state;
  return vr_rangelock_init (&lock);
}

static int
tear_down (void **state)
{
  (void) state;
  vr_rangelock_destroy (&lock);
  return 0;
}

/* A thread that takes one range and notes its turn.  */

static atomic_uint turns;

struct taker {
  pthread_t thread;
  uint64_t offset, length;
  unsigned turn; /* 1 for the first; 0: not yet */
};

static void *
take (void *arg)
{
  struct taker *t = arg;
  struct vr_range r;

  vr_rangelock_lock (&lock, &r, t->offset, t->length);
  t->turn = atomic_fetch_add (&turns, 1) + 1;
  vr_rangelock_unlock (&lock, &r);
  return NULL;
}

static void
start (struct taker *t, uint64_t offset, uint64_t length)
{
  t->offset = offset;
  t->length = length;
  t->turn = 0;
  assert_int_equal (pthread_create (&t->thread, NULL, take, t), 0);
}

static void
wait_for_waiters (unsigned n)
{
  for (;;) {
    unsigned waiters;

    pthread_mutex_lock (&lock.mutex);
    waiters = lock.waiters;
    pthread_mutex_unlock (&lock.mutex);
    if (waiters == n)
      return;
    sched_yield ();
  }
}

static void
test_order (void **state)
{
  struct taker t[3];
  struct vr_range r;

  (void) state;
  atomic_store (&turns, 0);
  vr_rangelock_lock (&lock, &r, 0, 10);
  start (&t[0], 9, 11); /* behind us */
  wait_for_waiters (1);
  start (&t[1], 19, 1); /* behind t[0], though free now */
  wait_for_waiters (2);
  start (&t[2], 0, 100);
  wait_for_waiters (3);
  assert_int_equal (atomic_load (&turns), 0);
  vr_rangelock_unlock (&lock, &r);
  for (unsigned i = 0; i < 3; i++) {
    pthread_join (t[i].thread, NULL);
    assert_int_equal (t[i].turn, i + 1);
  }
}

static void
test_parallel (void **state)
{
  struct taker t[3];
  struct vr_range r, empty;

  (void) state;
  atomic_store (&turns, 0);
  vr_rangelock_lock (&lock, &r, 10, 10);
  start (&t[0], 0, 10);
  start (&t[1], 20, UINT64_MAX - 20);
  start (&t[2], 15, 0);
  for (unsigned i = 0; i < 3; i++) {
    pthread_join (t[i].thread, NULL);
    assert_int_not_equal (t[i].turn, 0);
  }
  vr_rangelock_lock (&lock, &empty, 15, 0);
  vr_rangelock_unlock (&lock, &empty);
  vr_rangelock_unlock (&lock, &r);
}

/* The end of a range may be 2^64. */
static void
test_no_overflow (void **state)
{
  struct taker t;
  struct vr_range r;

  (void) state;
  atomic_store (&turns, 0);
  vr_rangelock_lock (&lock, &r, UINT64_MAX - 9, 10);
  start (&t, 0, 10);
  pthread_join (t.thread, NULL);
  start (&t, 0, UINT64_MAX);
  wait_for_waiters (1);
  vr_rangelock_unlock (&lock, &r);
  pthread_join (t.thread, NULL);
  assert_int_equal (t.turn, 2);
}

/* Threads that take and release small ranges without a pause cannot keep
   another out of the whole.  */

static atomic_bool stop;

static void *
hog (void *arg)
{
  (void) arg;
  for (uint64_t i = 0; !atomic_load (&stop); i++) {
    struct vr_range r;

    vr_rangelock_lock (&lock, &r, i % 7, 10);
    vr_rangelock_unlock (&lock, &r);
  }
  return NULL;
}

static void
test_no_starvation (void **state)
{
  pthread_t thread[3];

  (void) state;
  atomic_store (&stop, false);
  for (unsigned i = 0; i < 3; i++)
    assert_int_equal (pthread_create (&thread[i], NULL, hog, NULL), 0);
  alarm (60);
  for (unsigned i = 0; i < 2000; i++) {
    struct vr_range r;

    vr_rangelock_lock (&lock, &r, 0, 100);
    vr_rangelock_unlock (&lock, &r);
  }
  alarm (0);
  atomic_store (&stop, true);
  for (unsigned i = 0; i < 3; i++)
    pthread_join (thread[i], NULL);
}

/* Plain data under random ranges: a race shows as a lost count, and to the
   thread sanitizer.  */

#define CELLS 64
#define ROUNDS 20000

static unsigned cell[CELLS];

static void *
count_up (void *arg)
{
  uint32_t random = *(const uint32_t *) arg;
  uint64_t *sum = calloc (1, sizeof *sum);

  for (unsigned i = 0; sum && i < ROUNDS; i++) {
    struct vr_range r;
    uint32_t first, n;

    random = random * 1664525u + 1013904223u;
    first = (random >> 8) % CELLS;
    n = (random >> 16) % 8;
    if (n > CELLS - first)
      n = CELLS - first;
    vr_rangelock_lock (&lock, &r, first, n);
    for (uint32_t c = first; c < first + n; c++)
      cell[c]++;
    vr_rangelock_unlock (&lock, &r);
    *sum += n;
  }
  return sum;
}

static void
test_exclusive (void **state)
{
  pthread_t thread[4];
  uint32_t seed[4] = { 1, 2, 3, 4 };
  uint64_t expected = 0, found = 0;

  (void) state;
  for (unsigned i = 0; i < 4; i++)
    assert_int_equal (
      pthread_create (&thread[i], NULL, count_up, &seed[i]), 0);
  for (unsigned i = 0; i < 4; i++) {
    void *sum;

    pthread_join (thread[i], &sum);
    assert_non_null (sum);
    expected += *(uint64_t *) sum;
    free (sum);
  }
  for (unsigned i = 0; i < CELLS; i++)
    found += cell[i];
  assert_int_equal (found, expected);
  assert_null (lock.first);
  assert_null (lock.last);
  assert_int_equal (lock.waiters, 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown (test_order, set_up, tear_down),
    cmocka_unit_test_setup_teardown (test_parallel, set_up, tear_down),
    cmocka_unit_test_setup_teardown (test_no_overflow, set_up, tear_down),
    cmocka_unit_test_setup_teardown (test_no_starvation, set_up, tear_down),
    cmocka_unit_test_setup_teardown (test_exclusive, set_up, tear_down),
  };

  return cmocka_run_group_tests_name ("rangelock", tests, NULL, NULL);
}
