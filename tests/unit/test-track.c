/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync/track.h: exactly the pages that a process writes are reported, and
   it goes on as before when tracking ends, however it ends.

   VMREP_SEED=n chooses the writes. */
#include "util.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "memsync/attach.h"
#include "memsync/delta.h"
#include "memsync/track.h"

#define BLOCKS 3
#define MAX_PAGES 2048

/* Private, shared, and private in huge pages if there are any.  Blocks 0 and 1
   start without a page in them. */
static const uint64_t pages_of[BLOCKS] = { 200, 150, MAX_PAGES };

enum order { WRITE, READ, REPLACE };

/* What the process is told to do, in memory that both have. */
struct orders {
  enum order order;
  uint8_t chosen[BLOCKS][MAX_PAGES];
  uint64_t sum; /* so that a read is one */
};

struct process {
  pid_t pid;
  int to[2], from[2];
  struct orders *orders;
  uint8_t *block[BLOCKS];
  struct vr_ram_block ram_blocks[BLOCKS];
  struct vr_ram ram;
};

/* ---- The process -------------------------------------------------------- */

static void
obey (const struct process *p)
{
  struct orders *o = p->orders;

  if (o->order == REPLACE
      && mmap (p->block[0], pages_of[0] * VR_PAGE_SIZE, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
           == MAP_FAILED)
    _exit (1);
  for (unsigned b = 0; b < BLOCKS; b++)
    for (uint64_t i = 0; i < pages_of[b]; i++) {
      volatile uint8_t *page = p->block[b] + i * VR_PAGE_SIZE;

      if (o->chosen[b][i] && o->order == WRITE)
        page[i % VR_PAGE_SIZE]++;
      else if (o->chosen[b][i])
        o->sum += *page;
    }
}

static void
run_process (const struct process *p)
{
  char byte;

  prctl (PR_SET_PDEATHSIG, SIGKILL);
  close (p->to[1]);
  while (read (p->to[0], &byte, 1) == 1) {
    obey (p);
    if (write (p->from[1], &byte, 1) != 1)
      break;
  }
  _exit (0);
}

static void
tell (struct process *p, enum order order)
{
  char byte = 0;

  p->orders->order = order;
  assert_int_equal (write (p->to[1], &byte, 1), 1);
  assert_int_equal (read (p->from[0], &byte, 1), 1);
}

static void
map_blocks (struct process *p)
{
  for (unsigned i = 0; i < BLOCKS; i++) {
    struct vr_ram_block *b = &p->ram_blocks[i];

    p->block[i] = mmap (NULL, pages_of[i] * VR_PAGE_SIZE,
                        PROT_READ | PROT_WRITE,
                        MAP_ANONYMOUS | (i == 1 ? MAP_SHARED : MAP_PRIVATE),
                        -1, 0);
    assert_true (p->block[i] != MAP_FAILED);
    snprintf (b->name, sizeof b->name, "block-%u", i);
    b->used = b->size = pages_of[i] * VR_PAGE_SIZE;
    b->address = (uintptr_t) p->block[i];
    b->shared = i == 1;
  }
  madvise (p->block[2], pages_of[2] * VR_PAGE_SIZE, MADV_HUGEPAGE);
  memset (p->block[2], 1, pages_of[2] * VR_PAGE_SIZE);
  p->ram.count = BLOCKS;
  p->ram.blocks = p->ram_blocks;
}

static void
start_process (struct process *p)
{
  memset (p, 0, sizeof *p);
  map_blocks (p);
  p->orders = mmap (NULL, sizeof *p->orders, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  assert_true (p->orders != MAP_FAILED);
  assert_int_equal (pipe2 (p->to, O_CLOEXEC), 0);
  assert_int_equal (pipe2 (p->from, O_CLOEXEC), 0);
  p->pid = fork ();
  assert_true (p->pid != -1);
  if (p->pid == 0) {
    /* Pages that are still shared with the parent would be copied. */
    memset (p->block[2], 2, pages_of[2] * VR_PAGE_SIZE);
    run_process (p);
  }
  tell (p, READ); /* it has started */
}

static void
stop_process (struct process *p)
{
  kill (p->pid, SIGKILL);
  waitpid (p->pid, NULL, 0);
  for (unsigned i = 0; i < BLOCKS; i++)
    munmap (p->block[i], pages_of[i] * VR_PAGE_SIZE);
  munmap (p->orders, sizeof *p->orders);
  for (unsigned i = 0; i < 2; i++) {
    close (p->to[i]);
    close (p->from[i]);
  }
}

/* ---- Trackers ----------------------------------------------------------- */

enum kind { UFFD, UFFD_RUNS, SOFT_DIRTY };

/* -EOPNOTSUPP, -EPERM and -ENOSYS (valgrind, which does not know the system
   calls): not here; *problem says why. */
static int
open_tracker (struct process *p, enum kind kind, struct vr_tracker **ret,
              struct vr_problem *problem)
{
  int err, uffd;

  if (kind == SOFT_DIRTY)
    err = vr_tracker_soft_dirty (p->pid, &p->ram, ret, problem);
  else {
    err = vr_attach (p->pid, &uffd, NULL, problem);
    if (err == 0)
      err = vr_tracker_uffd (p->pid, uffd, &p->ram, kind == UFFD_RUNS, ret,
                             problem);
  }
  if (err < 0)
    return err;
  err = (*ret)->ops->begin (*ret, problem);
  if (err < 0)
    (*ret)->ops->end (*ret);
  return err;
}

static struct vr_tracker *
open_or_skip (struct process *p, enum kind kind)
{
  struct vr_problem problem;
  struct vr_tracker *t = NULL;
  const int err = open_tracker (p, kind, &t, &problem);

  if (err == -EOPNOTSUPP || err == -EPERM || err == -ENOSYS) {
    print_message ("skipped: %s\n", problem.text);
    stop_process (p);
    skip ();
  }
  if (err < 0)
    fail_msg ("%s", problem.text);
  return t;
}

static void
choose (struct process *p, uint64_t *rng)
{
  memset (p->orders->chosen, 0, sizeof p->orders->chosen);
  for (unsigned b = 0; b < BLOCKS; b++)
    for (uint64_t n = below (rng, 9); n > 0; n--) {
      const uint64_t first = below (rng, pages_of[b]);
      const uint64_t left = pages_of[b] - first;
      const uint64_t run = 1 + below (rng, chance (rng, 10) ? left : 5);

      for (uint64_t i = first; i < first + (run < left ? run : left); i++)
        p->orders->chosen[b][i] = 1;
    }
}

/* Soft-dirty bits of a huge page are one: with those, block 2 may have more
   reported than was written. */
static void
assert_reported (const struct process *p, const struct vr_dirty *d,
                 enum kind kind)
{
  static uint8_t reported[BLOCKS][MAX_PAGES];
  uint64_t sum = 0;

  memset (reported, 0, sizeof reported);
  for (size_t i = 0; i < d->count; i++) {
    const struct vr_run *r = &d->runs[i];

    assert_true (r->block < BLOCKS && r->pages > 0);
    assert_true (r->page + r->pages <= pages_of[r->block]);
    memset (&reported[r->block][r->page], 1, r->pages);
    sum += r->pages;
  }
  assert_int_equal (sum, d->pages);
  for (unsigned b = 0; b < BLOCKS; b++)
    for (uint64_t i = 0; i < pages_of[b]; i++)
      if (reported[b][i] != p->orders->chosen[b][i]
          && !(kind == SOFT_DIRTY && b == 2 && reported[b][i]))
        fail_msg ("block %u page %llu: reported %d, written %d", b,
                  (unsigned long long) i, reported[b][i],
                  p->orders->chosen[b][i]);
}

/* A shared page that is not mapped counts as written with soft-dirty bits: map
   them all.  Every page of private memory exists, then, before and after. */
static void
touch_everything (struct process *p)
{
  memset (p->orders->chosen, 1, sizeof p->orders->chosen);
  tell (p, WRITE);
}

static void
follow (enum kind kind)
{
  uint64_t rng = seeded (env_number ("VMREP_SEED", 5));
  struct vr_dirty dirty = { 0 };
  struct process p;
  struct vr_tracker *t;

  start_process (&p);
  if (kind == SOFT_DIRTY)
    touch_everything (&p);
  t = open_or_skip (&p, kind);
  for (unsigned round = 0; round < 60; round++) {
    choose (&p, &rng);
    tell (&p, WRITE);
    assert_int_equal (t->ops->collect (t, &dirty), 0);
    assert_reported (&p, &dirty, kind);
    choose (&p, &rng);
    tell (&p, READ);
    assert_int_equal (t->ops->collect (t, &dirty), 0);
    assert_int_equal (dirty.count, 0);
  }
  t->ops->end (t);
  vr_dirty_free (&dirty);
  touch_everything (&p);
  stop_process (&p);
}

static void
test_uffd (void **state)
{
  (void) state;
  follow (UFFD);
}

static void
test_uffd_runs (void **state)
{
  (void) state;
  follow (UFFD_RUNS);
}

static void
test_soft_dirty (void **state)
{
  (void) state;
  follow (SOFT_DIRTY);
}

/* More runs than one scan returns. */
static void
test_many_runs (void **state)
{
  struct vr_dirty dirty = { 0 };
  struct process p;
  struct vr_tracker *t;

  (void) state;
  start_process (&p);
  t = open_or_skip (&p, UFFD);
  for (unsigned b = 0; b < BLOCKS; b++)
    for (uint64_t i = 0; i < pages_of[b]; i += 2)
      p.orders->chosen[b][i] = 1;
  for (unsigned round = 0; round < 3; round++) {
    tell (&p, WRITE);
    assert_int_equal (t->ops->collect (t, &dirty), 0);
    assert_int_equal (dirty.count, (200 + 150 + MAX_PAGES) / 2);
    assert_reported (&p, &dirty, UFFD);
  }
  t->ops->end (t);
  vr_dirty_free (&dirty);
  stop_process (&p);
}

/* ---- The end ------------------------------------------------------------ */

/* Is any of the process' memory registered for write-protection? */
static bool
is_tracked (const struct process *p)
{
  char path[64], line[512];
  bool found = false;
  FILE *f;

  snprintf (path, sizeof path, "/proc/%d/smaps", (int) p->pid);
  f = fopen (path, "r");
  assert_non_null (f);
  while (fgets (line, sizeof line, f))
    found |= strncmp (line, "VmFlags:", 8) == 0 && strstr (line, " uw");
  fclose (f);
  return found;
}

static void
test_end (void **state)
{
  struct process p;
  struct vr_tracker *t;

  (void) state;
  start_process (&p);
  t = open_or_skip (&p, UFFD);
  assert_true (is_tracked (&p));
  t->ops->end (t);
  assert_false (is_tracked (&p));
  t = open_or_skip (&p, UFFD);
  t->ops->end (t);
  touch_everything (&p);
  stop_process (&p);
}

static void
test_killed (void **state)
{
  struct process p;
  pid_t pid;
  int status;

  (void) state;
  start_process (&p);
  pid = fork ();
  if (pid == 0) {
    struct vr_tracker *t;

    if (open_tracker (&p, UFFD, &t, NULL) < 0)
      _exit (77);
    kill (getpid (), SIGKILL);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  if (WIFEXITED (status)) {
    stop_process (&p);
    skip ();
  }
  assert_false (is_tracked (&p));
  touch_everything (&p);
  stop_process (&p);
}

/* ---- Refusals ----------------------------------------------------------- */

static void
test_busy (void **state)
{
  struct vr_problem problem;
  struct vr_tracker *t, *second;
  struct vr_dirty dirty = { 0 };
  struct process p;

  (void) state;
  start_process (&p);
  t = open_or_skip (&p, UFFD);
  assert_int_equal (open_tracker (&p, UFFD, &second, &problem), -EBUSY);
  assert_non_null (strstr (problem.text, "block-0"));
  /* The first one is none the worse. */
  touch_everything (&p);
  assert_int_equal (t->ops->collect (t, &dirty), 0);
  assert_int_equal (dirty.pages, 200 + 150 + MAX_PAGES);
  t->ops->end (t);
  vr_dirty_free (&dirty);
  stop_process (&p);
}

static void
test_replaced (void **state)
{
  struct vr_dirty dirty = { 0 };
  struct process p;
  struct vr_tracker *t;

  (void) state;
  start_process (&p);
  t = open_or_skip (&p, UFFD);
  tell (&p, REPLACE);
  assert_int_equal (t->ops->collect (t, &dirty), -ESTALE);
  t->ops->end (t);
  vr_dirty_free (&dirty);
  stop_process (&p);
}

static void
test_file_on_disk (void **state)
{
  struct vr_problem problem;
  struct vr_tracker *t;
  struct process p;
  const int fd = open ("/proc/self/exe", O_RDONLY | O_CLOEXEC);

  (void) state;
  start_process (&p);
  t = open_or_skip (&p, UFFD);
  t->ops->end (t);
  stop_process (&p);

  memset (&p, 0, sizeof p);
  map_blocks (&p);
  assert_true (mmap (p.block[1], VR_PAGE_SIZE, PROT_READ,
                     MAP_SHARED | MAP_FIXED, fd, 0)
               == p.block[1]);
  close (fd);
  p.pid = fork ();
  if (p.pid == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    pause ();
  }
  assert_int_equal (open_tracker (&p, UFFD, &t, &problem), -EINVAL);
  assert_non_null (strstr (problem.text, "block-1"));
  assert_false (is_tracked (&p)); /* block-0 was, for a moment */
  kill (p.pid, SIGKILL);
  waitpid (p.pid, NULL, 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_uffd),       cmocka_unit_test (test_uffd_runs),
    cmocka_unit_test (test_soft_dirty), cmocka_unit_test (test_many_runs),
    cmocka_unit_test (test_end),        cmocka_unit_test (test_killed),
    cmocka_unit_test (test_busy),       cmocka_unit_test (test_replaced),
    cmocka_unit_test (test_file_on_disk),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
