/* SPDX-License-Identifier: BSD-3-Clause */
/* journal/disk.h and image.h: a disk against an array of bytes. */
#include "util.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include <xxhash.h>

#include "journal/disk.h"

struct rig {
  struct env *e;
  uint64_t rng;
  uint64_t size;
  struct vr_epoch *epoch;
  struct vr_disk *d;
  uint8_t *model;
  uint64_t segment_size, segment_count;
};

static bool
give_up (void *opaque)
{
  (void) opaque;
  return false;
}

static int
try_open (struct rig *r, char message[512])
{
  struct vr_disk_config c = { .vm = "vm", .disk = "d", .cache_segments = 3,
                              .direct = true };
  int err;

  c.image = in_dir (r->e, "image");
  c.journal = in_dir (r->e, "journal");
  err = vr_disk_open (r->e->io, &c, &r->d, message, 512);
  if (err < 0)
    r->d = NULL;
  return err;
}

static void
open_disk (struct rig *r)
{
  char message[512];

  if (try_open (r, message) < 0)
    fail_msg ("%s", message);
  assert_int_equal (r->d->size, r->size);
  r->d->keep_waiting = give_up;
  assert_int_equal (vr_disk_start (r->d, r->epoch), 0);
}

/* An image with something in it, a journal, the disk open. */
static struct rig
new_rig (struct env *e, uint64_t seed, uint64_t size, uint64_t segment_size,
         uint64_t segment_count)
{
  struct vr_log_config c = small_config (size, segment_size, segment_count);
  struct rig r = { .e = e, .rng = seeded (seed), .size = size,
                   .model = malloc (size), .segment_size = segment_size,
                   .segment_count = segment_count };
  const uint8_t id[16] = { 1, 2, 3 };

  fill_random (&r.rng, r.model, size);
  write_file (e->io, in_dir (e, "image"), r.model, size);
  e->io->ops->unlink (e->io, in_dir (e, "journal"));
  assert_int_equal (vr_log_create (e->io, in_dir (e, "journal"), &c), 0);
  assert_int_equal (vr_epoch_new_private ("vm", id, 1, &r.epoch), 0);
  open_disk (&r);
  return r;
}

static void
end_rig (struct rig *r)
{
  vr_disk_close (r->d);
  vr_epoch_close (r->epoch);
  free (r->model);
}

/* ---- What a disk does --------------------------------------------------- */

static void
cut (struct rig *r)
{
  vr_epoch_cut (r->epoch, vr_epoch_current (r->epoch), 0);
}

static void
seal_and_commit (struct rig *r)
{
  struct vr_seal s;
  uint64_t lsn;

  cut (r);
  if (vr_log_seal (r->d->log, &lsn) == 0 && lsn)
    assert_int_equal (vr_log_sync (r->d->log, lsn), 0);
  if (vr_log_last_durable_seal (r->d->log, &s))
    assert_int_equal (vr_log_commit (r->d->log, s.epoch), 0);
}

static uint64_t
apply (struct rig *r, uint64_t max)
{
  uint64_t n;

  assert_int_equal (vr_image_apply (&r->d->img, max, &n), 0);
  return n;
}

static void
apply_all (struct rig *r)
{
  while (apply (r, 0) > 0)
    ;
  assert_int_equal (vr_image_checkpoint (&r->d->img), 0);
}

static void
write_range (struct rig *r, uint64_t offset, uint64_t n)
{
  uint8_t *p = malloc (n + 1);
  int err;

  fill_random (&r->rng, p, n);
  err = vr_disk_write (r->d, p, n, offset);
  if (err == -ESHUTDOWN) { /* full */
    seal_and_commit (r);
    apply_all (r);
    err = vr_disk_write (r->d, p, n, offset);
  }
  assert_int_equal (err, 0);
  memcpy (r->model + offset, p, n);
  free (p);
}

static void
zero_range (struct rig *r, uint64_t offset, uint64_t n, bool may_trim)
{
  int err = vr_disk_zero (r->d, n, offset, may_trim);

  if (err == -ESHUTDOWN) {
    seal_and_commit (r);
    apply_all (r);
    err = vr_disk_zero (r->d, n, offset, may_trim);
  }
  assert_int_equal (err, 0);
  memset (r->model + offset, 0, n);
}

static void
check_range (struct rig *r, uint64_t offset, uint64_t n)
{
  uint8_t *got = malloc (n + 1);

  assert_int_equal (vr_disk_read (r->d, got, n, offset), 0);
  assert_memory_equal (got, r->model + offset, n);
  free (got);
}

