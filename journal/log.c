/* SPDX-License-Identifier: BSD-3-Clause */
/* The log's state and its append side; see log.h. */
#include "log_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Epochs are claimed from the superblock in steps, so that a number that was
   ever used is never used again, even if the records that used it are lost.
   Renewed when fewer than half are left. */
#define EPOCH_CLAIM 4096

int
vr_log_fail_locked (struct vr_log *log, int err)
{
  if (log->failed == 0)
    log->failed = err;
  pthread_cond_broadcast (&log->changed);
  return log->failed;
}

/* ---- Segments in memory ------------------------------------------------- */

struct vr_segbuf *
vr_segbuf_new (struct vr_log *log, uint64_t number)
{
  struct vr_segbuf *s;

  if (log->spares > 0)
    s = log->spare[--log->spares];
  else {
    s = malloc (sizeof *s);
    if (s == NULL)
      return NULL;
    s->data = aligned_alloc (VR_BLOCK, log->segment_size);
    if (s->data == NULL) {
      free (s);
      return NULL;
    }
  }
  s->number = number;
  s->used = number * log->segment_size;
  s->refs = 1;
  s->cached = false;
  return s;
}

void
vr_segbuf_put_locked (struct vr_log *log, struct vr_segbuf *s)
{
  assert (s->refs > 0);
  if (--s->refs > 0 || s->cached)
    return;
  if (log->spares < VR_LOG_SPARES)
    log->spare[log->spares++] = s;
  else {
    free (s->data);
    free (s);
  }
}

struct vr_segbuf *
vr_segbuf_get_locked (struct vr_log *log, uint64_t number)
{
  struct vr_segbuf *s = log->cache[number % log->cache_slots];

  if (s == NULL || s->number != number)
    return NULL;
  s->refs++;
  return s;
}

/* Is all of an old segment in the file? */
static bool
written_out (const struct vr_log *log, const struct vr_segbuf *s)
{
  return log->written >= s->used;
}

/* Take the segment in this slot out of the cache. */
static void
uncache_locked (struct vr_log *log, size_t slot)
{
  struct vr_segbuf *old = log->cache[slot];

  if (old == NULL)
    return;
  log->cache[slot] = NULL;
  old->cached = false;
  old->refs++;
  vr_segbuf_put_locked (log, old);
}

int
vr_segbuf_cache_locked (struct vr_log *log, struct vr_segbuf *s)
{
  size_t slot = s->number % log->cache_slots;
  struct vr_segbuf *old = log->cache[slot];

  if (old && !written_out (log, old))
    return -EINPROGRESS;
  uncache_locked (log, slot);
  log->cache[slot] = s;
  s->cached = true;
  return 0;
}

struct vr_segbuf *
vr_log_get_segment (struct vr_log *log, uint64_t lsn)
{
  struct vr_segbuf *s;

  pthread_mutex_lock (&log->mutex);
  s = vr_segbuf_get_locked (log, segment_number (log, lsn));
  pthread_mutex_unlock (&log->mutex);
  return s;
}

void
vr_log_put_segment (struct vr_log *log, struct vr_segbuf *s)
{
  pthread_mutex_lock (&log->mutex);
  vr_segbuf_put_locked (log, s);
  pthread_mutex_unlock (&log->mutex);
}

/* ---- Information -------------------------------------------------------- */

void
vr_log_info (struct vr_log *log, struct vr_log_info *ret)
{
  pthread_mutex_lock (&log->mutex);
  *ret = (struct vr_log_info){
    .super = log->super,
    .head = log->head,
    .complete = complete_lsn (log),
    .written = log->written,
    .durable = log->durable,
    .committed = log->super.committed_lsn,
    .applied = log->applied.lsn,
    .tail = log->tail.lsn,
    .head_chain = log->head_chain,
    .committed_epoch = log->super.committed_epoch,
    .sealed_epoch = log->sealed_epoch,
    .sealed_lsn = log->sealed_lsn,
    .open_epoch = log->open_epoch,
    .capacity = (log->segment_count - 1) * log->segment_size,
    .used = log->head - segment_start (log, log->tail.lsn),
    .uncommitted = log->seal_count,
    .failed = log->failed,
  };
  pthread_mutex_unlock (&log->mutex);
}

