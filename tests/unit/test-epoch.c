/* SPDX-License-Identifier: BSD-3-Clause */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "journal/epoch.h"

#define SECOND UINT64_C (1000000000)

static char dir[PATH_MAX - 16];
static char path[PATH_MAX];
static const uint8_t some_id[16] = { 1, 2, 3, 4, 5, 6, 7, 8, 9 };
static const uint8_t zero_id[16];

static int
make_dir (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  (void) state;
  snprintf (dir, sizeof dir, "%s/test-epoch.XXXXXX", tmp ? tmp : "/tmp");
  if (!mkdtemp (dir))
    return -1;
  snprintf (path, sizeof path, "%s/page", dir);
  return 0;
}

static int
remove_dir (void **state)
{
  (void) state;
  unlink (path);
  return rmdir (dir);
}

static int
remove_file (void **state)
{
  (void) state;
  unlink (path);
  return 0;
}

static int
try_open (const char *vm, const uint8_t id[16], struct vr_epoch **ret)
{
  uint8_t copy[16];

  memcpy (copy, id, 16);
  return vr_epoch_open (path, vm, copy, 1, ret);
}

static struct vr_epoch *
open_page (void)
{
  struct vr_epoch *e;

  assert_int_equal (try_open ("vm", some_id, &e), 0);
  return e;
}

static uint64_t
now_ns (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * SECOND + (uint64_t) t.tv_nsec;
}

/* Another process: does its work, says so with one byte, and then waits to be
   killed or dismissed.  */

struct child {
  pid_t pid;
  int from, to;
};

static struct child
spawn (int (*work) (void))
{
  struct child c;
  int up[2], down[2];
  char byte;

  assert_int_equal (pipe2 (up, O_CLOEXEC), 0);
  assert_int_equal (pipe2 (down, O_CLOEXEC), 0);
  c.pid = fork ();
  assert_true (c.pid >= 0);
  if (c.pid == 0) {
    int r;

    close (up[0]);
    close (down[1]);
    r = work ();
    byte = r == 0 ? 'y' : 'n';
    if (write (up[1], &byte, 1) == 1 && read (down[0], &byte, 1) < 0)
      r = 1;
    _exit (r != 0);
  }
  close (up[1]);
  close (down[0]);
  c.from = up[0];
  c.to = down[1];
  return c;
}

static void
wait_ready (const struct child *c)
{
  char byte = '?';

  assert_int_equal (read (c->from, &byte, 1), 1);
  assert_int_equal (byte, 'y');
}

static void
reap (const struct child *c, int signal)
{
  int status;

  if (signal)
    kill (c->pid, signal);
  else
    assert_int_equal (write (c->to, "", 1), 1);
  close (c->to);
  close (c->from);
  assert_int_equal (waitpid (c->pid, &status, 0), c->pid);
  if (!signal)
    assert_true (WIFEXITED (status) && WEXITSTATUS (status) == 0);
}

/* The counter.  */

static void
check_counter (struct vr_epoch *e)
{
  struct vr_epoch_page *page = vr_epoch_page (e);
  uint32_t word = vr_epoch_word (e);

  assert_int_equal (vr_epoch_current (e), 1);
  vr_epoch_raise (e, 10);
  vr_epoch_raise (e, 5);
  assert_int_equal (vr_epoch_current (e), 10);
  assert_int_equal (vr_epoch_word (e), word + 1);

  vr_epoch_mark_dirty (e);
  assert_int_equal (page->dirty, 1);
  assert_false (vr_epoch_cut (e, 9, 77));
  assert_int_equal (page->dirty, 1);
  assert_true (vr_epoch_cut (e, 10, 77));
  assert_int_equal (page->dirty, 0);
  assert_int_equal (vr_epoch_current (e), 11);
  assert_int_equal (page->cut_time_ns, 77);
  assert_int_equal (vr_epoch_word (e), word + 2);

  vr_epoch_request_cut (e, 11);
  vr_epoch_request_cut (e, 11);
  assert_int_equal (page->cut_request, 11);
  assert_int_equal (vr_epoch_word (e), word + 3);
  vr_epoch_set_committed (e, 10);
  vr_epoch_set_committed (e, 9);
  assert_int_equal (page->committed_epoch, 10);
  assert_int_equal (vr_epoch_word (e), word + 4);
}

