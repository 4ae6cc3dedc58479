/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep verify: one pair of views of a disk, at the primary and at the backup,
 * at the same epoch.
 *
 * An epoch that has passed cannot be shown any more, so one is chosen that is
 * yet to come, and both servers are asked for it before it is committed; they
 * answer when it is.  While the views are open both sides hold back what is
 * newer, in their journals, and give the views up when these fill.
 */
#ifndef VMREP_ROUNDS_H
#define VMREP_ROUNDS_H

#include "client.h"

enum { PRIMARY, BACKUP, SIDES };

struct round {
  const char *uri[SIDES];
  char log_export[2 * VR_NAME_SIZE]; /* VM/DISK at the backup */
  struct client log;                 /* open on that */
  struct vr_status status;           /* as read last */
  unsigned distance; /* how many epochs ahead to choose; grows on failure */
  uint64_t epoch;    /* of the present round */
  struct client hashes[SIDES];
  struct client bytes[SIDES]; /* opened when first needed */
  char error[700];            /* for the user */
};

/* Connect to the backup, and look whether there is something to compare.  All
   functions: 0, or negative errno with r->error. */
int round_start (struct round *r, const char *primary_uri,
                 const char *backup_uri);
void round_end (struct round *r);

/* Open views of hashes at a new epoch.  Tries several. */
int round_open (struct round *r);
void round_close (struct round *r);

/* n bytes of both views of hashes, side by side.  -EIO: given up, or a real
   error. */
int round_read_hashes (struct round *r, uint8_t *buf[SIDES], size_t n,
                       uint64_t offset);

/* The first byte in [offset, offset+n) where the disks differ; n <=
   VR_HASH_CHUNK.  -ENOENT if none does, or negative errno. */
int round_first_difference (struct round *r, uint64_t offset, size_t n,
                            uint64_t *ret);

#endif /* VMREP_ROUNDS_H */
