/* SPDX-License-Identifier: BSD-3-Clause */
/* The applier thread brings committed epochs onto the base image; the syncer
 * thread syncs the image, which may take seconds, and gives the journal back.
 */
#include "primary.h"

#include <errno.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

/* Log bytes per batch: enough that overwrites and neighbours meet, few enough
   that the segments are still in memory. */
#define BATCH_BYTES (UINT64_C (16) << 20)

/* Let commits gather before applying them: each batch has a fixed price (its
   scan, a commit point to record).  Shorter while much comes. */
#define GATHER_MS 20
#define GATHER_LONG_MS 100
#define GATHER_MUCH (UINT64_C (1) << 20)

/* The image is synced and the log recycled after this share of the journal:
   late, since a block that is written again until then goes to the disk once
   less.  Or when nothing happened for a while. */
#define CHECKPOINT_SHARE 3
#define CHECKPOINT_IDLE_NS UINT64_C (1000000000)

/* Redo can be tried again: a full file system may have room later, and until
   then the journal keeps everything. */
#define RETRY_MS 500

static void
say_error (struct primary *p, const char *what, int err)
{
  nbdkit_error ("%s: %s: %s; the journal keeps the committed epochs",
                p->config.image, what, strerror (-err));
}

void *
primary_applier (void *opaque)
{
  struct primary *p = opaque;
  int err = 0, said = 0, gather_ms = GATHER_MS;

  pthread_setname_np (pthread_self (), "vmrep-apply");
  while (!atomic_load (&p->stopping)) {
    uint64_t n = 0;

    event_wait (p->apply_event, 200);
    if (!atomic_load (&p->stopping))
      event_wait (-1, err < 0 ? RETRY_MS : gather_ms);
    do {
      err = vr_image_apply (&p->disk->img, BATCH_BYTES, &n);
      if (n > 0)
        atomic_store (&p->applied_ns, vr_now_ns (p->disk->io));
    } while (err == 0 && n >= BATCH_BYTES && !atomic_load (&p->stopping));
    gather_ms = n < GATHER_MUCH ? GATHER_LONG_MS : GATHER_MS;
    if (err < 0 && err != said)
      say_error (p, "applying", err);
    said = err;
  }
  return NULL;
}

static bool
checkpoint_due (struct primary *p)
{
  struct vr_log_info info;

  if (p->disk->img.dirty_bytes == 0)
    return false;
  vr_log_info (p->log, &info);
  return p->disk->img.dirty_bytes >= info.capacity / CHECKPOINT_SHARE
         || vr_now_ns (p->disk->io) - atomic_load (&p->applied_ns)
                >= CHECKPOINT_IDLE_NS;
}

void *
primary_syncer (void *opaque)
{
  struct primary *p = opaque;
  int err = 0;

  pthread_setname_np (pthread_self (), "vmrep-sync");
  while (err == 0 && !atomic_load (&p->stopping)) {
    event_wait (-1, GATHER_MS);
    if (checkpoint_due (p))
      err = vr_image_checkpoint (&p->disk->img);
  }
  /* A sync that failed is not tried again: what the image holds is unknown.
     The next start applies everything anew from the journal. */
  if (err < 0) {
    atomic_store (&p->slot->state, VR_STATE_FAILED);
    say_error (p, "syncing the image", err);
  }
  return NULL;
}
