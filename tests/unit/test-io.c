/* SPDX-License-Identifier: BSD-3-Clause */
/* journal/io.h: what both implementations promise, then what each adds. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "journal/io.h"

#define KIB 1024u
#define MIB (1024u * KIB)
#define BLOCK 4096u

struct env {
  struct vr_io *io;
  char dir[64];
  char path[PATH_MAX]; /* what path_of wrote last */
};

/* ---- Helpers ---------------------------------------------------------- */

static const char *
path_of (struct env *e, const char *name)
{
  assert_true (snprintf (e->path, sizeof e->path, "%s/%s", e->dir, name) > 0);
  return e->path;
}

static struct vr_file *
open_file (struct env *e, const char *name, int flags)
{
  struct vr_file *f = NULL;

  assert_int_equal (e->io->ops->open (e->io, path_of (e, name), flags, &f), 0);
  assert_non_null (f);
  return f;
}

static int
open_error (struct env *e, const char *name, int flags)
{
  struct vr_file *f = NULL;
  const int r = e->io->ops->open (e->io, path_of (e, name), flags, &f);

  if (r == 0)
    vr_close (f);
  return r;
}

static uint64_t
size_of (struct vr_file *f)
{
  uint64_t size = UINT64_MAX;

  assert_int_equal (f->io->ops->size (f, &size), 0);
  return size;
}

static void *
new_buffer (size_t n, int byte)
{
  void *p = NULL;

  assert_int_equal (posix_memalign (&p, BLOCK, n), 0);
  memset (p, byte, n);
  return p;
}

/* All n bytes of f at offset are `byte`. */
static void
assert_bytes (struct vr_file *f, uint64_t offset, size_t n, uint8_t byte)
{
  uint8_t *got = new_buffer (n, ~byte);
  uint8_t *want = new_buffer (n, byte);

  assert_int_equal (vr_read (f, got, n, offset), 0);
  assert_memory_equal (got, want, n);
  free (got);
  free (want);
}

static void
fill (struct vr_file *f, uint64_t offset, size_t n, uint8_t byte)
{
  void *p = new_buffer (n, byte);

  assert_int_equal (vr_write (f, p, n, offset), 0);
  free (p);
}

static void
sync_file (struct vr_file *f)
{
  assert_int_equal (vr_sync (f), 0);
}

static void
sync_names (struct env *e)
{
  assert_int_equal (e->io->ops->sync_dir (e->io, e->dir), 0);
}

static int
rename_in (struct env *e, const char *from, const char *to)
{
  char source[PATH_MAX];

  strcpy (source, path_of (e, from));
  return e->io->ops->rename (e->io, source, path_of (e, to));
}

static int
unlink_in (struct env *e, const char *name)
{
  return e->io->ops->unlink (e->io, path_of (e, name));
}

/* xorshift64 (Marsaglia 2003): the same test each time. */
static uint64_t
next_random (uint64_t *x)
{
  *x ^= *x << 13;
  *x ^= *x >> 7;
  *x ^= *x << 17;
  return *x;
}

/* ---- Both implementations --------------------------------------------- */

static void
test_open (void **state)
{
  struct env *e = *state;
  struct vr_file *f;

  assert_int_equal (open_error (e, "a", 0), -ENOENT);
  vr_close (open_file (e, "a", VR_OPEN_CREATE));
  assert_int_equal (open_error (e, "a", VR_OPEN_CREATE), -EEXIST);
  assert_int_equal (open_error (e, "no/such", VR_OPEN_CREATE), -ENOENT);
  assert_int_equal (open_error (e, "", 0), -EISDIR);
  assert_int_equal (open_error (e, "", VR_OPEN_READ_ONLY), -EISDIR);

  f = open_file (e, "a", VR_OPEN_READ_ONLY);
  assert_int_equal (vr_write (f, "x", 1, 0), -EBADF);
  vr_close (f);
  vr_close (NULL);
}

static void
test_read_write (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  char buf[16];

  assert_int_equal (size_of (f), 0);
  assert_int_equal (vr_read (f, buf, 1, 0), -ENODATA);
  assert_int_equal (vr_write (f, "hello", 5, 10000), 0);
  assert_int_equal (size_of (f), 10005);
  assert_bytes (f, 0, 10000, 0);
  assert_int_equal (vr_read (f, buf, 5, 10000), 0);
  assert_memory_equal (buf, "hello", 5);
  assert_int_equal (vr_read (f, buf, 6, 10000), -ENODATA);
  assert_int_equal (vr_read (f, buf, 1, 10005), -ENODATA);
  assert_int_equal (vr_read (f, buf, 0, 10005), 0);
  assert_int_equal (vr_write (f, buf, 0, 20000), 0);
  assert_int_equal (size_of (f), 10005);
  vr_close (f);

  f = open_file (e, "a", VR_OPEN_READ_ONLY);
  assert_int_equal (vr_read (f, buf, 5, 10000), 0);
  assert_memory_equal (buf, "hello", 5);
  vr_close (f);
}

/* More buffers than IOV_MAX, of lengths from 0 up. */
static void
test_long_vector (void **state)
{
  enum { COUNT = 2 * IOV_MAX + 7 };
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  static uint8_t bytes[COUNT * 30], got[COUNT * 30];
  static struct iovec iov[COUNT];
  const struct vr_io_write w = {iov, COUNT, 3};
  size_t n = 0;

  for (size_t i = 0; i < COUNT; i++) {
    iov[i] = (struct iovec){bytes + n, i % 30};
    n += i % 30;
  }
  for (size_t i = 0; i < n; i++)
    bytes[i] = (uint8_t)(i * 7 / 5);

  assert_int_equal (f->io->ops->writev (f, iov, COUNT, 3), 0);
  assert_int_equal (size_of (f), n + 3);
  assert_int_equal (vr_read (f, got, n, 3), 0);
  assert_memory_equal (got, bytes, n);

  assert_int_equal (f->io->ops->zero (f, 0, n + 3, true), 0);
  assert_int_equal (f->io->ops->write_batch (f, &w, 1), 0);
  assert_int_equal (vr_read (f, got, n, 3), 0);
  assert_memory_equal (got, bytes, n);
  vr_close (f);
}

