/* SPDX-License-Identifier: BSD-3-Clause */
/* One connection to a backup's log export, with a deadline on everything.
 *
 * libnbd's simple calls wait for ever when the other host is gone without a
 * word.  Here every wait has an end.  One thread only.
 */
#ifndef VMREP_LINK_H
#define VMREP_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <libnbd.h>

#include "format.h"

struct link {
  struct nbd_handle *nbd;
  char error[512]; /* what went wrong last, for the user */
  int err;         /* negative errno of it */
};

/* Connect to the export VM/DISK of the server at uri (nbds: insists on TLS).
   0 or negative errno with link->error filled in. */
int link_open (struct link *l, const char *uri, const char *vm,
               const char *disk);
void link_close (struct link *l);

/* Can commands be sent? */
bool link_is_up (struct link *l);

/* Read and write the block at offset 0. */
int link_read_status (struct link *l, struct vr_status *ret);
int link_write_hello (struct link *l, const struct vr_hello *h);

/* Wait for traffic, the eventfd, or timeout_ms, and let libnbd work.  0, or
   negative errno when the connection is dead. */
int link_poll (struct link *l, int event_fd, int timeout_ms);

#endif /* VMREP_LINK_H */
