/* SPDX-License-Identifier: BSD-3-Clause */
/* The applier thread: brings committed epochs onto the base image and gives
 * their part of the journal back. */
#include "primary.h"

#include <errno.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

/* Log bytes per batch: enough that overwrites and neighbours meet, few enough
   that the segments are still in memory. */
#define BATCH_BYTES (UINT64_C (16) << 20)

/* Let commits gather this long before applying them. */
#define GATHER_MS 20

/* The image is synced and the log recycled after this share of the journal,
   or when nothing happened for a while. */
#define CHECKPOINT_SHARE 8
#define CHECKPOINT_IDLE_NS UINT64_C (1000000000)

static bool
checkpoint_due (struct primary *p, uint64_t idle_since)
{
  struct vr_log_info info;

  if (p->disk->img.dirty_bytes == 0)
    return false;
  vr_log_info (p->log, &info);
  return p->disk->img.dirty_bytes >= info.capacity / CHECKPOINT_SHARE
         || vr_now_ns (p->disk->io) - idle_since >= CHECKPOINT_IDLE_NS;
}

static int
apply_some (struct primary *p, uint64_t *idle_since)
{
  uint64_t n;
  int err = vr_image_apply (&p->disk->img, BATCH_BYTES, &n);

  if (n > 0)
    *idle_since = vr_now_ns (p->disk->io);
  if (err == 0 && checkpoint_due (p, *idle_since))
    err = vr_image_checkpoint (&p->disk->img);
  /* More of the same is waiting. */
  if (err == 0 && n >= BATCH_BYTES)
    event_signal (p->apply_event);
  return err;
}

void *
primary_applier (void *opaque)
{
  struct primary *p = opaque;
  uint64_t idle_since = vr_now_ns (p->disk->io);
  int err = 0;

  pthread_setname_np (pthread_self (), "vmrep-apply");
  while (err == 0 && !atomic_load (&p->stopping)) {
    event_wait (p->apply_event, 200);
    if (!atomic_load (&p->stopping))
      event_wait (-1, GATHER_MS);
    err = apply_some (p, &idle_since);
  }
  if (err < 0) {
    atomic_store (&p->slot->state, VR_STATE_FAILED);
    nbdkit_error ("%s: applying committed epochs: %s; the journal keeps them",
                  p->config.image, strerror (-err));
  }
  return NULL;
}
