/* SPDX-License-Identifier: BSD-3-Clause */
/* Crashes everywhere: one VM of one or two disks, its primary and its backup,
 * run by a seeded random schedule in simulated environments, die at random
 * steps and recover with the code that ships.
 *
 * Each disk's process has an environment of its own (a process may die alone,
 * or all with the host), the backup has one.  The driver below does what the
 * plugins do, one call at a time.  Outside of it stands the oracle: it knows
 * every write with its epoch, which flushes were acknowledged and which
 * commits were reported, and checks the invariants of the design:
 *
 *   I1  the backup's disk is the disk at exactly epoch k; the primary's is a
 *       prefix of its history at or after the last acknowledged flush
 *   I2  k >= every commit that was reported    I3  k never goes back
 *   I4  recovery cut short and done again gives the same
 *   I5  both disks are at the same k
 *   I7  when faults stop, both sides become equal
 *   I8  a flipped bit in the backup's journal is refused or does no harm
 *   I9  when faults stop, everything is committed again
 *
 * VR_SEED=N runs one seed, VR_SEEDS=N so many of them.
 */
#include "util.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "journal/disk.h"
#include "journal/ship.h"
#include "journal/vm.h"

#define DISKS_MAX 2
#define SEALS_MAX 4
#define WRITE_MAX 12000
#define WRITER_TIMEOUT_NS 1000000000

/* See wrap.mk. */
int __wrap_pthread_cond_timedwait (pthread_cond_t *, pthread_mutex_t *,
                                   const struct timespec *);
int
__wrap_pthread_cond_timedwait (pthread_cond_t *c, pthread_mutex_t *m,
                               const struct timespec *t)
{
  (void) c;
  (void) m;
  (void) t;
  return ETIMEDOUT;
}

/* ---- History ------------------------------------------------------------ */

struct op {
  uint64_t offset, length;
  uint64_t epoch;
  uint64_t end;  /* log position behind it; UINT64_MAX: it failed half-way */
  uint8_t *data; /* NULL: zeros */
};

struct history {
  uint64_t size;
  uint8_t *start; /* the image before the first op */
  uint8_t *now;   /* behind the last op */
  struct op *op;
  size_t count, allocated;
  size_t acked; /* so many ops were promised to survive */
};

static void
apply_op (const struct op *o, uint64_t length, uint8_t *disk)
{
  if (o->data)
    memcpy (disk + o->offset, o->data, length);
  else
    memset (disk + o->offset, 0, length);
}

static struct op *
add_op (struct history *h, uint64_t epoch, uint64_t offset, uint64_t length,
        uint8_t *data)
{
  if (h->count == h->allocated) {
    h->allocated = h->allocated ? 2 * h->allocated : 64;
    h->op = realloc (h->op, h->allocated * sizeof *h->op);
    assert_non_null (h->op);
  }
  h->op[h->count] = (struct op){ offset, length, epoch, UINT64_MAX, data };
  return &h->op[h->count++];
}

/* Forget all ops from the n-th on. */
static void
cut_history (struct history *h, size_t n)
{
  while (h->count > n)
    free (h->op[--h->count].data);
  memcpy (h->now, h->start, h->size);
  for (size_t i = 0; i < n; i++)
    apply_op (&h->op[i], h->op[i].length, h->now);
}

/* The disk at the end of epoch k; free it. */
static uint8_t *
state_at (const struct history *h, uint64_t k)
{
  uint8_t *disk = malloc (h->size);

  assert_non_null (disk);
  memcpy (disk, h->start, h->size);
  for (size_t i = 0; i < h->count && h->op[i].epoch <= k; i++)
    apply_op (&h->op[i], h->op[i].length, disk);
  return disk;
}

/* The last op failed or was cut by a crash; records end at multiples of 4096
   of the disk, so find out how much of it `disk` shows.  It shrinks to that
   and ends at LSN end.  False if no part explains what is seen. */
