/* SPDX-License-Identifier: BSD-3-Clause */
/* The RAM of a running QEMU: its blocks, where they are in its memory, and
 * whether they can be tracked.
 *
 * QEMU >= 8.1 tells the address of each block (`info ramblock`).  Before, a
 * block is found
 *   - by where the guest sees it: `info mtree -f` gives a guest address,
 *     `gpa2hva` the host's.  The two know a block by the end of its name;
 *   - else (a disabled BAR, tables that the guest reads through fw_cfg) by its
 *     mapping: QEMU maps each block with a page behind it that cannot be
 *     accessed, so if just one such mapping has the size, and is no ROM by
 *     its first bytes, that is it.
 * A block that is not found that way is left out if it is the ROM of a device,
 * which nothing writes; else this QEMU is refused.
 */
#ifndef VR_RAM_H
#define VR_RAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "memsync/problem.h"
#include "memsync/qmp.h"

#define VR_RAM_NAME_SIZE 256

struct vr_ram_block {
  char name[VR_RAM_NAME_SIZE]; /* QEMU's, unique */
  uint64_t used;               /* bytes that mean something */
  uint64_t size;               /* bytes of address space */
  uint64_t page_size;          /* of what backs it */
  uint64_t address;            /* in QEMU; 0: a ROM that was not found */
  bool shared;                 /* a shared mapping */
};

struct vr_ram {
  unsigned count; /* <= VR_RAM_BLOCKS_MAX */
  struct vr_ram_block *blocks;
};

/* Find all RAM blocks, in QEMU's order.  The guest may run; it should not
   change its BARs meanwhile.

   -ENODEV: a block that may be written cannot be found, or has no name (its
   device cannot migrate); -EPROTO: QEMU's output is not understood; errors of
   QMP and of reading /proc. */
int vr_ram_find (struct vr_qmp *q, pid_t pid, struct vr_ram *ret,
                 struct vr_problem *problem);
void vr_ram_free (struct vr_ram *ram);

/* Is there anything about this QEMU that rules out protection of its memory?
   -EOPNOTSUPP: a device that writes the guest's memory behind QEMU's page
   tables (vhost-user, vhost-vdpa, VFIO, ivshmem); -EBUSY: a migration, in or
   out.  *problem names the device, and says what helps. */
int vr_ram_check (struct vr_qmp *q, struct vr_problem *problem);

/* ---- For tests ---------------------------------------------------------- */

/* Parse `info ramblock`; ret->blocks is to be freed even after an error. */
int vr_ram_parse_blocks (const char *text, struct vr_ram *ret,
                         struct vr_problem *problem);

/* The next line of `info mtree -f`, at *text, that shows a block as memory of
   the guest; moves *text behind it.  False at the end. */
struct vr_ram_range {
  uint64_t guest_address;
  uint64_t offset; /* in the block */
  char name[VR_RAM_NAME_SIZE];
};
bool vr_ram_next_range (const char **text, struct vr_ram_range *ret);

#endif /* VR_RAM_H */