uint64_t
vr_log_head (struct vr_log *log)
{
  uint64_t head;

  pthread_mutex_lock (&log->mutex);
  head = log->head;
  pthread_mutex_unlock (&log->mutex);
  return head;
}

uint64_t
vr_log_durable (struct vr_log *log)
{
  uint64_t durable;

  pthread_mutex_lock (&log->mutex);
  durable = log->durable;
  pthread_mutex_unlock (&log->mutex);
  return durable;
}

const char *
vr_log_path (struct vr_log *log)
{
  return log->path;
}

struct vr_io *
vr_log_io (struct vr_log *log)
{
  return log->io;
}

void
vr_log_tail_mark (struct vr_log *log, struct vr_mark *ret)
{
  pthread_mutex_lock (&log->mutex);
  *ret = log->tail;
  pthread_mutex_unlock (&log->mutex);
}

void
vr_log_applied_mark (struct vr_log *log, struct vr_mark *ret)
{
  pthread_mutex_lock (&log->mutex);
  *ret = log->applied;
  pthread_mutex_unlock (&log->mutex);
}

void
vr_log_committed_mark (struct vr_log *log, struct vr_mark *ret)
{
  pthread_mutex_lock (&log->mutex);
  *ret = (struct vr_mark){ log->super.committed_lsn,
                           log->super.committed_chain };
  pthread_mutex_unlock (&log->mutex);
}

/* ---- Seals -------------------------------------------------------------- */

int
vr_log_push_seal_locked (struct vr_log *log, const struct vr_seal *s)
{
  if (log->seal_count == log->seal_allocated) {
    size_t n = log->seal_allocated ? 2 * log->seal_allocated : 64;
    struct vr_seal *p = realloc (log->seals, n * sizeof *p);

    if (p == NULL)
      return -ENOMEM;
    log->seals = p;
    log->seal_allocated = n;
  }
  log->seals[log->seal_count++] = *s;
  return 0;
}

bool
vr_log_next_seal (struct vr_log *log, uint64_t lsn, struct vr_seal *ret)
{
  bool found = false;

  pthread_mutex_lock (&log->mutex);
  for (size_t i = 0; i < log->seal_count && !found; i++)
    if (log->seals[i].lsn >= lsn) {
      *ret = log->seals[i];
      found = true;
    }
  pthread_mutex_unlock (&log->mutex);
  return found;
}

bool
vr_log_last_durable_seal (struct vr_log *log, struct vr_seal *ret)
{
  bool found = false;

  pthread_mutex_lock (&log->mutex);
  for (size_t i = log->seal_count; i > 0 && !found; i--)
    if (log->seals[i - 1].lsn <= log->durable) {
      *ret = log->seals[i - 1];
      found = true;
    }
  pthread_mutex_unlock (&log->mutex);
  return found;
}

/* ---- Append ------------------------------------------------------------- */

/* May segment number n be started?  Data leaves one segment free, so that a
   full journal can still be sealed, and by that committed and emptied. */
static bool
segment_free (const struct vr_log *log, uint64_t n, bool for_seal)
{
  uint64_t limit = segment_number (log, log->tail.lsn) + log->segment_count;

  return for_seal ? n < limit : n + 1 < limit;
}

/* Leave the tip.  Behind its last record comes at least an empty header: what
   an older use or a truncated history left in the file must not go on from
   here.  But a block that was durable when the log was opened is not written
   again; nothing valid followed it then. */
static void
leave_tip_locked (struct vr_log *log)
{
  struct vr_segbuf *s = log->tip;
  uint64_t in_segment, end;

  if (s == NULL)
    return;
  in_segment = s->used - s->number * log->segment_size;
  end = align_up (in_segment + VR_RECORD_HEADER, VR_BLOCK);
  if (end > log->segment_size)
    end = log->segment_size;
  memset (s->data + in_segment, 0, end - in_segment);
  if (!log->force_new_segment)
    s->used = s->number * log->segment_size + end;
  log->tip = NULL;
  vr_segbuf_put_locked (log, s);
}

/* Put a buffer for segment n in place as the tip.  -EINPROGRESS: write out
   and try again. */
