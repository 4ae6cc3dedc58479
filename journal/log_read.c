/* SPDX-License-Identifier: BSD-3-Clause */
/* Walking the chain, reading back, cutting batches for the wire. */
#include "log_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

int
vr_segbuf_load (struct vr_log *log, uint64_t number, struct vr_segbuf **ret)
{
  struct vr_segbuf *s;
  int err;

  pthread_mutex_lock (&log->mutex);
  s = vr_segbuf_new (log, number);
  pthread_mutex_unlock (&log->mutex);
  if (s == NULL)
    return -ENOMEM;
  err = vr_read (log->file, s->data, log->segment_size,
                 slot_offset (log, number));
  if (err < 0) {
    vr_log_put_segment (log, s);
    return err;
  }
  s->used = (number + 1) * log->segment_size;
  *ret = s;
  return 0;
}

/* ---- The walk ----------------------------------------------------------- */

/* Have segment number in w->seg. */
static int
walk_to_segment (struct vr_walk *w, uint64_t number)
{
  struct vr_log *log = w->log;

  if (w->seg && w->seg->number == number)
    return 0;
  vr_walk_end (w);
  w->seg = vr_log_get_segment (log, number * log->segment_size);
  w->from_file = w->seg == NULL;
  if (w->seg)
    return 0;
  return vr_segbuf_load (log, number, &w->seg);
}

void
vr_walk_end (struct vr_walk *w)
{
  if (w->seg)
    vr_log_put_segment (w->log, w->seg);
  w->seg = NULL;
}

/* Go to the first record of segment number, if it links to this place.
   1: done, 0: it does not. */
static int
cross_into (struct vr_walk *w, uint64_t number)
{
  uint64_t start = number * w->log->segment_size;
  struct vr_segment header;
  int err = walk_to_segment (w, number);

  if (err < 0)
    return err;
  memcpy (&header, w->seg->data, sizeof header);
  if (!vr_segment_ok (&header, w->log->super.log_id, start)
      || header.prev_chain != w->at.chain)
    return 0;
  w->at = (struct vr_mark){ start + sizeof header, header.checksum };
  return 1;
}

/* The record at w->at within w's segment; NULL and w->problem if none. */
static const struct vr_record *
record_here (struct vr_walk *w)
{
  const struct vr_log *log = w->log;
  uint64_t end = segment_start (log, w->at.lsn) + log->segment_size;
  const struct vr_record *r;

  r = (const void *) (w->seg->data + w->at.lsn % log->segment_size);
  w->problem = vr_record_problem (r, w->at.lsn, end, log->super.disk_size);
  if (w->problem == NULL && vr_record_chain (r, w->at.chain) != r->hash)
    w->problem = "record hash does not match";
  /* What came from the file is checked whole; what never left memory was
     checked on its way in. */
  if (w->problem == NULL && r->kind == VR_WRITE && w->from_file
      && vr_payload_hash (r + 1, r->payload_size) != r->payload_hash)
    w->problem = "payload hash does not match";
  return w->problem ? NULL : r;
}

int
vr_walk_step (struct vr_walk *w, uint64_t limit, const struct vr_record **r,
              const uint8_t **payload)
{
  const struct vr_log *log = w->log;
  const struct vr_record *found = NULL;
  const char *problem = NULL;
  const struct vr_mark before = w->at;
  int err;

  w->problem = NULL;
  if (w->at.lsn >= limit)
    return 0;
  if (w->at.lsn % log->segment_size != 0) {
    err = walk_to_segment (w, segment_number (log, w->at.lsn));
    if (err < 0)
      return err;
    found = record_here (w);
    problem = w->problem;
  }
  if (found == NULL) {
    uint64_t next
        = segment_number (log, w->at.lsn + log->segment_size - 1);

    if (next * log->segment_size >= limit)
      return 0;
    err = cross_into (w, next);
    if (err < 0)
      return err;
    if (err == 0) {
      w->problem = problem ? problem : "no segment follows";
      return 0;
    }
    if (w->at.lsn < limit)
      found = record_here (w);
    if (found == NULL) {
      w->at = before; /* a header alone is no step */
      return 0;
    }
  }
  *r = found;
  *payload = (const uint8_t *) (found + 1);
  w->at.lsn += vr_record_size (found->payload_size);
  w->at.chain = found->hash;
  return 1;
}

/* ---- Scan --------------------------------------------------------------- */