/* Write 300 elements of two blocks each, in scrambled places. */
static void
check_batch (struct vr_file *f, uint8_t salt)
{
  enum { COUNT = 300 };
  uint8_t *bytes = new_buffer (COUNT * 2 * BLOCK, 0);
  struct iovec iov[COUNT][2];
  struct vr_io_write w[COUNT];

  for (size_t i = 0; i < COUNT; i++) {
    const size_t place = i * 77 % COUNT;

    memset (bytes + i * 2 * BLOCK, (int)(place + salt), 2 * BLOCK);
    iov[i][0] = (struct iovec){bytes + i * 2 * BLOCK, BLOCK};
    iov[i][1] = (struct iovec){bytes + (i * 2 + 1) * BLOCK, BLOCK};
    w[i] = (struct vr_io_write){iov[i], 2, place * 2 * BLOCK};
  }
  assert_int_equal (f->io->ops->write_batch (f, w, 0), 0);
  assert_int_equal (f->io->ops->write_batch (f, w, 1), 0);
  assert_int_equal (f->io->ops->write_batch (f, w, COUNT), 0);
  for (size_t place = 0; place < COUNT; place++)
    assert_bytes (f, place * 2 * BLOCK, 2 * BLOCK, (uint8_t)(place + salt));
  free (bytes);
}

static void
test_batch (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

  check_batch (f, 0);
  vr_close (f);
}

static void
test_batch_direct (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);

  check_batch (f, 0);
  check_batch (f, 1);
  vr_close (f);
}

static void
test_direct (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  void *buf = new_buffer (3 * BLOCK, 0);

  fill (f, BLOCK, 2 * BLOCK, 7);
  assert_bytes (f, 0, BLOCK, 0);
  assert_bytes (f, BLOCK, 2 * BLOCK, 7);
  assert_int_equal (f->io->ops->zero (f, BLOCK, BLOCK, true), 0);
  assert_int_equal (f->io->ops->zero (f, 4 * BLOCK, BLOCK, true), 0);
  assert_int_equal (f->io->ops->zero (f, 5 * BLOCK, BLOCK, false), 0);
  assert_int_equal (size_of (f), 6 * BLOCK);
  assert_bytes (f, BLOCK, BLOCK, 0);
  assert_bytes (f, 2 * BLOCK, BLOCK, 7);
  assert_bytes (f, 3 * BLOCK, 3 * BLOCK, 0);
  assert_int_equal (vr_read (f, buf, 3 * BLOCK, 4 * BLOCK), -ENODATA);
  assert_int_equal (f->io->ops->truncate (f, 5 * BLOCK + 100), 0);
  assert_int_equal (vr_read (f, buf, 2 * BLOCK, 4 * BLOCK), -ENODATA);
  vr_close (f);
  free (buf);
}

static void
test_zero (void **state)
{
  struct env *e = *state;

  for (int may_deallocate = 0; may_deallocate < 2; may_deallocate++) {
    struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

    fill (f, 0, 100 * KIB, 9);
    assert_int_equal (f->io->ops->zero (f, 5, 0, may_deallocate), 0);
    assert_int_equal (f->io->ops->zero (f, 1, 2, may_deallocate), 0);
    assert_int_equal (f->io->ops->zero (f, 5000, 50000, may_deallocate), 0);
    assert_bytes (f, 0, 1, 9);
    assert_bytes (f, 1, 2, 0);
    assert_bytes (f, 3, 4997, 9);
    assert_bytes (f, 5000, 50000, 0);
    assert_bytes (f, 55000, 100 * KIB - 55000, 9);
    assert_int_equal (size_of (f), 100 * KIB);

    /* Over the end, and wholly past it. */
    assert_int_equal (
      f->io->ops->zero (f, 99 * KIB, 9 * KIB + 1, may_deallocate), 0);
    assert_int_equal (size_of (f), 108 * KIB + 1);
    assert_int_equal (f->io->ops->zero (f, 200 * KIB, 3, may_deallocate), 0);
    assert_int_equal (size_of (f), 200 * KIB + 3);
    assert_bytes (f, 99 * KIB, 101 * KIB + 3, 0);
    assert_int_equal (f->io->ops->zero (f, UINT64_MAX, 2, may_deallocate),
                      -EFBIG);
    vr_close (f);
    assert_int_equal (unlink_in (e, "a"), 0);
  }
}

static void
test_truncate (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

  fill (f, 0, 10000, 3);
  assert_int_equal (f->io->ops->truncate (f, 5000), 0);
  assert_int_equal (size_of (f), 5000);
  assert_int_equal (f->io->ops->truncate (f, 20000), 0);
  assert_bytes (f, 0, 5000, 3);
  assert_bytes (f, 5000, 15000, 0);
  assert_int_equal (f->io->ops->truncate (f, UINT64_MAX), -EFBIG);
  vr_close (f);
}

static void
test_next_data (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  uint64_t start, end;

  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == 0 && end == 0);

  assert_int_equal (f->io->ops->truncate (f, 16 * MIB + 5), 0);
  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == 16 * MIB + 5 && end == start);

  fill (f, 8 * MIB, 64 * KIB, 1);
  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == 8 * MIB && end == 8 * MIB + 64 * KIB);
  assert_int_equal (f->io->ops->next_data (f, 8 * MIB + 5, &start, &end), 0);
  assert_true (start == 8 * MIB + 5 && end == 8 * MIB + 64 * KIB);
  assert_int_equal (f->io->ops->next_data (f, end, &start, &end), 0);
  assert_true (start == 16 * MIB + 5 && end == start);
  assert_int_equal (f->io->ops->next_data (f, 99 * MIB, &start, &end), 0);
  assert_true (start == 16 * MIB + 5 && end == start);

  assert_int_equal (f->io->ops->zero (f, 8 * MIB, 32 * KIB, true), 0);
  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == 8 * MIB + 32 * KIB && end == 8 * MIB + 64 * KIB);
  fill (f, 8 * MIB, BLOCK, 2);
  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == 8 * MIB && end == 8 * MIB + BLOCK);
  vr_close (f);
}

static void
test_names (void **state)
{
  struct env *e = *state;
  struct vr_file *a = open_file (e, "a", VR_OPEN_CREATE);
  struct vr_file *b = open_file (e, "b", VR_OPEN_CREATE);

  fill (a, 0, 1, 'a');
  fill (b, 0, 1, 'b');
  assert_int_equal (rename_in (e, "no", "b"), -ENOENT);
  assert_int_equal (rename_in (e, "a", "b"), 0);
  assert_int_equal (open_error (e, "a", 0), -ENOENT);
  assert_bytes (b, 0, 1, 'b'); /* nameless, but open */
  vr_close (b);
  b = open_file (e, "b", 0);
  assert_bytes (b, 0, 1, 'a');

  assert_int_equal (unlink_in (e, "no"), -ENOENT);
  assert_int_equal (unlink_in (e, "b"), 0);
  assert_int_equal (open_error (e, "b", 0), -ENOENT);
  fill (a, 1, 1, 'c');
  assert_bytes (b, 1, 1, 'c');
  vr_close (a);
  vr_close (b);
  sync_names (e);
}