static int
enter_segment_locked (struct vr_log *log, uint64_t n)
{
  struct vr_segbuf *s = vr_segbuf_new (log, n);
  int r;

  if (s == NULL)
    return -ENOMEM;
  r = vr_segbuf_cache_locked (log, s);
  if (r < 0) {
    vr_segbuf_put_locked (log, s);
    return r;
  }
  leave_tip_locked (log);
  log->tip = s;
  log->head = n * log->segment_size;
  log->force_new_segment = false;
  return 0;
}

/* Start segment n with a fresh header.  Primary. */
static int
start_segment_locked (struct vr_log *log, uint64_t n)
{
  struct vr_segment header = {
    .version = VR_VERSION,
    .lsn = n * log->segment_size,
    .prev_chain = log->head_chain,
  };
  int r;

  memcpy (header.magic, VR_SEGMENT_MAGIC, 8);
  memcpy (header.log_id, log->super.log_id, 16);
  r = log->io->ops->random (log->io, header.salt, sizeof header.salt);
  if (r == 0)
    r = enter_segment_locked (log, n);
  if (r < 0)
    return r;
  vr_segment_seal (&header);
  memcpy (log->tip->data, &header, sizeof header);
  log->head += sizeof header;
  log->head_chain = header.checksum;
  log->tip->used = log->head;
  return 0;
}

/* The number of the segment that would follow head. */
static uint64_t
next_segment (const struct vr_log *log)
{
  return segment_number (log, log->head + log->segment_size - 1);
}

/* Bytes left in the tip. */
static uint64_t
tip_room (const struct vr_log *log)
{
  if (log->tip == NULL || log->force_new_segment)
    return 0;
  return (log->tip->number + 1) * log->segment_size - log->head;
}

/* Make sure that a record of at least size bytes fits the tip. */
static int
make_room_locked (struct vr_log *log, uint64_t size, bool for_seal)
{
  uint64_t n;

  if (tip_room (log) >= size)
    return 0;
  n = next_segment (log);
  if (!segment_free (log, n, for_seal))
    return -EAGAIN;
  return start_segment_locked (log, n);
}

/* Write a header at head and move head behind the record.  The room is
   there. */
static void
put_header_locked (struct vr_log *log, struct vr_record *r)
{
  uint64_t at = log->head - log->tip->number * log->segment_size;

  r->lsn = log->head;
  r->generation = log->super.generation;
  r->hash = vr_record_chain (r, log->head_chain);
  memcpy (log->tip->data + at, r, sizeof *r);
  log->head_chain = r->hash;
  log->head += vr_record_size (r->payload_size);
  log->tip->used = log->head;
}

void
vr_log_pad_locked (struct vr_log *log)
{
  uint64_t in_block = log->head % VR_BLOCK;
  struct vr_record pad = { .kind = VR_PAD, .epoch = log->open_epoch };
  uint8_t *payload;

  if (in_block == 0 || log->tip == NULL || log->force_new_segment)
    return;
  pad.payload_size = (uint32_t) (VR_BLOCK - in_block - VR_RECORD_HEADER);
  payload = log->tip->data
            + (log->head - log->tip->number * log->segment_size)
            + VR_RECORD_HEADER;
  memset (payload, 0, pad.payload_size);
  put_header_locked (log, &pad);
}

/* Seal all epochs < next, which becomes the open one. */
static int
seal_locked (struct vr_log *log, uint64_t next)
{
  struct vr_record r = {
    .kind = VR_SEAL,
    .epoch = next - 1,
    .offset = log->io->ops->realtime_ns (log->io),
    .length = log->epoch_bytes,
  };
  struct vr_seal seal = { .epoch = r.epoch, .time = r.offset,
                          .since = vr_now_ns (log->io) };
  int err;

  err = make_room_locked (log, VR_RECORD_HEADER, true);
  if (err < 0)
    return err;
  /* Taken now, so that nothing can fail once the record is in. */
  err = vr_log_push_seal_locked (log, &seal);
  if (err < 0)
    return err;
  log->seals[log->seal_count - 1].start = log->head;
  put_header_locked (log, &r);
  log->open_epoch = r.epoch;
  vr_log_pad_locked (log);
  log->seals[log->seal_count - 1].lsn = log->head;
  log->seals[log->seal_count - 1].chain = log->head_chain;
  log->sealed_epoch = r.epoch;
  log->sealed_lsn = log->head;
  log->open_epoch = next;
  log->epoch_bytes = 0;
  if (next + EPOCH_CLAIM / 2 > log->super.epoch_limit) {
    log->super.epoch_limit = next + EPOCH_CLAIM;
    log->super_version++;
  }
  return 0;
}

