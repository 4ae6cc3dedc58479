/* SPDX-License-Identifier: BSD-3-Clause */
/* journal/log.h: one log, or a primary's and a backup's of the same bytes. */
#include "util.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "journal/log_internal.h" /* its file, to count syncs */

#define DISK (UINT64_C (1) << 20)

/* ---- A log and what went into it ---------------------------------------- */

struct entry {
  uint64_t lsn, end, epoch, offset, length, hash;
  unsigned kind;
};

struct rig {
  struct env *e;
  uint64_t rng;
  uint64_t segment_size;
  struct vr_epoch *epoch;
  struct vr_log *log;
  struct entry *entry;
  size_t count, allocated;
};

static void
note (struct rig *r, const struct entry *e)
{
  if (r->count == r->allocated) {
    r->allocated = r->allocated ? 2 * r->allocated : 256;
    r->entry = realloc (r->entry, r->allocated * sizeof *r->entry);
    assert_non_null (r->entry);
  }
  r->entry[r->count++] = *e;
}

static void
new_epoch (struct rig *r)
{
  const uint8_t id[16] = { 1 };

  vr_epoch_close (r->epoch);
  assert_int_equal (vr_epoch_new_private ("vm", id, 1, &r->epoch), 0);
}

static struct rig
new_rig (struct env *e, uint64_t seed, uint64_t segment_size,
         uint64_t segment_count)
{
  const struct vr_log_config c
      = small_config (DISK, segment_size, segment_count);
  struct rig r = { .e = e, .rng = seeded (seed),
                   .segment_size = segment_size };

  e->io->ops->unlink (e->io, in_dir (e, "log"));
  assert_int_equal (vr_log_create (e->io, in_dir (e, "log"), &c), 0);
  r.log = open_log (e->io, in_dir (e, "log"), 4);
  new_epoch (&r);
  assert_int_equal (vr_log_start_primary (r.log, r.epoch), 0);
  return r;
}

static void
end_rig (struct rig *r)
{
  vr_log_close (r->log);
  vr_epoch_close (r->epoch);
  free (r->entry);
}

/* Append one request of this kind, in as many records as it takes. */
static int
append (struct rig *r, enum vr_kind kind, uint64_t length)
{
  uint64_t offset = below (&r->rng, DISK - length);
  uint8_t *payload = malloc (length), *p = payload;
  int err = 0;

  fill_random (&r->rng, payload, length);
  while (err == 0 && length > 0) {
    struct vr_reservation v;

    err = vr_log_reserve (r->log, kind, 0, offset, length, p, &v);
    if (err == 0) {
      const uint64_t n = kind == VR_WRITE ? v.length : length;
      struct entry e = { v.lsn, v.end, v.epoch, offset, n, 0, kind };

      assert_true (n > 0 && n <= length && v.end % 64 == 0);
      if (kind == VR_WRITE)
        e.hash = vr_payload_hash (p, n);
      vr_log_publish (r->log, &v);
      note (r, &e);
      p += n;
      offset += n;
      length -= n;
    }
  }
  free (payload);
  return err;
}

static int
append_some (struct rig *r)
{
  const uint64_t what = below (&r->rng, 10);
  const uint64_t max = chance (&r->rng, 20) ? 3 * r->segment_size : 3000;

  return append (r,
                 what == 0   ? VR_ZERO
                 : what == 1 ? VR_TRIM
                             : VR_WRITE,
                 1 + below (&r->rng, max));
}

static void
cut (struct rig *r)
{
  vr_epoch_cut (r->epoch, vr_epoch_current (r->epoch), 0);
}

/* A seal for everything so far, durable; where it ends. */
static uint64_t
seal (struct rig *r)
{
  uint64_t lsn;

  cut (r);
  assert_int_equal (vr_log_seal (r->log, &lsn), 0);
  assert_true (lsn > 0 && lsn % VR_BLOCK == 0);
  assert_int_equal (vr_log_sync (r->log, lsn), 0);
  return lsn;
}

/* Commit the last durable seal; if asked, apply (there is no image) and
   recycle. */
static void
commit_all (struct rig *r, bool recycle)
{
  struct vr_log_info info;
  struct vr_mark mark;
  struct vr_seal s;

  if (vr_log_last_durable_seal (r->log, &s)) {
    assert_int_equal (vr_log_commit (r->log, s.epoch), 0);
    vr_log_committed_mark (r->log, &mark);
    assert_int_equal (mark.lsn, s.lsn);
  }
  if (!recycle)
    return;
  vr_log_info (r->log, &info);
  vr_log_committed_mark (r->log, &mark);
  vr_log_set_applied (r->log, &mark, info.committed_epoch);
  assert_int_equal (vr_log_recycle (r->log, &mark, info.committed_epoch), 0);
}

/* The journal is full: a seal still fits, unless the place for it was taken
   by seals that are committed or can be. */
static void
make_space (struct rig *r)
{
  struct vr_log_info before, after;
  uint64_t lsn;
  int err;

  cut (r);
  vr_log_info (r->log, &before);
  err = vr_log_seal (r->log, &lsn);
  assert_true (err == 0
               || (err == -EAGAIN && before.sealed_lsn > before.tail));
  if (err == 0)
    assert_int_equal (vr_log_sync (r->log, lsn), 0);
  commit_all (r, true);
  vr_log_info (r->log, &after);
  assert_true (after.tail > before.tail);
}

/* Does the log, from its tail on, hold just what was put in? */
struct compare {
  const struct rig *r;
  size_t at;
};

static int
compare_record (void *opaque, const struct vr_record *rec,
                const uint8_t *payload)
{
  struct compare *c = opaque;
  const struct entry *e = &c->r->entry[c->at];

  if (rec->kind == VR_PAD || rec->kind == VR_SEAL)
    return 0;
  assert_true (c->at < c->r->count);
  assert_int_equal (rec->lsn, e->lsn);
  assert_int_equal (rec->epoch, e->epoch);
  assert_int_equal (rec->kind, e->kind);
  assert_int_equal (rec->offset, e->offset);
  assert_int_equal (rec->length, e->length);
  if (rec->kind == VR_WRITE)
    assert_int_equal (vr_payload_hash (payload, rec->payload_size), e->hash);
  c->at++;
  return 0;
}

static void
check_contents (struct rig *r)
{
  struct compare c = { .r = r };
  struct vr_log_info info;
  struct vr_mark from;

  vr_log_info (r->log, &info);
  vr_log_tail_mark (r->log, &from);
  while (c.at < r->count && r->entry[c.at].lsn < from.lsn)
    c.at++;
  assert_int_equal (vr_log_scan (r->log, &from, info.complete, 0,
                                 compare_record, &c, NULL, NULL),
                    0);
  assert_int_equal (c.at, r->count);
}

/* Open again what a crash or close left; entries behind its end are gone. */
static void
reopen (struct rig *r, bool same_counter)
{
  uint64_t head;

  vr_log_close (r->log);
  r->log = open_log (r->e->io, in_dir (r->e, "log"), 2);
  head = vr_log_head (r->log);
  while (r->count > 0 && r->entry[r->count - 1].end > head)
    r->count--;
  check_contents (r);
  if (!same_counter)
    new_epoch (r);
  assert_int_equal (vr_log_start_primary (r->log, r->epoch), 0);
}

