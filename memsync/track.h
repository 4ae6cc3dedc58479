/* SPDX-License-Identifier: BSD-3-Clause */
/* Which pages of a guest's RAM were written.
 *
 * A tracker follows the writes that go through QEMU's page tables: those of
 * virtual processors, of device emulation, and of system calls and vhost on
 * QEMU's behalf.  Two kinds behind one interface:
 *
 *   uffd        userfaultfd with asynchronous write-protection, scanned with
 *               PAGEMAP_SCAN (Linux >= 6.7).  A scan takes and protects a page
 *               in one step, so pages may be collected while the guest runs.
 *   soft-dirty  soft-dirty bits (kernels with CONFIG_MEM_SOFT_DIRTY, which
 *               Debian's are).  Reading and clearing are two steps, so the
 *               guest must be stopped.  A page of shared memory that is not
 *               mapped at the moment counts as written: the kernel may have
 *               unmapped it, and its bit is lost then.
 *
 * A page may be reported that is the same as before (written with what it had,
 * or neighbour of a written one in a huge page).  A page that has changed
 * since begin, or since the collect before, is always reported: as long as the
 * guest takes no memory away and brings it back empty, which only what it has
 * given up (balloon, free page reporting) does.
 *
 * Use: begin; copy all of the RAM; then, each epoch, collect and copy what it
 * reports.  What is copied after a collect is at least as new as what it
 * reported, and what is written during the copy is reported the next time.
 *
 * Pages are of VR_PAGE_SIZE.  One thread at a time may use a tracker.  If we
 * die, the kernel ends the tracking; the guest runs on.
 */
#ifndef VR_TRACK_H
#define VR_TRACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "memsync/problem.h"
#include "memsync/ram.h"

/* Pages [page, page + pages) of a block; block is its place in the struct
   vr_ram. */
struct vr_run {
  uint32_t block;
  uint64_t page;
  uint64_t pages;
};

/* In ascending order, and neither adjacent nor overlapping.  Starts as zeros;
   vr_dirty_free at the end. */
struct vr_dirty {
  struct vr_run *runs;
  size_t count, capacity;
  uint64_t pages; /* the sum */
};

void vr_dirty_free (struct vr_dirty *d);

struct vr_tracker;

struct vr_tracker_ops {
  const char *name;

  /* collect only while the guest is stopped. */
  bool needs_stop;

  /* From now on writes are noted.  May be called while the guest runs.

     -EOPNOTSUPP: the kernel lacks something, *problem says what; -EBUSY: a
     block is already tracked by somebody else; -EINVAL: a block cannot be
     tracked, *problem names it.  After an error the guest is as before, and
     begin may not be called again. */
  int (*begin) (struct vr_tracker *t, struct vr_problem *problem);

  /* Fill *ret (of which the old contents are dropped) with the pages written
     since begin or the last collect, and note writes to them anew.

     -ENOMEM; -ESTALE: a block is no longer tracked, as when QEMU has mapped
     something else there.  After an error pages may be lost: end, begin with
     a new tracker, and copy everything. */
  int (*collect) (struct vr_tracker *t, struct vr_dirty *ret);

  /* Stop tracking, leave the guest as it was before, and free the tracker. */
  void (*end) (struct vr_tracker *t);
};

struct vr_tracker {
  const struct vr_tracker_ops *ops;
};

/* The RAM is copied; a block without address (a ROM) is never reported.
   -ENOMEM, or the error of opening a file of /proc/PID. */

/* uffd: from vr_attach; now the tracker's, even after an error.
   protect_runs: protect each run that was found in a step of its own, and not
   with the scan.  For KVM, where protecting a range drops the translations of
   all of it from the guest's own tables; under TCG one pass is faster. */
int vr_tracker_uffd (pid_t pid, int uffd, const struct vr_ram *ram,
                     bool protect_runs, struct vr_tracker **ret,
                     struct vr_problem *problem);

int vr_tracker_soft_dirty (pid_t pid, const struct vr_ram *ram,
                           struct vr_tracker **ret,
                           struct vr_problem *problem);

/* ---- For trackers ------------------------------------------------------- */

void vr_dirty_clear (struct vr_dirty *d);

/* Add a run that is behind all others; joined with the last one if it
   touches it. */
int vr_dirty_add (struct vr_dirty *d, uint32_t block, uint64_t page,
                  uint64_t pages);

/* A copy, for the tracker to vr_ram_free. */
int vr_ram_copy (const struct vr_ram *ram, struct vr_ram *ret);

/* Open /proc/PID/NAME. */
int vr_open_proc (pid_t pid, const char *name, int flags, int *ret,
                  struct vr_problem *problem);

#endif /* VR_TRACK_H */
