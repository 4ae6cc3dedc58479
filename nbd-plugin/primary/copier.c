/* SPDX-License-Identifier: BSD-3-Clause */
/* The copier thread: puts the disk's present contents into the log, for a
 * backup that begins with an empty image.
 *
 * Each piece is read and appended under its range lock, so in the log it is
 * just one more write, and whatever the guest writes before or after is in
 * the right order.  What reads as zeros is left out: the backup's image was
 * created empty, and every later zero or trim is in the log.
 */
#include "primary.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

/* The guest's own writes go first: the copy waits while this share of the
   journal is used.  But not for ever: a guest that never pauses shall have a
   backup too.  Each piece waits at most so long. */
#define JOURNAL_SHARE 4
#define GIVE_WAY_STEPS 10
#define GIVE_WAY_STEP_US 2000

/* Wait for a connection that needs a copy; its round, or 0 when stopping. */
static uint64_t
wait_for_work (struct primary *p, uint64_t done_round)
{
  uint64_t round = 0;

  pthread_mutex_lock (&p->mutex);
  while (!atomic_load (&p->stopping)
         && !(p->copy_wanted && p->copy_round != done_round))
    pthread_cond_wait (&p->committed_changed, &p->mutex);
  if (!atomic_load (&p->stopping))
    round = p->copy_round;
  pthread_mutex_unlock (&p->mutex);
  return round;
}

/* Is the connection that wanted this copy still the present one? */
static bool
still_wanted (struct primary *p, uint64_t round)
{
  bool wanted;

  pthread_mutex_lock (&p->mutex);
  wanted = p->copy_round == round && !atomic_load (&p->stopping);
  pthread_mutex_unlock (&p->mutex);
  return wanted;
}

static void
give_way (struct primary *p, uint64_t round)
{
  struct vr_log_info info;

  for (unsigned i = 0; i < GIVE_WAY_STEPS; i++) {
    vr_log_info (p->log, &info);
    if (info.used < info.capacity / JOURNAL_SHARE
        || !still_wanted (p, round))
      return;
    usleep (GIVE_WAY_STEP_US);
  }
}

static int
copy_disk (struct primary *p, void *buf, uint64_t round)
{
  uint64_t size = p->disk->size, at = 0;
  int err = 0;

  atomic_store (&p->slot->copied_bytes, 0);
  atomic_store (&p->slot->copy_bytes, size);
  while (err == 0 && at < size && still_wanted (p, round)) {
    uint64_t n, end = at + VR_PAYLOAD_MAX - at % VR_PAYLOAD_MAX;
    bool zero;

    err = vr_disk_extent (p->disk, at, size, &n, &zero);
    if (err == 0 && !zero) {
      if (n > end - at)
        n = end - at;
      give_way (p, round);
      err = vr_disk_copy (p->disk, buf, n, at);
      primary_ship (p, false);
    }
    at += n;
    atomic_store (&p->slot->copied_bytes, at);
  }
  return err;
}

/* The epoch that is open now holds the last piece. */
static void
report_done (struct primary *p, uint64_t round)
{
  uint64_t epoch = vr_epoch_current (p->epoch);

  pthread_mutex_lock (&p->mutex);
  if (p->copy_round == round)
    p->copied_epoch = epoch;
  pthread_mutex_unlock (&p->mutex);
  vr_epoch_request_cut (p->epoch, epoch);
}

void *
primary_copier (void *opaque)
{
  struct primary *p = opaque;
  void *buf = malloc (VR_PAYLOAD_MAX);
  uint64_t round = 0;

  pthread_setname_np (pthread_self (), "vmrep-copy");
  while (buf && (round = wait_for_work (p, round)) != 0) {
    int err = copy_disk (p, buf, round);

    if (err < 0 && err != -ESHUTDOWN)
      nbdkit_error ("initial copy of %s: %s", p->config.image,
                    strerror (-err));
    else if (err == 0 && still_wanted (p, round))
      report_done (p, round);
  }
  free (buf);
  return NULL;
}