/* Follow the shared counter.  The seal goes in under the same mutex that
   every append takes, before the first record of the new epoch.  If we are
   late, there must also be a seal right behind our last record: what is
   committed may be any epoch since then that the other members have sealed,
   and this log must be able to stop there. */
static int
follow_epoch_locked (struct vr_log *log)
{
  uint64_t now = vr_epoch_current (log->epoch);
  int err = 0;

  if (now <= log->open_epoch)
    return 0;
  if (now > log->open_epoch + 1 && log->open_epoch > log->sealed_epoch
      && log->head != log->sealed_lsn)
    err = seal_locked (log, log->open_epoch + 1);
  return err < 0 ? err : seal_locked (log, now);
}

/* How much of a write fits: all that is left, or what fits the record, cut
   at a 4096-byte boundary of the disk so that no sector is torn. */
static uint32_t
piece_length (uint64_t offset, uint64_t length, uint64_t room)
{
  uint64_t n = length, end;

  if (n > VR_PAYLOAD_MAX)
    n = VR_PAYLOAD_MAX;
  if (room < VR_RECORD_HEADER + VR_RECORD_ALIGN)
    return 0;
  if (n > align_down (room - VR_RECORD_HEADER, VR_RECORD_ALIGN))
    n = align_down (room - VR_RECORD_HEADER, VR_RECORD_ALIGN);
  if (n == length)
    return (uint32_t) n;
  end = align_down (offset + n, VR_BLOCK);
  return end > offset ? (uint32_t) (end - offset) : 0;
}

static void
add_inflight_locked (struct vr_log *log, struct vr_reservation *r)
{
  r->next = NULL;
  r->prev = log->last_inflight;
  if (r->prev)
    r->prev->next = r;
  else
    log->first_inflight = r;
  log->last_inflight = r;
}

/* Fill in *r for a record whose header is at the head. */
static int
reserve_locked (struct vr_log *log, struct vr_record *record,
                uint64_t length, const void *payload,
                struct vr_reservation *r)
{
  uint32_t piece = 0;
  int err = follow_epoch_locked (log);

  if (err < 0)
    return err;
  if (record->kind == VR_WRITE) {
    uint32_t hashed = record->payload_size;

    piece = piece_length (record->offset, length, tip_room (log));
    if (piece == 0) {
      err = make_room_locked (log, log->segment_size - VR_SEGMENT_HEADER,
                              false);
      if (err < 0)
        return err;
      piece = piece_length (record->offset, length, tip_room (log));
    }
    record->payload_size = piece;
    record->length = piece;
    if (piece != hashed)
      record->payload_hash = vr_payload_hash (payload, piece);
  } else {
    err = make_room_locked (log, VR_RECORD_HEADER, false);
    if (err < 0)
      return err;
  }
  record->epoch = log->open_epoch;
  r->lsn = log->head;
  r->payload_lsn = log->head + VR_RECORD_HEADER;
  r->epoch = log->open_epoch;
  r->length = piece;
  r->segment = log->tip;
  r->segment->refs++;
  put_header_locked (log, record);
  r->end = log->head;
  log->epoch_bytes += piece;
  add_inflight_locked (log, r);
  return 0;
}

static void
copy_payload (struct vr_log *log, const struct vr_reservation *r,
              const void *payload)
{
  uint8_t *to = r->segment->data
                + (r->payload_lsn - r->segment->number * log->segment_size);

  memcpy (to, payload, r->length);
  memset (to + r->length, 0, r->end - r->payload_lsn - r->length);
}