static void
test_directories (void **state)
{
  struct env *e = *state;
  struct vr_io *io = e->io;

  assert_int_equal (io->ops->mkdir (io, path_of (e, "no/d")), -ENOENT);
  assert_int_equal (io->ops->mkdir (io, path_of (e, "d")), 0);
  assert_int_equal (io->ops->mkdir (io, path_of (e, "d")), 0);
  assert_int_equal (io->ops->mkdir (io, path_of (e, "d/")), 0);
  assert_int_equal (open_error (e, "d", 0), -EISDIR);
  assert_int_equal (unlink_in (e, "d"), -EISDIR);
  vr_close (open_file (e, "d/a", VR_OPEN_CREATE));
  assert_int_equal (io->ops->mkdir (io, path_of (e, "d/a")), -EEXIST);
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "d")), 0);
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "no")), -ENOENT);
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "d/a")), -ENOTDIR);
  assert_int_equal (open_error (e, "d//a", 0), 0);
}

static void
test_lock (void **state)
{
  struct env *e = *state;
  struct vr_file *a = open_file (e, "a", VR_OPEN_CREATE);
  struct vr_file *b = open_file (e, "a", 0);
  struct vr_file *c = open_file (e, "a", VR_OPEN_READ_ONLY);
  struct vr_lock_owner owner = {-1};

  assert_int_equal (c->io->ops->lock (c, &owner), -EBADF);
  assert_int_equal (a->io->ops->lock (a, &owner), 0);
  assert_int_equal (a->io->ops->lock (a, &owner), 0);
  assert_int_equal (b->io->ops->lock (b, &owner), -EAGAIN);
  assert_true (owner.pid >= 0);
  vr_close (c); /* does not drop a's lock, as a POSIX lock would */
  assert_int_equal (b->io->ops->lock (b, &owner), -EAGAIN);
  vr_close (a);
  assert_int_equal (b->io->ops->lock (b, &owner), 0);
  vr_close (b);
}

static void
test_sync_and_hints (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

  fill (f, 0, MIB, 5);
  f->io->ops->start_writeback (f, 0, MIB);
  assert_int_equal (f->io->ops->prefetch (f, 0, MIB), 0);
  sync_file (f);
  sync_file (f);
  sync_names (e);
  assert_bytes (f, 0, MIB, 5);
  vr_close (f);
}

static void
test_clock_and_random (void **state)
{
  struct env *e = *state;
  const uint64_t now = vr_now_ns (e->io);
  uint8_t a[500] = {0}, b[500] = {0};

  assert_true (vr_now_ns (e->io) >= now);
  assert_true (e->io->ops->realtime_ns (e->io) / 1000000000 > 1600000000);
  assert_int_equal (e->io->ops->random (e->io, a, sizeof a), 0);
  assert_int_equal (e->io->ops->random (e->io, b, sizeof b), 0);
  assert_memory_not_equal (a, b, sizeof a);
}

/* Do one random operation to the file and to its picture in memory. */
static void
random_step (struct vr_file *f, uint8_t *picture, uint64_t *size,
             uint64_t limit, uint64_t *rng)
{
  const uint64_t offset = next_random (rng) % limit;
  const uint64_t room = limit - offset;
  const size_t n = (size_t)(next_random (rng) % (room < 9000 ? room : 9000));
  const uint64_t what = next_random (rng) % 8;

  if (what < 5) {
    const bool zero = what < 2;

    memset (picture + offset, zero ? 0 : (int)*rng, n);
    if (zero)
      assert_int_equal (f->io->ops->zero (f, offset, n, what == 0), 0);
    else
      assert_int_equal (vr_write (f, picture + offset, n, offset), 0);
    if (n > 0 && offset + n > *size)
      *size = offset + n;
  }
  else if (what == 5 && offset % 4 == 0) {
    assert_int_equal (f->io->ops->truncate (f, offset), 0);
    memset (picture + offset, 0, room);
    *size = offset;
  }
  else if (what == 6)
    sync_file (f);
}

static void
test_random_steps (void **state)
{
  enum { LIMIT = 300 * 1000 };
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  uint8_t *picture = calloc (1, LIMIT), *got = malloc (LIMIT);
  uint64_t size = 0, rng = 4711;

  for (int i = 0; i < 600; i++) {
    random_step (f, picture, &size, LIMIT, &rng);
    assert_int_equal (size_of (f), size);
    assert_int_equal (vr_read (f, got, size, 0), 0);
    assert_memory_equal (got, picture, size);
  }
  vr_close (f);
  free (picture);
  free (got);
}

struct worker {
  pthread_t thread;
  struct vr_file *f;
  uint64_t offset;
  int result;
};

static void *
write_batches (void *arg)
{
  enum { COUNT = 40, ROUNDS = 20 };
  struct worker *me = arg;
  struct iovec iov;
  struct vr_io_write w[COUNT];

  if (posix_memalign (&iov.iov_base, BLOCK, BLOCK) != 0)
    return NULL;
  memset (iov.iov_base, (int)(me->offset / MIB) + 1, BLOCK);
  iov.iov_len = BLOCK;
  for (size_t i = 0; i < COUNT; i++)
    w[i] = (struct vr_io_write){&iov, 1, me->offset + i * BLOCK};
  me->result = 0;
  for (int i = 0; i < ROUNDS && me->result == 0; i++)
    me->result = me->f->io->ops->write_batch (me->f, w, COUNT);
  free (iov.iov_base);
  return NULL;
}

static void
test_threads (void **state)
{
  enum { THREADS = 12 }; /* more than the pool keeps rings */
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  struct worker worker[THREADS];

  for (size_t i = 0; i < THREADS; i++) {
    worker[i] = (struct worker){.f = f, .offset = i * MIB, .result = -1};
    assert_int_equal (
      pthread_create (&worker[i].thread, NULL, write_batches, &worker[i]), 0);
  }
  for (size_t i = 0; i < THREADS; i++) {
    pthread_join (worker[i].thread, NULL);
    assert_int_equal (worker[i].result, 0);
    assert_bytes (f, i * MIB, 40 * BLOCK, (uint8_t)(i + 1));
  }
  vr_close (f);
}

/* ---- The real one only ------------------------------------------------ */

static void
test_real_other_types (void **state)
{
  struct env *e = *state;
  struct sockaddr_un addr = {.sun_family = AF_UNIX};
  const int fd = socket (AF_UNIX, SOCK_STREAM, 0);
  struct vr_file *f;

  assert_int_equal (mkfifo (path_of (e, "fifo"), 0600), 0);
  assert_int_equal (open_error (e, "fifo", VR_OPEN_READ_ONLY), -EINVAL);
  assert_int_equal (open_error (e, "fifo", 0), -EINVAL);
  strcpy (addr.sun_path, path_of (e, "socket"));
  assert_int_equal (bind (fd, (struct sockaddr *)&addr, sizeof addr), 0);
  assert_int_equal (open_error (e, "socket", 0), -EINVAL);
  close (fd);
  assert_int_equal (e->io->ops->open (e->io, "/dev/null", 0, &f), -EINVAL);
}