/* ---- Create and open ---------------------------------------------------- */

static void
test_create (void **state)
{
  struct env *e = *state;
  const char *path = in_dir (e, "log");
  struct vr_log_config c = small_config (DISK, 8192, 4);
  struct vr_log_info info;
  struct vr_log *log;
  uint64_t size;

  c.segment_size = 10000;
  assert_int_equal (vr_log_create (e->io, path, &c), -EUCLEAN);
  c.segment_size = 8192;
  /* Left over from a creation that a crash cut short. */
  write_file (e->io, in_dir (e, "log.new"), "x", 1);
  assert_int_equal (vr_log_create (e->io, path, &c), 0);
  assert_int_equal (vr_log_create (e->io, path, &c), -EEXIST);
  free (read_file (e->io, path, &size));
  assert_int_equal (size, VR_DATA_START + 4 * 8192);
  log = open_log (e->io, path, 2);
  vr_log_info (log, &info);
  assert_int_equal (info.head, 8192);
  assert_int_equal (info.complete, 8192);
  assert_int_equal (info.durable, 8192);
  assert_int_equal (info.tail, 8192);
  assert_int_equal (info.sealed_epoch, 0);
  assert_int_equal (info.capacity, 3 * 8192);
  assert_string_equal (info.super.vm, "vm");
  assert_string_equal (vr_log_path (log), path);
  vr_log_close (log);
}

static void
test_create_no_space (void **state)
{
  struct env *e = *state;
  const struct vr_log_config c = small_config (DISK, 8192, 4);
  struct vr_file *f;

  vr_io_sim_set_space (e->io, 100000);
  assert_int_equal (vr_log_create (e->io, "log", &c), -ENOSPC);
  assert_int_equal (e->io->ops->open (e->io, "log", 0, &f), -ENOENT);
  assert_int_equal (e->io->ops->open (e->io, "log.new", 0, &f), -ENOENT);
  vr_io_sim_set_space (e->io, 0);
  assert_int_equal (vr_log_create (e->io, "log", &c), 0);
}

/* A crash at any step of a creation leaves no log or a good one. */
static void
test_create_crash (void **state)
{
  const struct vr_log_config c = small_config (DISK, 8192, 4);

  (void) state;
  for (uint64_t step = 1;; step++) {
    static const struct vr_sim_crash crash = { 100, 60, true };
    struct vr_io *io = vr_io_sim_new (step);
    struct vr_log_problem problem;
    int err;

    vr_io_sim_die_at (io, step);
    err = vr_log_create (io, "log", &c);
    vr_io_sim_die_at (io, 0);
    vr_io_sim_crash (io, &crash);
    if (err == 0)
      assert_int_equal (open_log_error (io, "log", &problem), 0);
    else {
      const int r = open_log_error (io, "log", &problem);

      assert_true (r == 0 || r == -ENOENT);
      if (r < 0)
        assert_int_equal (vr_log_create (io, "log", &c), 0);
    }
    vr_io_sim_free (io);
    if (err == 0)
      break;
  }
}

/* Killed before its name was durable, found, used: the name must stay. */
static void
test_create_kill (void **state)
{
  static const struct vr_sim_crash lose = { .drop = 256 };
  struct env *e = *state;
  const struct vr_log_config c = small_config (DISK, 8192, 4);
  struct vr_log_problem problem;

  vr_io_sim_fail (e->io, VR_SIM_NAME, 3, -EIO, false);
  assert_int_equal (vr_log_create (e->io, "log", &c), -EIO);
  vr_io_sim_kill (e->io);
  vr_log_close (open_log (e->io, "log", 2));
  vr_io_sim_crash (e->io, &lose);
  assert_int_equal (open_log_error (e->io, "log", &problem), 0);
}

static void
test_geometry (void **state)
{
  uint64_t size, count;

  (void) state;
  assert_int_equal (vr_log_geometry (VR_JOURNAL_MIN - 1, &size, &count),
                    -EINVAL);
  assert_int_equal (vr_log_geometry (VR_JOURNAL_MAX + 1, &size, &count),
                    -EINVAL);
  for (uint64_t n = VR_JOURNAL_MIN; n <= VR_JOURNAL_MAX; n += n / 3) {
    assert_int_equal (vr_log_geometry (n, &size, &count), 0);
    assert_true (size * count <= n && n - size * count < size);
    assert_true (count >= 32 && count <= VR_SEGMENTS_MAX);
    assert_true (size >= VR_PAYLOAD_MAX);
  }
}

static void
test_open_errors (void **state)
{
  struct env *e = *state;
  const char *path = in_dir (e, "log");
  const struct vr_log_open_options read_only = { .read_only = true };
  struct rig r = new_rig (e, 1, 8192, 4);
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log *log;
  struct vr_super s;
  uint64_t size;
  uint8_t *file;

  assert_int_equal (open_log_error (e->io, path, &problem), -EAGAIN);
  assert_int_equal (vr_log_open (e->io, path, &read_only, &log, &problem,
                                 &owner),
                    0);
  vr_log_close (log);
  end_rig (&r);
  file = read_file (e->io, path, &size);
  memcpy (&s, file, sizeof s);

  assert_int_equal (open_log_error (e->io, in_dir (e, "no"), &problem),
                    -ENOENT);
  write_file (e->io, path, file, 1000);
  assert_int_equal (open_log_error (e->io, path, &problem), -EBADMSG);
  memset (file + VR_SUPER_A, 'x', 4096);
  memset (file + VR_SUPER_B, 'x', 4096);
  write_file (e->io, path, file, size);
  assert_int_equal (open_log_error (e->io, path, &problem), -EBADMSG);
  s.version = 2;
  vr_block_seal (&s);
  memcpy (file, &s, sizeof s);
  write_file (e->io, path, file, size);
  assert_int_equal (open_log_error (e->io, path, &problem), -EPROTO);
  assert_non_null (strstr (problem.text, "version 2"));
  free (file);
}

/* ---- Append and recycle ------------------------------------------------- */

/* Many times around a small ring, closed and opened on the way. */
static void
test_wrap (void **state)
{
  struct env *e = *state;
  const unsigned rounds = e->sim ? 40 : 4;

  for (unsigned seed = 0; seed < rounds; seed++) {
    const uint64_t size = UINT64_C (8192) << seed % 4;
    struct rig r = new_rig (e, seed, size, 4 + seed % 5);

    for (int i = 0; i < 400; i++) {
      const int err = append_some (&r);

      if (err == -EAGAIN) {
        check_contents (&r);
        make_space (&r);
        assert_int_equal (append (&r, VR_WRITE, 1), 0);
      } else
        assert_int_equal (err, 0);
      if (chance (&r.rng, 10)) {
        make_space (&r);
        commit_all (&r, false);
      }
      if (chance (&r.rng, 3)) {
        assert_int_equal (vr_log_sync (r.log, vr_log_head (r.log)), 0);
        reopen (&r, chance (&r.rng, 50));
      }
    }
    check_contents (&r);
    assert_true (vr_log_head (r.log) > 5 * (4 + seed % 5) * size);
    end_rig (&r);
  }
}