int
vr_log_reserve (struct vr_log *log, enum vr_kind kind, unsigned flags,
                uint64_t offset, uint64_t length, const void *payload,
                struct vr_reservation *r)
{
  struct vr_record record = {
    .kind = (uint16_t) kind,
    .flags = (uint16_t) flags,
    .offset = offset,
    .length = length,
  };
  int err;

  assert (log->epoch != NULL && length > 0);
  if (kind == VR_WRITE) {
    /* Outside the mutex; done again in the rare case that a segment's end
       makes the piece smaller. */
    record.payload_size = piece_length (offset, length, UINT32_MAX);
    record.payload_hash = vr_payload_hash (payload, record.payload_size);
  }
  for (;;) {
    pthread_mutex_lock (&log->mutex);
    err = log->failed;
    if (err == 0)
      err = reserve_locked (log, &record, length, payload, r);
    pthread_mutex_unlock (&log->mutex);
    if (err != -EINPROGRESS)
      break;
    err = vr_log_write_out (log, 0);
    if (err < 0)
      break;
  }
  if (err == 0 && kind == VR_WRITE)
    copy_payload (log, r, payload);
  return err;
}

void
vr_log_publish (struct vr_log *log, struct vr_reservation *r)
{
  pthread_mutex_lock (&log->mutex);
  if (r->prev)
    r->prev->next = r->next;
  else
    log->first_inflight = r->next;
  if (r->next)
    r->next->prev = r->prev;
  else
    log->last_inflight = r->prev;
  vr_segbuf_put_locked (log, r->segment);
  /* A sync may wait for exactly this writer. */
  if (log->writer_busy && r->prev == NULL)
    pthread_cond_broadcast (&log->changed);
  pthread_mutex_unlock (&log->mutex);
}

/* An absolute CLOCK_MONOTONIC time, for pthread_cond_timedwait. */
static struct timespec
deadline_after (uint64_t ns)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  t.tv_sec += (time_t) (ns / 1000000000);
  t.tv_nsec += (long) (ns % 1000000000);
  if (t.tv_nsec >= 1000000000) {
    t.tv_sec++;
    t.tv_nsec -= 1000000000;
  }
  return t;
}

void
vr_log_wait_space (struct vr_log *log, uint64_t timeout_ns)
{
  struct timespec until = deadline_after (timeout_ns);
  uint64_t seen;

  pthread_mutex_lock (&log->mutex);
  seen = log->freed;
  while (log->freed == seen && log->failed == 0)
    if (pthread_cond_timedwait (&log->changed, &log->mutex, &until)
        == ETIMEDOUT)
      break;
  pthread_mutex_unlock (&log->mutex);
}

int
vr_log_seal (struct vr_log *log, uint64_t *ret_lsn)
{
  int err;

  for (;;) {
    pthread_mutex_lock (&log->mutex);
    err = log->failed ? log->failed : follow_epoch_locked (log);
    *ret_lsn = log->sealed_lsn > log->durable ? log->sealed_lsn : 0;
    pthread_mutex_unlock (&log->mutex);
    /* Full, but a commit of what is sealed will make space. */
    if (err == -EAGAIN && *ret_lsn)
      return 0;
    if (err != -EINPROGRESS)
      return err;
    err = vr_log_write_out (log, 0);
    if (err < 0)
      return err;
  }
}

static int
new_segment_locked (struct vr_log *log)
{
  uint64_t n = next_segment (log);

  /* One that holds nothing but its header will do. */
  if (log->tip && !log->force_new_segment
      && log->head % log->segment_size == VR_SEGMENT_HEADER)
    return 0;
  if (!segment_free (log, n, false))
    return -EAGAIN;
  return start_segment_locked (log, n);
}

int
vr_log_new_segment (struct vr_log *log, struct vr_mark *ret)
{
  int err;

  for (;;) {
    pthread_mutex_lock (&log->mutex);
    err = log->failed ? log->failed : new_segment_locked (log);
    if (err == 0) {
      struct vr_segment header;

      memcpy (&header, log->tip->data, sizeof header);
      *ret = (struct vr_mark){ header.lsn, header.prev_chain };
    }
    pthread_mutex_unlock (&log->mutex);
    if (err != -EINPROGRESS)
      return err;
    err = vr_log_write_out (log, 0);
    if (err < 0)
      return err;
  }
}