static void
test_real_lock_owner (void **state)
{
  struct env *e = *state;
  struct vr_file *a = open_file (e, "a", VR_OPEN_CREATE);
  struct vr_file *b = NULL;
  struct vr_lock_owner owner = {-1};
  int to_child[2];
  pid_t child;

  assert_int_equal (a->io->ops->lock (a, &owner), 0);
  b = open_file (e, "a", 0);
  assert_int_equal (b->io->ops->lock (b, &owner), -EAGAIN);
  assert_int_equal (owner.pid, getpid ());

  /* A child inherits the lock and holds it on. */
  assert_int_equal (pipe (to_child), 0);
  child = fork ();
  if (child == 0) {
    char c;
    int r;

    vr_close (b);
    close (to_child[1]);
    r = read (to_child[0], &c, 1) == 0 ? 0 : 1;
    vr_close (a);
    _exit (r);
  }
  vr_close (a);
  assert_int_equal (b->io->ops->lock (b, &owner), -EAGAIN);
  assert_int_equal (owner.pid, child);
  close (to_child[0]);
  close (to_child[1]);
  assert_int_equal (waitpid (child, NULL, 0), child);
  assert_int_equal (b->io->ops->lock (b, &owner), 0);
  vr_close (b);
}

/* A classic POSIX lock, as another program may hold, conflicts too. */
static void
test_real_posix_lock_owner (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  const int fd = open (path_of (e, "a"), O_RDWR);
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  struct vr_lock_owner owner = {-1};

  assert_int_equal (fcntl (fd, F_SETLK, &lock), 0);
  assert_int_equal (f->io->ops->lock (f, &owner), -EAGAIN);
  assert_int_equal (owner.pid, getpid ());
  close (fd);
  vr_close (f);
}