static bool
settle_last_op (struct history *h, const uint8_t *disk, uint64_t end)
{
  struct op *o = &h->op[h->count - 1];
  const uint64_t whole = o->length;
  uint64_t n = 0;

  cut_history (h, h->count); /* the state with it */
  if (memcmp (h->now, disk, h->size) == 0) {
    o->end = end;
    return true;
  }
  o->length = 0;
  cut_history (h, h->count);
  while (memcmp (h->now, disk, h->size) != 0) {
    if (n == whole)
      return false;
    n += 4096 - (o->offset + n) % 4096;
    n = n < whole ? n : whole;
    apply_op (o, n, h->now);
  }
  o->length = n;
  o->end = end;
  if (n == 0)
    cut_history (h, h->count - 1);
  return true;
}

/* ---- The world ---------------------------------------------------------- */

struct disk {
  char name[16];
  struct vr_io *io;
  struct vr_disk *d; /* NULL: its process is dead */
  struct history h;

  /* The link to the backup. */
  struct vr_vm_member *m; /* NULL: not connected */
  uint64_t session;
  struct vr_ship_cursor cursor;
  uint64_t owed[SEALS_MAX]; /* seals that were sent, not answered */
  size_t owed_count;

  /* The initial copy of this connection. */
  bool copying;
  uint64_t copy_at;
  uint64_t copied_epoch; /* holds the last piece; 0: not there yet */
};

struct world {
  uint64_t rng;
  uint8_t vm_id[16];
  struct disk disk[DISKS_MAX];
  unsigned disks;
  struct vr_epoch *epoch;

  struct vr_io *backup;
  struct vr_vm *vm; /* NULL: dead */
  bool sync_memory;
  bool forgot; /* sync=memory lost its memory: all promises are off */

  uint64_t reported; /* the newest commit the primary heard of */
  uint64_t seen;     /* the newest k */
};

static struct world w;
static uint64_t current_seed;
static bool finished;

static bool
refuse_to_wait (void *opaque)
{
  (void) opaque;
  return false;
}

/* Did the process or machine behind io die? */
static bool
is_dead (struct vr_io *io)
{
  struct vr_file *f;

  return io->ops->open (io, "none", VR_OPEN_READ_ONLY, &f) == -ESHUTDOWN;
}

/* err must be 0, unless who returned it is dead. */
static bool
worked (struct vr_io *io, int err)
{
  if (err < 0 && !is_dead (io))
    fail_msg ("unexpected error: %s", strerror (-err));
  return err == 0;
}

static void
die_soon (struct vr_io *io)
{
  vr_io_sim_die_at (io, vr_io_sim_steps (io) + 1 + below (&w.rng, 30));
}

/* ---- The oracle --------------------------------------------------------- */

static void
expect_equal (const uint8_t *got, const uint8_t *want, uint64_t size,
              const char *what, uint64_t k)
{
  for (uint64_t i = 0; i < size; i++)
    if (got[i] != want[i])
      fail_msg ("%s (k %llu): byte %llu is %02x, not %02x", what,
                (unsigned long long) k, (unsigned long long) i, got[i],
                want[i]);
}

/* I1 and I5: this member's disk at k. */
static void
check_member (struct disk *d, struct vr_vm_member *m, uint64_t k)
{
  uint8_t *got = malloc (d->h.size), *want;
  struct vr_view v;

  assert_int_equal (vr_view_open (&v, &m->img, 0), 0);
  if (v.epoch > k)
    fail_msg ("%s: view of epoch %llu, committed %llu", d->name,
              (unsigned long long) v.epoch, (unsigned long long) k);
  /* What is only in memory is not in the view yet. */
  want = state_at (&d->h, w.sync_memory ? v.epoch : k);
  assert_int_equal (vr_view_ready (&v), 0);
  assert_int_equal (vr_view_read (&v, got, d->h.size, 0), 0);
  vr_view_close (&v);
  expect_equal (got, want, d->h.size, d->name, k);
  free (got);
  free (want);
}

static bool
is_copying (struct vr_vm_member *m)
{
  struct vr_log_info info;

  vr_log_info (m->log, &info);
  return info.super.flags & VR_LOG_COPYING;
}