static void
check_all (struct rig *r)
{
  check_range (r, 0, r->size);
}

/* Zero is zero, and data is not all zeros where it says so. */
static void
check_extents (struct rig *r)
{
  uint64_t at = 0;

  while (at < r->size) {
    uint64_t n = 0;
    bool zero;

    assert_int_equal (vr_disk_extent (r->d, at, r->size, &n, &zero), 0);
    assert_true (n > 0 && n <= r->size - at);
    for (uint64_t i = 0; zero && i < n; i++)
      assert_int_equal (r->model[at + i], 0);
    at += n;
  }
}

static void
check_image (struct rig *r)
{
  uint64_t size;
  uint8_t *got = read_file (r->e->io, in_dir (r->e, "image"), &size);

  assert_int_equal (size, r->size);
  assert_memory_equal (got, r->model, size);
  free (got);
}

/* ---- Model -------------------------------------------------------------- */

static void
random_step (struct rig *r)
{
  const uint64_t offset = below (&r->rng, r->size);
  const uint64_t longest = (r->segment_count - 3) * r->segment_size / 2;
  uint64_t n = 1 + below (&r->rng, chance (&r->rng, 70) ? 700 : longest);

  n = n < r->size - offset ? n : r->size - offset;
  switch (below (&r->rng, 12)) {
  case 0:
    zero_range (r, offset, n, false);
    break;
  case 1:
    zero_range (r, offset, n, true);
    break;
  case 2: case 3: case 4:
    check_range (r, offset, n);
    break;
  case 5:
    seal_and_commit (r);
    break;
  case 6:
    apply (r, 1 + below (&r->rng, 20000));
    break;
  case 7:
    assert_int_equal (vr_image_checkpoint (&r->d->img), 0);
    break;
  default:
    write_range (r, offset, n);
  }
}

static void
test_model (void **state)
{
  struct env *e = *state;

  for (unsigned seed = 0; seed < (e->sim ? 40 : 4); seed++) {
    struct rig r = new_rig (e, seed, 60001 + 4096 * (seed % 7) + seed,
                            UINT64_C (8192) << seed % 4, 5 + seed % 6);

    for (int i = 0; i < 400; i++) {
      random_step (&r);
      if (i % 50 == 49)
        check_all (&r);
      if (chance (&r.rng, 2)) { /* restart in order */
        assert_int_equal (vr_disk_sync (r.d), 0);
        vr_disk_close (r.d);
        open_disk (&r);
        check_all (&r);
      }
    }
    check_extents (&r);
    seal_and_commit (&r);
    apply_all (&r);
    check_image (&r);
    check_all (&r);
    end_rig (&r);
  }
}

static void
test_edges (void **state)
{
  struct rig r = new_rig (*state, 1, 12345, 8192, 6);

  write_range (&r, 0, 0);
  check_range (&r, 5, 0);
  write_range (&r, 12344, 1);
  write_range (&r, 0, 1);
  zero_range (&r, 12300, 45, true);
  zero_range (&r, 1, 1, false);
  write_range (&r, 0, 12345);
  check_all (&r);
  zero_range (&r, 0, 12345, true);
  check_all (&r);
  seal_and_commit (&r);
  apply_all (&r);
  check_image (&r);
  end_rig (&r);
}

/* A write the journal has no room for: waits while it may, then gives up,
   and what was there before is still the disk. */
static unsigned asked;

static bool
ask_three_times (void *opaque)
{
  (void) opaque;
  return ++asked < 3;
}

static void
test_full (void **state)
{
  struct rig r = new_rig (*state, 2, 100000, 8192, 4);
  uint8_t byte = 1;
  int err = 0;

  for (uint64_t i = 0; err == 0; i++) {
    assert_true (i < 1000);
    err = vr_disk_write (r.d, &byte, 1, i);
    if (err == 0)
      r.model[i] = 1;
  }
  assert_int_equal (err, -ESHUTDOWN);
  r.d->keep_waiting = ask_three_times;
  asked = 0;
  assert_int_equal (vr_disk_zero (r.d, 10, 0, false), -ESHUTDOWN);
  assert_int_equal (asked, 3);
  check_all (&r);
  /* A seal still goes in, and empties it. */
  seal_and_commit (&r);
  apply_all (&r);
  check_image (&r);
  write_range (&r, 0, 5000);
  end_rig (&r);
}

/* ---- Opening ------------------------------------------------------------ */