/* tmpfs: no direct I/O on older kernels, and no ZERO_RANGE. */
static void
test_real_tmpfs (void **state)
{
  struct env *e = *state;
  struct env shm = {.io = e->io, .dir = "/dev/shm/vmrep-io-XXXXXX"};
  struct vr_file *f;

  if (mkdtemp (shm.dir) == NULL) {
    print_message ("no /dev/shm: skipped\n");
    skip ();
  }
  f = open_file (&shm, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  assert_int_equal (unlink_in (&shm, "a"), 0);
  assert_int_equal (rmdir (shm.dir), 0);
  check_batch (f, 0);
  assert_int_equal (f->io->ops->zero (f, BLOCK, 20 * BLOCK, false), 0);
  assert_bytes (f, BLOCK, 20 * BLOCK, 0);
  assert_int_equal (f->io->ops->zero (f, 0, 30 * BLOCK, true), 0);
  assert_bytes (f, 0, 30 * BLOCK, 0);
  sync_file (f);
  vr_close (f);
}

/* Rings made before a fork are not used after it. */
static void
test_real_fork (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  struct vr_file *b = open_file (e, "b", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  int status = -1;
  pid_t child;

  check_batch (f, 0);
  child = fork ();
  if (child == 0) {
    struct worker me = {.f = f, .offset = 0, .result = -1};

    for (int i = 0; i < 10; i++)
      write_batches (&me);
    vr_close (f);
    vr_close (b);
    _exit (me.result != 0);
  }
  check_batch (b, 1);
  vr_close (b);
  assert_int_equal (waitpid (child, &status, 0), child);
  assert_int_equal (status, 0);
  assert_bytes (f, 0, 40 * BLOCK, 1);
  vr_close (f);
}

static void
test_real_batch_error (void **state)
{
  enum { COUNT = 200 };
  struct env *e = *state;
  struct iovec iov = {new_buffer (BLOCK, 1), BLOCK};
  struct vr_io_write w[COUNT];
  struct vr_file *f;

  vr_close (open_file (e, "a", VR_OPEN_CREATE));
  f = open_file (e, "a", VR_OPEN_READ_ONLY | VR_OPEN_DIRECT);
  for (size_t i = 0; i < COUNT; i++)
    w[i] = (struct vr_io_write){&iov, 1, i * BLOCK};
  assert_int_equal (f->io->ops->write_batch (f, w, COUNT), -EBADF);
  assert_int_equal (size_of (f), 0);
  vr_close (f);
  free (iov.iov_base);
}

/* Attach file to a free loop device; false if that is not to be had. */
static bool
attach_loop (const char *file, char *ret_device, int size)
{
  char command[PATH_MAX + 64];
  FILE *fp;
  bool ok;

  snprintf (command, sizeof command, "losetup -f --show %s 2>/dev/null", file);
  fp = popen (command, "r");
  if (fp == NULL)
    return false;
  ok = fgets (ret_device, size, fp) != NULL;
  ok = pclose (fp) == 0 && ok;
  if (ok)
    ret_device[strcspn (ret_device, "\n")] = '\0';
  return ok;
}

static void
check_device (struct vr_file *f)
{
  uint64_t start, end;

  assert_int_equal (size_of (f), 4 * MIB);
  check_batch (f, 3);
  fill (f, 0, MIB, 4);
  for (int may_deallocate = 0; may_deallocate < 2; may_deallocate++) {
    const uint64_t base = may_deallocate ? 512 * KIB : 0;

    assert_int_equal (f->io->ops->zero (f, base + 8192, 8192, may_deallocate),
                      0);
    assert_bytes (f, base, 8192, 4);
    assert_bytes (f, base + 8192, 8192, 0);
    assert_bytes (f, base + 16384, 8192, 4);
  }
  assert_int_equal (f->io->ops->zero (f, 4 * MIB, BLOCK, true), -ENOSPC);
  assert_int_equal (f->io->ops->next_data (f, 5, &start, &end), 0);
  assert_true (start == 5 && end == 4 * MIB);
  sync_file (f);
}

static void
check_device_edges (struct vr_file *f)
{
  for (int may_deallocate = 0; may_deallocate < 2; may_deallocate++) {
    fill (f, 0, 100 * KIB, 6);
    assert_int_equal (f->io->ops->zero (f, 5, 60, may_deallocate), 0);
    assert_int_equal (f->io->ops->zero (f, 10001, 50000, may_deallocate), 0);
    assert_bytes (f, 0, 5, 6);
    assert_bytes (f, 5, 60, 0);
    assert_bytes (f, 65, 10001 - 65, 6);
    assert_bytes (f, 10001, 50000, 0);
    assert_bytes (f, 60001, 100 * KIB - 60001, 6);
  }
}

static void
test_real_block_device (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  struct vr_file *direct = NULL, *buffered = NULL;
  char device[64], command[128];

  assert_int_equal (f->io->ops->truncate (f, 4 * MIB), 0);
  vr_close (f);
  if (!attach_loop (path_of (e, "a"), device, sizeof device)) {
    print_message ("no loop device to be had: skipped\n");
    skip ();
  }
  e->io->ops->open (e->io, device, VR_OPEN_DIRECT, &direct);
  e->io->ops->open (e->io, device, 0, &buffered);
  /* Takes effect at the last close, however the test ends. */
  snprintf (command, sizeof command, "losetup -d %s", device);
  assert_int_equal (system (command), 0);

  assert_non_null (direct);
  check_device (direct);
  vr_close (direct);
  assert_non_null (buffered);
  check_device_edges (buffered);
  vr_close (buffered);
}

/* ---- The simulated one only ------------------------------------------- */

static const struct vr_sim_crash LOSE_ALL = {.drop = 256};
static const struct vr_sim_crash KEEP_ALL = {.drop = 0};
static const struct vr_sim_crash SOME = {.drop = 100, .torn = true};

/* A file with a durable name, size and content. */
static struct vr_file *
durable_file (struct env *e, const char *name, size_t n, uint8_t byte)
{
  struct vr_file *f = open_file (e, name, VR_OPEN_CREATE);

  fill (f, 0, n, byte);
  sync_file (f);
  sync_names (e);
  return f;
}

static struct vr_file *
crash_and_reopen (struct env *e, struct vr_file *f, const char *name,
                  const struct vr_sim_crash *crash)
{
  vr_io_sim_crash (e->io, crash);
  vr_close (f);
  return open_file (e, name, 0);
}

/* How many of the sectors of f read as all `byte`, `byte2`, or else. */
static void
count_sectors (struct vr_file *f, uint8_t byte, uint8_t byte2,
               unsigned ret_count[3])
{
  uint8_t sector[512], want[512], want2[512];
  const uint64_t size = size_of (f);

  memset (want, byte, sizeof want);
  memset (want2, byte2, sizeof want2);
  memset (ret_count, 0, 3 * sizeof *ret_count);
  for (uint64_t at = 0; at < size; at += sizeof sector) {
    assert_int_equal (vr_read (f, sector, sizeof sector, at), 0);
    if (memcmp (sector, want, sizeof want) == 0)
      ret_count[0]++;
    else if (memcmp (sector, want2, sizeof want2) == 0)
      ret_count[1]++;
    else
      ret_count[2]++;
  }
}

static void
test_sim_dead_process (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 100, 1), *next;
  struct vr_lock_owner owner;
  uint64_t n;
  char c;

  assert_int_equal (f->io->ops->lock (f, &owner), 0);
  vr_io_sim_crash (e->io, &LOSE_ALL);
  assert_int_equal (vr_read (f, &c, 1, 0), -ESHUTDOWN);
  assert_int_equal (vr_write (f, "x", 1, 0), -ESHUTDOWN);
  assert_int_equal (vr_sync (f), -ESHUTDOWN);
  assert_int_equal (f->io->ops->size (f, &n), -ESHUTDOWN);
  sync_names (e);

  next = open_file (e, "a", 0);
  assert_int_equal (next->io->ops->lock (next, &owner), 0);
  vr_close (f);
  assert_bytes (next, 0, 100, 1);
  vr_close (next);
}

static void
test_sim_synced_bytes_stay (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", MIB, 1);

  fill (f, 0, MIB, 2);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_bytes (f, 0, MIB, 1);

  fill (f, 100, 1000, 2);
  sync_file (f);
  fill (f, 600, 1000, 3);
  assert_int_equal (f->io->ops->zero (f, 0, 50, true), 0);
  assert_int_equal (f->io->ops->zero (f, 256 * KIB, 64 * KIB, true), 0);
  assert_int_equal (f->io->ops->truncate (f, 512 * KIB), 0);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_int_equal (size_of (f), MIB);
  assert_bytes (f, 0, 100, 1);
  assert_bytes (f, 100, 1000, 2);
  assert_bytes (f, 1100, MIB - 1100, 1);

  /* Cut and grown again. */
  assert_int_equal (f->io->ops->truncate (f, 2000), 0);
  assert_int_equal (f->io->ops->truncate (f, MIB), 0);
  sync_file (f);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_bytes (f, 1100, 900, 1);
  assert_bytes (f, 2000, MIB - 2000, 0);
  vr_close (f);
}

static void
test_sim_kept_bytes (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 8000, 1);

  fill (f, 4000, 8000, 2);
  assert_int_equal (f->io->ops->truncate (f, 10000), 0);
  assert_int_equal (f->io->ops->zero (f, 0, 10, false), 0);
  f = crash_and_reopen (e, f, "a", &KEEP_ALL);
  assert_int_equal (size_of (f), 10000);
  assert_bytes (f, 0, 10, 0);
  assert_bytes (f, 10, 3990, 1);
  assert_bytes (f, 4000, 6000, 2);

  /* And they are durable now. */
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_bytes (f, 4000, 6000, 2);
  vr_close (f);
}

static void
test_sim_unsynced_bytes_mix (void **state)
{
  static const struct vr_sim_crash garble = {
    .drop = 80, .garbage = 80, .torn = true};
  static const struct vr_sim_crash whole = {.drop = 128};
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", MIB, 1);
  unsigned count[3];

  fill (f, 0, MIB, 2);
  f = crash_and_reopen (e, f, "a", &garble);
  count_sectors (f, 1, 2, count);
  assert_true (count[0] > 400 && count[1] > 400 && count[2] > 400);

  /* Not torn: all of a write or none of it. */
  fill (f, 0, MIB, 3);
  sync_file (f);
  for (uint64_t at = 0; at < MIB; at += 16 * KIB)
    fill (f, at, 16 * KIB, 4);
  f = crash_and_reopen (e, f, "a", &whole);
  for (uint64_t at = 0; at < MIB; at += 16 * KIB) {
    uint8_t first;

    assert_int_equal (vr_read (f, &first, 1, at), 0);
    assert_true (first == 3 || first == 4);
    assert_bytes (f, at, 16 * KIB, first);
  }
  count_sectors (f, 3, 4, count);
  assert_true (count[0] > 0 && count[1] > 0 && count[2] == 0);
  vr_close (f);
}