/* Order of positions, and what the journal says about itself. */
static void
test_positions (void **state)
{
  struct rig r = new_rig (*state, 3, 16384, 6);
  struct vr_log_info i;
  struct vr_seal s;
  uint64_t end;

  assert_false (vr_log_next_seal (r.log, 0, &s));
  append (&r, VR_WRITE, 100);
  vr_log_info (r.log, &i);
  assert_int_equal (i.head, r.entry[0].end);
  end = seal (&r);
  vr_log_info (r.log, &i);
  assert_int_equal (i.sealed_lsn, end);
  assert_int_equal (i.sealed_epoch, r.entry[0].epoch);
  assert_int_equal (i.durable, end);
  assert_int_equal (i.written, end);
  assert_int_equal (i.committed, 16384);
  assert_true (vr_log_next_seal (r.log, end, &s));
  assert_int_equal (s.epoch, r.entry[0].epoch);
  assert_false (vr_log_next_seal (r.log, end + 1, &s));
  commit_all (&r, false);
  vr_log_info (r.log, &i);
  assert_int_equal (i.committed, end);
  assert_int_equal (i.tail, 16384);
  assert_false (vr_log_next_seal (r.log, 0, &s));
  /* Never back. */
  assert_int_equal (vr_log_commit (r.log, 1), 0);
  vr_log_info (r.log, &i);
  assert_int_equal (i.committed, end);
  end_rig (&r);
}

/* A write goes to the end of its segment and on in the next one; pieces end
   at multiples of 4096 of the disk. */
static void
test_pieces (void **state)
{
  struct rig r = new_rig (*state, 4, 16384, 8);
  struct vr_reservation v;
  static uint8_t payload[40000];
  uint64_t offset = 1001, left = sizeof payload;
  unsigned pieces = 0;

  while (left > 0) {
    assert_int_equal (vr_log_reserve (r.log, VR_WRITE, 0, offset, left,
                                      payload, &v),
                      0);
    assert_true (v.lsn / 16384 == (v.end - 1) / 16384);
    assert_true (v.length == left || (offset + v.length) % 4096 == 0);
    offset += v.length;
    left -= v.length;
    vr_log_publish (r.log, &v);
    pieces++;
  }
  assert_true (pieces >= 3 && pieces <= 5);
  end_rig (&r);
}

/* Being late for several cuts, the log can still stop at its last epoch. */
static void
test_late_seal (void **state)
{
  struct rig r = new_rig (*state, 5, 16384, 8);
  struct vr_seal first, second;
  uint64_t lsn, epoch;

  append (&r, VR_WRITE, 100);
  epoch = r.entry[0].epoch;
  cut (&r);
  cut (&r);
  cut (&r);
  assert_int_equal (vr_log_seal (r.log, &lsn), 0);
  assert_true (vr_log_next_seal (r.log, r.entry[0].end, &first));
  assert_int_equal (first.epoch, epoch);
  assert_true (vr_log_next_seal (r.log, first.lsn + 1, &second));
  assert_int_equal (second.epoch, epoch + 2);
  assert_int_equal (second.lsn, lsn);
  /* With nothing written there is one. */
  cut (&r);
  cut (&r);
  assert_int_equal (vr_log_seal (r.log, &lsn), 0);
  assert_true (vr_log_next_seal (r.log, second.lsn + 1, &first));
  assert_int_equal (first.lsn, lsn);
  end_rig (&r);
}

/* Epochs that a superblock claimed too late are not used again. */
static void
test_late_claim (void **state)
{
  struct rig r = new_rig (*state, 12, 16384, 8);
  uint64_t epoch, lsn;

  append (&r, VR_WRITE, 100);
  vr_epoch_raise (r.epoch, 10000);
  append (&r, VR_WRITE, 100);
  epoch = r.entry[1].epoch;
  assert_int_equal (epoch, 10000);
  assert_int_equal (vr_log_sync (r.log, vr_log_head (r.log)), 0);
  reopen (&r, false);
  assert_true (vr_epoch_current (r.epoch) > epoch);
  append (&r, VR_WRITE, 100);
  assert_true (r.entry[2].epoch > epoch);
  /* With the last record a seal, it is not sealed once more. */
  lsn = seal (&r);
  epoch = r.entry[2].epoch;
  vr_log_close (r.log);
  r.log = open_log (r.e->io, in_dir (r.e, "log"), 2);
  assert_int_equal (vr_log_start_primary (r.log, r.epoch), 0);
  append (&r, VR_WRITE, 100);
  assert_true (r.entry[3].epoch > epoch && r.entry[3].lsn >= lsn);
  end_rig (&r);
}

/* A seal that a write put in is still one to be synced. */
static void
test_seal_by_write (void **state)
{
  struct rig r = new_rig (*state, 6, 16384, 8);
  uint64_t lsn, again;

  append (&r, VR_WRITE, 100);
  cut (&r);
  append (&r, VR_WRITE, 100);
  assert_int_equal (vr_log_seal (r.log, &lsn), 0);
  assert_true (lsn > 0 && lsn <= r.entry[1].lsn);
  assert_int_equal (vr_log_sync (r.log, lsn), 0);
  assert_int_equal (vr_log_seal (r.log, &again), 0);
  assert_int_equal (again, 0);
  end_rig (&r);
}

/* No seal behind a record in flight gets out. */
static void
test_in_flight (void **state)
{
  struct rig r = new_rig (*state, 7, 16384, 8);
  struct vr_ship_cursor cursor = { .at = { 16384, 0 } };
  struct vr_ship_batch b;
  struct vr_reservation v;
  struct vr_log_info info;

  assert_int_equal (vr_log_reserve (r.log, VR_WRITE, 0, 0, 3, "abc", &v), 0);
  append (&r, VR_WRITE, 100);
  vr_log_info (r.log, &info);
  assert_int_equal (info.complete, v.lsn);
  assert_int_equal (vr_log_ship_batch (r.log, &cursor, &b), 0);
  assert_int_equal (b.size, 0); /* the first seal is not durable either */
  vr_log_publish (r.log, &v);
  vr_log_info (r.log, &info);
  assert_int_equal (info.complete, info.head);
  vr_log_ship_cursor_end (r.log, &cursor);
  end_rig (&r);
}

static void
test_dead_log (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 8, 16384, 8);
  struct vr_log_info info;
  uint64_t lsn;

  append (&r, VR_WRITE, 100);
  vr_io_sim_fail (e->io, VR_SIM_SYNC, 1, -EIO, false);
  assert_int_equal (vr_log_sync (r.log, vr_log_head (r.log)), -EIO);
  /* Not tried again, though it would work now. */
  assert_int_equal (vr_log_sync (r.log, vr_log_head (r.log)), -EIO);
  assert_int_equal (append (&r, VR_WRITE, 1), -EIO);
  cut (&r);
  assert_int_equal (vr_log_seal (r.log, &lsn), -EIO);
  assert_int_equal (vr_log_commit (r.log, 1), -EIO);
  assert_int_equal (vr_log_write_out (r.log, 0), -EIO);
  assert_int_equal (vr_log_set_flags (r.log, VR_LOG_CLEAN, 0), -EIO);
  vr_log_info (r.log, &info);
  assert_int_equal (info.failed, -EIO);
  end_rig (&r);
}