static void
test_open_messages (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 3, 50000, 8192, 6), other = r;
  struct vr_disk_config c = { .image = in_dir (e, "image"), .vm = "vm",
                              .journal = in_dir (e, "journal"),
                              .disk = "other", .cache_segments = 2 };
  struct vr_disk *d;
  char message[512];
  struct vr_file *f;

  assert_int_equal (try_open (&other, message), -EAGAIN);
  assert_non_null (strstr (message, "locked"));
  vr_disk_close (r.d);
  r.d = NULL;
  assert_int_equal (vr_disk_open (e->io, &c, &d, message, 512), -EXDEV);
  assert_non_null (strstr (message, "belongs to disk d of VM vm"));
  c.disk = "d";
  c.vm = "other";
  assert_int_equal (vr_disk_open (e->io, &c, &d, message, 512), -EXDEV);
  c.image = in_dir (e, "none");
  assert_int_equal (vr_disk_open (e->io, &c, &d, message, 512), -ENOENT);
  assert_non_null (strstr (message, "none"));
  assert_int_equal (e->io->ops->open (e->io, in_dir (e, "image"), 0, &f), 0);
  assert_int_equal (f->io->ops->truncate (f, 50001), 0);
  assert_int_equal (try_open (&other, message), -EXDEV);
  assert_non_null (strstr (message, "50001"));
  assert_int_equal (f->io->ops->truncate (f, 0), 0);
  assert_int_equal (try_open (&other, message), -EINVAL);
  assert_int_equal (f->io->ops->truncate (f, 50000), 0);
  vr_close (f);
  e->io->ops->unlink (e->io, in_dir (e, "journal"));
  assert_int_equal (try_open (&other, message), -ENOENT);
  assert_string_equal (message, "");
  end_rig (&r);
}

/* Created on demand, of the least size allowed. */
static void
test_create_on_open (void **state)
{
  struct env *e = *state;
  struct vr_disk_config c = { .image = in_dir (e, "image"), .vm = "vm",
                              .journal = in_dir (e, "journal"), .disk = "d",
                              .vm_id = { 7 }, .create = true,
                              .journal_size = VR_JOURNAL_MIN - 1,
                              .cache_segments = 2 };
  struct vr_log_info info;
  struct vr_disk *d;
  char message[512];

  write_file (e->io, c.image, "abc", 3);
  assert_int_equal (vr_disk_open (e->io, &c, &d, message, 512), -EINVAL);
  assert_non_null (strstr (message, "journal-size"));
  c.journal_size++;
  assert_int_equal (vr_disk_open (e->io, &c, &d, message, 512), 0);
  vr_log_info (d->log, &info);
  assert_int_equal (info.super.disk_size, 3);
  assert_int_equal (info.super.vm_id[0], 7);
  vr_disk_close (d);
}

/* ---- Views -------------------------------------------------------------- */

static void
check_view (struct vr_view *v, const uint8_t *want, uint64_t size)
{
  uint8_t *got = malloc (size), hash[VR_HASH_SIZE];
  uint64_t chunks = (size + VR_HASH_CHUNK - 1) / VR_HASH_CHUNK;

  assert_int_equal (vr_view_ready (v), 0);
  assert_int_equal (vr_view_read (v, got, size, 0), 0);
  assert_memory_equal (got, want, size);
  for (uint64_t i = 0; i < chunks; i++) {
    const uint64_t at = i * VR_HASH_CHUNK;
    const uint64_t n = size - at < VR_HASH_CHUNK ? size - at : VR_HASH_CHUNK;
    XXH128_canonical_t c;

    XXH128_canonicalFromHash (&c, XXH3_128bits (want + at, n));
    assert_int_equal (vr_view_hash (v, i, hash), 0);
    assert_memory_equal (hash, c.digest, VR_HASH_SIZE);
  }
  assert_int_equal (vr_view_hash (v, chunks, hash), -EINVAL);
  free (got);
}

static uint8_t *
copy_of (const struct rig *r)
{
  uint8_t *p = malloc (r->size);

  memcpy (p, r->model, r->size);
  return p;
}