/* Of two writes to one sector the newer may be lost and the older kept, but
   garbage and tearing never touch bytes that nobody wrote. */
static void
test_sim_neighbours_are_safe (void **state)
{
  static const struct vr_sim_crash garble = {.garbage = 256, .torn = true};
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 5000, 1);

  fill (f, 300, 100, 2);
  f = crash_and_reopen (e, f, "a", &garble);
  assert_bytes (f, 0, 300, 1);
  assert_bytes (f, 400, 4600, 1);
  vr_close (f);
}

static void
test_sim_unsynced_size (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 1000, 1);
  bool grown = false, short_of = false;

  fill (f, 1000, 1000, 2);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_int_equal (size_of (f), 1000);

  for (int i = 0; i < 50; i++) {
    fill (f, 1000, 1000, 2);
    f = crash_and_reopen (e, f, "a", &SOME);
    grown |= size_of (f) == 2000;
    short_of |= size_of (f) == 1000;
    assert_bytes (f, 0, 1000, 1);
    /* What a lost size cut off does not come back. */
    if (size_of (f) == 1000) {
      assert_int_equal (f->io->ops->truncate (f, 3000), 0);
      assert_bytes (f, 1000, 2000, 0);
    }
    assert_int_equal (f->io->ops->truncate (f, 1000), 0);
    sync_file (f);
  }
  assert_true (grown && short_of);
  vr_close (f);
}

static void
test_sim_kill_keeps_cache (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

  fill (f, 0, 5000, 1);
  vr_io_sim_kill (e->io);
  assert_int_equal (vr_sync (f), -ESHUTDOWN);
  vr_close (f);
  f = open_file (e, "a", 0);
  assert_bytes (f, 0, 5000, 1);
  sync_names (e);

  /* Still not durable. */
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_int_equal (size_of (f), 0);
  vr_close (f);
}

static void
test_sim_names_need_sync_dir (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);

  fill (f, 0, 10, 1);
  sync_file (f);
  vr_io_sim_crash (e->io, &LOSE_ALL);
  vr_close (f);
  assert_int_equal (open_error (e, "a", 0), -ENOENT);

  vr_close (durable_file (e, "a", 10, 1));
  vr_close (durable_file (e, "b", 10, 2));
  assert_int_equal (rename_in (e, "a", "b"), 0);
  vr_io_sim_crash (e->io, &LOSE_ALL);
  assert_int_equal (open_error (e, "a", 0), 0);
  f = open_file (e, "b", 0);
  assert_bytes (f, 0, 10, 2);
  vr_close (f);

  assert_int_equal (unlink_in (e, "a"), 0);
  vr_io_sim_crash (e->io, &LOSE_ALL);
  assert_int_equal (open_error (e, "a", 0), 0);

  assert_int_equal (rename_in (e, "a", "b"), 0);
  sync_names (e);
  vr_io_sim_crash (e->io, &LOSE_ALL);
  assert_int_equal (open_error (e, "a", 0), -ENOENT);
  f = open_file (e, "b", 0);
  assert_bytes (f, 0, 10, 1);
  vr_close (f);
}

/* Create, write, sync, rename over: the reader finds old or new, and both
   happen. */
static void
test_sim_replace_is_atomic (void **state)
{
  struct env *e = *state;
  unsigned seen[2] = {0, 0};

  vr_close (durable_file (e, "a", 10, 0));
  for (int i = 0; i < 60; i++) {
    struct vr_file *f;
    uint8_t byte, old;

    f = open_file (e, "a", 0);
    assert_int_equal (vr_read (f, &old, 1, 0), 0);
    vr_close (f);
    unlink_in (e, "a.new");
    f = open_file (e, "a.new", VR_OPEN_CREATE);
    fill (f, 0, 10, (uint8_t)(old + 1));
    sync_file (f);
    assert_int_equal (rename_in (e, "a.new", "a"), 0);
    f = crash_and_reopen (e, f, "a", &SOME);
    assert_int_equal (vr_read (f, &byte, 1, 0), 0);
    assert_true (byte == old || byte == (uint8_t)(old + 1));
    seen[byte != old]++;
    vr_close (f);
  }
  assert_true (seen[0] > 5 && seen[1] > 5);
}

static void
test_sim_directory_lost (void **state)
{
  struct env *e = *state;
  struct vr_io *io = e->io;

  assert_int_equal (io->ops->mkdir (io, path_of (e, "d")), 0);
  vr_close (open_file (e, "d/a", VR_OPEN_CREATE));
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "d")), 0);
  vr_io_sim_crash (io, &LOSE_ALL);
  assert_int_equal (open_error (e, "d/a", 0), -ENOENT);
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "d")), -ENOENT);

  assert_int_equal (io->ops->mkdir (io, path_of (e, "d")), 0);
  sync_names (e);
  vr_close (open_file (e, "d/a", VR_OPEN_CREATE));
  assert_int_equal (io->ops->sync_dir (io, path_of (e, "d")), 0);
  vr_io_sim_crash (io, &LOSE_ALL);
  assert_int_equal (open_error (e, "d/a", 0), 0);
}

/* A failed sync loses the bytes although a second one says it worked. */
static void
test_sim_failed_sync (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", MIB, 1);
  unsigned count[3];

  fill (f, 0, MIB, 2);
  vr_io_sim_fail (e->io, VR_SIM_SYNC, 1, -EIO, false);
  assert_int_equal (vr_sync (f), -EIO);
  count_sectors (f, 1, 2, count);
  assert_true (count[0] > 0 && count[1] > 0 && count[2] == 0);
  sync_file (f);
  f = crash_and_reopen (e, f, "a", &KEEP_ALL);
  assert_bytes (f, 0, MIB, 1);

  /* Later writes are as good as ever, and carry the size. */
  fill (f, MIB, 1000, 3);
  vr_io_sim_fail (e->io, VR_SIM_SYNC, 1, -EIO, false);
  assert_int_equal (vr_sync (f), -EIO);
  fill (f, 0, MIB, 3);
  sync_file (f);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_int_equal (size_of (f), MIB + 1000);
  assert_bytes (f, 0, MIB, 3);
  assert_bytes (f, MIB, 1000, 0);
  vr_close (f);
}