static void
test_flags_and_generation (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 9, 16384, 8);
  struct vr_log_info info;

  assert_int_equal (vr_log_set_flags (r.log, VR_LOG_CLEAN | VR_LOG_COPYING,
                                      0),
                    0);
  assert_int_equal (vr_log_set_generation (r.log, 7), 0);
  vr_log_close (r.log);
  r.log = open_log (e->io, in_dir (e, "log"), 2);
  vr_log_info (r.log, &info);
  assert_int_equal (info.super.flags, VR_LOG_CLEAN | VR_LOG_COPYING);
  assert_int_equal (info.super.generation, 7);
  assert_int_equal (vr_log_start_primary (r.log, r.epoch), 0);
  vr_log_info (r.log, &info);
  assert_int_equal (info.super.flags, VR_LOG_COPYING);
  end_rig (&r);
}

/* ---- Chain and truncation ----------------------------------------------- */

static void
test_chain_at (void **state)
{
  struct rig r = new_rig (*state, 10, 8192, 16);
  uint64_t chain, end;

  for (int i = 0; i < 30; i++)
    append_some (&r);
  end = seal (&r);
  for (size_t i = 0; i < r.count; i++) {
    struct vr_mark from, at;

    assert_int_equal (vr_log_chain_at (r.log, r.entry[i].end, &chain), 0);
    vr_log_tail_mark (r.log, &from);
    assert_int_equal (vr_log_scan (r.log, &from, r.entry[i].end, 0,
                                   compare_record,
                                   &(struct compare){ .r = &r }, NULL, &at),
                      0);
    assert_int_equal (at.chain, chain);
    for (uint64_t x = r.entry[i].lsn + 64; x < r.entry[i].end; x += 64)
      assert_int_equal (vr_log_chain_at (r.log, x, &chain), -ESTALE);
    assert_int_equal (vr_log_chain_at (r.log, r.entry[i].end - 1, &chain),
                      -ESTALE);
  }
  assert_int_equal (vr_log_chain_at (r.log, end, &chain), 0);
  assert_int_equal (vr_log_chain_at (r.log, end + 64, &chain), -ERANGE);
  assert_int_equal (vr_log_chain_at (r.log, 8192 - 64, &chain), -ERANGE);
  assert_int_equal (vr_log_chain_at (r.log, UINT64_MAX, &chain), -ERANGE);
  end_rig (&r);
}

static void
test_truncate (void **state)
{
  struct env *e = *state;

  for (size_t keep = 0; keep < 25; keep++) {
    struct rig r = new_rig (e, 11, 8192, 16);
    uint64_t chain, chain_early, to;
    struct vr_log_info info;

    for (int i = 0; i < 3; i++)
      append_some (&r);
    assert_int_equal (vr_log_chain_at (r.log, r.entry[0].end, &chain_early),
                      0);
    seal (&r);
    commit_all (&r, false);
    for (size_t i = r.count; i < 25; i++)
      append (&r, VR_WRITE, 1 + below (&r.rng, 3000));
    seal (&r);
    assert_true (r.count >= 25);
    to = r.entry[keep].end;
    assert_int_equal (vr_log_chain_at (r.log, to, &chain), 0);
    vr_log_info (r.log, &info);
    if (to < info.committed) {
      assert_int_equal (vr_log_truncate (r.log, to, chain), -ERANGE);
      end_rig (&r);
      continue;
    }
    assert_int_equal (vr_log_truncate (r.log, to, chain + 1), -ESTALE);
    assert_int_equal (vr_log_truncate (r.log, to - 1, chain), -ESTALE);
    assert_int_equal (vr_log_truncate (r.log, to, chain), 0);
    assert_int_equal (vr_log_head (r.log), to);
    assert_int_equal (vr_log_sync (r.log, to + VR_BLOCK), -ESTALE);
    vr_log_info (r.log, &info);
    assert_int_equal (info.sealed_epoch, info.committed_epoch);
    r.count = keep + 1;
    check_contents (&r);
    assert_int_equal (vr_log_sync (r.log, to), 0);
    reopen (&r, true);
    assert_int_equal (r.count, keep + 1);
    append (&r, VR_WRITE, 5000);
    assert_int_equal (vr_log_sync (r.log, vr_log_head (r.log)), 0);
    reopen (&r, true);
    end_rig (&r);
  }
}

/* ---- Ship and take in --------------------------------------------------- */

struct pair {
  struct rig p;
  struct vr_log *b;
  struct vr_ship_cursor cursor;
};

static struct pair
new_pair (struct env *e, uint64_t seed, uint64_t segment_size,
          uint64_t segment_count)
{
  struct vr_log_config c = small_config (DISK, segment_size, segment_count);
  struct pair x = { .p = new_rig (e, seed, segment_size, segment_count) };
  struct vr_log_info info;

  vr_log_info (x.p.log, &info);
  memcpy (c.log_id, info.super.log_id, 16);
  c.flags = VR_LOG_BACKUP;
  e->io->ops->unlink (e->io, in_dir (e, "blog"));
  assert_int_equal (vr_log_create (e->io, in_dir (e, "blog"), &c), 0);
  x.b = open_log (e->io, in_dir (e, "blog"), 3);
  x.cursor.at = (struct vr_mark){ segment_size, 0 };
  return x;
}

static void
end_pair (struct pair *x)
{
  vr_log_ship_cursor_end (x->p.log, &x->cursor);
  vr_log_close (x->b);
  end_rig (&x->p);
}

static void
check_batch (struct pair *x, const struct vr_ship_batch *b)
{
  const uint64_t size = x->p.segment_size;
  struct vr_log_info info;

  assert_true (b->size <= VR_SHIP_MAX);
  assert_int_equal (b->lsn / size, (b->lsn + b->size - 1) / size);
  vr_log_info (x->p.log, &info);
  assert_true (b->lsn + b->size <= info.complete);
  if (b->sealed_epoch) {
    struct vr_seal s;

    assert_true (vr_log_last_durable_seal (x->p.log, &s));
    assert_true (b->sealed_epoch <= s.epoch);
  }
}

/* Everything that may go; the epoch sealed last, or 0. */
static uint64_t
ship (struct pair *x)
{
  uint64_t sealed = 0;

  for (;;) {
    struct vr_raw_result result;
    struct vr_ship_batch b;
    const char *reason;

    assert_int_equal (vr_log_ship_batch (x->p.log, &x->cursor, &b), 0);
    if (b.size == 0)
      return sealed;
    check_batch (x, &b);
    if (vr_log_append_raw (x->b, b.lsn, b.data, b.size, 1, &result, &reason)
        != 0)
      fail_msg ("%s", reason ? reason : "not taken in");
    assert_int_equal (result.sealed_epoch, b.sealed_epoch);
    if (b.sealed_epoch) {
      sealed = b.sealed_epoch;
      assert_int_equal (vr_log_sync (x->b, result.sealed_lsn), 0);
    }
    vr_log_put_segment (x->p.log, b.segment);
  }
}

