/* SPDX-License-Identifier: BSD-3-Clause */
/* Write out, sync, commit and recycle; see log.h. */
#include "log_internal.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/* One element of a write batch; several are in flight at once. */
#define WRITE_PIECE (1U << 20)
#define WRITE_PIECES 32

/* The superblock follows commits at most this often. */
#define SUPER_INTERVAL_NS UINT64_C (20000000)

/* ---- Writing bytes of the log to the file -------------------------------- */

/* Pieces of one write_batch, with the segments that hold their bytes.  All of
   a sync, its superblock too, is usually in flight at once. */
struct pieces {
  struct vr_log *log;
  struct iovec iov[WRITE_PIECES];
  struct vr_io_write write[WRITE_PIECES];
  struct vr_segbuf *segment[WRITE_PIECES];
  size_t count;
};

static int
flush_pieces (struct pieces *p)
{
  struct vr_log *log = p->log;
  int err = 0;

  if (p->count > 0)
    err = log->io->ops->write_batch (log->file, p->write, p->count);
  for (size_t i = 0; i < p->count; i++)
    if (p->segment[i])
      vr_log_put_segment (log, p->segment[i]);
  p->count = 0;
  return err;
}

/* Write what is left; after a failure only let go of it. */
static int
finish_pieces (struct pieces *p, int err)
{
  if (err == 0)
    return flush_pieces (p);
  for (size_t i = 0; i < p->count; i++)
    if (p->segment[i])
      vr_log_put_segment (p->log, p->segment[i]);
  return err;
}

/* Takes over the reference to s (may be NULL), also on failure. */
static int
add_piece (struct pieces *p, struct vr_segbuf *s, const void *data, size_t n,
           uint64_t file_offset)
{
  int err = p->count == WRITE_PIECES ? flush_pieces (p) : 0;
  size_t i = p->count++;

  p->iov[i] = (struct iovec){ (void *) data, n };
  p->write[i] = (struct vr_io_write){ &p->iov[i], 1, file_offset };
  p->segment[i] = s;
  return err;
}

/* The part of [from, to) that lies in from's segment, as a place in memory;
   NULL if there is nothing left of it to write.  *ret_next is where the log
   goes on. */
static struct vr_segbuf *
locate (struct vr_log *log, uint64_t from, uint64_t to, uint64_t *ret_end,
        uint64_t *ret_next)
{
  struct vr_segbuf *s;
  uint64_t segment_end = segment_start (log, from) + log->segment_size;

  pthread_mutex_lock (&log->mutex);
  s = vr_segbuf_get_locked (log, segment_number (log, from));
  /* Unwritten bytes never leave the cache; but a segment that ended early may
     be written to its end, and gone, while `written` still points there. */
  assert (s != NULL || from == log->written);
  *ret_end = s && s->used < to ? s->used : to;
  *ret_next = segment_end <= to ? segment_end : to;
  pthread_mutex_unlock (&log->mutex);
  return s;
}

/* Add [from, to) of one segment, rounded out to whole blocks. */
static int
add_segment (struct pieces *p, struct vr_segbuf *s, uint64_t from,
             uint64_t to)
{
  uint64_t base = s->number * p->log->segment_size;
  uint64_t at = align_down (from, VR_BLOCK) - base;
  uint64_t end = align_up (to, VR_BLOCK) - base;
  int err = 0;

  while (err == 0 && at < end) {
    uint64_t size = end - at < WRITE_PIECE ? end - at : WRITE_PIECE;

    pthread_mutex_lock (&p->log->mutex);
    s->refs++;
    pthread_mutex_unlock (&p->log->mutex);
    err = add_piece (p, s, s->data + at, size,
                     slot_offset (p->log, s->number) + at);
    at += size;
  }
  return err;
}

/* Add everything in [from, to). */
static int
add_range (struct pieces *p, uint64_t from, uint64_t to)
{
  int err = 0;

  while (err == 0 && from < to) {
    uint64_t end, next;
    struct vr_segbuf *s = locate (p->log, from, to, &end, &next);

    if (s && end > from)
      err = add_segment (p, s, from, end);
    if (s)
      vr_log_put_segment (p->log, s);
    from = next;
  }
  return err;
}

static void
become_writer_locked (struct vr_log *log)
{
  while (log->writer_busy)
    pthread_cond_wait (&log->changed, &log->mutex);
  log->writer_busy = true;
}

static void
leave_writer_locked (struct vr_log *log)
{
  log->writer_busy = false;
  pthread_cond_broadcast (&log->changed);
}

/* Where write_out may write to: whole complete blocks.  A segment that ended
   early ends with a part of a block. */
