/* SPDX-License-Identifier: BSD-3-Clause */
/* A lock over byte ranges, for writes in flight.
 *
 * Two writes that overlap must reach the log and the read index in the same
 * order, or primary and backup diverge in silence.  A writer holds its range
 * from before it takes its place in the log until the index shows it.
 *
 * Waiters are served in the order they came (a ticket behind every earlier
 * overlapping one), so nobody starves.  Few ranges are held at once (one per
 * server thread), so a list is the right structure.
 */
#ifndef VR_RANGELOCK_H
#define VR_RANGELOCK_H

#include <pthread.h>
#include <stdint.h>

/* Lives on the holder's stack between lock and unlock. */
struct vr_range {
  uint64_t offset;
  uint64_t length;
  struct vr_range *next; /* private */
  struct vr_range *prev; /* private */
};

struct vr_rangelock {
  pthread_mutex_t mutex;
  pthread_cond_t released;
  struct vr_range *first, *last; /* held and waiting, oldest first */
  unsigned waiters;
};

int vr_rangelock_init (struct vr_rangelock *l);
void vr_rangelock_destroy (struct vr_rangelock *l);

/* Take [offset, offset+length); length 0 covers nothing and never waits.
   *r must stay in place until unlock. */
void vr_rangelock_lock (struct vr_rangelock *l, struct vr_range *r,
                        uint64_t offset, uint64_t length);
void vr_rangelock_unlock (struct vr_rangelock *l, struct vr_range *r);

#endif /* VR_RANGELOCK_H */