/* A view of the last epoch and one of an epoch still to come. */
static void
test_views (void **state)
{
  struct rig r = new_rig (*state, 4, 600007, 65536, 64);
  struct vr_view now, later;
  uint8_t *then, *at_later;
  uint8_t byte;
  uint64_t epoch;

  for (int i = 0; i < 30; i++)
    write_range (&r, below (&r.rng, 590000), 1 + below (&r.rng, 10000));
  seal_and_commit (&r);
  apply (&r, 50000);
  then = copy_of (&r);
  assert_int_equal (vr_view_open (&now, &r.d->img, 0), 0);
  check_view (&now, then, r.size);
  write_range (&r, 1000, 5000);
  epoch = vr_epoch_current (r.epoch);
  assert_int_equal (vr_view_open (&later, &r.d->img, epoch), 0);
  assert_int_equal (vr_view_ready (&later), -EAGAIN);
  assert_int_equal (vr_view_read (&later, &byte, 1, 0), -ESTALE);
  zero_range (&r, 3000, 9000, true);
  at_later = copy_of (&r);
  /* Later epochs are committed too when it is looked at first. */
  seal_and_commit (&r);
  write_range (&r, 2000, 3000);
  seal_and_commit (&r);
  for (int i = 0; i < 20; i++) {
    seal_and_commit (&r);
    assert_int_equal (apply (&r, 0), 0); /* held up */
    check_view (&now, then, r.size);
    check_view (&later, at_later, r.size);
    write_range (&r, below (&r.rng, 590000), 1 + below (&r.rng, 10000));
  }
  vr_view_close (&now);
  vr_view_close (&later);
  apply_all (&r);
  /* Gone by. */
  assert_int_equal (vr_view_open (&later, &r.d->img, epoch), -ESTALE);
  seal_and_commit (&r);
  apply_all (&r);
  check_image (&r);
  free (then);
  free (at_later);
  end_rig (&r);
}

/* A view does not hold up a journal that fills. */
static void
test_view_given_up (void **state)
{
  struct rig r = new_rig (*state, 5, 100000, 8192, 10);
  struct vr_view v, next;
  uint8_t byte;

  seal_and_commit (&r);
  assert_int_equal (vr_view_open (&v, &r.d->img, 0), 0);
  assert_int_equal (vr_view_ready (&v), 0);
  for (int i = 0; i < 12; i++) {
    write_range (&r, 0, 4000);
    seal_and_commit (&r);
    apply_all (&r);
  }
  assert_int_equal (vr_view_ready (&v), -ESTALE);
  assert_int_equal (vr_view_read (&v, &byte, 1, 0), -ESTALE);
  assert_int_equal (vr_view_open (&next, &r.d->img, 0), 0);
  check_view (&next, r.model, r.size);
  vr_view_close (&v); /* does not take the new one along */
  write_range (&r, 9000, 100);
  seal_and_commit (&r);
  assert_int_equal (apply (&r, 0), 0);
  vr_view_close (&next);
  assert_true (apply (&r, 0) > 0);
  end_rig (&r);
}

/* What the image was ahead of before a restart, it is ahead of afterwards,
   though the log is applied again from before. */
static void
test_view_of_the_past (void **state)
{
  struct rig r = new_rig (*state, 6, 100000, 16384, 16);
  uint64_t epoch[6];
  struct vr_view v;

  for (int i = 0; i < 6; i++) {
    epoch[i] = vr_epoch_current (r.epoch);
    write_range (&r, below (&r.rng, 90000), 5000);
    cut (&r);
  }
  seal_and_commit (&r);
  assert_true (apply (&r, 20000) > 0);
  assert_int_equal (vr_view_open (&v, &r.d->img, epoch[0]), -ESTALE);
  assert_int_equal (vr_view_open (&v, &r.d->img, epoch[3]), 0);
  vr_view_close (&v);
  while (apply (&r, 6000) > 0)
    ;
  vr_disk_close (r.d);
  open_disk (&r);
  assert_true (apply (&r, 6000) > 0);
  for (int i = 0; i < 5; i++)
    assert_int_equal (vr_view_open (&v, &r.d->img, epoch[i]), -ESTALE);
  assert_int_equal (vr_view_open (&v, &r.d->img, 0), 0);
  check_view (&v, r.model, r.size);
  vr_view_close (&v);
  end_rig (&r);
}

/* The image is never ahead of what the superblock says is committed. */
static void
test_apply_is_recorded (void **state)
{
  const struct vr_log_open_options options = { .read_only = true };
  struct rig r = new_rig (*state, 10, 100000, 16384, 16);

  for (int i = 0; i < 10; i++) {
    struct vr_log_problem problem;
    struct vr_lock_owner owner;
    struct vr_log_info info;
    struct vr_mark applied;
    struct vr_log *log;

    write_range (&r, 100, 5000);
    seal_and_commit (&r);
    assert_int_equal (vr_log_set_flags (r.d->log, 0, 0), 0);
    write_range (&r, 200, 5000);
    seal_and_commit (&r);
    assert_true (apply (&r, 0) > 0);
    vr_log_applied_mark (r.d->log, &applied);
    assert_int_equal (vr_log_open (r.e->io, in_dir (r.e, "journal"),
                                   &options, &log, &problem, &owner),
                      0);
    vr_log_info (log, &info);
    vr_log_close (log);
    assert_true (info.super.committed_lsn >= applied.lsn);
  }
  end_rig (&r);
}