static void
test_sim_nth_call_fails (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 100, 1);
  char c;

  vr_io_sim_fail (e->io, VR_SIM_READ, 3, -EIO, false);
  assert_int_equal (vr_read (f, &c, 1, 0), 0);
  assert_int_equal (vr_write (f, "x", 1, 0), 0);
  assert_int_equal (vr_read (f, &c, 1, 0), 0);
  assert_int_equal (vr_read (f, &c, 1, 0), -EIO);
  assert_int_equal (vr_read (f, &c, 1, 0), 0);

  vr_io_sim_fail (e->io, VR_SIM_NAME | VR_SIM_OPEN, 2, -ENOSPC, true);
  assert_int_equal (rename_in (e, "a", "b"), 0);
  assert_int_equal (rename_in (e, "b", "c"), -ENOSPC);
  assert_int_equal (open_error (e, "b", 0), -ENOSPC);
  assert_int_equal (f->io->ops->truncate (f, 0), -ENOSPC);
  assert_int_equal (vr_read (f, &c, 1, 0), 0);
  vr_io_sim_fail (e->io, 0, 0, 0, false);
  assert_int_equal (open_error (e, "b", 0), 0);
  vr_close (f);
}

/* Whatever a failed write leaves lies within its range. */
static void
test_sim_failed_write (void **state)
{
  struct env *e = *state;
  bool partial = false;

  for (int i = 0; i < 20; i++) {
    struct vr_file *f = durable_file (e, "a", 8192, 1);
    uint8_t buf[4096], got[4096];

    memset (buf, 2, sizeof buf);
    vr_io_sim_fail (e->io, VR_SIM_WRITE, 1, -EIO, false);
    assert_int_equal (vr_write (f, buf, sizeof buf, 1000), -EIO);
    assert_bytes (f, 0, 1000, 1);
    assert_bytes (f, 5096, 3096, 1);
    assert_int_equal (vr_read (f, got, sizeof got, 1000), 0);
    for (size_t j = 0; j < sizeof got; j++)
      assert_true (got[j] == 1 || got[j] == 2);
    partial |= got[0] == 2 && got[4095] == 1;
    vr_close (f);
    assert_int_equal (unlink_in (e, "a"), 0);
  }
  assert_true (partial);
}

static void
test_sim_die_at (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 100, 1);
  const uint64_t step = vr_io_sim_steps (e->io);
  uint64_t size;

  vr_io_sim_die_at (e->io, step + 2);
  fill (f, 0, 10, 2);
  assert_int_equal (vr_io_sim_steps (e->io), step + 1);
  assert_int_equal (f->io->ops->size (f, &size), 0);
  assert_int_equal (vr_write (f, "x", 1, 0), -ESHUTDOWN);
  assert_int_equal (vr_sync (f), -ESHUTDOWN);
  assert_int_equal (f->io->ops->size (f, &size), -ESHUTDOWN);
  assert_int_equal (open_error (e, "a", 0), -ESHUTDOWN);
  assert_int_equal (vr_io_sim_steps (e->io), step + 1);

  f = crash_and_reopen (e, f, "a", &KEEP_ALL);
  assert_bytes (f, 0, 10, 2);
  assert_bytes (f, 10, 90, 1);
  sync_file (f);
  vr_io_sim_die_at (e->io, 1); /* long past */
  assert_int_equal (vr_sync (f), -ESHUTDOWN);
  vr_io_sim_die_at (e->io, 0);
  sync_file (f);
  vr_close (f);
}

static void
test_sim_space (void **state)
{
  struct env *e = *state;
  struct vr_file *a = open_file (e, "a", VR_OPEN_CREATE);
  struct vr_file *b = open_file (e, "b", VR_OPEN_CREATE);

  vr_io_sim_set_space (e->io, 10000);
  fill (a, 0, 6000, 1);
  assert_int_equal (b->io->ops->truncate (b, 4001), -ENOSPC);
  assert_int_equal (size_of (b), 0);
  fill (b, 0, 4000, 1);
  assert_int_equal (vr_write (b, "x", 1, 4000), -ENOSPC);
  assert_int_equal (b->io->ops->zero (b, 4000, 1, true), -ENOSPC);
  fill (b, 0, 4000, 2); /* not growing */

  assert_int_equal (unlink_in (e, "a"), 0);
  assert_int_equal (vr_write (b, "x", 1, 4000), -ENOSPC); /* still open */
  vr_close (a);
  assert_int_equal (vr_write (b, "x", 1, 4000), 0);
  vr_io_sim_set_space (e->io, 0);
  assert_int_equal (b->io->ops->truncate (b, MIB), 0);
  vr_close (b);
}

static void
test_sim_direct_alignment (void **state)
{
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE | VR_OPEN_DIRECT);
  uint8_t *buf = new_buffer (3 * BLOCK, 1);

  assert_int_equal (vr_write (f, buf, 2 * BLOCK, 0), 0);
  assert_int_equal (vr_write (f, buf + 512, BLOCK, 0), -EINVAL);
  assert_int_equal (vr_write (f, buf, BLOCK, 512), -EINVAL);
  assert_int_equal (vr_write (f, buf, 512, 0), -EINVAL);
  assert_int_equal (vr_read (f, buf + 512, BLOCK, 0), -EINVAL);
  assert_int_equal (vr_read (f, buf, BLOCK, 512), -EINVAL);
  assert_int_equal (vr_read (f, buf, 512, 0), -EINVAL);
  assert_int_equal (f->io->ops->zero (f, 512, BLOCK, true), -EINVAL);
  vr_close (f);
  free (buf);
}

static void
test_sim_flip (void **state)
{
  struct env *e = *state;
  struct vr_file *f = durable_file (e, "a", 1000, 1);

  assert_int_equal (vr_io_sim_flip (e->io, path_of (e, "a"), 500, 0x82), 0);
  assert_bytes (f, 500, 1, 0x83);
  assert_bytes (f, 0, 500, 1);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_bytes (f, 500, 1, 0x83);
  assert_int_equal (vr_io_sim_flip (e->io, path_of (e, "a"), 1000, 1),
                    -EINVAL);
  assert_int_equal (vr_io_sim_flip (e->io, path_of (e, "b"), 0, 1), -ENOENT);

  /* An unsynced write does not heal it. */
  fill (f, 0, 1000, 4);
  assert_int_equal (vr_io_sim_flip (e->io, path_of (e, "a"), 7, 1), 0);
  sync_file (f);
  assert_bytes (f, 7, 1, 5);
  f = crash_and_reopen (e, f, "a", &LOSE_ALL);
  assert_bytes (f, 7, 1, 5);
  vr_close (f);
}

static void
test_sim_clock (void **state)
{
  struct env *e = *state;
  const uint64_t realtime = e->io->ops->realtime_ns (e->io);

  assert_int_equal (vr_now_ns (e->io), 1000000000);
  vr_io_sim_sleep (e->io, 25);
  assert_int_equal (vr_now_ns (e->io), 1000000025);
  assert_int_equal (e->io->ops->realtime_ns (e->io), realtime + 25);
}

