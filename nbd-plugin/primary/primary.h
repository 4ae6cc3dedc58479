/* SPDX-License-Identifier: BSD-3-Clause */
/* The nbdkit plugin `vmrep`: the disk of a protected guest.
 *
 *   vmrep.c    parameters, life cycle, the guest's requests
 *   clock.c    thread: cuts or follows epochs, seals, syncs, reports
 *   shipper.c  thread: log bytes to the backup, commits back
 *   link.c     the connection: libnbd with deadlines
 *   applier.c  threads: committed epochs onto the base image, and its syncs
 *   copier.c   thread: the initial copy for a new backup
 *   window.c   how far the guest may run ahead of the backup
 *
 * The threads share struct primary.  What has no lock of its own (the log,
 * the disk, the epoch counter have) is atomic or guarded by `mutex`.
 */
#ifndef VMREP_PRIMARY_H
#define VMREP_PRIMARY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "disk.h"
#include "ship.h"

enum flush_mode { FLUSH_AUTO, FLUSH_LOCAL, FLUSH_REMOTE, FLUSH_EPOCH };

struct primary_config {
  char *image;
  char *backup; /* URI, or NULL for none */
  char *vm;
  char *disk;
  char *journal;
  char *epoch_path;
  char *node;
  int64_t journal_size;
  uint64_t interval_ns;
  enum flush_mode flush;
  bool unsafe; /* flush=epoch though nothing holds the output */
};

struct primary {
  struct primary_config config;
  struct vr_disk *disk;
  struct vr_log *log; /* the disk's */
  bool journal_created; /* by this start */
  struct vr_epoch *epoch;
  struct vr_member *slot; /* own progress, for vmrep status */

  uint64_t started_ns;  /* CLOCK_BOOTTIME */
  atomic_bool stopping; /* threads shall end */
  atomic_bool fenced;   /* another primary took over: serve nothing */

  /* Commits, for those who wait for them. */
  pthread_mutex_t mutex;
  pthread_cond_t committed_changed;
  uint64_t committed_epoch;

  _Atomic uint64_t window;        /* bytes that may be uncommitted */
  _Atomic uint64_t committed_lsn;

  int ship_event;  /* eventfd: something to ship */
  int apply_event; /* eventfd: something to apply */
  atomic_bool ship_now; /* a waiter wants even a small batch out */

  /* The initial copy.  mutex. */
  bool copy_wanted;     /* the present connection needs one */
  uint64_t copy_round;  /* which connection wants it */
  uint64_t copied_epoch; /* != 0: complete once this epoch is committed */

  pthread_t clock, shipper, applier, syncer, copier;
  bool clock_started, shipper_started, applier_started, syncer_started;
  bool copier_started;
  _Atomic uint64_t applied_ns; /* when something was last applied */
  _Atomic uint64_t hinted_lsn; /* the shipper knows of bytes up to here */
};

/* ---- clock.c ------------------------------------------------------------ */

void *primary_clock (void *opaque);

/* Cut the open epoch now if this process is the clock, else ask for it; seal
   and sync this disk's part.  Returns the epoch that holds all writes
   acknowledged before the call. */
uint64_t primary_cut_now (struct primary *p);

/* ---- shipper.c ---------------------------------------------------------- */

void *primary_shipper (void *opaque);

/* Connect once, look whether this backup can be used.  0: yes, or it is not
   reachable (which was said); -1: no, and nbdkit_error said why. */
int primary_probe (struct primary *p);

/* Everything up to epoch is committed. */
void primary_committed (struct primary *p, uint64_t epoch);

/* Wait a moment for a commit.  mutex held.  0, or -ESHUTDOWN when stopping or
   fenced. */
int primary_wait_step (struct primary *p);

/* Wait until epoch is committed; -ESHUTDOWN when stopping or fenced. */
int primary_wait_committed (struct primary *p, uint64_t epoch);

/* Wake the shipper.  now: even for a small batch. */
void primary_ship (struct primary *p, bool now);

/* ---- applier.c and copier.c --------------------------------------------- */

void *primary_applier (void *opaque);
void *primary_syncer (void *opaque);
void *primary_copier (void *opaque);

/* ---- window.c ------------------------------------------------------------ */

void window_init (struct primary *p);

/* A commit came latency_ns after its cut. */
void window_committed (struct primary *p, uint64_t latency_ns);

/* Before a write of the guest: wait until the window is open.  0 or
   -ESHUTDOWN. */
int window_enter (struct primary *p);

/* ---- helpers ------------------------------------------------------------ */

/* Add to, wait for and clear an eventfd. */
void event_signal (int fd);
void event_wait (int fd, int timeout_ms);

#endif /* VMREP_PRIMARY_H */
