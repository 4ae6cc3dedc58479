/* SPDX-License-Identifier: BSD-3-Clause */
/* What both plugins do the same way: errors at the NBD boundary, and exports
 * that show a disk at one committed epoch.
 *
 *   …@committed      the disk at the last commit before the export was opened
 *   …@EPOCH          the same at the end of that epoch, waiting for it
 *   …@EPOCH.xxh3     16 bytes for each 256 KiB of it: their XXH3-128
 */
#ifndef VMREP_COMMON_H
#define VMREP_COMMON_H

#include "image.h"

/* Set the errno the client sees for err and return -1.  NBD knows EPERM, EIO,
 * ENOMEM, ENOSPC, ESHUTDOWN and EINVAL; everything else of ours is EIO, on
 * purpose and not as nbdkit's EINVAL. */
int plugin_errno (int err);

/* For .load: keep the memory of this process in proportion to what is
   allocated. */
void plugin_bound_memory (void);

/* Has this client gone, or is the server shutting down?  For threads that
   serve a connection. */
bool plugin_should_stop (void);

struct view_export {
  struct vr_view view;
  bool hashes;
};

/* Open what spec, the part behind '@', names.  Waits for the epoch.  0, or -1
   after nbdkit_error. */
int view_export_open (struct view_export *x, struct vr_image *img,
                      const char *spec);
void view_export_close (struct view_export *x);
uint64_t view_export_size (const struct view_export *x);
int view_export_read (struct view_export *x, void *buf, uint32_t count,
                      uint64_t offset);

#endif /* VMREP_COMMON_H */