static void
test_counter (void **state)
{
  struct vr_epoch *e = open_page ();

  (void) state;
  check_counter (e);
  vr_epoch_close (e);
  vr_epoch_close (NULL);
}

static void
test_private (void **state)
{
  struct vr_epoch *e;
  struct vr_member *a, *b;

  (void) state;
  assert_int_equal (vr_epoch_new_private ("vm", some_id, 1, &e), 0);
  check_counter (e);
  assert_true (vr_epoch_try_clock (e));
  assert_int_equal (vr_epoch_join (e, "a", VR_MEMBER_DISK, &a), 0);
  assert_int_equal (vr_epoch_join (e, "b", VR_MEMBER_MEMORY, &b), 0);
  assert_int_equal (vr_epoch_join (e, "a", VR_MEMBER_DISK, &a), -EBUSY);
  assert_ptr_not_equal (a, b);
  assert_true (vr_epoch_member_alive (e, 0));
  assert_true (vr_epoch_member_alive (e, 1));
  assert_false (vr_epoch_member_alive (e, 2));
  vr_epoch_close (e);
}

/* The file.  */

static void
test_identity (void **state)
{
  struct vr_epoch *e, *other;
  uint8_t id[16] = { 0 }, wrong[16] = { 9 };
  char longest[VR_NAME_SIZE + 1];

  (void) state;
  memset (longest, 'x', VR_NAME_SIZE);
  longest[VR_NAME_SIZE] = '\0';
  assert_int_equal (try_open (longest, some_id, &e), -ENAMETOOLONG);
  assert_int_equal (try_open ("", some_id, &e), -EINVAL);
  assert_int_equal (access (path, F_OK), -1);

  e = open_page ();
  assert_memory_equal (vr_epoch_page (e)->vm_id, some_id, 16);
  assert_int_equal (vr_epoch_open (path, "vm", id, 7, &other), 0);
  assert_memory_equal (id, some_id, 16);
  assert_int_equal (vr_epoch_current (e), 7);
  vr_epoch_close (other);
  assert_int_equal (try_open ("vm", wrong, &other), -EXDEV);
  assert_int_equal (try_open ("vm2", some_id, &other), -EXDEV);
  vr_epoch_close (e);

  unlink (path);
  memset (id, 0, sizeof id);
  assert_int_equal (vr_epoch_open (path, "vm", id, 1, &e), 0);
  assert_memory_not_equal (id, zero_id, 16);
  assert_memory_equal (vr_epoch_page (e)->vm_id, id, 16);
  vr_epoch_close (e);
}

