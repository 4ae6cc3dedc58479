/* SPDX-License-Identifier: BSD-3-Clause */
/* The clock thread: cuts epochs if this process is the clock of its VM,
 * follows whoever is if not; seals and syncs its disk's log at each cut.
 *
 *        cut            sealed           durable here        committed
 *   ──────┼────────────────┼───────────────────┼──────────────────┼────▶
 *         counter N→N+1    seal record N       fdatasync          backup's
 *                          in the log          returned           reply
 */
#include "primary.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* With nothing written an epoch is longer: it is only a sign of life, and
   each one costs both hosts a sync. */
#define IDLE_INTERVALS 4
#define IDLE_MAX_NS UINT64_C (250000000)

/* So many sealed epochs may wait for their commit; beyond, the open epoch is
   stretched. */
#define OUTSTANDING_MAX 64

static uint64_t
now_ns (struct primary *p)
{
  return vr_now_ns (p->disk->io);
}

static uint64_t
idle_interval (const struct primary *p)
{
  uint64_t ns = IDLE_INTERVALS * p->config.interval_ns;

  if (ns > IDLE_MAX_NS)
    ns = IDLE_MAX_NS;
  return ns > p->config.interval_ns ? ns : p->config.interval_ns;
}

static bool
too_far_ahead (struct primary *p, uint64_t open)
{
  uint64_t committed
      = atomic_load (&vr_epoch_page (p->epoch)->committed_epoch);
  struct vr_seal oldest, newest;

  /* By seals, not by numbers: epochs jump at a restart. */
  if (open <= committed + OUTSTANDING_MAX)
    return false;
  return vr_log_next_seal (p->log, 0, &oldest)
         && vr_log_last_durable_seal (p->log, &newest)
         && newest.epoch - oldest.epoch >= OUTSTANDING_MAX;
}

/* Seal what the counter has passed, make it durable, pass it on. */
static void
seal_and_sync (struct primary *p)
{
  uint64_t lsn;
  int err = vr_log_seal (p->log, &lsn);

  if (err == 0 && lsn)
    err = vr_log_sync (p->log, lsn);
  if (err < 0 && err != -EAGAIN)
    atomic_store (&p->slot->state, VR_STATE_FAILED);
  if (err < 0 || lsn == 0)
    return;
  if (p->config.backup)
    primary_ship (p, false);
  else {
    struct vr_seal seal;

    if (vr_log_last_durable_seal (p->log, &seal))
      primary_committed (p, seal.epoch);
  }
}

uint64_t
primary_cut_now (struct primary *p)
{
  uint64_t open = vr_epoch_current (p->epoch);

  if (vr_epoch_try_clock (p->epoch)) {
    if (vr_epoch_cut (p->epoch, open, now_ns (p)))
      seal_and_sync (p);
  } else
    vr_epoch_request_cut (p->epoch, open);
  return open;
}

/* Is it time to cut?  If not, *wait_ns is how long to sleep. */
static bool
cut_is_due (struct primary *p, uint64_t open, uint64_t *wait_ns)
{
  struct vr_epoch_page *page = vr_epoch_page (p->epoch);
  uint64_t now = now_ns (p);
  uint64_t last = atomic_load (&page->cut_time_ns);
  uint64_t age = now > last ? now - last : 0;
  uint64_t interval = p->config.interval_ns;

  *wait_ns = interval;
  if (too_far_ahead (p, open))
    return false;
  if (atomic_load (&page->cut_request) >= open)
    return true;
  if (age < interval) {
    *wait_ns = interval - age;
    return false;
  }
  return atomic_load (&page->dirty) || age >= idle_interval (p);
}

/* What vmrep status shows. */
static void
report (struct primary *p)
{
  struct vr_member *m = p->slot;
  struct vr_log_info info;
  struct vr_seal oldest;
  uint64_t lag_since = 0;

  vr_log_info (p->log, &info);
  if (vr_log_next_seal (p->log, 0, &oldest))
    lag_since = oldest.since ? oldest.since : p->started_ns;
  atomic_store (&m->oldest_open_ns, lag_since);
  atomic_store (&m->sealed_epoch, info.sealed_epoch);
  atomic_store (&m->head_lsn, info.head);
  atomic_store (&m->durable_lsn, info.durable);
  atomic_store (&m->committed_lsn, info.committed);
  atomic_store (&m->applied_lsn, info.applied);
  atomic_store (&m->capacity, info.capacity);
  atomic_store (&m->used_bytes, info.used);
  atomic_store (&m->uncommitted, info.uncommitted);
  /* Also what was committed before this process began. */
  atomic_store (&m->committed_epoch, info.committed_epoch);
  atomic_store (&m->written_bytes, atomic_load (&p->disk->written_bytes));
}

void *
primary_clock (void *opaque)
{
  struct primary *p = opaque;

  pthread_setname_np (pthread_self (), "vmrep-clock");
  while (!atomic_load (&p->stopping)) {
    uint32_t word = vr_epoch_word (p->epoch);
    uint64_t open = vr_epoch_current (p->epoch);
    uint64_t wait_ns = p->config.interval_ns;
    bool clock = vr_epoch_try_clock (p->epoch);

    if (clock && cut_is_due (p, open, &wait_ns)) {
      vr_epoch_cut (p->epoch, open, now_ns (p));
      wait_ns = p->config.interval_ns;
      word = vr_epoch_word (p->epoch);
    }
    seal_and_sync (p);
    report (p);
    vr_epoch_wait (p->epoch, word, wait_ns,
                   clock ? VR_WAKE_REQUEST : VR_WAKE_CUT);
  }
  return NULL;
}
