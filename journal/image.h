/* SPDX-License-Identifier: BSD-3-Clause */
/* A base image and the committed log that belongs on top of it.
 *
 * Both sides have one: committed epochs are redone onto the base image, each
 * byte once per batch in its last version, then the image is synced and the
 * log recycled.  Redo writes whole new contents and never reads old ones, so
 * doing it again after a crash gives the same bytes.
 *
 *      log:   tail ─ applied ─ committed ─ head
 *                   │          │
 *      apply moves ─┘          └─ commit moves
 *
 * On a primary the image also carries the read index: where the newest bytes
 * are that the base image does not hold yet.  Rules between readers and apply:
 *   - a reader holds `places` shared from look-up to copy;
 *   - apply writes the base image first, then takes the entries out of the
 *     index, then (before the log is recycled) passes through `places`
 *     exclusively: whoever still uses a place in the log is waited for.
 */
#ifndef VR_IMAGE_H
#define VR_IMAGE_H

#include <pthread.h>

#include "log.h"
#include "map.h"

struct vr_image {
  struct vr_io *io;
  struct vr_log *log;   /* borrowed */
  struct vr_file *base; /* borrowed */
  uint64_t size;        /* of the disk */
  bool primary;         /* records of an initial copy are not applied */

  pthread_rwlock_t places;
  pthread_mutex_t index_mutex;
  struct vr_map *index; /* primary only */

  pthread_mutex_t apply_mutex; /* one apply, checkpoint or view change */
  _Atomic int failed; /* a sync of base failed: it is unknown what is in it,
                         so nothing is read from or added to it any more */
  uint64_t applied_through;    /* no record of a later epoch is in base */
  uint64_t applied_epoch;      /* last epoch applied whole */
  _Atomic uint64_t dirty_bytes; /* applied since the last checkpoint */
  pthread_mutex_t checkpoint_mutex; /* before apply_mutex */
  unsigned views;              /* open ones hold up apply */
  _Atomic uint64_t view_round; /* bumped when open views are given up */
  struct vr_map *batch;        /* scratch */
};

/* Neither log nor base is owned.  -ENOMEM, or errors of reading the log's
   tail (a primary's index is built from it). */
int vr_image_init (struct vr_image *img, struct vr_log *log,
                   struct vr_file *base, bool primary);
void vr_image_destroy (struct vr_image *img);

/* Redo committed records, about max_bytes of log (0: all).  *ret_bytes of log
   were done; 0 when there is nothing to do or a view holds it up. */
int vr_image_apply (struct vr_image *img, uint64_t max_bytes,
                    uint64_t *ret_bytes);

/* Sync the base image and free the log before the applied mark.  Applying
   goes on meanwhile.  After a failure the log keeps everything for the next
   start, and all of apply, checkpoint and reading give that error. */
int vr_image_checkpoint (struct vr_image *img);

/* Read through a map of places in the log onto the base image.  mutex (may
   be NULL) guards the map.  The caller holds places. */
int vr_image_read_through (struct vr_image *img, const struct vr_map *map,
                           pthread_mutex_t *mutex, void *buf, size_t n,
                           uint64_t offset);

/* ---- Views -------------------------------------------------------------- */

/* The disk exactly as it was at the end of one epoch.  While a view is open
 * the base image stands still and the log grows; when half of the journal
 * waits to be applied, views are given up and reading them fails with
 * -ESTALE. */
struct vr_view {
  struct vr_image *img;
  uint64_t epoch;
  uint64_t round;
  struct vr_map *map; /* NULL until ready */
};

/* A view holds apply up: begin with little left to apply, so that it lasts.
   Never applies past epoch (0: the last committed). */
int vr_view_make_room (struct vr_image *img, uint64_t epoch);

/* Start holding for epoch (0: the last committed).  -ESTALE if the base
   image has passed it. */
int vr_view_open (struct vr_view *v, struct vr_image *img, uint64_t epoch);

/* 0 once its epoch is committed and it can be read, -EAGAIN before. */
int vr_view_ready (struct vr_view *v);
int vr_view_read (struct vr_view *v, void *buf, size_t n, uint64_t offset);
void vr_view_close (struct vr_view *v);

/* XXH3-128, in canonical form, of chunk i: VR_HASH_CHUNK bytes of the disk
   from i * VR_HASH_CHUNK, or what is left of it. */
#define VR_HASH_CHUNK (256U << 10)
#define VR_HASH_SIZE 16
int vr_view_hash (struct vr_view *v, uint64_t i, uint8_t ret[VR_HASH_SIZE]);

#endif /* VR_IMAGE_H */
