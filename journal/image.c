/* SPDX-License-Identifier: BSD-3-Clause */
/* Apply, checkpoint, views; see image.h. */
#include "image.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"

/* One write to the base image: neighbours in the image go together. */
#define RUN_MAX (1U << 20)
#define IOV_BATCH 256

/* Log bytes applied at once to make room for a view. */
#define VIEW_APPLY_BYTES (UINT64_C (16) << 20)

/* ---- Records into a map ------------------------------------------------- */

/* Enter a record's range.  Later records win, so after a scan in log order
   each byte is at its last version. */
static int
map_record (struct vr_map *map, const struct vr_record *r)
{
  struct vr_extent e = { .offset = r->offset, .length = r->length };

  switch (r->kind) {
  case VR_WRITE:
    e.kind = VR_EXTENT_DATA;
    e.lsn = r->lsn + VR_RECORD_HEADER;
    return vr_map_insert (map, &e);
  case VR_ZERO:
  case VR_TRIM:
    e.kind = r->kind == VR_ZERO ? VR_EXTENT_ZERO : VR_EXTENT_TRIM;
    e.lsn = r->lsn;
    return vr_map_insert (map, &e);
  default:
    return 0;
  }
}

/* What scans below collect. */
struct collect {
  struct vr_map *map;
  bool skip_copies;
  uint64_t last_epoch;   /* of any record */
  uint64_t sealed_epoch; /* of the last seal */
  uint64_t max_epoch;    /* stop before a later one; 0: no limit */
};

static int
collect_record (void *opaque, const struct vr_record *r,
                const uint8_t *payload)
{
  struct collect *c = opaque;

  (void) payload;
  if (c->max_epoch && r->epoch > c->max_epoch)
    return 1;
  c->last_epoch = r->epoch;
  if (r->kind == VR_SEAL)
    c->sealed_epoch = r->epoch;
  if (c->skip_copies && (r->flags & VR_RECORD_COPY))
    return 0;
  return map_record (c->map, r);
}

/* ---- Life --------------------------------------------------------------- */

/* The index of everything the base image lacks, from the log's tail. */
static int
build_index (struct vr_image *img)
{
  struct collect c = { .map = img->index, .skip_copies = true };
  struct vr_log_info info;
  struct vr_mark from;

  vr_log_info (img->log, &info);
  vr_log_applied_mark (img->log, &from);
  return vr_log_scan (img->log, &from, info.complete, 0, collect_record, &c,
                      NULL, NULL);
}