/* Keep the walk's present segment until vr_log_scan_release. */
static int
hold_segment (struct vr_walk *w, struct vr_scan_held *held)
{
  if (held->count > 0 && held->segment[held->count - 1] == w->seg)
    return 0;
  if (held->count == held->allocated) {
    size_t n = held->allocated ? 2 * held->allocated : 16;
    struct vr_segbuf **p = realloc (held->segment, n * sizeof *p);

    if (p == NULL)
      return -ENOMEM;
    held->segment = p;
    held->allocated = n;
  }
  pthread_mutex_lock (&w->log->mutex);
  w->seg->refs++;
  pthread_mutex_unlock (&w->log->mutex);
  held->segment[held->count++] = w->seg;
  return 0;
}

void
vr_log_scan_release (struct vr_log *log, struct vr_scan_held *held)
{
  for (size_t i = 0; i < held->count; i++)
    vr_log_put_segment (log, held->segment[i]);
  free (held->segment);
  *held = (struct vr_scan_held){ 0 };
}

int
vr_log_scan (struct vr_log *log, const struct vr_mark *from, uint64_t to,
             uint64_t max_bytes, vr_log_record_fn fn, void *opaque,
             struct vr_scan_held *held, struct vr_mark *end)
{
  struct vr_walk w = { .log = log, .at = *from };
  const struct vr_record *r;
  const uint8_t *payload;
  int err = 0;

  while (err == 0 && w.at.lsn < to
         && (max_bytes == 0 || w.at.lsn - from->lsn < max_bytes)) {
    err = vr_walk_step (&w, to, &r, &payload);
    if (err == 0) {
      /* The caller promised a record's end; what lies before it was valid
         when it was written. */
      err = w.at.lsn < to ? -EUCLEAN : 0;
      break;
    }
    if (err == 1)
      err = held ? hold_segment (&w, held) : 0;
    if (err == 0)
      err = fn (opaque, r, payload);
  }
  if (end)
    *end = w.at;
  vr_walk_end (&w);
  return err;
}

/* ---- Read --------------------------------------------------------------- */

/* From the file, by way of an aligned buffer: direct I/O wants that. */
static int
read_from_file (struct vr_log *log, uint64_t lsn, void *buf, size_t n)
{
  uint64_t in_segment = lsn % log->segment_size;
  uint64_t first = align_down (in_segment, VR_BLOCK);
  size_t size = align_up (in_segment + n, VR_BLOCK) - first;
  void *bounce = aligned_alloc (VR_BLOCK, size);
  int err;

  if (bounce == NULL)
    return -ENOMEM;
  err = vr_read (log->file, bounce, size,
                 slot_offset (log, segment_number (log, lsn)) + first);
  if (err == 0)
    memcpy (buf, (char *) bounce + (in_segment - first), n);
  free (bounce);
  return err;
}

int
vr_log_read (struct vr_log *log, uint64_t lsn, void *buf, size_t n)
{
  struct vr_segbuf *s = vr_log_get_segment (log, lsn);

  if (s == NULL)
    return read_from_file (log, lsn, buf, n);
  memcpy (buf, s->data + lsn % log->segment_size, n);
  vr_log_put_segment (log, s);
  return 0;
}

/* The chain value at the start of the segment lsn is in. */
static int
walk_from_segment_start (struct vr_log *log, uint64_t lsn, struct vr_walk *w)
{
  struct vr_segment header;
  int err;

  *w = (struct vr_walk){ .log = log };
  err = walk_to_segment (w, segment_number (log, lsn));
  if (err < 0)
    return err;
  memcpy (&header, w->seg->data, sizeof header);
  if (!vr_segment_ok (&header, log->super.log_id, segment_start (log, lsn)))
    return -ESTALE;
  w->at = (struct vr_mark){ segment_start (log, lsn) + sizeof header,
                            header.checksum };
  if (lsn % log->segment_size == 0)
    w->at = (struct vr_mark){ lsn, header.prev_chain };
  return 0;
}

int
vr_log_first_segment (struct vr_log *log, struct vr_mark *ret)
{
  struct vr_mark tail;
  struct vr_walk w;
  int err;

  vr_log_tail_mark (log, &tail);
  err = walk_from_segment_start (log, segment_start (log, tail.lsn), &w);
  if (err == 0)
    *ret = w.at;
  vr_walk_end (&w);
  return err;
}