static void
write_file (const void *buf, size_t n, off_t size)
{
  int fd = open (path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

  assert_true (fd >= 0);
  assert_int_equal (write (fd, buf, n), n);
  assert_int_equal (ftruncate (fd, size), 0);
  close (fd);
}

static void
expect_open (int expected)
{
  struct vr_epoch *e;
  int r = try_open ("vm", some_id, &e);

  assert_int_equal (r, expected);
  if (r == 0)
    vr_epoch_close (e);
  r = vr_epoch_open_readonly (path, &e);
  assert_int_equal (r, expected);
  if (r == 0)
    vr_epoch_close (e);
}

static void
read_page (struct vr_epoch_page *page)
{
  struct vr_member *m;
  struct vr_epoch *e = open_page ();

  assert_int_equal (vr_epoch_join (e, "disk", VR_MEMBER_DISK, &m), 0);
  memcpy (page, vr_epoch_page (e), sizeof *page);
  vr_epoch_close (e);
}

/* Each damage to a good page, one at a time. */
static void
test_garbage (void **state)
{
  struct vr_epoch_page good, bad;

  (void) state;
  read_page (&good);
  write_file ("hello", 5, 5);
  expect_open (-EBADMSG);
  write_file (&good, sizeof good, sizeof good);
  expect_open (-EBADMSG);
  write_file (&good, sizeof good, VR_EPOCH_FILE_SIZE + 1);
  expect_open (-EBADMSG);
  write_file (&zero_id, 16, VR_EPOCH_FILE_SIZE + 1);
  expect_open (-EBADMSG);

#define DAMAGE(statement, expected)                   \
  bad = good;                                         \
  statement;                                          \
  write_file (&bad, sizeof bad, VR_EPOCH_FILE_SIZE);  \
  expect_open (expected)

  DAMAGE (bad.magic[7] ^= 1, -EBADMSG);
  DAMAGE (bad.version = VR_EPOCH_VERSION + 1, -EPROTO);
  DAMAGE (bad.version = 0, -EBADMSG);
  DAMAGE (bad.flags = 1, -EBADMSG);
  DAMAGE (bad.spare[87] = 1, -EBADMSG);
  DAMAGE (memset (bad.vm, 'x', sizeof bad.vm), -EBADMSG);
  DAMAGE (bad.vm[0] = '\0', -EBADMSG);
  DAMAGE (bad.member[0].kind = 3, -EBADMSG);
  DAMAGE (bad.member[0].reserved = 1, -EBADMSG);
  DAMAGE (memset (bad.member[0].name, 'x', VR_NAME_SIZE), -EBADMSG);
  DAMAGE (memset (bad.member[1].name, 'x', VR_NAME_SIZE), 0);
  DAMAGE ((void) 0, 0);
#undef DAMAGE
}

static void
test_not_a_file (void **state)
{
  struct vr_epoch *e;

  (void) state;
  assert_int_equal (vr_epoch_open_readonly (path, &e), -ENOENT);
  assert_int_equal (mkfifo (path, 0600), 0);
  expect_open (-EBADMSG);
  unlink (path);
  write_file ("", 0, 0);
  assert_int_equal (vr_epoch_open_readonly (path, &e), -EBADMSG);
}

/* The maker died before the magic was written. */
static void
test_half_made (void **state)
{
  struct vr_epoch_page page;

  (void) state;
  read_page (&page);
  memset (page.magic, 0, sizeof page.magic);
  write_file (&page, sizeof page, VR_EPOCH_FILE_SIZE);
  expect_open (0);
  write_file (&page, 100, 100);
  expect_open (0);
}

static int
creator (void)
{
  struct vr_epoch *e;
  uint8_t id[16] = { 0 };
  int r = vr_epoch_open (path, "vm", id, 1, &e);

  if (r < 0)
    return r;
  vr_epoch_raise (e, vr_epoch_current (e));
  atomic_fetch_add (&vr_epoch_page (e)->member[31].commits, 1);
  return memcmp (vr_epoch_page (e)->vm_id, id, 16);
}

/* Were the page made twice, the count of one maker would be lost, or its id
   would differ. */
static void
test_create_race (void **state)
{
  struct child c[8];

  (void) state;
  for (unsigned round = 0; round < 20; round++) {
    uint8_t id[16] = { 0 };
    struct vr_epoch *e;

    unlink (path);
    for (unsigned i = 0; i < 8; i++)
      c[i] = spawn (creator);
    for (unsigned i = 0; i < 8; i++)
      wait_ready (&c[i]);
    for (unsigned i = 0; i < 8; i++)
      reap (&c[i], 0);
    assert_int_equal (vr_epoch_open (path, "vm", id, 1, &e), 0);
    assert_int_equal (vr_epoch_page (e)->member[31].commits, 8);
    vr_epoch_close (e);
  }
}

/* Between processes.  */

static int
cutter (void)
{
  struct vr_epoch *e;
  struct timespec pause = { .tv_nsec = 50000000 };

  if (try_open ("vm", some_id, &e) < 0)
    return 1;
  nanosleep (&pause, NULL);
  vr_epoch_mark_dirty (e);
  return !vr_epoch_cut (e, 1, 123);
}

static void
check_woken (struct vr_epoch *e)
{
  uint64_t begin = now_ns ();
  uint32_t word = vr_epoch_word (e);
  struct child c = spawn (cutter);

  vr_epoch_wait (e, word, 30 * SECOND, VR_WAKE_ANY);
  assert_true (now_ns () - begin < 20 * SECOND);
  assert_int_not_equal (vr_epoch_word (e), word);
  assert_int_equal (vr_epoch_current (e), 2);
  assert_int_equal (vr_epoch_page (e)->cut_time_ns, 123);
  wait_ready (&c);
  reap (&c, 0);
}

static void
test_cut_wakes (void **state)
{
  struct vr_epoch *e = open_page ();

  (void) state;
  check_woken (e);
  vr_epoch_close (e);
}

static void
test_cut_wakes_reader (void **state)
{
  struct vr_epoch *e = open_page (), *reader;
  struct vr_member *m;

  (void) state;
  assert_int_equal (vr_epoch_open_readonly (path, &reader), 0);
  check_woken (reader);
  assert_false (vr_epoch_try_clock (reader));
  assert_int_equal (vr_epoch_join (reader, "x", VR_MEMBER_DISK, &m), -EROFS);
  vr_epoch_close (reader);
  vr_epoch_close (e);
}

static void
test_timeout (void **state)
{
  struct vr_epoch *e = open_page ();
  uint64_t begin = now_ns (), passed;

  (void) state;
  vr_epoch_wait (e, vr_epoch_word (e), SECOND / 20, VR_WAKE_ANY);
  passed = now_ns () - begin;
  assert_true (passed >= SECOND / 20);
  vr_epoch_wait (e, vr_epoch_word (e), 0, VR_WAKE_ANY);
  vr_epoch_wait (e, vr_epoch_word (e) - 1, UINT64_MAX, VR_WAKE_ANY);
  vr_epoch_close (e);
}

static int
clock_owner (void)
{
  struct vr_epoch *e;

  if (try_open ("vm", some_id, &e) < 0)
    return 1;
  return !(vr_epoch_try_clock (e) && vr_epoch_try_clock (e));
}

static void
test_clock (void **state)
{
  struct vr_epoch *e = open_page (), *f = open_page ();
  struct child c = spawn (clock_owner);

  (void) state;
  wait_ready (&c);
  assert_false (vr_epoch_try_clock (e));
  assert_int_equal (vr_epoch_page (e)->clock_pid, c.pid);
  assert_int_not_equal (vr_epoch_page (e)->clock_start, 0);
  reap (&c, SIGKILL);
  assert_true (vr_epoch_try_clock (e));
  assert_int_equal (vr_epoch_page (e)->clock_pid, getpid ());
  assert_false (vr_epoch_try_clock (f));
  vr_epoch_close (e);
  assert_true (vr_epoch_try_clock (f));
  vr_epoch_close (f);
}

static int
member (void)
{
  struct vr_epoch *e;
  struct vr_member *m, *other;

  if (try_open ("vm", some_id, &e) < 0 ||
      vr_epoch_join (e, "other", VR_MEMBER_MEMORY, &other) < 0 ||
      vr_epoch_join (e, "disk", VR_MEMBER_DISK, &m) < 0)
    return 1;
  atomic_store (&m->sealed_epoch, 42);
  atomic_store (&m->state, VR_STATE_PROTECTED);
  return 0;
}

static void
test_rejoin (void **state)
{
  struct vr_epoch *e = open_page (), *reader;
  struct child c = spawn (member);
  struct vr_member *m = NULL;
  struct vr_epoch_page *page = vr_epoch_page (e);

  (void) state;
  wait_ready (&c);
  assert_int_equal (vr_epoch_open_readonly (path, &reader), 0);
  assert_int_equal (vr_epoch_join (e, "disk", VR_MEMBER_DISK, &m), -EBUSY);
  assert_string_equal (page->member[1].name, "disk");
  assert_int_equal (page->member[1].pid, c.pid);
  assert_true (vr_epoch_member_alive (e, 1));
  assert_true (vr_epoch_member_alive (reader, 1));
  assert_false (vr_epoch_member_alive (reader, 2));

  reap (&c, SIGKILL);
  assert_false (vr_epoch_member_alive (e, 1));
  assert_false (vr_epoch_member_alive (reader, 1));
  assert_int_equal (page->member[1].sealed_epoch, 42);
  assert_int_equal (vr_epoch_join (e, "disk", VR_MEMBER_DISK, &m), 0);
  assert_ptr_equal (m, &page->member[1]);
  assert_int_equal (m->pid, getpid ());
  assert_int_equal (m->sealed_epoch, 0);
  assert_true (vr_epoch_member_alive (e, 1));
  atomic_store (&m->state, VR_STATE_ALONE);
  vr_epoch_close (e);

  assert_false (vr_epoch_member_alive (reader, 1));
  assert_int_equal (vr_epoch_page (reader)->member[1].state, VR_STATE_OFFLINE);
  vr_epoch_close (reader);
}

static void
test_slots_full (void **state)
{
  struct vr_epoch *e = open_page ();
  struct vr_member *m;
  char name[VR_NAME_SIZE + 1];

  (void) state;
  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++) {
    snprintf (name, sizeof name, "disk%u", i);
    assert_int_equal (vr_epoch_join (e, name, VR_MEMBER_DISK, &m), 0);
    assert_ptr_equal (m, &vr_epoch_page (e)->member[i]);
  }
  assert_int_equal (vr_epoch_join (e, "more", VR_MEMBER_DISK, &m), -ENOSPC);
  memset (name, 'x', VR_NAME_SIZE);
  name[VR_NAME_SIZE] = '\0';
  assert_int_equal (vr_epoch_join (e, name, VR_MEMBER_DISK, &m),
                    -ENAMETOOLONG);
  assert_int_equal (vr_epoch_join (e, "", VR_MEMBER_DISK, &m), -EINVAL);
  vr_epoch_close (e);
}