static void
check_backup (void)
{
  const uint64_t k = w.vm->committed_epoch;

  if (w.vm->damaged.code)
    fail_msg ("backup: %s", w.vm->damaged.text);
  if (!w.forgot && (k < w.seen || k < w.reported))
    fail_msg ("k is %llu, but %llu was seen and %llu reported",
              (unsigned long long) k, (unsigned long long) w.seen,
              (unsigned long long) w.reported);
  w.seen = k;
  for (unsigned i = 0; i < w.disks; i++) {
    struct vr_vm_member *m = vr_vm_find (w.vm, w.disk[i].name);

    if (m && !is_copying (m))
      check_member (&w.disk[i], m, k);
  }
}

/* I1 of a primary that was just opened: which prefix of its history is it? */
static void
check_primary (struct disk *d)
{
  const uint64_t head = vr_log_head (d->d->log);
  uint8_t *got = malloc (d->h.size);
  size_t n = 0;

  while (n < d->h.count && d->h.op[n].end <= head)
    n++;
  if (n < d->h.acked)
    fail_msg ("%s: %zu writes of %zu acknowledged ones are left", d->name, n,
              d->h.acked);
  assert_int_equal (vr_disk_read (d->d, got, d->h.size, 0), 0);
  if (n < d->h.count) {
    cut_history (&d->h, n + 1);
    if (!settle_last_op (&d->h, got, head))
      fail_msg ("%s: not a prefix of its history", d->name);
  }
  expect_equal (got, d->h.now, d->h.size, "primary", 0);
  free (got);
}

/* ---- The link ----------------------------------------------------------- */

static void
disconnect (struct disk *d)
{
  if (d->m == NULL)
    return;
  vr_log_ship_cursor_end (d->d->log, &d->cursor);
  /* A backup that does not notice has another way to get rid of it. */
  if (w.vm && chance (&w.rng, 80))
    vr_vm_goodbye (d->m, d->session);
  d->m = NULL;
  d->owed_count = 0;
  d->copying = false;
}

/* The primary of d hears that epoch is committed. */
static void
report (struct disk *d, uint64_t epoch)
{
  if (w.reported < epoch)
    w.reported = epoch;
  if (!worked (d->io, vr_log_commit (d->d->log, epoch)))
    return;
  if (d->copying && d->copied_epoch && d->copied_epoch <= epoch
      && worked (w.backup, vr_vm_copied (d->m, d->session)))
    d->copying = false;
}

/* Answers to seals arrive, or are lost with the connection. */
static void
deliver (void)
{
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];

    while (d->owed_count > 0 && w.vm->committed_epoch >= d->owed[0]) {
      const uint64_t epoch = d->owed[0];

      if (chance (&w.rng, 2)) {
        disconnect (d);
        break;
      }
      memmove (d->owed, d->owed + 1, --d->owed_count * sizeof d->owed[0]);
      report (d, epoch);
      if (is_dead (w.backup))
        return;
    }
  }
}

/* Send one batch. */
static void
ship (struct disk *d)
{
  const struct vr_mark before = d->cursor.at;
  struct vr_ship_batch b;
  struct vr_refused refused;
  int err;

  if (d->m == NULL || d->owed_count == SEALS_MAX
      || !worked (d->io, vr_log_ship_batch (d->d->log, &d->cursor, &b))
      || b.size == 0)
    return;
  err = vr_vm_write (d->m, d->session, b.lsn, b.data, b.size, NULL, &refused);
  vr_log_put_segment (d->d->log, b.segment);
  if (is_dead (w.backup))
    return;
  if (err < 0 && err != -ESHUTDOWN)
    fail_msg ("backup refused: %s", refused.text);
  if (err < 0 && vr_log_head (d->m->log) != b.lsn + b.size) {
    /* Its journal is full; a real one would not have answered yet. */
    vr_log_ship_cursor_end (d->d->log, &d->cursor);
    d->cursor = (struct vr_ship_cursor){ .at = before };
    return;
  }
  if (err == 0 && b.sealed_epoch > w.vm->committed_epoch)
    fail_msg ("answered before the commit");
  if (b.sealed_epoch)
    d->owed[d->owed_count++] = b.sealed_epoch;
  deliver ();
}