static uint64_t
write_out_target (const struct vr_log *log)
{
  uint64_t complete = complete_lsn (log);
  uint64_t target = align_down (complete, VR_BLOCK);

  return target > log->written ? target : log->written;
}

int
vr_log_write_out (struct vr_log *log, uint64_t min_bytes)
{
  struct pieces pieces = { .log = log };
  uint64_t from, to;
  int err;

  pthread_mutex_lock (&log->mutex);
  if (min_bytes > 0
      && (log->writer_busy
          || write_out_target (log) - log->written < min_bytes)) {
    err = log->failed;
    pthread_mutex_unlock (&log->mutex);
    return err;
  }
  become_writer_locked (log);
  /* Who must have something written may have to wait for a writer in flight
     that holds everything up. */
  while (write_out_target (log) == log->written && log->first_inflight
         && log->failed == 0)
    pthread_cond_wait (&log->changed, &log->mutex);
  from = log->written;
  to = write_out_target (log);
  err = log->failed;
  pthread_mutex_unlock (&log->mutex);

  if (err == 0)
    err = finish_pieces (&pieces, add_range (&pieces, from, to));

  pthread_mutex_lock (&log->mutex);
  if (err == 0)
    log->written = to;
  else
    err = vr_log_fail_locked (log, err);
  leave_writer_locked (log);
  pthread_mutex_unlock (&log->mutex);
  return err;
}

/* ---- Sync --------------------------------------------------------------- */

/* One round: what it covers, decided under the mutex by its leader. */
struct round {
  uint64_t from, to;
  uint64_t super_version; /* 0: the superblock stays as it is */
  _Alignas (VR_BLOCK) struct vr_super super;
};

/* The commit point may lag: what lies behind it is found by walking.  So at a
   high rate of syncs not each one takes the superblock along. */
static bool
super_is_due (const struct vr_log *log)
{
  if (log->super_version == log->super_synced)
    return false;
  return log->super_wanted > log->super_synced
         || vr_now_ns (log->io) - log->super_written_ns >= SUPER_INTERVAL_NS;
}

/* Decide what to sync: on a primary everything up to head, padded; on a
   backup, whose bytes the primary decides, what was asked for. */
static void
plan_round_locked (struct vr_log *log, struct round *round)
{
  if (log->epoch)
    vr_log_pad_locked (log);
  round->from = log->written;
  round->to = log->epoch ? log->head : log->sync_wanted;
  if (round->to > log->head)
    round->to = log->head;
  if (round->to < round->from)
    round->to = round->from;
  while (complete_lsn (log) < round->to && log->failed == 0)
    pthread_cond_wait (&log->changed, &log->mutex);
  round->super_version = 0;
  if (super_is_due (log)) {
    log->super_written_ns = vr_now_ns (log->io);
    log->super.sequence++;
    round->super_version = log->super_version;
    round->super = log->super;
  }
}

/* The two superblocks take turns, so one valid one always remains. */
static int
add_super (struct pieces *p, struct vr_super *super)
{
  vr_block_seal (super);
  return add_piece (p, NULL, super, sizeof *super,
                    super->sequence % 2 ? VR_SUPER_B : VR_SUPER_A);
}

/* Records and superblock need no order between them: the superblock speaks
   only of what earlier rounds made durable. */
static int
perform_round (struct vr_log *log, struct round *round)
{
  struct pieces pieces = { .log = log };
  int err = add_range (&pieces, round->from, round->to);

  if (err == 0 && round->super_version)
    err = add_super (&pieces, &round->super);
  err = finish_pieces (&pieces, err);
  if (err == 0)
    err = vr_sync (log->file);
  return err;
}

static void
finish_round_locked (struct vr_log *log, const struct round *round)
{
  if (log->written < round->to)
    log->written = round->to;
  if (log->durable < round->to)
    log->durable = round->to;
  if (round->super_version) {
    log->super_synced = round->super_version;
    log->recorded = round->super.committed_lsn;
    if (round->super.applied_lsn > log->tail.lsn) {
      log->tail = (struct vr_mark){ round->super.applied_lsn,
                                    round->super.applied_chain };
      log->freed++;
    }
  }
}

/* Lead one round.  Mutex held at entry and exit. */
static void
lead_round_locked (struct vr_log *log)
{
  struct round round;
  int err;

  become_writer_locked (log);
  plan_round_locked (log, &round);
  err = log->failed;
  if (err == 0) {
    pthread_mutex_unlock (&log->mutex);
    err = perform_round (log, &round);
    pthread_mutex_lock (&log->mutex);
  }
  if (err == 0)
    finish_round_locked (log, &round);
  else
    vr_log_fail_locked (log, err);
  leave_writer_locked (log);
}