/* The same records, bytes and chain on both sides, up to the backup's end. */
static void
check_equal (struct pair *x)
{
  struct rig backup = x->p;
  struct vr_mark tail;
  uint64_t head = vr_log_head (x->b), a, b;

  vr_log_tail_mark (x->b, &tail);
  assert_int_equal (vr_log_chain_at (x->p.log, head, &a), 0);
  assert_int_equal (vr_log_chain_at (x->b, head, &b), 0);
  assert_int_equal (a, b);
  backup.log = x->b;
  while (backup.count > 0 && backup.entry[backup.count - 1].end > head)
    backup.count--;
  check_contents (&backup);
}

static void
test_ship (void **state)
{
  struct env *e = *state;

  for (unsigned seed = 0; seed < (e->sim ? 30 : 3); seed++) {
    const uint64_t size = UINT64_C (8192) << seed % 4;
    struct pair x = new_pair (e, 100 + seed, size, 5 + seed % 4);

    for (int i = 0; i < 150; i++) {
      const int err = append_some (&x.p);

      if (err == 0 && chance (&x.p.rng, 85))
        continue;
      assert_true (err == 0 || err == -EAGAIN);
      if (chance (&x.p.rng, 30)) {
        ship (&x);
        check_equal (&x);
        continue;
      }
      seal (&x.p);
      if (chance (&x.p.rng, 50) && vr_log_head (x.b) < x.cursor.at.lsn + 1)
        vr_log_ship_cursor_end (x.p.log, &x.cursor);
      {
        const uint64_t sealed = ship (&x);
        struct vr_mark mark;

        assert_true (sealed > 0);
        assert_int_equal (vr_log_head (x.b), vr_log_head (x.p.log));
        check_equal (&x);
        assert_int_equal (vr_log_commit (x.b, sealed), 0);
        vr_log_committed_mark (x.b, &mark);
        vr_log_set_applied (x.b, &mark, sealed);
        assert_int_equal (vr_log_recycle (x.b, &mark, sealed), 0);
        commit_all (&x.p, true);
      }
    }
    end_pair (&x);
  }
}

/* A long backlog, read back from the file; large segments and batches. */
static void
test_ship_from_file (void **state)
{
  struct env *e = *state;
  const uint64_t sizes[] = { 8192, 65536, 4 << 20 };

  for (size_t i = 0; i < 3; i++) {
    struct pair x = new_pair (e, 200 + i, sizes[i], i == 2 ? 4 : 12);
    const uint64_t goal = sizes[i] * (i == 2 ? 3 : 9);

    while (vr_log_head (x.p.log) < goal)
      assert_int_equal (append (&x.p, VR_WRITE,
                                1 + below (&x.p.rng, sizes[i] / 8)),
                        0);
    seal (&x.p);
    reopen (&x.p, true);
    ship (&x);
    check_equal (&x);
    vr_log_close (x.b);
    x.b = open_log (e->io, in_dir (e, "blog"), 2);
    check_equal (&x);
    end_pair (&x);
  }
}

/* A seal that is not durable stays here, what is before it may go. */
static void
test_ship_unsynced (void **state)
{
  struct pair x = new_pair (*state, 300, 65536, 8);
  uint64_t lsn;

  append (&x.p, VR_WRITE, 1000);
  seal (&x.p);
  append (&x.p, VR_WRITE, 1000);
  cut (&x.p);
  assert_int_equal (vr_log_seal (x.p.log, &lsn), 0);
  append (&x.p, VR_WRITE, 1000);
  ship (&x);
  assert_int_equal (vr_log_head (x.b), x.p.entry[1].end);
  assert_int_equal (vr_log_sync (x.p.log, lsn), 0);
  ship (&x);
  assert_true (vr_log_head (x.b) >= x.p.entry[2].end);
  check_equal (&x);
  end_pair (&x);
}

/* ---- Malformed log bytes ------------------------------------------------ */

/* A batch under construction. */
struct craft {
  uint8_t buf[VR_SHIP_MAX + VR_BLOCK];
  uint64_t lsn; /* of buf */
  size_t n;
  uint64_t chain, epoch;
};

static void
begin_craft (struct craft *c, struct vr_log *b)
{
  struct vr_log_info info;

  vr_log_info (b, &info);
  memset (c, 0, sizeof *c);
  c->lsn = info.head;
  c->chain = info.head_chain;
  c->epoch = info.sealed_epoch + 1;
}

static struct vr_record *
add_record (struct craft *c, struct vr_record r)
{
  void *at = c->buf + c->n;

  if (r.lsn == 0)
    r.lsn = c->lsn + c->n;
  if (r.epoch == 0)
    r.epoch = c->epoch;
  if (r.generation == 0)
    r.generation = 1;
  if (r.kind == VR_WRITE && r.payload_hash == 0) {
    memset (c->buf + c->n + 64, 'p', r.payload_size);
    r.payload_hash
        = vr_payload_hash (c->buf + c->n + 64, r.payload_size);
  }
  r.hash = vr_record_chain (&r, c->chain);
  c->chain = r.hash;
  memcpy (at, &r, sizeof r);
  c->n += vr_record_size (r.payload_size);
  return at;
}

static void
add_write (struct craft *c)
{
  add_record (c, (struct vr_record){ .kind = VR_WRITE, .length = 100,
                                     .payload_size = 100 });
}

static void
add_seal (struct craft *c, uint64_t epoch, bool padded)
{
  add_record (c, (struct vr_record){ .kind = VR_SEAL, .epoch = epoch });
  if (padded && (c->lsn + c->n) % VR_BLOCK != 0)
    add_record (c, (struct vr_record){
                       .kind = VR_PAD, .epoch = epoch,
                       .payload_size = (uint32_t) (
                           VR_BLOCK - (c->lsn + c->n) % VR_BLOCK - 64) });
}

/* It must be refused and leave no trace. */
static void
expect_refused (struct vr_log *b, struct craft *c, int want, const char *why)
{
  struct vr_log_info before, after;
  struct vr_raw_result result;
  const char *reason;
  int err;

  vr_log_info (b, &before);
  err = vr_log_append_raw (b, c->lsn, c->buf, c->n, 1, &result, &reason);
  if (err != want || (why && strcmp (reason, why) != 0))
    fail_msg ("%d, %s; expected %d, %s", err, reason ? reason : "", want,
              why ? why : "");
  vr_log_info (b, &after);
  assert_memory_equal (&before, &after,
                       offsetof (struct vr_log_info, failed));
  assert_int_equal (after.failed, 0);
}