static void
carry_out (struct disk *d, struct vr_ship_plan *plan)
{
  struct vr_refused refused;
  struct vr_vm_member *m = NULL;
  struct vr_hello hello;
  int err;

  d->session = next_random (&w.rng) | 1;
  err = vr_ship_hello (d->d->log, plan, "node", d->session, &hello);
  if (err == -EAGAIN || !worked (d->io, err))
    return;
  err = vr_vm_hello (w.vm, d->name, &hello, &m, &refused);
  if (is_dead (w.backup))
    return;
  /* With sync=memory the commit point may only now follow what was said. */
  if (err < 0 && w.sync_memory && refused.code == VR_REFUSED_HISTORY)
    return;
  if (err < 0)
    fail_msg ("hello refused: %s", refused.text);
  d->m = m;
  d->cursor = (struct vr_ship_cursor){ .at = plan->start };
  d->copying = plan->plan != VR_PLAN_RESUME;
  d->copy_at = d->copied_epoch = 0;
}

static void
connect_disk (struct disk *d)
{
  const struct vr_refused none = { 0 };
  struct vr_ship_plan plan;
  struct vr_status status;

  if (d->d == NULL || w.vm == NULL || d->m)
    return;
  vr_io_sim_sleep (w.backup, WRITER_TIMEOUT_NS);
  vr_vm_status (w.vm, d->name, &none, &status);
  if (!worked (d->io, vr_ship_plan (d->d->log, &status, &plan)))
    return;
  if (plan.plan == VR_PLAN_REFUSED && w.forgot)
    return;
  if (plan.plan == VR_PLAN_REFUSED || plan.plan == VR_PLAN_FENCED)
    fail_msg ("%s: refused: %s", d->name, plan.why);
  if (plan.committed_epoch)
    report (d, plan.committed_epoch);
  carry_out (d, &plan);
}

/* Seals that an earlier connection sent are answered by nobody when other
   members let them commit: with nothing owed, look. */
static void
ask (struct disk *d)
{
  const struct vr_refused none = { 0 };
  struct vr_ship_plan plan;
  struct vr_status status;

  if (d->m == NULL || d->owed_count > 0)
    return;
  vr_vm_status (w.vm, d->name, &none, &status);
  if (worked (d->io, vr_ship_plan (d->d->log, &status, &plan))
      && plan.committed_epoch)
    report (d, plan.committed_epoch);
}

/* One piece of the initial copy. */
static void
copy (struct disk *d)
{
  static uint8_t buf[VR_PAYLOAD_MAX];
  uint64_t n;
  bool zero;

  if (d->m == NULL || !d->copying || d->copied_epoch)
    return;
  if (!worked (d->io, vr_disk_extent (d->d, d->copy_at, d->h.size, &n, &zero)))
    return;
  if (!zero) {
    const uint64_t max = 1 + below (&w.rng, 20000);
    int err;

    n = n < max ? n : max;
    err = vr_disk_copy (d->d, buf, n, d->copy_at);
    if (err == -ESHUTDOWN || !worked (d->io, err))
      return;
  }
  d->copy_at += n;
  if (d->copy_at == d->h.size)
    d->copied_epoch = vr_epoch_current (w.epoch);
}

/* ---- The guest and the clock -------------------------------------------- */

static void
guest_write (struct disk *d)
{
  const unsigned kind = (unsigned) below (&w.rng, 10);
  const uint64_t offset = below (&w.rng, d->h.size);
  uint64_t length = 1 + below (&w.rng, chance (&w.rng, 50) ? 600 : WRITE_MAX);
  struct op *o;
  int err;

  if (length > d->h.size - offset)
    length = d->h.size - offset;
  o = add_op (&d->h, vr_epoch_current (w.epoch), offset, length, NULL);
  if (kind > 1) {
    o->data = malloc (length);
    fill_random (&w.rng, o->data, length);
    err = vr_disk_write (d->d, o->data, length, offset);
  } else
    err = vr_disk_zero (d->d, length, offset, kind == 0);
  if (is_dead (d->io))
    return; /* what became of it, recovery will show */
  if (err == 0) {
    o->end = vr_log_head (d->d->log);
    apply_op (o, length, d->h.now);
  } else {
    uint8_t *got = malloc (d->h.size);

    assert_int_equal (err, -ESHUTDOWN); /* gave up: the journal is full */
    assert_int_equal (vr_disk_read (d->d, got, d->h.size, 0), 0);
    assert_true (settle_last_op (&d->h, got, vr_log_head (d->d->log)));
    free (got);
  }
}

