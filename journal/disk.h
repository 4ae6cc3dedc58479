/* SPDX-License-Identifier: BSD-3-Clause */
/* The primary's disk: base image, journal and read index as one block device.
 *
 * A write takes its range, its place in the log (vr_log_reserve), enters the
 * index and is published; then it may be acknowledged.  Nothing reaches the
 * base image before its epoch is committed.
 *
 * Threads: every function by any thread, once vr_disk_start has returned.
 * Errors: 0 or negative errno.
 */
#ifndef VR_DISK_H
#define VR_DISK_H

#include "image.h"
#include "rangelock.h"

struct vr_disk {
  struct vr_io *io;
  struct vr_file *base;
  struct vr_log *log;
  struct vr_epoch *epoch; /* borrowed, set by vr_disk_start */
  struct vr_image img;
  struct vr_rangelock ranges;
  uint64_t size;
  /* Asked when the journal is full, before waiting for space once more;
     false gives up with -ESHUTDOWN.  Set before start. */
  bool (*keep_waiting) (void *opaque);
  void *opaque;
  _Atomic uint64_t written_bytes; /* payload of the guest's writes */
};

struct vr_disk_config {
  const char *image;     /* path of the base image */
  const char *journal;   /* path of the journal */
  bool create;           /* create the journal if it is missing, */
  uint64_t journal_size; /* of this size */
  uint8_t vm_id[16];     /* and for this VM */
  const char *vm, *disk; /* names */
  unsigned cache_segments;
  bool direct; /* direct I/O for the journal */
};

/* Lock and open the image, open or create the journal, recover.  On failure
 * message says what is wrong with which file, for the user.  Errors as of
 * vr_log_open; -EXDEV: the journal belongs to another VM, disk or size.
 * -ENOENT with an empty message: there is no journal, and not create. */
int vr_disk_open (struct vr_io *io, const struct vr_disk_config *config,
                  struct vr_disk **ret, char *message, size_t message_size);

/* Begin to take writes, in the epochs of the shared counter (borrowed). */
int vr_disk_start (struct vr_disk *d, struct vr_epoch *epoch);

/* No other call may be running. */
void vr_disk_close (struct vr_disk *d);

/* The range must lie inside the disk.  -ESHUTDOWN: gave up waiting for
   space; the range may then be partly written. */
int vr_disk_write (struct vr_disk *d, const void *buf, size_t n,
                   uint64_t offset);
int vr_disk_zero (struct vr_disk *d, uint64_t length, uint64_t offset,
                  bool may_trim);
int vr_disk_read (struct vr_disk *d, void *buf, size_t n, uint64_t offset);

/* All writes that returned before are durable in the local journal. */
int vr_disk_sync (struct vr_disk *d);

/* What is at offset: *ret_length bytes (> 0) that are all data or, if
   *ret_zero, all read as zeros without being written anywhere. */
int vr_disk_extent (struct vr_disk *d, uint64_t offset, uint64_t end,
                    uint64_t *ret_length, bool *ret_zero);

/* Put the present contents of a range into the log, for a backup that has
   none.  n <= VR_PAYLOAD_MAX; buf is scratch of n bytes.  Zeros are left out
   when the range has never been data. */
int vr_disk_copy (struct vr_disk *d, void *buf, size_t n, uint64_t offset);

#endif /* VR_DISK_H */
