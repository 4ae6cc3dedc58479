/* SPDX-License-Identifier: BSD-3-Clause */
/* Flow control: how far the guest may run ahead of the backup.
 *
 * A guest can write faster than two hosts can make durable.  Left alone, the
 * backlog would grow until the journal is full, and every commit would be as
 * old as a journal is long.  So writes wait while more than `window` bytes
 * are uncommitted, and the window follows the commits: smaller when one took
 * longer than an epoch interval from its cut, larger when it was in time and
 * the window was in the way (additive increase, multiplicative decrease, as
 * TCP does it).
 *
 * This only evens out what the backup takes anyway.  When commits stop
 * altogether nothing is gained by waiting, and the journal is the backlog.
 */
#include "primary.h"

#define WINDOW_MIN (UINT64_C (2) << 20)
#define WINDOW_MAX (UINT64_C (48) << 20)
#define WINDOW_START (UINT64_C (16) << 20)
#define WINDOW_STEP (UINT64_C (256) << 10)

/* Commits have stopped when the last one is so many intervals ago. */
#define STALLED_INTERVALS 8

void
window_init (struct primary *p)
{
  atomic_store (&p->window, WINDOW_START);
}

void
window_committed (struct primary *p, uint64_t latency_ns)
{
  uint64_t window = atomic_load (&p->window);
  uint64_t backlog = vr_log_head (p->log) - atomic_load (&p->committed_lsn);

  if (latency_ns > p->config.interval_ns)
    window -= window / 8;
  else if (backlog > window / 2)
    window += WINDOW_STEP + window / 32;
  if (window < WINDOW_MIN)
    window = WINDOW_MIN;
  if (window > WINDOW_MAX)
    window = WINDOW_MAX;
  atomic_store (&p->window, window);
}

static bool
is_open (struct primary *p)
{
  uint32_t state = atomic_load (&p->slot->state);
  uint64_t last = atomic_load (&p->slot->commit_time_ns);
  uint64_t stalled = STALLED_INTERVALS * p->config.interval_ns;

  if (state != VR_STATE_PROTECTED && state != VR_STATE_COPYING)
    return true;
  if (vr_log_head (p->log) - atomic_load (&p->committed_lsn)
      <= atomic_load (&p->window))
    return true;
  return vr_now_ns (p->disk->io) - last > stalled;
}

int
window_enter (struct primary *p)
{
  int err = 0;

  if (is_open (p))
    return 0;
  pthread_mutex_lock (&p->mutex);
  while (err == 0 && !is_open (p))
    err = primary_wait_step (p);
  pthread_mutex_unlock (&p->mutex);
  return err;
}
