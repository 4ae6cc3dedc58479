/* SPDX-License-Identifier: BSD-3-Clause */
/* The primary's side of the conversation; see ship.h. */
#include "ship.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static int
decide (struct vr_ship_plan *p, enum vr_plan plan, const char *fmt, ...)
{
  va_list args;

  p->plan = plan;
  va_start (args, fmt);
  vsnprintf (p->why, sizeof p->why, fmt, args);
  va_end (args);
  return 0;
}

static bool
is_zero (const uint8_t id[16])
{
  static const uint8_t zeros[16];

  return memcmp (id, zeros, 16) == 0;
}

/* Is the chain value at this place the same here?  1, 0 or error. */
static int
agrees (struct vr_log *log, uint64_t lsn, uint64_t chain)
{
  uint64_t here;
  int err = vr_log_chain_at (log, lsn, &here);

  if (err == -ERANGE || err == -ESTALE)
    return 0;
  return err < 0 ? err : here == chain;
}

/* The newest seal behind our commit point that the backup holds, up to LSN
   held, and has committed.  What is committed there may be beyond what this
   log's copy has, when it is a late member of its VM. */
static uint64_t
committed_seal (struct vr_log *log, uint64_t committed_epoch, uint64_t held)
{
  struct vr_seal s = { 0 };
  uint64_t epoch = 0;

  while (vr_log_next_seal (log, s.lsn + 1, &s) && s.lsn <= held
         && s.epoch <= committed_epoch)
    epoch = s.epoch;
  return epoch;
}

/* Both have logs of one stream: find where they part. */
static int
plan_resume (struct vr_log *log, const struct vr_log_info *info,
             const struct vr_status *st, struct vr_ship_plan *p)
{
  bool copying = st->flags & VR_LOG_COPYING;
  int same = agrees (log, st->next_lsn, st->next_chain);

  p->plan = copying ? VR_PLAN_COPY : VR_PLAN_RESUME;
  p->start = (struct vr_mark){ st->next_lsn, st->next_chain };
  if (same != 0)
    return same < 0 ? same : 0;
  /* Its tail is none of ours; what it committed must be. */
  p->start = (struct vr_mark){ st->committed_lsn, st->committed_chain };
  same = agrees (log, st->committed_lsn, st->committed_chain);
  if (same != 0)
    return same < 0 ? same : 0;
  if (copying)
    return decide (p, VR_PLAN_CREATE, "%s", "");
  if (st->committed_lsn > info->head)
    return decide (p, VR_PLAN_REFUSED,
                   "the backup has committed epoch %llu, which is beyond the "
                   "end of this journal: this image is older than the "
                   "backup's",
                   (unsigned long long) st->committed_epoch);
  return decide (p, VR_PLAN_REFUSED,
                 "the backup stands at epoch %llu (LSN %llu), which this "
                 "journal does not reach back to (it begins at LSN %llu)",
                 (unsigned long long) st->committed_epoch,
                 (unsigned long long) st->committed_lsn,
                 (unsigned long long) info->tail);
}

/* What does not depend on the logs' contents; 1 if nothing speaks against. */
static int
plan_identity (const struct vr_log_info *info, const struct vr_status *st,
               struct vr_ship_plan *p)
{
  const struct vr_super *own = &info->super;

  if (st->refusal == VR_REFUSED_DAMAGE)
    return decide (p, VR_PLAN_REFUSED, "the backup is damaged: %.*s",
                   (int) sizeof st->refusal_text - 1, st->refusal_text);
  if (st->flags & VR_LOG_PROMOTED)
    return decide (p, VR_PLAN_FENCED,
                   "the backup was promoted at epoch %llu: it is the primary "
                   "now",
                   (unsigned long long) st->committed_epoch);
  if (st->generation > own->generation
      && memcmp (st->vm_id, own->vm_id, 16) == 0)
    return decide (p, VR_PLAN_FENCED,
                   "the backup knows generation %llu, this is %llu: another "
                   "primary has taken over",
                   (unsigned long long) st->generation,
                   (unsigned long long) own->generation);
  if (!is_zero (st->vm_id) && memcmp (st->vm_id, own->vm_id, 16) != 0)
    return decide (p, VR_PLAN_REFUSED,
                   "the backup holds another VM called %s", own->vm);
  if (!is_zero (st->log_id) && st->disk_size != own->disk_size)
    return decide (p, VR_PLAN_REFUSED,
                   "disk %s has %llu bytes here and %llu at the backup",
                   own->disk, (unsigned long long) own->disk_size,
                   (unsigned long long) st->disk_size);
  return 1;
}

int
vr_ship_plan (struct vr_log *log, const struct vr_status *st,
              struct vr_ship_plan *p)
{
  struct vr_log_info info;
  int err;

  *p = (struct vr_ship_plan){ 0 };
  if (!vr_block_ok (st, VR_STATUS_MAGIC))
    return -EBADMSG;
  if (st->version != VR_VERSION)
    return decide (p, VR_PLAN_REFUSED,
                   "the backup speaks version %u, this program version %u",
                   st->version, VR_VERSION);
  vr_log_info (log, &info);
  if (plan_identity (&info, st, p) == 0)
    return 0;
  if (is_zero (st->log_id))
    return decide (p, VR_PLAN_CREATE, "%s", "");
  if (memcmp (st->log_id, info.super.log_id, 16) != 0) {
    if (st->flags & VR_LOG_COPYING)
      return decide (p, VR_PLAN_CREATE, "%s", "");
    return decide (p, VR_PLAN_REFUSED,
                   "the backup holds the history of another journal, up to "
                   "epoch %llu; to start over from this primary, remove "
                   "%s/%s.* there",
                   (unsigned long long) st->committed_epoch, info.super.vm,
                   info.super.disk);
  }
  err = plan_resume (log, &info, st, p);
  if (err == 0 && (p->plan == VR_PLAN_RESUME || p->plan == VR_PLAN_COPY))
    p->committed_epoch
        = committed_seal (log, st->committed_epoch,
                          p->start.lsn < info.durable ? p->start.lsn
                                                      : info.durable);
  return err;
}

int
vr_ship_hello (struct vr_log *log, struct vr_ship_plan *plan,
               const char *node, uint64_t session, struct vr_hello *h)
{
  struct vr_log_info info;
  int err = 0;

  if (plan->plan == VR_PLAN_CREATE) {
    err = vr_log_new_segment (log, &plan->start);
    /* Full while there was no backup: only shipping it all makes space. */
    if (err == -EAGAIN)
      err = vr_log_first_segment (log, &plan->start);
  }
  if (err < 0)
    return err;
  vr_log_info (log, &info);
  memset (h, 0, sizeof *h);
  memcpy (h->magic, VR_HELLO_MAGIC, 8);
  h->version = VR_VERSION;
  h->mode = plan->plan == VR_PLAN_CREATE ? VR_HELLO_CREATE : VR_HELLO_RESUME;
  memcpy (h->vm_id, info.super.vm_id, 16);
  memcpy (h->log_id, info.super.log_id, 16);
  h->generation = info.super.generation;
  h->disk_size = info.super.disk_size;
  h->segment_size = info.super.segment_size;
  h->segment_count = info.super.segment_count;
  h->lsn = plan->start.lsn;
  h->chain = plan->start.chain;
  h->session = session;
  memcpy (h->vm, info.super.vm, sizeof h->vm);
  memcpy (h->disk, info.super.disk, sizeof h->disk);
  snprintf (h->node, sizeof h->node, "%s", node);
  vr_block_seal (h);
  return 0;
}
