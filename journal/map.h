/* SPDX-License-Identifier: BSD-3-Clause */
/* An ordered map of disjoint byte ranges to places in the log.
 *
 * It answers "where are the newest pending bytes of this range": the read
 * index of a primary's disk, and the last-version-wins table of an apply.
 * Ranges are byte-granular.  Inserting over existing ranges trims or splits
 * them; the newest insert wins.
 *
 * Two levels: an array of leaves ordered by first offset, each leaf an array
 * of at most VR_MAP_LEAF extents.  Look-up is two binary searches; an insert
 * moves at most one leaf (a few KiB) and, once in VR_MAP_LEAF/2 inserts, the
 * leaf array.  At a million extents that is still under a microsecond, with a
 * fraction of the code of a B-tree.
 *
 * No locking inside: the owner serialises.  No I/O.
 */
#ifndef VR_MAP_H
#define VR_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum vr_extent_kind {
  VR_EXTENT_DATA = 1, /* bytes are in the log at lsn */
  VR_EXTENT_ZERO = 2, /* reads as zeros, stays allocated */
  VR_EXTENT_TRIM = 3, /* reads as zeros, may become a hole */
};

struct vr_extent {
  uint64_t offset; /* first byte */
  uint64_t length; /* > 0 */
  uint64_t lsn;    /* DATA: log position of the byte at offset (it moves along
                      when the front is cut off); others: the record's own */
  uint64_t kind;   /* enum vr_extent_kind */
};

struct vr_map;

/* NULL when out of memory. */
struct vr_map *vr_map_new (void);
void vr_map_free (struct vr_map *m);
void vr_map_clear (struct vr_map *m);

/* Number of extents, and bytes of memory held. */
size_t vr_map_count (const struct vr_map *m);
size_t vr_map_memory (const struct vr_map *m);

/* Insert *e, replacing whatever was there.  e->length > 0 and e->offset +
   e->length must not overflow.  -ENOMEM leaves the map as it was. */
int vr_map_insert (struct vr_map *m, const struct vr_extent *e);

/* Make room so that the next `inserts` calls of vr_map_insert and
   vr_map_remove_older together cannot fail.  Promises do not add up: the
   larger one holds.  -ENOMEM. */
int vr_map_reserve (struct vr_map *m, size_t inserts);

/* In [offset, offset+length) drop whatever is older than lsn, keeping newer
   bytes.  A byte of DATA is as old as its own place in the log; one of ZERO or
   TRIM, as the record.  So lsn should be the end of a record, not its start
   plus one.  May split.  -ENOMEM leaves the map as it was. */
int vr_map_remove_older (struct vr_map *m, uint64_t offset, uint64_t length,
                         uint64_t lsn);

/* The first piece of an extent at or after offset and before end, clipped to
   [offset, end).  False if there is none. */
bool vr_map_next (const struct vr_map *m, uint64_t offset, uint64_t end,
                  struct vr_extent *ret);

/* Check the structure (order, no overlap, no empty extent, counts); aborts.
   For tests. */
void vr_map_assert_valid (const struct vr_map *m);

#endif /* VR_MAP_H */