/* ---- Failing storage ---------------------------------------------------- */

/* After a failed sync of the image nothing is recycled, and a restart redoes
   it all. */
static void
test_image_sync_fails (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 7, 100000, 16384, 16);
  static const struct vr_sim_crash lose = { .drop = 256 };
  uint64_t n;
  uint8_t byte;

  write_range (&r, 100, 50000);
  seal_and_commit (&r);
  assert_true (apply (&r, 0) > 0);
  vr_io_sim_fail (e->io, VR_SIM_SYNC, 1, -EIO, false);
  assert_int_equal (vr_image_checkpoint (&r.d->img), -EIO);
  assert_int_equal (vr_image_checkpoint (&r.d->img), -EIO);
  assert_int_equal (vr_image_apply (&r.d->img, 0, &n), -EIO);
  assert_int_equal (vr_disk_read (r.d, &byte, 1, 0), -EIO);
  vr_io_sim_crash (e->io, &lose);
  vr_disk_close (r.d);
  open_disk (&r);
  check_all (&r);
  seal_and_commit (&r);
  apply_all (&r);
  check_image (&r);
  end_rig (&r);
}

/* No space in the image: nothing is lost, and it goes on when there is. */
static void
test_image_no_space (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 8, 100000, 16384, 16);
  uint64_t n;

  write_range (&r, 100, 50000);
  seal_and_commit (&r);
  assert_int_equal (vr_log_set_flags (r.d->log, 0, 0), 0);
  vr_io_sim_fail (e->io, VR_SIM_WRITE, 1, -ENOSPC, true);
  assert_int_equal (vr_image_apply (&r.d->img, 0, &n), -ENOSPC);
  vr_io_sim_fail (e->io, 0, 0, 0, false);
  check_all (&r);
  apply_all (&r);
  check_image (&r);
  end_rig (&r);
}

/* ---- Threads ------------------------------------------------------------ */

/* Large ones and small ones: copying a large one into the log takes so long
   that a small one behind it would overtake it on the way to the index. */
enum { WRITERS = 4, AREA = 200000, RUNS = 200 };

struct shared {
  struct rig *r;
  atomic_bool stop;
};

/* Overlapping writes; each is all one byte. */
static void *
writer (void *opaque)
{
  struct shared *s = opaque;
  static atomic_uint id;
  const unsigned me = atomic_fetch_add (&id, 1);
  uint64_t rng = seeded (1000 + me);
  uint8_t *buf = malloc (AREA);

  for (unsigned i = 0; i < RUNS; i++) {
    const uint64_t at = below (&rng, AREA / 4);
    const uint64_t n = 1 + below (&rng, i % 2 ? 3 * AREA / 4 : 100);

    memset (buf, (int) (1 + (me * RUNS + i) % 255), n);
    assert_int_equal (vr_disk_write (s->r->d, buf, n, 777 + at), 0);
    if (i % 16 == 0)
      assert_int_equal (vr_disk_sync (s->r->d), 0);
    if (i % 40 == 0)
      assert_int_equal (vr_disk_zero (s->r->d, n, 777 + at, i % 80 == 0), 0);
  }
  free (buf);
  return NULL;
}

static void *
reader (void *opaque)
{
  struct shared *s = opaque;
  uint8_t *buf = malloc (AREA);

  while (!atomic_load (&s->stop))
    assert_int_equal (vr_disk_read (s->r->d, buf, AREA, 777), 0);
  free (buf);
  return NULL;
}

static void *
background (void *opaque)
{
  struct shared *s = opaque;

  while (!atomic_load (&s->stop)) {
    seal_and_commit (s->r);
    apply_all (s->r);
    usleep (200);
  }
  return NULL;
}

static bool
keep_on (void *opaque)
{
  (void) opaque;
  return true;
}

/* What reads show at the end is what the image and the log's redo give: the
   order of overlapping writes was one. */