int
vr_log_chain_at (struct vr_log *log, uint64_t lsn, uint64_t *ret_chain)
{
  struct vr_walk w = { .log = log };
  struct vr_mark known[3];
  uint64_t tail, complete;
  int err;

  pthread_mutex_lock (&log->mutex);
  complete = complete_lsn (log);
  tail = log->tail.lsn;
  known[0] = log->tail;
  known[1] = (struct vr_mark){ log->head, log->head_chain };
  known[2] = (struct vr_mark){ log->super.committed_lsn,
                               log->super.committed_chain };
  pthread_mutex_unlock (&log->mutex);
  for (size_t i = 0; i < 3; i++)
    if (known[i].lsn == lsn) {
      *ret_chain = known[i].chain;
      return 0;
    }
  if (lsn < tail || lsn > complete)
    return -ERANGE;
  err = walk_from_segment_start (log, lsn, &w);
  while (err == 0 && w.at.lsn < lsn) {
    const struct vr_record *r;
    const uint8_t *payload;

    err = vr_walk_step (&w, lsn, &r, &payload);
    if (err == 0)
      err = -ESTALE;
    else if (err == 1)
      err = 0;
  }
  if (err == 0 && w.at.lsn != lsn)
    err = -ESTALE;
  if (err == 0)
    *ret_chain = w.at.chain;
  vr_walk_end (&w);
  return err;
}

/* ---- Ship --------------------------------------------------------------- */

/* How far a shipper may go: not into bytes still being filled in, and not
 * past a seal that is not durable here, so that a backup is never ahead of
 * what this host would recover. */
static uint64_t
ship_limit (struct vr_log *log)
{
  uint64_t limit;

  pthread_mutex_lock (&log->mutex);
  limit = complete_lsn (log);
  for (size_t i = log->seal_count; i > 0; i--) {
    const struct vr_seal *s = &log->seals[i - 1];

    if (s->lsn <= log->durable)
      break;
    if (limit > s->start)
      limit = s->start;
  }
  pthread_mutex_unlock (&log->mutex);
  return limit;
}

/* A batch may still grow by one record of any size and a seal's padding. */
#define SHIP_FULL                                                             \
  (VR_SHIP_MAX - VR_PAYLOAD_MAX - VR_RECORD_HEADER - 2 * VR_BLOCK)

/* Step over records while they fit the batch and lie in one segment.  *w is
   left where the batch ends. */
static int
collect_batch (struct vr_walk *w, uint64_t limit, struct vr_ship_batch *b)
{
  uint64_t segment_size = w->log->segment_size;
  const struct vr_record *r;
  const uint8_t *payload;
  bool seal_open = false;

  while (b->size < SHIP_FULL || seal_open) {
    struct vr_mark before = w->at;
    int err = vr_walk_step (w, limit, &r, &payload);

    if (err < 0)
      return err;
    if (err == 0)
      break;
    if (b->segment == NULL) {
      uint64_t start = w->seg->number * segment_size;

      /* The first record of a segment brings the header along. */
      b->segment = w->seg;
      pthread_mutex_lock (&w->log->mutex);
      b->segment->refs++; /* the batch's reader's; the walk may move on */
      pthread_mutex_unlock (&w->log->mutex);
      b->lsn = r->lsn == start + VR_SEGMENT_HEADER ? start : r->lsn;
      b->data = w->seg->data + (b->lsn - start);
    } else if (b->segment != w->seg) {
      w->at = before;
      break;
    }
    b->size = w->at.lsn - b->lsn;
    if (r->kind == VR_SEAL) {
      b->sealed_epoch = r->epoch;
      seal_open = true;
    }
    if (w->at.lsn % VR_BLOCK == 0)
      seal_open = false;
  }
  return 0;
}

int
vr_log_ship_batch (struct vr_log *log, struct vr_ship_cursor *cursor,
                   struct vr_ship_batch *ret)
{
  struct vr_walk w = { .log = log, .at = cursor->at, .seg = cursor->segment,
                       .from_file = cursor->from_file };
  int err;

  *ret = (struct vr_ship_batch){ .lsn = cursor->at.lsn };
  err = collect_batch (&w, ship_limit (log), ret);
  if (err == 0)
    cursor->at = w.at;
  else if (ret->segment) {
    vr_log_put_segment (log, ret->segment);
    ret->segment = NULL;
  }
  cursor->segment = w.seg;
  cursor->from_file = w.from_file;
  return err;
}

void
vr_log_ship_cursor_end (struct vr_log *log, struct vr_ship_cursor *cursor)
{
  if (cursor->segment)
    vr_log_put_segment (log, cursor->segment);
  cursor->segment = NULL;
}