static void
guest_read (struct disk *d)
{
  const uint64_t offset = below (&w.rng, d->h.size);
  const uint64_t n = 1 + below (&w.rng, d->h.size - offset);
  uint8_t *got = malloc (n);

  if (worked (d->io, vr_disk_read (d->d, got, n, offset)))
    expect_equal (got, d->h.now + offset, n, "read", offset);
  free (got);
}

static void
guest_flush (struct disk *d)
{
  if (worked (d->io, vr_disk_sync (d->d)))
    d->h.acked = d->h.count;
}

static void
cut (void)
{
  vr_epoch_cut (w.epoch, vr_epoch_current (w.epoch), 0);
}

static void
seal (struct disk *d)
{
  uint64_t lsn;
  int err = vr_log_seal (d->d->log, &lsn);

  if (err == -EAGAIN || !worked (d->io, err))
    return;
  if (chance (&w.rng, 80))
    worked (d->io, vr_log_sync (d->d->log, vr_log_head (d->d->log)));
}

static void
apply_primary (struct disk *d)
{
  uint64_t n;

  worked (d->io, vr_image_apply (&d->d->img, below (&w.rng, 3) * 5000, &n));
}

static void
apply_backup (void)
{
  uint64_t n;

  worked (w.backup, vr_vm_apply (w.vm, below (&w.rng, 3) * 5000, &n));
}

/* ---- Death and recovery ------------------------------------------------- */

static struct vr_sim_crash
some_crash (void)
{
  struct vr_sim_crash c = { .torn = chance (&w.rng, 70) };

  c.drop = (unsigned) below (&w.rng, 257);
  c.garbage = (unsigned) below (&w.rng, 257 - c.drop);
  return c;
}

static void
end_primary (struct disk *d)
{
  disconnect (d);
  vr_disk_close (d->d);
  d->d = NULL;
}

static void
kill_primary (struct disk *d)
{
  end_primary (d);
  vr_io_sim_kill (d->io);
}

/* The host with all its disks' processes, and the counter. */
static void
crash_primaries (void)
{
  const struct vr_sim_crash c = some_crash ();

  for (unsigned i = 0; i < w.disks; i++) {
    end_primary (&w.disk[i]);
    vr_io_sim_crash (w.disk[i].io, &c);
    vr_io_sim_die_at (w.disk[i].io, 0);
  }
  vr_epoch_close (w.epoch);
  assert_int_equal (vr_epoch_new_private ("vm", w.vm_id, 1, &w.epoch), 0);
}

static void
end_backup (bool power)
{
  const struct vr_sim_crash c = some_crash ();
  struct vr_vm *vm = w.vm;

  w.vm = NULL;
  for (unsigned i = 0; i < w.disks; i++)
    disconnect (&w.disk[i]);
  vr_vm_close (vm);
  if (power)
    vr_io_sim_crash (w.backup, &c);
  else
    vr_io_sim_kill (w.backup);
  vr_io_sim_die_at (w.backup, 0);
  w.forgot |= power && w.sync_memory;
}

/* Whoever died since the last look is taken away. */
static void
bury (void)
{
  for (unsigned i = 0; i < w.disks; i++)
    if (is_dead (w.disk[i].io)) {
      if (chance (&w.rng, 50))
        crash_primaries ();
      else {
        kill_primary (&w.disk[i]);
        vr_io_sim_die_at (w.disk[i].io, 0);
      }
    }
  if (is_dead (w.backup))
    end_backup (chance (&w.rng, 60));
}

static struct vr_disk *
open_disk (struct disk *d)
{
  struct vr_disk_config c = {
    .image = "image", .journal = "journal", .vm = "vm", .disk = d->name,
    .cache_segments = 2 + (unsigned) below (&w.rng, 4), .direct = true,
  };
  struct vr_disk *disk = NULL;
  char message[512];
  int err;

  memcpy (c.vm_id, w.vm_id, sizeof c.vm_id);
  err = vr_disk_open (d->io, &c, &disk, message, sizeof message);
  if (err < 0 && !is_dead (d->io))
    fail_msg ("%s: %s: %s", d->name, strerror (-err), message);
  return disk;
}