/* A sparse terabyte costs nothing, and zeroing it no time. */
static void
test_sim_sparse (void **state)
{
  const uint64_t tib = UINT64_C (1) << 40;
  struct env *e = *state;
  struct vr_file *f = open_file (e, "a", VR_OPEN_CREATE);
  uint64_t start, end;

  sync_names (e);
  assert_int_equal (f->io->ops->truncate (f, 2 * tib), 0);
  fill (f, tib, 10, 1);
  assert_int_equal (f->io->ops->zero (f, 5, tib, true), 0);
  assert_bytes (f, tib, 5, 0);
  assert_bytes (f, tib + 5, 5, 1);
  sync_file (f);
  assert_int_equal (f->io->ops->next_data (f, 0, &start, &end), 0);
  assert_true (start == tib && end == tib + BLOCK);
  f = crash_and_reopen (e, f, "a", &SOME);
  assert_int_equal (size_of (f), 2 * tib);
  assert_bytes (f, tib + 5, 5, 1);
  assert_int_equal (vr_write (f, "x", 1, 16 * tib), -EFBIG);
  vr_close (f);
}

/* One run of everything that draws on the seed, ending in a fingerprint. */
static void
run_from_seed (uint64_t seed, uint8_t *ret_bytes, size_t n)
{
  static const struct vr_sim_crash crash = {
    .drop = 60, .garbage = 60, .torn = true};
  struct env e = {.io = vr_io_sim_new (seed), .dir = "."};
  struct vr_file *f = durable_file (&e, "a", n, 1);
  uint64_t size = n, rng = 42;
  uint8_t *scratch = calloc (1, n);

  for (int i = 0; i < 200; i++) {
    random_step (f, scratch, &size, n, &rng);
    if (i % 50 == 7) {
      vr_io_sim_fail (e.io, VR_SIM_SYNC | VR_SIM_WRITE, 1, -EIO, false);
      assert_int_equal (vr_write (f, scratch, 3000, 0), -EIO);
      vr_io_sim_fail (e.io, VR_SIM_SYNC, 1, -EIO, false);
      assert_int_equal (vr_sync (f), -EIO);
      assert_int_equal (f->io->ops->truncate (f, size), 0);
    }
    if (i % 40 == 39)
      f = crash_and_reopen (&e, f, "a", &crash);
  }
  assert_int_equal (e.io->ops->random (e.io, ret_bytes, 100), 0);
  assert_int_equal (f->io->ops->truncate (f, n), 0);
  assert_int_equal (vr_read (f, ret_bytes + 100, n - 100, 0), 0);
  vr_close (f);
  vr_io_sim_free (e.io);
  free (scratch);
}

static void
test_sim_determinism (void **state)
{
  enum { N = 100 * 1000 };
  uint8_t *a = malloc (N), *b = malloc (N);

  (void)state;
  run_from_seed (1, a, N);
  run_from_seed (1, b, N);
  assert_memory_equal (a, b, N);
  run_from_seed (2, b, N);
  assert_memory_not_equal (a + 100, b + 100, N - 100);
  free (a);
  free (b);
}

/* ---- Set-up ----------------------------------------------------------- */

static int
setup_real (void **state)
{
  const char *tmp = getenv ("TMPDIR");
  struct env *e = calloc (1, sizeof *e);

  if (e == NULL)
    return -1;
  *state = e;
  e->io = vr_io_real ();
  if (snprintf (e->dir, sizeof e->dir, "%s/vmrep-io-XXXXXX",
                tmp ? tmp : "/tmp") >= (int)sizeof e->dir)
    return -1;
  return mkdtemp (e->dir) == NULL ? -1 : 0;
}

static int
teardown_real (void **state)
{
  struct env *e = *state;
  char command[128];
  int r;

  snprintf (command, sizeof command, "rm -rf '%s'", e->dir);
  r = system (command);
  free (e);
  return r;
}

static int
setup_sim (void **state)
{
  struct env *e = calloc (1, sizeof *e);

  if (e == NULL)
    return -1;
  *state = e;
  strcpy (e->dir, ".");
  e->io = vr_io_sim_new (20240229);
  return e->io == NULL ? -1 : 0;
}

static int
teardown_sim (void **state)
{
  struct env *e = *state;

  vr_io_sim_free (e->io);
  free (e);
  return 0;
}

#define ON_REAL(test)                                                         \
  cmocka_unit_test_setup_teardown (test, setup_real, teardown_real)
#define ON_SIM(test)                                                          \
  cmocka_unit_test_setup_teardown (test, setup_sim, teardown_sim)

/* The cases both implementations must pass. */
#define COMMON(on)                                                            \
  on (test_open), on (test_read_write), on (test_long_vector),                \
    on (test_batch), on (test_batch_direct), on (test_direct),                \
    on (test_zero), on (test_truncate), on (test_next_data), on (test_names), \
    on (test_directories), on (test_lock), on (test_sync_and_hints),          \
    on (test_clock_and_random), on (test_random_steps), on (test_threads)

int
main (void)
{
  const struct CMUnitTest real_tests[] = {
    COMMON (ON_REAL),
    ON_REAL (test_real_other_types),
    ON_REAL (test_real_lock_owner),
    ON_REAL (test_real_posix_lock_owner),
    ON_REAL (test_real_tmpfs),
    ON_REAL (test_real_fork),
    ON_REAL (test_real_batch_error),
    ON_REAL (test_real_block_device),
  };
  const struct CMUnitTest sim_tests[] = {
    COMMON (ON_SIM),
    ON_SIM (test_sim_dead_process),
    ON_SIM (test_sim_synced_bytes_stay),
    ON_SIM (test_sim_kept_bytes),
    ON_SIM (test_sim_unsynced_bytes_mix),
    ON_SIM (test_sim_neighbours_are_safe),
    ON_SIM (test_sim_unsynced_size),
    ON_SIM (test_sim_kill_keeps_cache),
    ON_SIM (test_sim_names_need_sync_dir),
    ON_SIM (test_sim_replace_is_atomic),
    ON_SIM (test_sim_directory_lost),
    ON_SIM (test_sim_failed_sync),
    ON_SIM (test_sim_nth_call_fails),
    ON_SIM (test_sim_failed_write),
    ON_SIM (test_sim_die_at),
    ON_SIM (test_sim_space),
    ON_SIM (test_sim_direct_alignment),
    ON_SIM (test_sim_flip),
    ON_SIM (test_sim_clock),
    ON_SIM (test_sim_sparse),
    ON_SIM (test_sim_determinism),
  };
  const int failed_real =
    cmocka_run_group_tests_name ("real", real_tests, NULL, NULL);
  const int failed_sim =
    cmocka_run_group_tests_name ("sim", sim_tests, NULL, NULL);

  return failed_real + failed_sim > 0;
}