int
vr_image_init (struct vr_image *img, struct vr_log *log, struct vr_file *base,
               bool primary)
{
  struct vr_log_info info;
  pthread_rwlockattr_t attr;

  vr_log_info (log, &info);
  *img = (struct vr_image){
    .io = vr_log_io (log),
    .log = log,
    .base = base,
    .size = info.super.disk_size,
    .primary = primary,
    /* Only what the superblock says is committed was ever applied. */
    .applied_through = info.super.committed_epoch,
    .applied_epoch = info.super.applied_epoch,
  };
  pthread_rwlockattr_init (&attr);
  pthread_rwlockattr_setkind_np (
      &attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  pthread_rwlock_init (&img->places, &attr);
  pthread_rwlockattr_destroy (&attr);
  pthread_mutex_init (&img->index_mutex, NULL);
  pthread_mutex_init (&img->apply_mutex, NULL);
  pthread_mutex_init (&img->checkpoint_mutex, NULL);
  img->batch = vr_map_new ();
  img->index = primary ? vr_map_new () : NULL;
  if (img->batch == NULL || (primary && img->index == NULL))
    return -ENOMEM;
  return primary ? build_index (img) : 0;
}

void
vr_image_destroy (struct vr_image *img)
{
  vr_map_free (img->batch);
  vr_map_free (img->index);
  pthread_mutex_destroy (&img->checkpoint_mutex);
  pthread_mutex_destroy (&img->apply_mutex);
  pthread_mutex_destroy (&img->index_mutex);
  pthread_rwlock_destroy (&img->places);
}

/* Wait for every reader that looked up a place before now. */
static void
pass_readers (struct vr_image *img)
{
  pthread_rwlock_wrlock (&img->places);
  pthread_rwlock_unlock (&img->places);
}

/* ---- Apply -------------------------------------------------------------- */

/* Elements for one write_batch. */
struct gather {
  struct iovec iov[IOV_BATCH];
  struct vr_io_write write[IOV_BATCH];
  size_t iov_count, write_count;
  uint64_t run_end;   /* where the open run ends in the image */
  uint64_t run_bytes; /* its size */
};

static int
flush_gather (struct vr_image *img, struct gather *g)
{
  int err = 0;

  if (g->write_count > 0)
    err = img->io->ops->write_batch (img->base, g->write, g->write_count);
  g->iov_count = g->write_count = 0;
  g->run_bytes = 0;
  return err;
}

static void
add_to_gather (struct gather *g, const struct vr_extent *e,
               const uint8_t *data)
{
  struct iovec *v = &g->iov[g->iov_count++];

  *v = (struct iovec){ (void *) data, e->length };
  if (g->write_count > 0 && g->run_end == e->offset
      && g->run_bytes + e->length <= RUN_MAX)
    g->write[g->write_count - 1].iov_count++;
  else {
    g->write[g->write_count++]
        = (struct vr_io_write){ .iov = v, .iov_count = 1,
                                .offset = e->offset };
    g->run_bytes = 0;
  }
  g->run_end = e->offset + e->length;
  g->run_bytes += e->length;
}

/* Where the bytes at lsn are, in a segment held by the scan. */
static const uint8_t *
held_bytes (const struct vr_scan_held *held, uint64_t segment_size,
            uint64_t lsn)
{
  uint64_t i = lsn / segment_size - held->segment[0]->number;

  assert (i < held->count);
  return held->segment[i]->data + lsn % segment_size;
}

/* Write all extents of the batch to the base image. */
static int
write_batch_map (struct vr_image *img, const struct vr_scan_held *held,
                 uint64_t segment_size)
{
  struct gather g;
  struct vr_extent e;
  uint64_t at = 0;
  int err = 0;

  g.iov_count = g.write_count = 0;
  g.run_bytes = g.run_end = 0;
  while (err == 0 && vr_map_next (img->batch, at, UINT64_MAX, &e)) {
    at = e.offset + e.length;
    if (e.kind == VR_EXTENT_DATA) {
      add_to_gather (&g, &e, held_bytes (held, segment_size, e.lsn));
      if (g.iov_count == IOV_BATCH)
        err = flush_gather (img, &g);
    } else
      err = img->io->ops->zero (img->base, e.offset, e.length,
                                e.kind == VR_EXTENT_TRIM);
  }
  if (err == 0)
    err = flush_gather (img, &g);
  return err;
}

/* Extents taken out of the index before writers and readers get a turn. */
#define UNINDEX_TURN 64

/* The base image has these bytes now: readers need the log no more. */
static int
unindex_batch (struct vr_image *img, uint64_t end)
{
  struct vr_extent e;
  uint64_t at = 0;
  unsigned n = 0;
  int err = 0;

  pthread_mutex_lock (&img->index_mutex);
  while (err == 0 && vr_map_next (img->batch, at, UINT64_MAX, &e)) {
    err = vr_map_remove_older (img->index, e.offset, e.length, end);
    at = e.offset + e.length;
    if (++n % UNINDEX_TURN == 0) {
      pthread_mutex_unlock (&img->index_mutex);
      pthread_mutex_lock (&img->index_mutex);
    }
  }
  pthread_mutex_unlock (&img->index_mutex);
  return err;
}

/* Redo [from, to) or a first part of it. */
static int
redo (struct vr_image *img, const struct vr_mark *from, uint64_t to,
      uint64_t max_bytes, struct vr_mark *end)
{
  struct collect c = { .map = img->batch, .skip_copies = img->primary };
  struct vr_scan_held held = { 0 };
  struct vr_log_info info;
  int err;

  vr_log_info (img->log, &info);
  vr_map_clear (img->batch);
  err = vr_log_scan (img->log, from, to, max_bytes, collect_record, &c,
                     &held, end);
  if (err == 0)
    err = write_batch_map (img, &held, info.super.segment_size);
  if (err == 0 && img->index)
    err = unindex_batch (img, end->lsn);
  vr_log_scan_release (img->log, &held);
  if (err == 0) {
    if (img->applied_through < c.last_epoch)
      img->applied_through = c.last_epoch;
    if (c.sealed_epoch)
      img->applied_epoch = c.sealed_epoch;
    vr_log_set_applied (img->log, end, img->applied_epoch);
  }
  return err;
}

/* Open views hold apply up, but not at the price of a full journal. */
static bool
held_up (struct vr_image *img, const struct vr_log_info *info)
{
  if (img->views == 0)
    return false;
  if (info->head - info->applied < info->capacity / 2)
    return true;
  img->view_round++;
  img->views = 0;
  pass_readers (img);
  return false;
}

int
vr_image_apply (struct vr_image *img, uint64_t max_bytes, uint64_t *ret_bytes)
{
  struct vr_mark from, end = { 0 };
  struct vr_log_info info;
  uint64_t to;
  int err;

  *ret_bytes = 0;
  pthread_mutex_lock (&img->apply_mutex);
  vr_log_info (img->log, &info);
  vr_log_applied_mark (img->log, &from);
  err = img->failed;
  if (err == 0)
    err = vr_log_recorded_commit (img->log, from.lsn, &to);
  if (err == 0 && to > from.lsn && !held_up (img, &info)) {
    err = redo (img, &from, to, max_bytes, &end);
    if (err == 0) {
      *ret_bytes = end.lsn - from.lsn;
      img->dirty_bytes += *ret_bytes;
    }
  }
  pthread_mutex_unlock (&img->apply_mutex);
  return err;
}

int
vr_image_checkpoint (struct vr_image *img)
{
  struct vr_mark mark, tail;
  uint64_t epoch, bytes;
  int err = 0;

  pthread_mutex_lock (&img->checkpoint_mutex);
  pthread_mutex_lock (&img->apply_mutex);
  vr_log_applied_mark (img->log, &mark);
  vr_log_tail_mark (img->log, &tail);
  epoch = img->applied_epoch;
  bytes = img->dirty_bytes;
  pthread_mutex_unlock (&img->apply_mutex);
  err = img->failed;
  if (err == 0 && mark.lsn != tail.lsn) {
    /* Never tried again: a second one would say that all is well. */
    err = vr_sync (img->base);
    img->failed = err;
    pass_readers (img);
    if (err == 0)
      err = vr_log_recycle (img->log, &mark, epoch);
    if (err == 0)
      img->dirty_bytes -= bytes;
  }
  pthread_mutex_unlock (&img->checkpoint_mutex);
  return err;
}

/* ---- Read --------------------------------------------------------------- */

/* The piece that covers offset, or the gap up to the next one. */
static struct vr_extent
piece_at (const struct vr_map *map, pthread_mutex_t *mutex, uint64_t offset,
          uint64_t end)
{
  struct vr_extent e;
  bool found;

  if (mutex)
    pthread_mutex_lock (mutex);
  found = vr_map_next (map, offset, end, &e);
  if (mutex)
    pthread_mutex_unlock (mutex);
  if (!found)
    return (struct vr_extent){ .offset = offset, .length = end - offset };
  if (e.offset > offset)
    return (struct vr_extent){ .offset = offset,
                               .length = e.offset - offset };
  return e;
}

int
vr_image_read_through (struct vr_image *img, const struct vr_map *map,
                       pthread_mutex_t *mutex, void *buf, size_t n,
                       uint64_t offset)
{
  uint64_t end = offset + n;
  uint8_t *to = buf;
  int err = img->failed;

  while (err == 0 && offset < end) {
    struct vr_extent e = piece_at (map, mutex, offset, end);

    if (e.kind == VR_EXTENT_DATA)
      err = vr_log_read (img->log, e.lsn, to, e.length);
    else if (e.kind == 0)
      err = vr_read (img->base, to, e.length, offset);
    else
      memset (to, 0, e.length);
    to += e.length;
    offset += e.length;
  }
  return err;
}

/* ---- Views -------------------------------------------------------------- */

int
vr_view_make_room (struct vr_image *img, uint64_t epoch)
{
  struct vr_log_info info;
  uint64_t n = 1;
  int err = 0;

  vr_log_info (img->log, &info);
  if (epoch && epoch < info.committed_epoch)
    return 0;
  while (err == 0 && n > 0 && info.head - info.applied > info.capacity / 4) {
    err = vr_image_apply (img, VIEW_APPLY_BYTES, &n);
    vr_log_info (img->log, &info);
  }
  return err;
}

int
vr_view_open (struct vr_view *v, struct vr_image *img, uint64_t epoch)
{
  struct vr_log_info info;
  int err = 0;

  pthread_mutex_lock (&img->apply_mutex);
  vr_log_info (img->log, &info);
  *v = (struct vr_view){ .img = img,
                         .epoch = epoch ? epoch : info.committed_epoch,
                         .round = img->view_round };
  if (img->applied_through > v->epoch)
    err = -ESTALE;
  else
    img->views++;
  pthread_mutex_unlock (&img->apply_mutex);
  return err;
}

/* Both mutexes' rules: apply_mutex is held, so nothing moves. */
static int
build_view (struct vr_view *v, const struct vr_log_info *info)
{
  struct collect c = { .skip_copies = v->img->primary,
                       .max_epoch = v->epoch };
  struct vr_mark from;
  int err;

  c.map = vr_map_new ();
  if (c.map == NULL)
    return -ENOMEM;
  vr_log_applied_mark (v->img->log, &from);
  err = vr_log_scan (v->img->log, &from, info->committed, 0, collect_record,
                     &c, NULL, NULL);
  if (err < 0) {
    vr_map_free (c.map);
    return err;
  }
  v->map = c.map;
  return 0;
}

int
vr_view_ready (struct vr_view *v)
{
  struct vr_log_info info;
  int err = 0;

  pthread_mutex_lock (&v->img->apply_mutex);
  vr_log_info (v->img->log, &info);
  if (v->round != v->img->view_round)
    err = -ESTALE;
  else if (info.committed_epoch < v->epoch)
    err = -EAGAIN;
  else if (v->map == NULL)
    err = build_view (v, &info);
  pthread_mutex_unlock (&v->img->apply_mutex);
  return err;
}

int
vr_view_read (struct vr_view *v, void *buf, size_t n, uint64_t offset)
{
  int err = -ESTALE;

  pthread_rwlock_rdlock (&v->img->places);
  if (v->map && v->round == v->img->view_round)
    err = vr_image_read_through (v->img, v->map, NULL, buf, n, offset);
  pthread_rwlock_unlock (&v->img->places);
  return err;
}

void
vr_view_close (struct vr_view *v)
{
  pthread_mutex_lock (&v->img->apply_mutex);
  if (v->round == v->img->view_round)
    v->img->views--;
  pthread_mutex_unlock (&v->img->apply_mutex);
  vr_map_free (v->map);
  v->map = NULL;
}

int
vr_view_hash (struct vr_view *v, uint64_t i, uint8_t ret[VR_HASH_SIZE])
{
  uint64_t offset = i * VR_HASH_CHUNK, n = VR_HASH_CHUNK;
  void *buf;
  int err;

  if (offset >= v->img->size)
    return -EINVAL;
  if (n > v->img->size - offset)
    n = v->img->size - offset;
  buf = malloc (n);
  if (buf == NULL)
    return -ENOMEM;
  err = vr_view_read (v, buf, n, offset);
  if (err == 0)
    vr_hash128 (buf, n, ret);
  free (buf);
  return err;
}
