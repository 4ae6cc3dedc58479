/* SPDX-License-Identifier: BSD-3-Clause */
/* The one door to the outside: files, time and randomness.
 *
 * Everything in journal/ reaches disks, clocks and random bytes through the
 * operations below and in no other way, so the code that ships also runs in
 * the simulator (io_sim.c), where unsynced writes can be lost, torn or
 * reordered and any call can fail.
 *
 * Durability model, which both implementations keep:
 *   - bytes written are durable once a later ->sync of the same file returns 0;
 *   - before that each 512-byte sector of a write may, after a crash, hold the
 *     old bytes, the new bytes, or (torn device) garbage, independently;
 *   - a file name created, renamed or unlinked is durable once ->sync_dir of
 *     its directory returns 0 (->sync of the file alone does not do it); until
 *     then a crash may undo each such change by itself, but never half of one;
 *   - the size of a file is durable with its bytes;
 *   - after ->sync has failed once nothing is known of the unsynced bytes: the
 *     caller must never retry it (see the fsync discussion in PostgreSQL's
 *     "fsyncgate" of 2018).
 *
 * All functions return 0 or a negative errno.  All may be called by several
 * threads at once.  Offsets and sizes are bytes.
 */
#ifndef VR_IO_H
#define VR_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct vr_io;   /* an environment: real (one per process) or simulated */
struct vr_file; /* an open file; owned by who opened it */

enum {
  VR_OPEN_READ_ONLY = 1, /* else read and write */
  VR_OPEN_CREATE = 2,    /* create; fails with -EEXIST if the name is taken */
  VR_OPEN_DIRECT = 4,    /* bypass the page cache where the file system can.
                            The caller keeps buffers, offsets and sizes
                            multiples of 4096; where direct I/O is refused
                            the open falls back to buffered. */
};

/* One element of a batch: iov_count buffers written at offset. */
struct vr_io_write {
  const struct iovec *iov;
  int iov_count;
  uint64_t offset;
};

/* Who holds a lock that we could not take; pid 0 if unknown. */
struct vr_lock_owner {
  int pid;
};

struct vr_io_ops {
  /* Open path.  Directories give -EISDIR, anything but a regular file or a
     block device -EINVAL. */
  int (*open) (struct vr_io *io, const char *path, int flags,
               struct vr_file **ret_file);
  void (*close) (struct vr_file *f);

  /* Size in bytes, of a block device too. */
  int (*size) (struct vr_file *f, uint64_t *ret_size);

  /* Cut or grow a regular file; what is new reads as zeros. */
  int (*truncate) (struct vr_file *f, uint64_t size);

  /* Read exactly n bytes; a range that passes the end gives -ENODATA. */
  int (*read) (struct vr_file *f, void *buf, size_t n, uint64_t offset);

  /* Write all bytes of the vector, or fail.  After a failure any part may
     have been written. */
  int (*writev) (struct vr_file *f, const struct iovec *iov, int iov_count,
                 uint64_t offset);

  /* Write n elements in any order, all of them or fail.  Elements do not
     overlap.  After a failure any part may have been written, but nothing is
     still under way: the buffers are the caller's again.  The real
     implementation chooses between io_uring and plain calls by what was
     measured to be cheaper. */
  int (*write_batch) (struct vr_file *f, const struct vr_io_write *w,
                      size_t n);

  /* Make the range read as zeros; may_deallocate allows a hole.  A regular
     file grows if the range passes its end. */
  int (*zero) (struct vr_file *f, uint64_t offset, uint64_t length,
               bool may_deallocate);

  /* fdatasync: all completed writes of this file become durable. */
  int (*sync) (struct vr_file *f);

  /* A hint: start writing the range out now, do not wait.  Promises
     nothing. */
  void (*start_writeback) (struct vr_file *f, uint64_t offset,
                           uint64_t length);

  /* A hint: read the range into the page cache. */
  int (*prefetch) (struct vr_file *f, uint64_t offset, uint64_t length);

  /* The first run of possibly non-zero bytes at or after offset, [start, end);
     start == end == size if there is none.  A file that cannot tell is all
     data. */
  int (*next_data) (struct vr_file *f, uint64_t offset, uint64_t *ret_start,
                    uint64_t *ret_end);

  /* Exclusive advisory lock over the whole file, held until close or death;
     a forked child that has the file open holds it too.  Waits a little for
     what a dead process still has in the kernel.  -EAGAIN and
     *ret_owner if another open file holds it, of this process or another.
     -EBADF for a file opened read-only. */
  int (*lock) (struct vr_file *f, struct vr_lock_owner *ret_owner);

  /* Rename a file within one directory, replacing a file named `to`. */
  int (*rename) (struct vr_io *io, const char *from, const char *to);
  int (*unlink) (struct vr_io *io, const char *path);
  int (*mkdir) (struct vr_io *io, const char *path); /* 0 if it exists */
  int (*sync_dir) (struct vr_io *io, const char *path);

  /* CLOCK_BOOTTIME and CLOCK_REALTIME in nanoseconds. */
  uint64_t (*now_ns) (struct vr_io *io);
  uint64_t (*realtime_ns) (struct vr_io *io);

