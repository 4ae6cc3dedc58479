/* SPDX-License-Identifier: BSD-3-Clause */
/* Errors and view exports of both plugins; see common.h. */
#include "common.h"

#include <errno.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define POLL_NS 5000000
#define EPOCH_WAIT_NS UINT64_C (30000000000)

/* Above this an allocation is a mapping of its own, given back when freed.
   glibc would raise the threshold beyond segments and requests as they come
   and go, and the heaps of dozens of threads then fragment without end: with
   it fixed a backup stayed at 24 MiB where it had passed 190 in half a
   minute. */
#define MAPPED_BYTES (128 << 10)

void
plugin_bound_memory (void)
{
  mallopt (M_MMAP_THRESHOLD, MAPPED_BYTES);
}

int
plugin_errno (int err)
{
  switch (err) {
  case -EPERM:
  case -ENOMEM:
  case -ENOSPC:
  case -ESHUTDOWN:
  case -EINVAL:
    nbdkit_set_error (-err);
    break;
  default:
    nbdkit_set_error (EIO);
  }
  return -1;
}

bool
plugin_should_stop (void)
{
  return nbdkit_nanosleep (0, 1) < 0;
}

/* "committed" or a number, perhaps with ".xxh3". */
static int
parse_spec (struct view_export *x, const char *spec, uint64_t *ret_epoch)
{
  char *end;

  x->hashes = false;
  *ret_epoch = 0;
  if (strncmp (spec, "committed", 9) == 0)
    end = (char *) spec + 9;
  else {
    if (*spec < '0' || *spec > '9')
      return -EINVAL;
    errno = 0;
    *ret_epoch = strtoull (spec, &end, 10);
    if (errno || *ret_epoch == 0)
      return -EINVAL;
  }
  x->hashes = strcmp (end, ".xxh3") == 0;
  return x->hashes || *end == 0 ? 0 : -EINVAL;
}

static int
wait_ready (struct view_export *x)
{
  struct vr_io *io = x->view.img->io;
  uint64_t start = vr_now_ns (io);
  int err;

  while ((err = vr_view_ready (&x->view)) == -EAGAIN) {
    if (vr_now_ns (io) - start > EPOCH_WAIT_NS)
      return -ETIMEDOUT;
    if (nbdkit_nanosleep (0, POLL_NS) < 0)
      return -ESHUTDOWN;
  }
  return err;
}

int
view_export_open (struct view_export *x, struct vr_image *img,
                  const char *spec)
{
  uint64_t epoch;
  int err = parse_spec (x, spec, &epoch);

  if (err < 0) {
    nbdkit_error ("export @%s: expected @committed or @EPOCH, perhaps with "
                  ".xxh3",
                  spec);
    return plugin_errno (err);
  }
  err = vr_view_make_room (img, epoch);
  if (err == 0)
    err = vr_view_open (&x->view, img, epoch);
  if (err == 0) {
    err = wait_ready (x);
    if (err < 0)
      vr_view_close (&x->view);
  }
  if (err < 0) {
    nbdkit_error ("export @%s: %s", spec,
                  err == -ESTALE      ? "the image has passed this epoch"
                  : err == -ETIMEDOUT ? "this epoch was not committed in time"
                                      : strerror (-err));
    return plugin_errno (err);
  }
  return 0;
}

void
view_export_close (struct view_export *x)
{
  vr_view_close (&x->view);
}

uint64_t
view_export_size (const struct view_export *x)
{
  uint64_t size = x->view.img->size;

  if (!x->hashes)
    return size;
  return (size + VR_HASH_CHUNK - 1) / VR_HASH_CHUNK * VR_HASH_SIZE;
}

static int
read_hashes (struct view_export *x, uint8_t *buf, uint32_t count,
             uint64_t offset)
{
  int err = 0;

  while (err == 0 && count > 0) {
    uint8_t hash[VR_HASH_SIZE];
    uint32_t skip = (uint32_t) (offset % VR_HASH_SIZE);
    uint32_t n = VR_HASH_SIZE - skip < count ? VR_HASH_SIZE - skip : count;

    err = vr_view_hash (&x->view, offset / VR_HASH_SIZE, hash);
    memcpy (buf, hash + skip, n);
    buf += n;
    offset += n;
    count -= n;
  }
  return err;
}

int
view_export_read (struct view_export *x, void *buf, uint32_t count,
                  uint64_t offset)
{
  int err = x->hashes ? read_hashes (x, buf, count, offset)
                      : vr_view_read (&x->view, buf, count, offset);

  if (err == -ESTALE)
    nbdkit_error ("epoch %llu: this view was given up because the journal "
                  "was filling",
                  (unsigned long long) x->view.epoch);
  return err < 0 ? plugin_errno (err) : 0;
}
