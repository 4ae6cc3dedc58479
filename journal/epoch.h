/* SPDX-License-Identifier: BSD-3-Clause */
/* The shared epoch counter of one VM.
 *
 * One small file, mapped shared by every process of a VM on one host (each
 * disk's nbdkit, memsync, `vmrep status`).  It holds the open epoch, who is
 * the clock, and one slot per member with its progress.  The file is no
 * record of truth: it may be lost with /run at a reboot, and is then made anew
 * from the journals, which know the highest epoch ever used.  A backup writes
 * the same page as a plain file, <dir>/<vm>/epoch; there it is the durable
 * list of members and the generation.
 *
 * Ownership is by OFD lock on single bytes of the file, which the kernel drops
 * with the process: byte VR_EPOCH_LOCK_CLOCK for the clock,
 * VR_EPOCH_LOCK_MEMBER + i for slot i.  pid and start time beside it are for
 * messages only.
 *
 * The cut: open_epoch goes from N to N+1 by compare-and-swap, and `word` is
 * bumped and woken.  A write that reads open_epoch after that (acquire) is of
 * N+1.  Because everybody on the host reads one memory word, a write issued
 * after another was acknowledged never carries a smaller epoch, whatever disk
 * it goes to.
 */
#ifndef VR_EPOCH_H
#define VR_EPOCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define VR_EPOCH_MAGIC "vmrepEPO"
#define VR_EPOCH_VERSION 1
#define VR_EPOCH_FILE_SIZE 16384
#define VR_EPOCH_MEMBERS 32
#define VR_NAME_SIZE 64 /* VM, disk and node names, with the final NUL */

#define VR_EPOCH_LOCK_SETUP 0
#define VR_EPOCH_LOCK_CLOCK 1
#define VR_EPOCH_LOCK_MEMBER 16

enum vr_member_kind {
  VR_MEMBER_FREE = 0,
  VR_MEMBER_DISK = 1,
  VR_MEMBER_MEMORY = 2,
};

enum vr_member_state {
  VR_STATE_OFFLINE = 0,    /* the process is gone */
  VR_STATE_ALONE = 1,      /* backup=none: commits are local */
  VR_STATE_CONNECTING = 2, /* the backup is not there (yet, or any more) */
  VR_STATE_COPYING = 3,    /* initial copy runs; not protected yet */
  VR_STATE_PROTECTED = 4,  /* every epoch commits at the backup */
  VR_STATE_FENCED = 5,     /* lost ownership; serves nothing */
  VR_STATE_FAILED = 6,     /* an I/O error of its own journal or image */
};

/* All counters only grow while the process lives.  Little-endian. */
struct vr_member {
  char name[VR_NAME_SIZE]; /*   0 NUL-terminated; void while kind is FREE */
  _Atomic uint32_t kind;   /*  64 enum vr_member_kind; read it (acquire)
                                  before the name */
  _Atomic uint32_t state;  /*  68 enum vr_member_state */
  _Atomic uint32_t pid;    /*  72 */
  uint32_t reserved;       /*  76 must be 0 */
  _Atomic uint64_t start;  /*  80 start time of pid, /proc/PID/stat field 22 */
  _Atomic uint64_t sealed_epoch;    /*  88 sealed in its local log */
  _Atomic uint64_t committed_epoch; /*  96 */
  _Atomic uint64_t head_lsn;        /* 104 end of its log */
  _Atomic uint64_t durable_lsn;     /* 112 */
  _Atomic uint64_t shipped_lsn;     /* 120 acknowledged by the backup */
  _Atomic uint64_t committed_lsn;   /* 128 */
  _Atomic uint64_t applied_lsn;     /* 136 in the base image */
  _Atomic uint64_t written_bytes;   /* 144 payload the guest wrote */
  _Atomic uint64_t commits;         /* 152 seals acknowledged by the backup */
  _Atomic uint64_t commit_ns;       /* 160 last: cut to commit */
  _Atomic uint64_t commit_time_ns;  /* 168 CLOCK_BOOTTIME of the last commit */
  _Atomic uint64_t copied_bytes;    /* 176 initial copy: done */
  _Atomic uint64_t copy_bytes;      /* 184 initial copy: of */
  _Atomic uint64_t capacity;        /* 192 bytes the journal can hold */
  _Atomic uint64_t reconnects;      /* 200 */
  _Atomic uint64_t oldest_open_ns;  /* 208 CLOCK_BOOTTIME of the cut of the
                                       oldest sealed, uncommitted epoch; 0:
                                       none.  Lag in seconds = now - this. */
  _Atomic uint64_t used_bytes;      /* 216 of capacity */
  _Atomic uint64_t uncommitted;     /* 224 epochs sealed, not committed;
                                       numbers jump at a restart, so their
                                       difference would not tell */
  uint8_t spare[24];                /* 232 must be 0 */
};
_Static_assert (sizeof (struct vr_member) == 256, "member slot is 256 bytes");

enum {
  VR_EPOCH_OUTPUT_HELD = 1, /* memsync holds all output until commit */
};