int
vr_log_start_primary (struct vr_log *log, struct vr_epoch *epoch)
{
  uint64_t version;

  pthread_mutex_lock (&log->mutex);
  log->epoch = epoch;
  /* A crash may have left records of epochs that were claimed only in a
     superblock that never reached the disk. */
  vr_epoch_raise (epoch, log->open_epoch < log->super.epoch_limit
                             ? log->super.epoch_limit
                             : log->open_epoch + 1);
  if (log->open_epoch == log->sealed_epoch)
    log->open_epoch++; /* nothing to seal there */
  log->super.epoch_limit = vr_epoch_current (epoch) + EPOCH_CLAIM;
  log->super.flags &= ~(uint32_t) VR_LOG_CLEAN;
  version = ++log->super_version;
  log->force_new_segment = log->head % log->segment_size != 0;
  pthread_mutex_unlock (&log->mutex);
  return vr_log_sync_super (log, version);
}

/* ---- Append: backup ----------------------------------------------------- */

static bool
expects_locked (const struct vr_log *log, uint64_t lsn, const void *buf,
                size_t n)
{
  struct vr_segment header;

  if (lsn == log->head)
    return true;
  if (lsn % log->segment_size != 0
      || lsn != next_segment (log) * log->segment_size || n < sizeof header)
    return false;
  memcpy (&header, buf, sizeof header);
  return header.prev_chain == log->head_chain;
}

bool
vr_log_expects (struct vr_log *log, uint64_t lsn, const void *buf, size_t n)
{
  bool ok;

  pthread_mutex_lock (&log->mutex);
  ok = expects_locked (log, lsn, buf, n);
  pthread_mutex_unlock (&log->mutex);
  return ok;
}

/* A batch being checked: where it is and what state the log will be in. */
struct raw {
  const uint8_t *buf;
  size_t n;
  uint64_t lsn, segment_end;
  uint64_t chain;
  uint64_t epoch, sealed_epoch, sealed_lsn, seal_start, seal_time;
  uint64_t generation;
  bool seal_open; /* a seal was seen, its padding not yet */
  struct vr_seal seals[VR_SHIP_MAX / VR_BLOCK + 1];
  size_t seal_count;
  uint64_t records;
};

static const char *
check_raw_header (const struct vr_log *log, struct raw *b)
{
  struct vr_segment header;

  if (b->n < sizeof header)
    return "segment header cut short";
  memcpy (&header, b->buf, sizeof header);
  if (!vr_segment_ok (&header, log->super.log_id, b->lsn))
    return "segment header damaged or of another log";
  if (header.prev_chain != b->chain)
    return "segment does not follow the log held here";
  b->chain = header.checksum;
  b->buf += sizeof header;
  b->n -= sizeof header;
  b->lsn += sizeof header;
  return NULL;
}

/* Seals end at a sync boundary: the seal itself or the pad behind it. */
static const char *
note_seal (struct raw *b, const struct vr_record *r, uint64_t end)
{
  if (b->seal_open && r->kind != VR_PAD)
    return "seal not padded to a sync boundary";
  if (r->kind == VR_SEAL) {
    if (r->epoch <= b->sealed_epoch)
      return "seal of an epoch that is sealed already";
    b->sealed_epoch = r->epoch;
    b->seal_start = r->lsn;
    b->seal_time = r->offset;
    b->seal_open = true;
  }
  if (b->seal_open && end % VR_BLOCK == 0) {
    if (b->seal_count == sizeof b->seals / sizeof b->seals[0])
      return "too many seals in one write";
    b->seal_open = false;
    b->sealed_lsn = end;
    b->seals[b->seal_count++] = (struct vr_seal){
      .epoch = b->sealed_epoch, .start = b->seal_start, .lsn = end,
      .chain = b->chain, .time = b->seal_time,
    };
  }
  return NULL;
}