static void
test_threads (void **state)
{
  struct rig r = new_rig (*state, 9, 300000, 1 << 20, 8);
  struct shared s = { .r = &r };
  pthread_t t[WRITERS], read_thread, back;

  r.d->keep_waiting = keep_on;
  pthread_create (&back, NULL, background, &s);
  pthread_create (&read_thread, NULL, reader, &s);
  for (int i = 0; i < WRITERS; i++)
    pthread_create (&t[i], NULL, writer, &s);
  for (int i = 0; i < WRITERS; i++)
    pthread_join (t[i], NULL);
  atomic_store (&s.stop, true);
  pthread_join (read_thread, NULL);
  pthread_join (back, NULL);
  assert_int_equal (vr_disk_read (r.d, r.model + 777, AREA, 777), 0);
  /* From the log alone, */
  assert_int_equal (vr_disk_sync (r.d), 0);
  vr_disk_close (r.d);
  open_disk (&r);
  check_all (&r);
  /* and in the image. */
  seal_and_commit (&r);
  apply_all (&r);
  check_image (&r);
  end_rig (&r);
}

/* A long write and a short one inside it, at about the same time. */
enum { LONG = 200000, PLACE = 120000, SHORT = 100 };

struct racer {
  struct rig *r;
  pthread_barrier_t *start;
  uint64_t delay; /* spins */
  bool is_long;
  uint8_t byte;
};

static void *
race (void *opaque)
{
  const struct racer *x = opaque;
  const uint64_t n = x->is_long ? LONG : SHORT;
  uint8_t *buf = malloc (n);

  memset (buf, x->byte, n);
  pthread_barrier_wait (x->start);
  for (volatile uint64_t i = 0; i < x->delay;)
    i++;
  assert_int_equal (vr_disk_write (x->r->d, buf, n, x->is_long ? 0 : PLACE),
                    0);
  free (buf);
  return NULL;
}

static int
redo_record (void *opaque, const struct vr_record *rec,
             const uint8_t *payload)
{
  uint8_t *disk = opaque;

  if (rec->kind == VR_WRITE)
    memcpy (disk + rec->offset, payload, rec->length);
  return 0;
}

/* The later one in the log is the one that is read. */
static void
test_one_order (void **state)
{
  struct rig r = new_rig (*state, 11, LONG, 1 << 20, 8);
  pthread_barrier_t start;
  uint8_t *redone = malloc (LONG);
  unsigned first[2] = { 0, 0 };

  pthread_barrier_init (&start, NULL, 2);
  for (unsigned i = 0; i < 600; i++) {
    struct racer x[2] = {
      { &r, &start, 0, true, (uint8_t) (2 * i) },
      { &r, &start, below (&r.rng, 60000), false, (uint8_t) (2 * i + 1) },
    };
    struct vr_log_info info;
    struct vr_mark from;
    pthread_t t[2];

    vr_log_info (r.d->log, &info);
    from = (struct vr_mark){ info.head, info.head_chain };
    for (int j = 0; j < 2; j++)
      pthread_create (&t[j], NULL, race, &x[j]);
    for (int j = 0; j < 2; j++)
      pthread_join (t[j], NULL);
    vr_log_info (r.d->log, &info);
    assert_int_equal (vr_log_scan (r.d->log, &from, info.complete, 0,
                                   redo_record, redone, NULL, NULL),
                      0);
    memcpy (r.model, redone, LONG);
    check_all (&r);
    first[redone[PLACE] == x[1].byte]++;
    seal_and_commit (&r);
    apply_all (&r);
  }
  assert_true (first[0] > 0 && first[1] > 0);
  pthread_barrier_destroy (&start);
  free (redone);
  end_rig (&r);
}

#define BOTH(on)                                                              \
  on (test_model), on (test_edges), on (test_full), on (test_open_messages),  \
      on (test_create_on_open), on (test_views), on (test_threads)

int
main (void)
{
  const struct CMUnitTest real_tests[] = { BOTH (ON_REAL) };
  const struct CMUnitTest sim_tests[] = {
    BOTH (ON_SIM),
    ON_SIM (test_one_order),
    ON_SIM (test_view_given_up),
    ON_SIM (test_view_of_the_past),
    ON_SIM (test_apply_is_recorded),
    ON_SIM (test_image_sync_fails),
    ON_SIM (test_image_no_space),
  };
  const int failed_real
      = cmocka_run_group_tests_name ("real", real_tests, NULL, NULL);
  const int failed_sim
      = cmocka_run_group_tests_name ("sim", sim_tests, NULL, NULL);

  return failed_real + failed_sim > 0;
}