/* A mark of the epoch that is open after a cut is not lost to the cut: a clock
   that cuts only what is dirty would never cut it.  */

#define ROUNDS 200000

static atomic_bool stop;

static void *
cut_dirty (void *arg)
{
  struct vr_epoch *e = arg;

  while (!atomic_load (&stop))
    if (vr_epoch_page (e)->dirty)
      vr_epoch_cut (e, vr_epoch_current (e), 1);
    else
      sched_yield ();
  return NULL;
}

static void
test_dirty_race (void **state)
{
  struct vr_epoch *e = open_page ();
  pthread_t thread;

  (void) state;
  assert_int_equal (pthread_create (&thread, NULL, cut_dirty, e), 0);
  for (unsigned i = 0; i < ROUNDS; i++) {
    uint64_t epoch = vr_epoch_current (e);
    uint64_t until = now_ns () + 20 * SECOND;

    vr_epoch_mark_dirty (e);
    for (unsigned spins = 1; vr_epoch_current (e) == epoch; spins++)
      if (spins % 1024 == 0) {
        assert_true (now_ns () < until);
        sched_yield ();
      }
  }
  atomic_store (&stop, true);
  pthread_join (thread, NULL);
  vr_epoch_close (e);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_teardown (test_counter, remove_file),
    cmocka_unit_test_teardown (test_private, remove_file),
    cmocka_unit_test_teardown (test_identity, remove_file),
    cmocka_unit_test_teardown (test_garbage, remove_file),
    cmocka_unit_test_teardown (test_not_a_file, remove_file),
    cmocka_unit_test_teardown (test_half_made, remove_file),
    cmocka_unit_test_teardown (test_create_race, remove_file),
    cmocka_unit_test_teardown (test_cut_wakes, remove_file),
    cmocka_unit_test_teardown (test_cut_wakes_reader, remove_file),
    cmocka_unit_test_teardown (test_timeout, remove_file),
    cmocka_unit_test_teardown (test_clock, remove_file),
    cmocka_unit_test_teardown (test_rejoin, remove_file),
    cmocka_unit_test_teardown (test_slots_full, remove_file),
    cmocka_unit_test_teardown (test_dirty_race, remove_file),
  };

  return cmocka_run_group_tests_name ("epoch", tests, make_dir, remove_dir);
}