static void
expect_accepted (struct vr_log *b, struct craft *c)
{
  struct vr_raw_result result;
  const char *reason;

  if (vr_log_append_raw (b, c->lsn, c->buf, c->n, 1, &result, &reason) != 0)
    fail_msg ("%s", reason);
  assert_int_equal (vr_log_head (b), c->lsn + c->n);
}

/* A backup with something sealed, in the middle of a segment. */
static struct pair
raw_pair (void **state)
{
  struct pair x = new_pair (*state, 400, 16384, 8);

  append (&x.p, VR_WRITE, 1000);
  seal (&x.p);
  ship (&x);
  return x;
}

static void
test_raw_records (void **state)
{
  static struct craft c;
  struct pair x = raw_pair (state);
  const struct vr_record w = { .kind = VR_WRITE, .length = 100,
                               .payload_size = 100 };
  struct vr_record r;

#define BAD(change, why)                                                      \
  do {                                                                        \
    r = w;                                                                    \
    change;                                                                   \
    begin_craft (&c, x.b);                                                    \
    add_write (&c);                                                           \
    add_record (&c, r);                                                       \
    expect_refused (x.b, &c, -EBADMSG, why);                                  \
  } while (0)

  BAD (r.lsn = 64, "record of another position");
  BAD (r.generation = 2, "record of a newer generation than its writer");
  BAD (r.epoch = c.epoch - 1, "epoch goes back");
  BAD (r.epoch = VR_EPOCH_MAX, "impossible epoch");
  BAD (r.payload_hash = 1, "payload damaged");
  BAD (r.offset = DISK - 99, "range beyond the end of the disk");
  BAD (r.length = 99, "write record whose payload is not its length");
  BAD (r.flags = 4, "unknown record flag");
  BAD ((r.kind = VR_JOIN, r.payload_size = 0), "unknown record kind");
  BAD ((r.kind = 0, r.payload_size = 0), "unknown record kind");
  BAD ((r.kind = VR_ZERO, r.payload_size = 0, r.length = 0), "empty range");
#undef BAD
  begin_craft (&c, x.b);
  add_write (&c);
  add_write (&c);
  c.n -= 64;
  expect_refused (x.b, &c, -EBADMSG, "record cut short");
  c.n -= 128 - 32;
  expect_refused (x.b, &c, -EBADMSG, "record header cut short");
  begin_craft (&c, x.b);
  c.chain ^= 1;
  add_write (&c);
  expect_refused (x.b, &c, -EBADMSG,
                  "record does not follow the log held here");
  begin_craft (&c, x.b);
  add_write (&c);
  expect_accepted (x.b, &c);
  end_pair (&x);
}

static void
test_raw_seals (void **state)
{
  static struct craft c;
  struct pair x = raw_pair (state);

  begin_craft (&c, x.b);
  add_seal (&c, c.epoch, false);
  expect_refused (x.b, &c, -EBADMSG, "seal not padded to a sync boundary");
  add_write (&c);
  expect_refused (x.b, &c, -EBADMSG, NULL);
  begin_craft (&c, x.b);
  add_seal (&c, c.epoch - 1, true);
  expect_refused (x.b, &c, -EBADMSG, NULL);
  begin_craft (&c, x.b);
  add_seal (&c, c.epoch, true);
  add_seal (&c, c.epoch, true);
  expect_refused (x.b, &c, -EBADMSG, NULL);
  begin_craft (&c, x.b);
  add_seal (&c, c.epoch, true);
  add_write (&c); /* of the epoch just sealed */
  expect_refused (x.b, &c, -EBADMSG, "epoch goes back");
  begin_craft (&c, x.b);
  add_seal (&c, c.epoch, true);
  add_seal (&c, c.epoch + 5, true);
  expect_accepted (x.b, &c);
  end_pair (&x);
}

static void
test_raw_places (void **state)
{
  static struct craft c;
  struct pair x = raw_pair (state);
  struct vr_log_info info;

  begin_craft (&c, x.b);
  add_write (&c);
  c.lsn += 64;
  expect_refused (x.b, &c, -ERANGE, NULL);
  c.lsn = 0;
  expect_refused (x.b, &c, -ERANGE, NULL);
  c.lsn = 2 * 16384;
  expect_refused (x.b, &c, -ERANGE, NULL); /* no header that links here */
  begin_craft (&c, x.b);
  while (c.lsn + c.n <= 2 * 16384)
    add_record (&c, (struct vr_record){ .kind = VR_WRITE, .length = 1000,
                                        .payload_size = 1000 });
  expect_refused (x.b, &c, -EBADMSG, "write passes the end of a segment");
  vr_log_info (x.b, &info);
  assert_false (vr_log_expects (x.b, info.head + 64, c.buf, c.n));
  assert_true (vr_log_expects (x.b, info.head, c.buf, c.n));
  end_pair (&x);
}

static void
begin_segment (struct craft *c, struct vr_log *b, struct vr_segment *s)
{
  struct vr_log_info info;

  vr_log_info (b, &info);
  *s = (struct vr_segment){ .version = VR_VERSION, .lsn = 2 * 16384,
                            .prev_chain = info.head_chain };
  memcpy (s->magic, VR_SEGMENT_MAGIC, 8);
  memcpy (s->log_id, info.super.log_id, 16);
  begin_craft (c, b);
  c->lsn = s->lsn;
}

static void
put_segment (struct craft *c, struct vr_segment *s)
{
  vr_segment_seal (s);
  memcpy (c->buf, s, sizeof *s);
  c->n = sizeof *s;
  c->chain = s->checksum;
}

static void
test_raw_segments (void **state)
{
  static struct craft c;
  struct pair x = raw_pair (state);
  struct vr_segment s;

  begin_segment (&c, x.b, &s);
  s.prev_chain ^= 1;
  put_segment (&c, &s);
  add_write (&c);
  expect_refused (x.b, &c, -ERANGE, NULL);
  begin_segment (&c, x.b, &s);
  s.log_id[0] ^= 1;
  put_segment (&c, &s);
  add_write (&c);
  expect_refused (x.b, &c, -EBADMSG,
                  "segment header damaged or of another log");
  begin_segment (&c, x.b, &s);
  s.lsn = 3 * 16384;
  put_segment (&c, &s);
  expect_refused (x.b, &c, -EBADMSG, NULL);
  begin_segment (&c, x.b, &s);
  put_segment (&c, &s);
  c.n = 64;
  expect_refused (x.b, &c, -ERANGE, NULL);
  begin_segment (&c, x.b, &s);
  put_segment (&c, &s);
  put_segment (&c, &s);
  memcpy (c.buf + 128, c.buf, 128);
  c.n = 256;
  expect_refused (x.b, &c, -EBADMSG, NULL);
  begin_segment (&c, x.b, &s);
  put_segment (&c, &s);
  add_write (&c);
  expect_accepted (x.b, &c);
  end_pair (&x);
}