/* Start the processes that are dead; all are up before the guest writes. */
static void
start_primaries (void)
{
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];

    if (d->d)
      continue;
    if (chance (&w.rng, 20))
      die_soon (d->io);
    d->d = open_disk (d);
    if (d->d == NULL)
      continue;
    check_primary (d);
    d->d->keep_waiting = refuse_to_wait;
    worked (d->io, vr_disk_start (d->d, w.epoch));
  }
}

static void
start_backup (void)
{
  const struct vr_vm_config c = {
    .dir = ".", .name = "vm", .create = true, .sync_memory = w.sync_memory,
    .writer_timeout_ns = WRITER_TIMEOUT_NS, .keep_waiting = refuse_to_wait,
  };
  char message[512];
  int err;

  if (w.vm)
    return;
  if (chance (&w.rng, 20))
    die_soon (w.backup);
  err = vr_vm_open (w.backup, &c, &w.vm, message, sizeof message);
  if (is_dead (w.backup)) {
    if (err < 0)
      w.vm = NULL;
    return;
  }
  if (err < 0)
    fail_msg ("backup: %s: %s", strerror (-err), message);
  check_backup ();
}

/* ---- The schedule ------------------------------------------------------- */

/* Things that happen to a disk whose process lives. */
static void
step_disk (struct disk *d)
{
  switch (below (&w.rng, 16)) {
  case 0: case 1: case 2: case 3: case 4:
    guest_write (d);
    break;
  case 5:
    guest_read (d);
    break;
  case 6:
    guest_flush (d);
    break;
  case 7: case 8:
    seal (d);
    break;
  case 9: case 10: case 11:
    ship (d);
    break;
  case 12:
    copy (d);
    copy (d);
    break;
  case 13:
    apply_primary (d);
    break;
  case 14:
    worked (d->io, vr_image_checkpoint (&d->d->img));
    break;
  default:
    connect_disk (d);
  }
}

/* What the plugins do all the time: pass an epoch on. */
static void
tick (void)
{
  cut ();
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];

    if (d->d == NULL)
      continue;
    connect_disk (d);
    if (w.vm)
      deliver ();
    ask (d);
    seal (d);
    for (int n = 0; n < 3 && !is_dead (d->io) && !is_dead (w.backup); n++) {
      copy (d);
      ship (d);
    }
    bury ();
  }
}

static void
disaster (void)
{
  struct disk *d = &w.disk[below (&w.rng, w.disks)];

  switch (below (&w.rng, 8)) {
  case 0:
    if (d->d)
      kill_primary (d);
    break;
  case 1:
    crash_primaries ();
    break;
  case 2: case 3:
    if (w.vm)
      end_backup (chance (&w.rng, 60));
    break;
  case 4: case 5:
    die_soon (d->io);
    break;
  case 6:
    die_soon (w.backup);
    break;
  default:
    disconnect (d);
  }
}

static void
step (void)
{
  const uint64_t what = below (&w.rng, 100);
  struct disk *d = &w.disk[below (&w.rng, w.disks)];

  if (what < 3)
    disaster ();
  else if (what < 10)
    start_primaries ();
  else if (what < 15)
    start_backup ();
  else if (what < 22)
    tick ();
  else if (what < 27)
    cut ();
  else if (what < 32 && w.vm)
    apply_backup ();
  else if (what < 34 && w.vm)
    worked (w.backup, vr_vm_checkpoint (w.vm, 0));
  else if (what < 36 && w.vm)
    check_backup ();
  else if (w.disk[0].d && w.disk[w.disks - 1].d)
    step_disk (d);
  bury ();
}

/* ---- The end ------------------------------------------------------------ */

static bool
all_protected (void)
{
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];
    struct vr_log_info info;

    if (d->d == NULL || d->m == NULL || d->copying)
      return false;
    vr_log_info (d->d->log, &info);
    if (d->h.count
        && info.committed_epoch < d->h.op[d->h.count - 1].epoch)
      return false;
  }
  return true;
}