  int (*random) (struct vr_io *io, void *buf, size_t n);
};

/* Implementations put this first in their own struct. */
struct vr_io {
  const struct vr_io_ops *ops;
};

struct vr_file {
  struct vr_io *io;
};

/* Short forms for callers: vr_read (f, …) is f->io->ops->read (f, …). */
static inline void
vr_close (struct vr_file *f)
{
  if (f)
    f->io->ops->close (f);
}

static inline int
vr_read (struct vr_file *f, void *buf, size_t n, uint64_t offset)
{
  return f->io->ops->read (f, buf, n, offset);
}

static inline int
vr_writev (struct vr_file *f, const struct iovec *iov, int iov_count,
           uint64_t offset)
{
  return f->io->ops->writev (f, iov, iov_count, offset);
}

static inline int
vr_write (struct vr_file *f, const void *buf, size_t n, uint64_t offset)
{
  struct iovec iov = { .iov_base = (void *) buf, .iov_len = n };
  return f->io->ops->writev (f, &iov, 1, offset);
}

static inline int
vr_sync (struct vr_file *f)
{
  return f->io->ops->sync (f);
}

static inline uint64_t
vr_now_ns (struct vr_io *io)
{
  return io->ops->now_ns (io);
}

/* ---- The real one (io_real.c) ------------------------------------------- */

/* Never fails; the environment lives as long as the process. */
struct vr_io *vr_io_real (void);

/* ---- The simulated one (io_sim.c) --------------------------------------- */

/* What may become of an unsynced sector at a crash, chances in 1/256; the
   rest is kept.  Garbage stays within the bytes written: neighbours in the
   same sector are safe (SQLite calls this powersafe overwrite).  Unsynced
   sizes and name changes are undone with the chance of drop. */
struct vr_sim_crash {
  unsigned drop;    /* the old bytes are back */
  unsigned garbage; /* random bytes */
  bool torn;        /* decide per sector; else per write */
};

/* A new empty in-memory file system (just "/" and ".") with its own clock
   (starts at 1 s) and all randomness drawn from seed: one thread gets the
   same bytes and fates each time.  NULL when out of memory; later on running
   out aborts.  Files end at 16 TiB (-EFBIG), a rename leaving its directory
   gives -EXDEV, and VR_OPEN_DIRECT insists on alignment (-EINVAL). */
struct vr_io *vr_io_sim_new (uint64_t seed);

/* Files still open are freed with it. */
void vr_io_sim_free (struct vr_io *io);

/* Power off and on: open files stay allocated but every call on them gives
   -ESHUTDOWN until closed; locks are gone; unsynced bytes, sizes and names
   become what crash and the seed say.  Ends a death by vr_io_sim_die_at.
   Faults, space limit and clock stay as they are. */
void vr_io_sim_crash (struct vr_io *io, const struct vr_sim_crash *crash);

/* Only the process dies: as above, but what was written stays, and is still
   unsynced. */
void vr_io_sim_kill (struct vr_io *io);

/* Advance the clock. */
void vr_io_sim_sleep (struct vr_io *io, uint64_t ns);

/* The n-th call from now (1 is the next) of the ops named in mask gives err
   (negative errno); afterwards all further ones too if sticky.  n == 0
   clears; one rule at a time.  A failed write may have written a part.  A
   failed ->sync loses the unsynced bytes, as Linux may: reads show new or old
   ones, page by page, a later ->sync says 0, and a crash brings the old
   ones back. */
enum {
  VR_SIM_OPEN = 1,  /* open, lock */
  VR_SIM_READ = 2,  /* read, size, next_data, prefetch */
  VR_SIM_WRITE = 4, /* writev, write_batch, zero */
  VR_SIM_SYNC = 8,
  VR_SIM_NAME = 16, /* rename, unlink, mkdir, sync_dir, truncate */
  VR_SIM_ALL = 31,
};
void vr_io_sim_fail (struct vr_io *io, unsigned mask, uint64_t n, int err,
                     bool sticky);

/* Limit the sum of all file sizes; growing past it gives -ENOSPC and changes
   nothing (of a batch: earlier elements are written).  0: none. */
void vr_io_sim_set_space (struct vr_io *io, uint64_t bytes);

/* Counts calls that change state since creation, failed ones included: write,
   zero, truncate, sync, creating open and all of VR_SIM_NAME.  These are the
   crash points of a run. */
uint64_t vr_io_sim_steps (struct vr_io *io);

/* Step n (1 is the first since creation) and every operation after it give
   -ESHUTDOWN and change nothing: the machine died there.  vr_io_sim_crash
   brings it up, or vr_io_sim_kill if it shall be the process alone that
   died.  0 clears. */
void vr_io_sim_die_at (struct vr_io *io, uint64_t step);

/* Flip the bits of mask in one stored byte, behind everybody's back: on the
   platter, in the cache and in unsynced writes. */
int vr_io_sim_flip (struct vr_io *io, const char *path, uint64_t offset,
                    uint8_t mask);

#endif /* VR_IO_H */
