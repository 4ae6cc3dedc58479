/* SPDX-License-Identifier: BSD-3-Clause */
/* The primary's disk; see disk.h. */
#include "disk.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How long one wait for journal space lasts before keep_waiting is asked. */
#define SPACE_WAIT_NS UINT64_C (50000000)

/* Index entries set aside before a record goes into the log, so that entering
   it cannot fail; more than there are server threads. */
#define INDEX_RESERVE 64

/* ---- Open --------------------------------------------------------------- */

static int
fail (char *message, size_t size, int err, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (message, size, fmt, args);
  va_end (args);
  return err;
}

static int
open_image (struct vr_disk *d, const char *path, char *message, size_t size)
{
  struct vr_lock_owner owner = { 0 };
  int err = d->io->ops->open (d->io, path, 0, &d->base);

  if (err < 0)
    return fail (message, size, err, "image %s: %s", path, strerror (-err));
  err = d->io->ops->lock (d->base, &owner);
  if (err == -EAGAIN)
    return fail (message, size, err,
                 "image %s: locked by another process (pid %d)", path,
                 owner.pid);
  if (err == 0)
    err = d->io->ops->size (d->base, &d->size);
  if (err < 0)
    return fail (message, size, err, "image %s: %s", path, strerror (-err));
  if (d->size == 0)
    return fail (message, size, -EINVAL, "image %s: is empty", path);
  return 0;
}

static int
create_journal (struct vr_disk *d, const struct vr_disk_config *c,
                char *message, size_t size)
{
  struct vr_log_config lc = { .vm = c->vm, .disk = c->disk,
                              .disk_size = d->size, .generation = 1,
                              /* the first seal is then of epoch >= 1 */
                              .epoch_limit = 2 };
  int err;

  err = vr_log_geometry (c->journal_size, &lc.segment_size,
                         &lc.segment_count);
  if (err < 0)
    return fail (message, size, err,
                 "journal-size=%llu: must be between %llu and %llu bytes",
                 (unsigned long long) c->journal_size,
                 (unsigned long long) VR_JOURNAL_MIN,
                 (unsigned long long) VR_JOURNAL_MAX);
  lc.start.lsn = lc.segment_size;
  memcpy (lc.vm_id, c->vm_id, sizeof lc.vm_id);
  err = vr_log_create (d->io, c->journal, &lc);
  if (err < 0)
    return fail (message, size, err, "journal %s: cannot create: %s",
                 c->journal, strerror (-err));
  return 0;
}

/* Is this journal the one for this image, VM and disk? */
static int
check_identity (struct vr_disk *d, const struct vr_disk_config *c,
                char *message, size_t size)
{
  struct vr_log_info info;

  vr_log_info (d->log, &info);
  if (strcmp (info.super.vm, c->vm) != 0
      || strcmp (info.super.disk, c->disk) != 0)
    return fail (message, size, -EXDEV,
                 "journal %s: belongs to disk %s of VM %s, not to disk %s of "
                 "VM %s",
                 c->journal, info.super.disk, info.super.vm, c->disk, c->vm);
  if (info.super.flags & VR_LOG_BACKUP)
    return fail (message, size, -EXDEV,
                 "journal %s: is a backup's; run vmrep promote first",
                 c->journal);
  if (info.super.disk_size != d->size)
    return fail (message, size, -EXDEV,
                 "journal %s: is for a disk of %llu bytes, image %s has %llu",
                 c->journal, (unsigned long long) info.super.disk_size,
                 c->image, (unsigned long long) d->size);
  return 0;
}

static int
open_journal (struct vr_disk *d, const struct vr_disk_config *c,
              char *message, size_t size)
{
  struct vr_log_open_options options = {
    .cache_segments = c->cache_segments, .direct = c->direct
  };
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  int err;

  err = vr_log_open (d->io, c->journal, &options, &d->log, &problem, &owner);
  if (err == -ENOENT && !c->create)
    return err;
  if (err == -ENOENT) {
    err = create_journal (d, c, message, size);
    if (err < 0)
      return err;
    err = vr_log_open (d->io, c->journal, &options, &d->log, &problem,
                       &owner);
  }
  if (err == -EAGAIN)
    return fail (message, size, err,
                 "journal %s: locked by another process (pid %d)", c->journal,
                 owner.pid);
  if (err < 0 && problem.text[0])
    return fail (message, size, err, "journal %s: at byte %llu: %s",
                 c->journal, (unsigned long long) problem.file_offset,
                 problem.text);
  if (err < 0)
    return fail (message, size, err, "journal %s: %s", c->journal,
                 strerror (-err));
  return check_identity (d, c, message, size);
}

int
vr_disk_open (struct vr_io *io, const struct vr_disk_config *config,
              struct vr_disk **ret, char *message, size_t message_size)
{
  struct vr_disk *d = calloc (1, sizeof *d);
  int err;

  message[0] = 0;
  if (d == NULL)
    return -ENOMEM;
  d->io = io;
  vr_rangelock_init (&d->ranges);
  err = open_image (d, config->image, message, message_size);
  if (err == 0)
    err = open_journal (d, config, message, message_size);
  if (err == 0) {
    err = vr_image_init (&d->img, d->log, d->base, true);
    if (err < 0)
      fail (message, message_size, err, "journal %s: reading the tail: %s",
            config->journal, strerror (-err));
  }
  if (err < 0) {
    vr_disk_close (d);
    return err;
  }
  *ret = d;
  return 0;
}

int
vr_disk_start (struct vr_disk *d, struct vr_epoch *epoch)
{
  d->epoch = epoch;
  return vr_log_start_primary (d->log, epoch);
}