struct vr_epoch_page {
  char magic[8];                    /*   0 VR_EPOCH_MAGIC */
  uint32_t version;                 /*   8 */
  uint32_t flags;                   /*  12 reserved, must be 0 */
  uint8_t vm_id[16];                /*  16 */
  char vm[VR_NAME_SIZE];            /*  32 */
  _Atomic uint64_t generation;      /*  96 */
  _Atomic uint64_t open_epoch;      /* 104 */
  _Atomic uint64_t committed_epoch; /* 112 of all members */
  _Atomic uint64_t cut_request;     /* 120 somebody wants epochs <= this cut
                                           at once */
  _Atomic uint64_t cut_time_ns;     /* 128 CLOCK_BOOTTIME of the last cut */
  _Atomic uint32_t word;            /* 136 futex: bumped on cut, request,
                                           commit */
  _Atomic uint32_t dirty;           /* 140 something was written in the open
                                           epoch */
  _Atomic uint32_t output;          /* 144 VR_EPOCH_OUTPUT_HELD */
  _Atomic uint32_t clock_pid;       /* 148 */
  _Atomic uint64_t clock_start;     /* 152 */
  uint8_t spare[88];                /* 160 must be 0 */
  uint64_t checksum;                /* 248 XXH3_64 of the page with this field
                                           0, seed 0; only in a backup's file,
                                           0 in a shared one */
  struct vr_member member[VR_EPOCH_MEMBERS]; /* 256 */
};
_Static_assert (sizeof (struct vr_epoch_page) == 256 + 32 * 256,
                "epoch page layout");
_Static_assert (sizeof (struct vr_epoch_page) <= VR_EPOCH_FILE_SIZE,
                "epoch page fits its file");

struct vr_epoch; /* a handle: map, descriptor, own slots */

/* Open path, or create it for VM vm with vm_id (16 bytes; taken from the file
 * if it exists, and written to *vm_id then).  open_min: the open epoch is
 * raised to at least this.  A new file of an all-zero *vm_id gets a random id,
 * so that disks which start together agree on one.
 * -EBADMSG not an epoch file, -EPROTO a newer version, -EXDEV another VM's
 * (name or, when *vm_id is not all zeros, id), -ETIMEDOUT the setup lock was
 * not to be had in 5 s.  Errors of open(2) otherwise.
 * A handle may be used by many threads, except while it is closed. */
int vr_epoch_open (const char *path, const char *vm, uint8_t vm_id[16],
                   uint64_t open_min, struct vr_epoch **ret);

/* The same in private memory, for one process: tests and the simulator. */
int vr_epoch_new_private (const char *vm, const uint8_t vm_id[16],
                          uint64_t open_min, struct vr_epoch **ret);

/* Map an existing file read-only, to report on it.  Same errors. */
int vr_epoch_open_readonly (const char *path, struct vr_epoch **ret);

/* Leaves the slots that are joined, and gives up the clock. */
void vr_epoch_close (struct vr_epoch *e);

struct vr_epoch_page *vr_epoch_page (struct vr_epoch *e);

/* The open epoch (acquire). */
uint64_t vr_epoch_current (struct vr_epoch *e);

/* Raise the open epoch to at least n. */
void vr_epoch_raise (struct vr_epoch *e, uint64_t n);

/* Raise the generation shown to at least n. */
void vr_epoch_raise_generation (struct vr_epoch *e, uint64_t n);

/* Cut: N becomes N+1 if the open epoch is still n.  False if somebody was
   faster.  now_ns is CLOCK_BOOTTIME. */
bool vr_epoch_cut (struct vr_epoch *e, uint64_t n, uint64_t now_ns);

/* Ask whoever is the clock to cut epoch n now. */
void vr_epoch_request_cut (struct vr_epoch *e, uint64_t n);

/* Note that the open epoch holds a write; cheap when already noted.  Call it
   after vr_epoch_current, in the same thread: the mark of a writer that reads
   the epoch later may be lost to a cut in between. */
void vr_epoch_mark_dirty (struct vr_epoch *e);

/* Raise the committed epoch to at least n, and wake waiters. */
void vr_epoch_set_committed (struct vr_epoch *e, uint64_t n);

/* Wait until word differs from seen, or timeout_ns passed.  Only events in
   the mask `what` end a sleep early: the clock need not be woken by its own
   cuts and commits, which at a flush=remote load are thousands a second. */
enum {
  VR_WAKE_CUT = 1,
  VR_WAKE_REQUEST = 2,
  VR_WAKE_COMMIT = 4,
  VR_WAKE_ANY = 7,
};
uint32_t vr_epoch_word (struct vr_epoch *e);
void vr_epoch_wait (struct vr_epoch *e, uint32_t seen, uint64_t timeout_ns,
                    unsigned what);

/* Become the clock if nobody is; true if this handle is the clock now.  Cheap
   when it already is. */
bool vr_epoch_try_clock (struct vr_epoch *e);

/* Take the slot called name (its old one, if it had one); a handle may take
   several.  The state becomes OFFLINE and all counters 0: the owner sets them
   from its journal.  -EBUSY if a living process has it (or this handle),
   -ENOSPC if all slots are taken, -ETIMEDOUT as vr_epoch_open, -EROFS. */
int vr_epoch_join (struct vr_epoch *e, const char *name,
                   enum vr_member_kind kind, struct vr_member **ret);

/* The process forked since it joined: record the child's pid. */
void vr_epoch_forked (struct vr_epoch *e, struct vr_member *slot);

/* Is this a page: magic, version, names terminated, reserved fields 0?  0,
   -EBADMSG or -EPROTO. */
int vr_epoch_page_check (const struct vr_epoch_page *page);

/* What belongs into page->checksum of a backup's file. */
uint64_t vr_epoch_page_checksum (const struct vr_epoch_page *page);

/* Is slot i held by a living process?  (By its lock, not by its pid.) */
bool vr_epoch_member_alive (struct vr_epoch *e, unsigned i);

/* The same of the clock. */
bool vr_epoch_clock_alive (struct vr_epoch *e);

#endif /* VR_EPOCH_H */