/* I7 and I9: no more faults. */
static void
drain (void)
{
  for (int i = 0; i < 2000; i++) {
    for (unsigned j = 0; j < w.disks; j++)
      vr_io_sim_die_at (w.disk[j].io, 0);
    vr_io_sim_die_at (w.backup, 0);
    start_primaries ();
    start_backup ();
    bury ();
    if (w.vm == NULL)
      continue;
    tick ();
    if (w.vm == NULL)
      continue;
    apply_backup ();
    worked (w.backup, vr_vm_checkpoint (w.vm, 0));
    for (unsigned j = 0; j < w.disks; j++)
      if (w.disk[j].d) {
        apply_primary (&w.disk[j]);
        worked (w.disk[j].io, vr_image_checkpoint (&w.disk[j].d->img));
      }
    bury ();
    if (all_protected ())
      return;
  }
  if (!w.forgot)
    fail_msg ("not protected again");
}

/* The images at the backup are the disks at k. */
static void
check_images (uint64_t k)
{
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];
    uint8_t *want = state_at (&d->h, k), *got;
    char path[32];
    uint64_t size;

    snprintf (path, sizeof path, "./vm/%s.img", d->name);
    got = read_file (w.backup, path, &size);
    assert_int_equal (size, d->h.size);
    expect_equal (got, want, size, "promoted image", k);
    free (got);
    free (want);
  }
}

static bool
any_copying (void)
{
  for (size_t i = 0; i < w.vm->member_count; i++)
    if (is_copying (w.vm->members[i]))
      return true;
  return w.vm->member_count < w.disks;
}

/* Promote, dying on the way some times. */
static void
promote (void)
{
  struct vr_refused refused;
  uint64_t k;
  int err;

  for (int tries = 0;; tries++) {
    if (w.vm)
      end_backup (chance (&w.rng, 60));
    start_backup ();
    if (is_dead (w.backup))
      continue;
    if (tries < 3)
      die_soon (w.backup);
    else
      vr_io_sim_die_at (w.backup, 0);
    if (any_copying ()) {
      if (w.vm->member_count == w.disks)
        assert_int_equal (vr_vm_promote (w.vm, &refused), -EPERM);
      return;
    }
    k = w.vm->committed_epoch;
    err = vr_vm_promote (w.vm, &refused);
    if (!is_dead (w.backup))
      break;
  }
  vr_io_sim_die_at (w.backup, 0);
  if (err < 0)
    fail_msg ("promote: %s", refused.text);
  check_images (k);
  assert_int_equal (vr_vm_promote (w.vm, &refused), 0);
  check_images (k);
}

/* Open the backup, which may be damaged.  False if it never came to be. */
static bool
reopen_damaged (void)
{
  const struct vr_vm_config c = {
    .dir = ".", .name = "vm", .keep_waiting = refuse_to_wait,
  };
  char message[512];
  int err = vr_vm_open (w.backup, &c, &w.vm, message, sizeof message);

  if (err == -ENOENT && w.seen == 0)
    return false;
  if (err < 0)
    fail_msg ("backup: %s: %s", strerror (-err), message);
  return true;
}

/* I8: damage the backup's journal.  What it still serves must be right, if
   not as new: of seals above the commit point nobody can tell whether they
   were there. */
static void
damage (void)
{
  struct disk *d = &w.disk[below (&w.rng, w.disks)];
  const unsigned flips = 1 + (unsigned) below (&w.rng, 3);
  uint64_t size;
  char path[32];

  if (w.vm)
    end_backup (chance (&w.rng, 50));
  vr_io_sim_die_at (w.backup, 0);
  if (!reopen_damaged ())
    return;
  check_backup ();
  snprintf (path, sizeof path, "./vm/%s.journal", d->name);
  if (vr_vm_find (w.vm, d->name) == NULL)
    return;
  end_backup (false);
  free (read_file (w.backup, path, &size));
  for (unsigned i = 0; i < flips; i++)
    vr_io_sim_flip (w.backup, path,
                    chance (&w.rng, 90)
                        ? VR_DATA_START + below (&w.rng, size - VR_DATA_START)
                        : below (&w.rng, VR_DATA_START),
                    (uint8_t) (1 + below (&w.rng, 255)));
  w.forgot = true;
  reopen_damaged ();
  if (w.vm->damaged.code == 0)
    check_backup ();
}