static const char *
check_raw_record (const struct vr_log *log, struct raw *b)
{
  struct vr_record r;
  uint64_t size;
  const char *problem;

  if (b->n < sizeof r)
    return "record header cut short";
  memcpy (&r, b->buf, sizeof r);
  problem = vr_record_problem (&r, b->lsn, b->segment_end,
                               log->super.disk_size);
  if (problem)
    return problem;
  size = vr_record_size (r.payload_size);
  if (size > b->n)
    return "record cut short";
  if (vr_record_chain (&r, b->chain) != r.hash)
    return "record does not follow the log held here";
  if (r.kind == VR_WRITE
      && vr_payload_hash (b->buf + sizeof r, r.payload_size)
             != r.payload_hash)
    return "payload damaged";
  if (r.generation > b->generation)
    return "record of a newer generation than its writer";
  if (r.epoch < b->epoch || (r.epoch <= b->sealed_epoch && r.kind != VR_PAD))
    return "epoch goes back";
  b->chain = r.hash;
  b->epoch = r.epoch;
  b->records++;
  b->buf += size;
  b->n -= size;
  b->lsn += size;
  return note_seal (b, &r, b->lsn);
}

static const char *
check_raw (const struct vr_log *log, struct raw *b)
{
  const char *problem = NULL;

  b->segment_end = segment_start (log, b->lsn) + log->segment_size;
  if (b->lsn + b->n > b->segment_end)
    return "write passes the end of a segment";
  if (b->lsn % log->segment_size == 0)
    problem = check_raw_header (log, b);
  while (problem == NULL && b->n > 0)
    problem = check_raw_record (log, b);
  if (problem == NULL && b->seal_open)
    problem = "seal not padded to a sync boundary";
  return problem;
}

/* Take checked bytes in. */
static int
take_raw_locked (struct vr_log *log, uint64_t lsn, const void *buf, size_t n,
                 const struct raw *b)
{
  int err;

  if (lsn % log->segment_size == 0) {
    uint64_t number = segment_number (log, lsn);

    if (!segment_free (log, number, true))
      return -EAGAIN;
    err = enter_segment_locked (log, number);
    if (err < 0)
      return err;
  }
  for (size_t i = 0; i < b->seal_count; i++) {
    err = vr_log_push_seal_locked (log, &b->seals[i]);
    if (err < 0) {
      log->seal_count -= i;
      return err;
    }
  }
  memcpy (log->tip->data + lsn % log->segment_size, buf, n);
  log->head = lsn + n;
  log->tip->used = log->head;
  log->head_chain = b->chain;
  log->open_epoch = b->epoch;
  log->sealed_epoch = b->sealed_epoch;
  if (b->seal_count > 0)
    log->sealed_lsn = b->sealed_lsn;
  if (b->epoch >= log->super.epoch_limit) {
    log->super.epoch_limit = b->epoch + EPOCH_CLAIM;
    log->super_version++;
  }
  return 0;
}

int
vr_log_append_raw (struct vr_log *log, uint64_t lsn, const void *buf,
                   size_t n, uint64_t generation, struct vr_raw_result *ret,
                   const char **ret_reason)
{
  struct raw b = { .buf = buf, .n = n, .lsn = lsn, .generation = generation };
  int err;

  *ret_reason = NULL;
  pthread_mutex_lock (&log->mutex);
  b.chain = log->head_chain;
  b.epoch = log->open_epoch;
  b.sealed_epoch = log->sealed_epoch;
  err = log->failed;
  if (err == 0 && !expects_locked (log, lsn, buf, n))
    err = -ERANGE;
  pthread_mutex_unlock (&log->mutex);
  if (err < 0)
    return err;
  *ret_reason = check_raw (log, &b);
  if (*ret_reason)
    return -EBADMSG;
  for (;;) {
    pthread_mutex_lock (&log->mutex);
    err = take_raw_locked (log, lsn, buf, n, &b);
    pthread_mutex_unlock (&log->mutex);
    if (err != -EINPROGRESS)
      break;
    err = vr_log_write_out (log, 0);
    if (err < 0)
      break;
  }
  if (err == 0)
    *ret = (struct vr_raw_result){
      .sealed_epoch = b.seal_count ? b.sealed_epoch : 0,
      .sealed_lsn = b.sealed_lsn,
      .records = b.records,
    };
  return err;
}