void
vr_disk_close (struct vr_disk *d)
{
  if (d == NULL)
    return;
  if (d->img.batch)
    vr_image_destroy (&d->img);
  vr_log_close (d->log);
  vr_close (d->base);
  vr_rangelock_destroy (&d->ranges);
  free (d);
}

/* ---- Write -------------------------------------------------------------- */

static int
index_reserve (struct vr_disk *d)
{
  int err;

  pthread_mutex_lock (&d->img.index_mutex);
  err = vr_map_reserve (d->img.index, INDEX_RESERVE);
  pthread_mutex_unlock (&d->img.index_mutex);
  return err;
}

/* Reserve, waiting while the journal is full. */
static int
reserve_wait (struct vr_disk *d, enum vr_kind kind, unsigned flags,
              uint64_t offset, uint64_t length, const void *payload,
              struct vr_reservation *r)
{
  int err;

  for (;;) {
    err = vr_log_reserve (d->log, kind, flags, offset, length, payload, r);
    if (err != -EAGAIN)
      return err;
    if (d->keep_waiting && !d->keep_waiting (d->opaque))
      return -ESHUTDOWN;
    vr_log_wait_space (d->log, SPACE_WAIT_NS);
  }
}

/* One record, in the log and in the index.  The range is locked. */
static int
add_record (struct vr_disk *d, enum vr_kind kind, uint64_t offset,
            uint64_t length, const void *payload, uint64_t *ret_done)
{
  struct vr_reservation r;
  struct vr_extent e;
  int err = index_reserve (d);

  if (err == 0)
    err = reserve_wait (d, kind, 0, offset, length, payload, &r);
  if (err < 0)
    return err;
  e.offset = offset;
  e.length = kind == VR_WRITE ? r.length : length;
  e.lsn = kind == VR_WRITE ? r.payload_lsn : r.lsn;
  e.kind = kind == VR_WRITE  ? VR_EXTENT_DATA
           : kind == VR_ZERO ? VR_EXTENT_ZERO
                             : VR_EXTENT_TRIM;
  pthread_mutex_lock (&d->img.index_mutex);
  err = vr_map_insert (d->img.index, &e);
  pthread_mutex_unlock (&d->img.index_mutex);
  /* Only now: before, an apply could pass the record and leave an entry that
     points to a recycled place. */
  vr_log_publish (d->log, &r);
  vr_epoch_mark_dirty (d->epoch);
  *ret_done = e.length;
  return err;
}

int
vr_disk_write (struct vr_disk *d, const void *buf, size_t n, uint64_t offset)
{
  const uint8_t *from = buf;
  struct vr_range range;
  int err = 0;

  vr_rangelock_lock (&d->ranges, &range, offset, n);
  while (err == 0 && n > 0) {
    uint64_t done = 0;

    err = add_record (d, VR_WRITE, offset, n, from, &done);
    from += done;
    offset += done;
    n -= done;
    atomic_fetch_add_explicit (&d->written_bytes, done,
                               memory_order_relaxed);
  }
  vr_rangelock_unlock (&d->ranges, &range);
  return err;
}

int
vr_disk_zero (struct vr_disk *d, uint64_t length, uint64_t offset,
              bool may_trim)
{
  struct vr_range range;
  uint64_t done;
  int err;

  if (length == 0)
    return 0;
  vr_rangelock_lock (&d->ranges, &range, offset, length);
  err = add_record (d, may_trim ? VR_TRIM : VR_ZERO, offset, length, NULL,
                    &done);
  vr_rangelock_unlock (&d->ranges, &range);
  return err;
}

int
vr_disk_copy (struct vr_disk *d, void *buf, size_t n, uint64_t offset)
{
  struct vr_reservation r;
  struct vr_range range;
  const uint8_t *from = buf;
  int err;

  vr_rangelock_lock (&d->ranges, &range, offset, n);
  err = vr_disk_read (d, buf, n, offset);
  while (err == 0 && n > 0) {
    err = reserve_wait (d, VR_WRITE, VR_RECORD_COPY, offset, n, from, &r);
    if (err < 0)
      break;
    vr_log_publish (d->log, &r);
    vr_epoch_mark_dirty (d->epoch);
    from += r.length;
    offset += r.length;
    n -= r.length;
  }
  vr_rangelock_unlock (&d->ranges, &range);
  return err;
}

/* ---- Read and sync ------------------------------------------------------ */

int
vr_disk_read (struct vr_disk *d, void *buf, size_t n, uint64_t offset)
{
  int err;

  pthread_rwlock_rdlock (&d->img.places);
  err = vr_image_read_through (&d->img, d->img.index, &d->img.index_mutex,
                               buf, n, offset);
  pthread_rwlock_unlock (&d->img.places);
  return err;
}

int
vr_disk_sync (struct vr_disk *d)
{
  return vr_log_sync (d->log, vr_log_head (d->log));
}

int
vr_disk_extent (struct vr_disk *d, uint64_t offset, uint64_t end,
                uint64_t *ret_length, bool *ret_zero)
{
  struct vr_extent e;
  uint64_t data, data_end;
  bool found;
  int err;

  pthread_mutex_lock (&d->img.index_mutex);
  found = vr_map_next (d->img.index, offset, end, &e);
  pthread_mutex_unlock (&d->img.index_mutex);
  if (found && e.offset == offset) {
    *ret_length = e.length;
    *ret_zero = e.kind != VR_EXTENT_DATA;
    return 0;
  }
  if (found)
    end = e.offset;
  err = d->io->ops->next_data (d->base, offset, &data, &data_end);
  if (err < 0)
    return err;
  *ret_zero = data > offset;
  data = *ret_zero ? data : data_end;
  *ret_length = (data < end ? data : end) - offset;
  return 0;
}
