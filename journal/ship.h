/* SPDX-License-Identifier: BSD-3-Clause */
/* The primary's side of the conversation with a backup.
 *
 *   primary                                backup
 *     read status (offset 0)  ──────────▶
 *     vr_ship_plan: create, resume or give up
 *     write hello (offset 0)  ──────────▶  vr_vm_hello
 *     write log bytes at LSN  ──────────▶  vr_vm_write, many in flight
 *     write with a seal, FUA  ──────────▶  … its reply is the commit
 *
 * This file decides; it does no I/O of its own beyond the log's, so the
 * plugin and the simulator share it.
 */
#ifndef VR_SHIP_H
#define VR_SHIP_H

#include "log.h"

enum vr_plan {
  VR_PLAN_CREATE,  /* the backup has nothing: begin a log, copy the disk */
  VR_PLAN_RESUME,  /* go on where the backup's log ends */
  VR_PLAN_COPY,    /* resume, and copy the disk: its copy is incomplete */
  VR_PLAN_FENCED,  /* another primary has taken over */
  VR_PLAN_REFUSED, /* this backup cannot be used; why says it */
};

struct vr_ship_plan {
  enum vr_plan plan;
  struct vr_mark start; /* CREATE, RESUME, COPY: where to ship from */
  uint64_t committed_epoch; /* RESUME, COPY: the newest of our uncommitted
                               epochs that the backup holds and has
                               committed; 0: none */
  char why[512];        /* FENCED, REFUSED: for the user */
};

/* Look at a backup's status block and decide.  Changes nothing.  -EBADMSG if
 * it is no valid status; errors of reading the log. */
int vr_ship_plan (struct vr_log *log, const struct vr_status *status,
                  struct vr_ship_plan *ret);

/* The hello that carries a plan out.  For CREATE this sets plan->start: the
 * log moves to a new segment, or if it is full, all of it is shipped.  session
 * is random, not 0. */
int vr_ship_hello (struct vr_log *log, struct vr_ship_plan *plan,
                   const char *node, uint64_t session, struct vr_hello *ret);

#endif /* VR_SHIP_H */