/* Sync until the log is durable up to lsn and the superblock up to version.
   Whoever finds no round running leads the next one, which covers all who
   came meanwhile. */
static int
sync_until (struct vr_log *log, uint64_t lsn, uint64_t version)
{
  int err = 0;

  pthread_mutex_lock (&log->mutex);
  if (log->sync_wanted < lsn)
    log->sync_wanted = lsn;
  if (log->super_wanted < version)
    log->super_wanted = version;
  while (err == 0 && log->failed == 0
         && (log->durable < lsn || log->super_synced < version)) {
    if (lsn > log->head)
      err = -ESTALE; /* truncated meanwhile */
    else if (log->writer_busy)
      pthread_cond_wait (&log->changed, &log->mutex);
    else
      lead_round_locked (log);
  }
  err = log->failed ? log->failed : err;
  pthread_mutex_unlock (&log->mutex);
  return err;
}

int
vr_log_sync (struct vr_log *log, uint64_t lsn)
{
  return sync_until (log, lsn, 0);
}

int
vr_log_sync_super (struct vr_log *log, uint64_t version)
{
  return sync_until (log, 0, version);
}

int
vr_log_set_flags (struct vr_log *log, uint32_t set, uint32_t clear)
{
  uint64_t version;

  pthread_mutex_lock (&log->mutex);
  log->super.flags = (log->super.flags | set) & ~clear;
  version = ++log->super_version;
  pthread_mutex_unlock (&log->mutex);
  return vr_log_sync_super (log, version);
}

int
vr_log_set_generation (struct vr_log *log, uint64_t generation)
{
  uint64_t version;

  pthread_mutex_lock (&log->mutex);
  log->super.generation = generation;
  version = ++log->super_version;
  pthread_mutex_unlock (&log->mutex);
  return vr_log_sync_super (log, version);
}

/* ---- Commit and recycle ------------------------------------------------- */

int
vr_log_commit (struct vr_log *log, uint64_t epoch)
{
  size_t n = 0;
  int err;

  pthread_mutex_lock (&log->mutex);
  err = log->failed;
  /* A disk that joined a VM late still sends seals of committed epochs, while
     others commit: those count once they are durable. */
  while (err == 0 && n < log->seal_count && log->seals[n].epoch <= epoch
         && log->seals[n].lsn <= log->durable)
    n++;
  if (n > 0) {
    const struct vr_seal *s = &log->seals[n - 1];

    log->super.committed_epoch = s->epoch;
    log->super.committed_lsn = s->lsn;
    log->super.committed_chain = s->chain;
    if (log->super.epoch_limit <= s->epoch)
      log->super.epoch_limit = s->epoch + 1;
    log->super_version++;
    log->seal_count -= n;
    memmove (log->seals, log->seals + n,
             log->seal_count * sizeof *log->seals);
  }
  pthread_mutex_unlock (&log->mutex);
  return err;
}

int
vr_log_recorded_commit (struct vr_log *log, uint64_t beyond,
                        uint64_t *ret_lsn)
{
  uint64_t version;
  bool behind;
  int err = 0;

  pthread_mutex_lock (&log->mutex);
  version = log->super_version;
  behind = log->recorded <= beyond && log->super.committed_lsn > beyond;
  pthread_mutex_unlock (&log->mutex);
  if (behind)
    err = vr_log_sync_super (log, version);
  pthread_mutex_lock (&log->mutex);
  *ret_lsn = log->recorded;
  pthread_mutex_unlock (&log->mutex);
  return err;
}

void
vr_log_set_applied (struct vr_log *log, const struct vr_mark *mark,
                    uint64_t epoch)
{
  pthread_mutex_lock (&log->mutex);
  assert (mark->lsn >= log->applied.lsn
          && mark->lsn <= log->super.committed_lsn);
  log->applied = *mark;
  log->applied_epoch = epoch;
  pthread_mutex_unlock (&log->mutex);
}

int
vr_log_recycle (struct vr_log *log, const struct vr_mark *mark,
                uint64_t epoch)
{
  uint64_t version;
  int err;

  pthread_mutex_lock (&log->mutex);
  assert (mark->lsn <= log->applied.lsn);
  log->super.applied_lsn = mark->lsn;
  log->super.applied_chain = mark->chain;
  log->super.applied_epoch = epoch;
  version = ++log->super_version;
  err = log->failed;
  pthread_mutex_unlock (&log->mutex);
  if (err == 0)
    err = vr_log_sync_super (log, version);
  return err;
}