/* Any byte of a good batch changed, or its end missing. */
static void
test_raw_flips (void **state)
{
  static struct craft c, good;
  struct pair x = raw_pair (state);
  struct vr_segment s;

  for (int with_header = 0; with_header < 2; with_header++) {
    if (with_header) {
      begin_segment (&good, x.b, &s);
      put_segment (&good, &s);
    } else
      begin_craft (&good, x.b);
    add_write (&good);
    add_record (&good, (struct vr_record){ .kind = VR_TRIM, .length = 5 });
    add_seal (&good, good.epoch, true);
    for (size_t i = 0; i < good.n; i++) {
      const size_t pad_payload = with_header ? 448 + 64 : 320 + 64;
      struct vr_raw_result result;
      const char *reason;

      /* Padding is nobody's: behind a payload, or a pad's own. */
      if (i >= pad_payload
          || (i >= 64 + 100 + (with_header ? 128 : 0)
              && i < 64 + 128 + (with_header ? 128u : 0u)))
        continue;
      c = good;
      c.buf[i] ^= 0x40;
      assert_int_not_equal (vr_log_append_raw (x.b, c.lsn, c.buf, c.n, 1,
                                               &result, &reason),
                            0);
    }
    for (size_t n = 1; n < good.n; n++) {
      c = good;
      c.n = n;
      if (n == 192 || n == 256 || (with_header && (n == 128 || n == 320
                                                   || n == 384)))
        continue; /* whole records */
      expect_refused (x.b, &c, n < 128 && with_header ? -ERANGE : -EBADMSG,
                      NULL);
    }
  }
  expect_accepted (x.b, &good);
  end_pair (&x);
}

/* ---- Damage ------------------------------------------------------------- */

/* A small journal with two committed epochs and a tail, as bytes. */
static uint8_t *
make_journal (struct env *e, struct rig *r, uint64_t *ret_size)
{
  *r = new_rig (e, 500, 8192, 4);
  append (r, VR_WRITE, 300);
  append (r, VR_ZERO, 70);
  seal (r);
  append (r, VR_WRITE, 2000);
  append (r, VR_WRITE, 900);
  append (r, VR_TRIM, 5);
  seal (r);
  commit_all (r, false);
  assert_int_equal (vr_log_set_flags (r->log, 0, 0), 0);
  append (r, VR_WRITE, 500);
  assert_int_equal (vr_log_sync (r->log, vr_log_head (r->log)), 0);
  return read_file (e->io, in_dir (e, "log"), ret_size);
}

/* Open what may be damaged: refused, or all that was committed is there. */
static int
try_open (struct rig *r, uint64_t committed_epoch, uint64_t committed_lsn,
          struct vr_log_problem *problem)
{
  const struct vr_log_open_options o = { .cache_segments = 2 };
  struct compare c = { .r = r };
  struct vr_lock_owner owner;
  struct vr_log_info info;
  struct vr_mark from;
  struct vr_log *log;
  int err = vr_log_open (r->e->io, in_dir (r->e, "log"), &o, &log, problem,
                         &owner);

  if (err < 0) {
    assert_true (err == -EUCLEAN || err == -EBADMSG || err == -EPROTO);
    assert_true (problem->text[0] != 0);
    return err;
  }
  vr_log_info (log, &info);
  assert_true (info.sealed_epoch >= committed_epoch);
  assert_true (info.head >= committed_lsn);
  vr_log_tail_mark (log, &from);
  assert_int_equal (from.lsn, 8192);
  assert_int_equal (vr_log_scan (log, &from, committed_lsn, 0,
                                 compare_record, &c, NULL, NULL),
                    0);
  assert_true (c.at >= 5);
  vr_log_close (log);
  return 0;
}

static void
test_flip_every_byte (void **state)
{
  struct env *e = *state;
  struct rig r;
  uint64_t size, rng = seeded (7);
  uint8_t *file = make_journal (e, &r, &size);
  struct vr_log_info info;
  struct vr_log_problem problem;
  unsigned refused = 0;

  vr_log_info (r.log, &info);
  vr_log_close (r.log);
  r.log = NULL;
  for (uint64_t at = 0; at < size; at++) {
    const uint8_t mask = (uint8_t) (1 + below (&rng, 255));
    const uint64_t lsn = at - VR_DATA_START; /* slot 1 is segment 1 */
    int err;

    if (at == VR_SUPER_A + VR_BLOCK)
      at = VR_SUPER_B;
    if (at == VR_SUPER_B + VR_BLOCK)
      at = VR_DATA_START;
    vr_io_sim_flip (e->io, "./log", at, mask);
    err = try_open (&r, info.committed_epoch, info.committed, &problem);
    vr_io_sim_flip (e->io, "./log", at, mask);
    if (err == 0)
      continue;
    refused++;
    /* One bad superblock is survived; else it is where the damage is. */
    assert_true (at >= VR_DATA_START && err == -EUCLEAN);
    assert_true (lsn >= 8192 && lsn < info.committed);
    assert_true (problem.file_offset <= at);
    assert_true (problem.file_offset + 4096 > at);
  }
  /* All of what is committed, but for the padding. */
  assert_true (refused > 3500);
  free (file);
  end_rig (&r);
}

static void
test_every_length (void **state)
{
  struct env *e = *state;
  struct rig r;
  uint64_t size;
  uint8_t *file = make_journal (e, &r, &size);
  struct vr_log_problem problem;
  struct vr_log_info info;
  struct vr_file *f;

  vr_log_info (r.log, &info);
  vr_log_close (r.log);
  r.log = NULL;
  assert_int_equal (e->io->ops->open (e->io, "./log", 0, &f), 0);
  for (uint64_t n = size; n-- > 0;) {
    if (n > 7000 && n < size - 40000)
      n -= 96;
    assert_int_equal (f->io->ops->truncate (f, n), 0);
    assert_true (try_open (&r, info.committed_epoch, info.committed,
                           &problem)
                 < 0);
  }
  vr_close (f);
  free (file);
  end_rig (&r);
}

/* Slots put in each other's place: never taken for something else. */
static void
test_swapped_slots (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 501, 8192, 6);
  uint8_t *file, *bad;
  uint64_t size;
  struct vr_log_info info;

  while (vr_log_head (r.log) < 20 * 8192) {
    const int err = append (&r, VR_WRITE, 1 + below (&r.rng, 4000));

    if (err == -EAGAIN)
      make_space (&r);
    else
      assert_int_equal (err, 0);
  }
  make_space (&r);
  append (&r, VR_WRITE, 100);
  seal (&r);
  commit_all (&r, false);
  assert_int_equal (vr_log_set_flags (r.log, 0, 0), 0);
  vr_log_info (r.log, &info);
  vr_log_close (r.log);
  r.log = NULL;
  file = read_file (e->io, "./log", &size);
  bad = malloc (size);
  for (unsigned from = 0; from < 6; from++)
    for (unsigned to = 0; to < 6; to++) {
      struct vr_log_problem problem;
      int err;

      memcpy (bad, file, size);
      memcpy (bad + VR_DATA_START + to * 8192,
              file + VR_DATA_START + from * 8192, 8192);
      write_file (e->io, "./log", bad, size);
      err = open_log_error (e->io, "./log", &problem);
      if (err == 0) {
        r.log = open_log (e->io, "./log", 2);
        assert_true (vr_log_head (r.log) <= info.head);
        assert_true (vr_log_head (r.log) >= info.committed);
        vr_log_close (r.log);
        r.log = NULL;
      } else
        assert_int_equal (err, -EUCLEAN);
      assert_true (from != to || err == 0);
    }
  free (file);
  free (bad);
  end_rig (&r);
}