/* Drop from memory every segment that starts at or behind lsn. */
static void
drop_behind_locked (struct vr_log *log, uint64_t lsn)
{
  if (log->tip)
    vr_segbuf_put_locked (log, log->tip);
  log->tip = NULL;
  for (size_t i = 0; i < log->cache_slots; i++)
    if (log->cache[i]
        && log->cache[i]->number * log->segment_size >= lsn)
      uncache_locked (log, i);
}

/* The last seal left, for the state behind a truncation. */
static void
rewind_seals_locked (struct vr_log *log, uint64_t lsn)
{
  while (log->seal_count > 0 && log->seals[log->seal_count - 1].lsn > lsn)
    log->seal_count--;
  if (log->seal_count > 0) {
    log->sealed_epoch = log->seals[log->seal_count - 1].epoch;
    log->sealed_lsn = log->seals[log->seal_count - 1].lsn;
  } else {
    log->sealed_epoch = log->super.committed_epoch;
    log->sealed_lsn = log->super.committed_lsn;
  }
  log->open_epoch = log->sealed_epoch;
}

/* The log may go on in a new segment, or not at all; then nothing is written
   over what lies at lsn, or over a segment that follows from there, up to the
   old head.  Left as they were they would still be valid, and lead recovery
   astray.  The caller is the writer; durable with the next sync, before which
   no commit depends on it. */
static int
erase_behind (struct vr_log *log, struct vr_segbuf *s, uint64_t lsn,
              uint64_t head)
{
  static const _Alignas (VR_BLOCK) uint8_t zeros[VR_BLOCK];
  uint64_t in_segment = lsn % log->segment_size;
  uint64_t block = align_down (in_segment, VR_BLOCK);
  uint64_t next = align_up (lsn, log->segment_size);
  int err = 0;

  if (s) {
    memset (s->data + in_segment, 0, block + VR_BLOCK - in_segment);
    err = vr_write (log->file, s->data + block, VR_BLOCK,
                    slot_offset (log, s->number) + block);
  }
  if (err == 0 && next < head)
    err = vr_write (log->file, zeros, VR_BLOCK,
                    slot_offset (log, segment_number (log, next)));
  return err;
}

/* Have the log end at lsn, in segment s (NULL: at a segment's start), whose
   reference is taken over.  Mutex held at entry and exit. */
static int
truncate_locked (struct vr_log *log, struct vr_segbuf *s, uint64_t lsn,
                 uint64_t chain)
{
  uint64_t head = log->head;
  int err = 0;

  drop_behind_locked (log, lsn);
  log->written = log->written < lsn ? log->written : lsn;
  log->durable = log->durable < lsn ? log->durable : lsn;
  log->head = lsn;
  log->head_chain = chain;
  rewind_seals_locked (log, lsn);
  if (s) {
    s->used = lsn;
    log->tip = s;
    if (!s->cached)
      err = vr_segbuf_cache_locked (log, s);
  }
  if (err == 0) {
    log->writer_busy = true;
    pthread_mutex_unlock (&log->mutex);
    err = erase_behind (log, s, lsn, head);
    pthread_mutex_lock (&log->mutex);
    log->writer_busy = false;
    pthread_cond_broadcast (&log->changed);
  }
  return err < 0 ? vr_log_fail_locked (log, err) : 0;
}

int
vr_log_truncate (struct vr_log *log, uint64_t lsn, uint64_t chain)
{
  struct vr_segbuf *s = NULL;
  uint64_t there;
  int err = vr_log_chain_at (log, lsn, &there);

  if (err < 0)
    return err;
  if (there != chain)
    return -ESTALE;
  err = vr_log_write_out (log, 0);
  if (err == 0 && lsn % log->segment_size != 0) {
    s = vr_log_get_segment (log, lsn);
    if (s == NULL)
      err = vr_segbuf_load (log, segment_number (log, lsn), &s);
  }
  if (err < 0)
    return err;
  pthread_mutex_lock (&log->mutex);
  while (log->writer_busy)
    pthread_cond_wait (&log->changed, &log->mutex);
  if (lsn < log->super.committed_lsn || lsn > log->head)
    err = -ERANGE;
  else if (lsn < log->head) {
    err = truncate_locked (log, s, lsn, chain);
    s = NULL;
  }
  if (s)
    vr_segbuf_put_locked (log, s);
  pthread_mutex_unlock (&log->mutex);
  return err;
}