/* ---- One seed ----------------------------------------------------------- */

/* An image with data and holes, and a journal. */
static void
create_disk (struct disk *d, unsigned i)
{
  const uint64_t segment = UINT64_C (8192) << below (&w.rng, 3);
  struct vr_log_config c;
  struct vr_file *f;
  uint64_t at = 0;

  snprintf (d->name, sizeof d->name, "disk%u", i);
  d->io = vr_io_sim_new (next_random (&w.rng));
  d->h.size = 20000 + below (&w.rng, 50000);
  d->h.start = calloc (1, d->h.size);
  d->h.now = malloc (d->h.size);
  while (at < d->h.size) {
    uint64_t n = 1 + below (&w.rng, 20000);

    n = n < d->h.size - at ? n : d->h.size - at;
    if (chance (&w.rng, 50))
      fill_random (&w.rng, d->h.start + at, n);
    at += n;
  }
  memcpy (d->h.now, d->h.start, d->h.size);
  assert_int_equal (d->io->ops->open (d->io, "image", VR_OPEN_CREATE, &f), 0);
  assert_int_equal (vr_write (f, d->h.start, d->h.size, 0), 0);
  assert_int_equal (vr_sync (f), 0);
  vr_close (f);
  c = small_config (d->h.size, segment, 4 + below (&w.rng, 8));
  c.disk = d->name;
  memcpy (c.vm_id, w.vm_id, sizeof c.vm_id);
  assert_int_equal (vr_log_create (d->io, "journal", &c), 0);
}

static void
create_world (uint64_t seed)
{
  memset (&w, 0, sizeof w);
  w.rng = seeded (seed);
  fill_random (&w.rng, w.vm_id, sizeof w.vm_id);
  w.disks = 1 + chance (&w.rng, 60);
  w.sync_memory = chance (&w.rng, 15);
  w.backup = vr_io_sim_new (next_random (&w.rng));
  assert_int_equal (vr_epoch_new_private ("vm", w.vm_id, 1, &w.epoch), 0);
  for (unsigned i = 0; i < w.disks; i++)
    create_disk (&w.disk[i], i);
}

static void
destroy_world (void)
{
  for (unsigned i = 0; i < w.disks; i++) {
    struct disk *d = &w.disk[i];

    end_primary (d);
    cut_history (&d->h, 0);
    free (d->h.op);
    free (d->h.start);
    free (d->h.now);
    vr_io_sim_free (d->io);
  }
  vr_vm_close (w.vm);
  vr_epoch_close (w.epoch);
  vr_io_sim_free (w.backup);
}

static void
run_seed (uint64_t seed)
{
  uint64_t steps;

  current_seed = seed;
  create_world (seed);
  start_primaries ();
  start_backup ();
  bury ();
  steps = 30 + below (&w.rng, 250);
  for (uint64_t i = 0; i < steps; i++)
    step ();
  if (chance (&w.rng, 50)) {
    drain ();
    if (w.vm)
      check_backup ();
  }
  if (chance (&w.rng, 30))
    damage ();
  else
    promote ();
  destroy_world ();
}

static void
test_seeds (void **state)
{
  const uint64_t first = env_number ("VR_SEED", 1);
  const uint64_t count
      = getenv ("VR_SEED") ? 1 : env_number ("VR_SEEDS", 3000);

  (void) state;
  for (uint64_t i = 0; i < count; i++)
    run_seed (first + i);
  finished = true;
}

static void
print_replay (void)
{
  dprintf (STDERR_FILENO, "replay: VR_SEED=%llu build/unit/test-crash\n",
           (unsigned long long) current_seed);
}

static int
tell_seed (void **state)
{
  (void) state;
  if (!finished)
    print_replay ();
  return 0;
}

/* An assertion of the library. */
static void
on_signal (int sig)
{
  print_replay ();
  signal (sig, SIG_DFL);
  raise (sig);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_teardown (test_seeds, tell_seed),
  };

  signal (SIGABRT, on_signal);
  return cmocka_run_group_tests_name ("crash", tests, NULL, NULL);
}