/* ---- Power loss --------------------------------------------------------- */

/* What was synced is there; of the rest, a prefix. */
static void
test_power_loss (void **state)
{
  (void) state;
  for (unsigned seed = 0; seed < 300; seed++) {
    struct env e = { .io = vr_io_sim_new (seed), .sim = true, .dir = "." };
    struct rig r = new_rig (&e, 600 + seed, UINT64_C (8192) << seed % 3, 8);
    const struct vr_sim_crash crash
        = { (unsigned) below (&r.rng, 128), (unsigned) below (&r.rng, 128),
            chance (&r.rng, 70) };
    size_t synced = 0;

    for (int life = 0; life < 4; life++) {
      for (uint64_t i = below (&r.rng, 40); i > 0; i--) {
        const int err = append_some (&r);

        if (err == -EAGAIN || chance (&r.rng, 10)) {
          make_space (&r);
          synced = r.count;
        }
        if (chance (&r.rng, 10))
          assert_int_equal (vr_log_write_out (r.log, 0), 0);
      }
      vr_log_close (r.log);
      vr_io_sim_crash (e.io, &crash);
      r.log = NULL;
      r.log = open_log (e.io, "./log", 2);
      while (r.count > 0 && r.entry[r.count - 1].end > vr_log_head (r.log))
        r.count--;
      assert_true (r.count >= synced);
      synced = r.count;
      check_contents (&r);
      if (chance (&r.rng, 50))
        new_epoch (&r);
      assert_int_equal (vr_log_start_primary (r.log, r.epoch), 0);
    }
    end_rig (&r);
    vr_io_sim_free (e.io);
  }
}

/* What a restart found is not put at risk by what comes next, even if the
   block it ends in would be turned into garbage. */
static void
test_restart_spares_block (void **state)
{
  static const struct vr_sim_crash garbage = { 0, 256, true };
  struct env *e = *state;
  struct rig r = new_rig (e, 800, 16384, 8);
  size_t found;

  for (int i = 0; i < 5; i++)
    append (&r, VR_WRITE, 1500);
  assert_int_equal (vr_log_write_out (r.log, 0), 0);
  vr_log_close (r.log);
  vr_io_sim_kill (e->io);
  r.log = open_log (e->io, in_dir (e, "log"), 2);
  while (r.entry[r.count - 1].end > vr_log_head (r.log))
    r.count--;
  found = r.count;
  assert_true (found >= 2 && r.entry[found - 1].end % VR_BLOCK != 0);
  vr_io_sim_die_at (e->io, vr_io_sim_steps (e->io) + 2);
  assert_int_equal (vr_log_start_primary (r.log, r.epoch), -ESHUTDOWN);
  vr_log_close (r.log);
  vr_io_sim_crash (e->io, &garbage);
  r.log = NULL;
  reopen (&r, true);
  assert_true (r.count >= found);
  end_rig (&r);
}

/* ---- Threads ------------------------------------------------------------ */

enum { THREADS = 8, FLUSHES = 60 };

static atomic_uint syncs;
static int (*real_sync) (struct vr_file *);

static int
slow_sync (struct vr_file *f)
{
  atomic_fetch_add (&syncs, 1);
  usleep (300);
  return real_sync (f);
}

static void *
flusher (void *opaque)
{
  struct rig *r = opaque;

  for (uint64_t i = 0; i < FLUSHES; i++) {
    struct vr_reservation v;

    assert_int_equal (vr_log_reserve (r->log, VR_WRITE, 0, i * 100, 100,
                                      &(uint8_t[100]){ 1 }, &v),
                      0);
    vr_log_publish (r->log, &v);
    assert_int_equal (vr_log_sync (r->log, v.end), 0);
    assert_true (vr_log_durable (r->log) >= v.end);
  }
  return NULL;
}

static void *
committer (void *opaque)
{
  struct rig *r = opaque;

  for (int i = 0; i < 50; i++) {
    uint64_t lsn;

    cut (r);
    assert_int_equal (vr_log_seal (r->log, &lsn), 0);
    if (lsn)
      assert_int_equal (vr_log_sync (r->log, lsn), 0);
    commit_all (r, true);
    usleep (500);
  }
  return NULL;
}

/* One fdatasync serves all who wait. */
static void
test_group_commit (void **state)
{
  struct env *e = *state;
  struct rig r = new_rig (e, 700, 65536, 64);
  struct vr_io_ops ops = *e->io->ops;
  struct vr_io counting = { .ops = &ops };
  pthread_t t[THREADS], c;

  real_sync = ops.sync;
  ops.sync = slow_sync;
  r.log->io = &counting; /* the real operations look at the file alone */
  r.log->file->io = &counting;
  atomic_store (&syncs, 0);
  for (int i = 0; i < THREADS; i++)
    pthread_create (&t[i], NULL, flusher, &r);
  pthread_create (&c, NULL, committer, &r);
  for (int i = 0; i < THREADS; i++)
    pthread_join (t[i], NULL);
  pthread_join (c, NULL);
  assert_true (atomic_load (&syncs) < THREADS * FLUSHES / 2);
  r.log->file->io = e->io;
  end_rig (&r);
}

#define BOTH(on)                                                              \
  on (test_create), on (test_open_errors), on (test_wrap),                    \
      on (test_positions), on (test_ship), on (test_ship_from_file),          \
      on (test_truncate), on (test_flags_and_generation)

int
main (void)
{
  const struct CMUnitTest real_tests[] = {
    BOTH (ON_REAL),
    ON_REAL (test_group_commit),
  };
  const struct CMUnitTest sim_tests[] = {
    BOTH (ON_SIM),
    ON_SIM (test_create_no_space),
    ON_SIM (test_create_crash),
    ON_SIM (test_create_kill),
    ON_SIM (test_geometry),
    ON_SIM (test_pieces),
    ON_SIM (test_late_seal),
    ON_SIM (test_late_claim),
    ON_SIM (test_seal_by_write),
    ON_SIM (test_in_flight),
    ON_SIM (test_dead_log),
    ON_SIM (test_chain_at),
    ON_SIM (test_ship_unsynced),
    ON_SIM (test_raw_records),
    ON_SIM (test_raw_seals),
    ON_SIM (test_raw_places),
    ON_SIM (test_raw_segments),
    ON_SIM (test_raw_flips),
    ON_SIM (test_flip_every_byte),
    ON_SIM (test_every_length),
    ON_SIM (test_swapped_slots),
    ON_SIM (test_power_loss),
    ON_SIM (test_restart_spares_block),
  };
  const int failed_real
      = cmocka_run_group_tests_name ("real", real_tests, NULL, NULL);
  const int failed_sim
      = cmocka_run_group_tests_name ("sim", sim_tests, NULL, NULL);

  return failed_real + failed_sim > 0;
}
