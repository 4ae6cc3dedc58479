/* SPDX-License-Identifier: BSD-3-Clause */
/* One log in one journal file: append, sync, seal, commit, read back, recycle.
 *
 * Positions, all LSNs, in the order in which the log keeps them:
 *
 *   tail <= applied <= committed <= durable <= written <= complete <= head
 *
 *   head       end of the last reserved record
 *   complete   everything before it is filled in (no writer in flight)
 *   written    in the file, perhaps only in the page cache or the drive's
 *   durable    survives power loss
 *   committed  behind the seal of the last committed epoch
 *   applied    the base image holds everything before it (image.h moves it)
 *   tail       the base image holds it durably; slots before it are free
 *
 * A primary appends with vr_log_reserve / vr_log_publish; reserving takes the
 * epoch from the shared counter under the log's mutex, and seals the old
 * epoch in the log when the counter moved on.  A backup appends the very
 * bytes the primary sent with vr_log_append_raw.
 *
 * Recent segments stay in memory (at most cache_segments of them, plus those
 * somebody holds a reference to), so that shipping, applying and reading
 * usually cost no I/O.
 *
 * Threads: every function may be called by any thread unless it says
 * otherwise.  The library has no threads of its own; whoever calls vr_log_sync
 * first syncs for all that wait (group commit).
 *
 * Errors: 0 or negative errno.  After a failed write or sync of the journal
 * the log is dead: every later append, sync and commit returns that error; it
 * is never retried (what the page cache then holds is unknown).
 */
#ifndef VR_LOG_H
#define VR_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "epoch.h"
#include "format.h"
#include "io.h"

struct vr_log;

/* A segment in memory.  data is segment_size bytes, aligned for direct I/O.
   Holders of a reference may read what they know to be complete. */
struct vr_segbuf {
  uint64_t number; /* LSN / segment_size */
  uint8_t *data;
  uint64_t used;   /* LSN: end of what is reserved in it (log's mutex) */
  unsigned refs;   /* log's mutex */
  bool cached;     /* log's mutex */
};

/* A position with its chain value: where a scan can begin. */
struct vr_mark {
  uint64_t lsn;
  uint64_t chain;
};

/* ---- Create, open, close ------------------------------------------------ */

struct vr_log_config {
  const char *vm;   /* names, see vr_name_ok */
  const char *disk;
  uint8_t vm_id[16];
  uint8_t log_id[16]; /* all zeros: draw a random one */
  uint64_t disk_size;
  uint64_t segment_size;
  uint64_t segment_count;
  struct vr_mark start; /* where the log begins: start of a segment, and
                           the chain value it links to (0: none) */
  uint64_t generation;
  uint64_t epoch_limit; /* first epoch that may be opened; > 0 */
  uint32_t flags;       /* VR_LOG_… */
};

/* Choose the segment size for a journal of size bytes; -EINVAL if size is
   too small (VR_JOURNAL_MIN) or too large. */
#define VR_JOURNAL_MIN (UINT64_C (8) << 20)
#define VR_JOURNAL_MAX (UINT64_C (1) << 40)
int vr_log_geometry (uint64_t size, uint64_t *ret_segment_size,
                     uint64_t *ret_segment_count);

/* Write a new journal file under a temporary name (every block is written
 * once, so that later syncs change no metadata), make it durable and rename
 * it to path.  -EEXIST if path exists; -ENOSPC leaves nothing behind. */
int vr_log_create (struct vr_io *io, const char *path,
                   const struct vr_log_config *config);

/* Where and why a journal was refused. */
struct vr_log_problem {
  uint64_t file_offset;
  char text[160];
};

struct vr_log_open_options {
  unsigned cache_segments;  /* >= 2 */
  bool direct;              /* direct I/O for the journal */
  bool read_only;           /* inspect: no lock, nothing is written */
  bool no_lock;             /* caller has locked otherwise */
};

/* Open and recover.  Takes the file's lock.  Errors:
 *   -EBADMSG   no valid superblock        -EPROTO   a newer format
 *   -EUCLEAN   committed data is damaged  (both fill in *problem)
 *   -EAGAIN    locked; *owner tells by whom
 * A torn tail is not an error: it is cut off.  Nothing is written. */
int vr_log_open (struct vr_io *io, const char *path,
                 const struct vr_log_open_options *options,
                 struct vr_log **ret, struct vr_log_problem *problem,
                 struct vr_lock_owner *owner);

/* Does not sync.  No other call may be running. */
void vr_log_close (struct vr_log *log);

/* Primary, before the first reserve: the epochs from epoch_limit on are ours
 * to open; appended records take their epoch from *epoch (borrowed) and carry
 * the superblock's generation.  Starts a new segment, so that no block
 * written before the crash is written again. */
int vr_log_start_primary (struct vr_log *log, struct vr_epoch *epoch);

/* ---- What is where ------------------------------------------------------ */

struct vr_log_info {
  struct vr_super super; /* as it would be written now */
  uint64_t head, complete, written, durable, committed, applied, tail;
  uint64_t head_chain;
  uint64_t committed_epoch;
  uint64_t sealed_epoch; /* last seal in the log, 0 if none */
  uint64_t sealed_lsn;   /* behind it */
  uint64_t open_epoch;   /* primary: epoch of the next record */
  uint64_t capacity;     /* bytes the journal can hold */
  uint64_t used;         /* bytes from tail to head */
  uint64_t uncommitted;  /* seals in the log that are not committed */
  int failed;            /* the error that killed the log, or 0 */
};

void vr_log_info (struct vr_log *log, struct vr_log_info *ret);
uint64_t vr_log_head (struct vr_log *log);
uint64_t vr_log_durable (struct vr_log *log);
const char *vr_log_path (struct vr_log *log);
struct vr_io *vr_log_io (struct vr_log *log);

/* ---- Append: primary ---------------------------------------------------- */

/* A place in the log.  Lives with the caller from reserve to publish. */
struct vr_reservation {
  uint64_t lsn;         /* of the record's header */
  uint64_t payload_lsn; /* of its payload */
  uint64_t end;         /* behind the record */
  uint64_t epoch;
  uint32_t length;      /* payload bytes of the request this record took */
  struct vr_segbuf *segment; /* private, as the rest */
  struct vr_reservation *next, *prev;
};

/* Reserve a record for the first part of [offset, offset+length): all of it,
 * or for VR_WRITE as much as fits a record here (r->length tells; call again
 * for the rest).  The payload is copied in.  The caller then makes the write
 * visible to readers and calls vr_log_publish; until then no seal behind it
 * becomes durable, is shipped or committed.
 *
 * -EAGAIN: the journal is full; vr_log_wait_space, or apply, then retry. */
int vr_log_reserve (struct vr_log *log, enum vr_kind kind, unsigned flags,
                    uint64_t offset, uint64_t length, const void *payload,
                    struct vr_reservation *r);
void vr_log_publish (struct vr_log *log, struct vr_reservation *r);

/* Wait until space was freed since the failed reserve, the log died or
   timeout_ns passed. */
void vr_log_wait_space (struct vr_log *log, uint64_t timeout_ns);

/* If the shared counter is beyond the log's open epoch, append the seal for
 * all epochs before it, padded to a sync boundary.  *ret_lsn is the LSN behind
 * the newest seal that waits for a sync, whoever put it there (a write that
 * came first may have); 0 if none.  -EAGAIN if the journal is full and
 * nothing waits. */
int vr_log_seal (struct vr_log *log, uint64_t *ret_lsn);

/* Have the next record be the first of a segment; *ret is the segment's
   start.  For a backup whose log is to begin there.  -EAGAIN as above. */
int vr_log_new_segment (struct vr_log *log, struct vr_mark *ret);

/* ---- Append: backup ----------------------------------------------------- */

/* What a batch of log bytes contained. */
struct vr_raw_result {
  uint64_t sealed_epoch; /* last seal in it, 0 if none */
  uint64_t sealed_lsn;   /* behind that seal and its padding */
  uint64_t records;
};

/* Check n bytes of log at lsn, whole records within one segment, perhaps with
 * the segment's header in front, and append them.  One caller at a time, in
 * LSN order.  All of it or nothing:
 *   -EBADMSG  a record is not valid here (*ret_reason says why)
 *   -ERANGE   lsn is not where the log ends
 *   -EAGAIN   the journal is full */
int vr_log_append_raw (struct vr_log *log, uint64_t lsn, const void *buf,
                       size_t n, uint64_t generation,
                       struct vr_raw_result *ret, const char **ret_reason);

/* Do these n bytes, said to be log at lsn, come next?  At head; or at the
   start of the next segment if its header links to head. */
bool vr_log_expects (struct vr_log *log, uint64_t lsn, const void *buf,
                     size_t n);

/* Forget everything behind lsn, which must be in [committed, head] and at a
 * record's end with chain value chain (-ERANGE, -ESTALE if not).  Nothing is
 * erased in the file: the chain makes the old bytes invalid once written
 * over, and *chain* refuses them until then. */
int vr_log_truncate (struct vr_log *log, uint64_t lsn, uint64_t chain);

/* ---- Sync and commit ---------------------------------------------------- */

/* Make everything before lsn durable, with everybody else's.  -ESTALE: a
   truncation took it away meanwhile. */
int vr_log_sync (struct vr_log *log, uint64_t lsn);

/* Write complete blocks to the file without waiting for durability, if at
   least min_bytes are unwritten. */
int vr_log_write_out (struct vr_log *log, uint64_t min_bytes);

/* Epochs <= epoch are committed: move the commit point to the last seal <=
 * epoch, which must be durable.  The superblock follows with the next sync.
 * Never goes back. */
int vr_log_commit (struct vr_log *log, uint64_t epoch);

/* The seals not yet committed, oldest first: the first one at or behind lsn.
   False if none. */
struct vr_seal {
  uint64_t epoch;
  uint64_t start; /* of the seal record */
  uint64_t lsn;   /* behind seal and padding */
  uint64_t chain; /* there */
  uint64_t time;  /* CLOCK_REALTIME ns of the cut, as recorded */
  uint64_t since; /* vr_now_ns when it went into this log; 0 if before it was
                     opened */
};
bool vr_log_next_seal (struct vr_log *log, uint64_t lsn, struct vr_seal *ret);

/* The last seal whose end is durable; false if none uncommitted is. */
bool vr_log_last_durable_seal (struct vr_log *log, struct vr_seal *ret);

/* Write the superblock now with these flags set and cleared, and sync. */
int vr_log_set_flags (struct vr_log *log, uint32_t set, uint32_t clear);
int vr_log_set_generation (struct vr_log *log, uint64_t generation);

/* ---- Read back ---------------------------------------------------------- */

/* Called for each record of a scan, seals and pads too.  payload points into
   a segment in memory, valid during the call.  Non-zero ends the scan. */
typedef int (*vr_log_record_fn) (void *opaque, const struct vr_record *r,
                                 const uint8_t *payload);

/* Visit the records in [from, to) in order.  to must be at a record's end
 * (complete, committed, …).  Stops early at a record's end once more than
 * max_bytes were visited (0: no limit).  *end (may be NULL) is where it
 * stopped.  Segments not in memory are read from the file and checked again:
 * -EUCLEAN if they have gone bad.  The segments visited stay in memory until
 * vr_log_scan_release on the same *held (NULL: they need not). */
struct vr_scan_held {
  struct vr_segbuf **segment;
  size_t count, allocated;
};
int vr_log_scan (struct vr_log *log, const struct vr_mark *from, uint64_t to,
                 uint64_t max_bytes, vr_log_record_fn fn, void *opaque,
                 struct vr_scan_held *held, struct vr_mark *end);
void vr_log_scan_release (struct vr_log *log, struct vr_scan_held *held);

/* Copy n payload bytes at lsn, from memory or file.  The caller keeps the
   place from being recycled. */
int vr_log_read (struct vr_log *log, uint64_t lsn, void *buf, size_t n);

/* The chain value at lsn; -ERANGE if lsn is not in [tail, complete], -ESTALE
   if it is not a record's end. */
int vr_log_chain_at (struct vr_log *log, uint64_t lsn, uint64_t *ret_chain);

/* The start of the log kept: applied as of the last checkpoint. */
void vr_log_tail_mark (struct vr_log *log, struct vr_mark *ret);
void vr_log_applied_mark (struct vr_log *log, struct vr_mark *ret);
void vr_log_committed_mark (struct vr_log *log, struct vr_mark *ret);

/* The start of the first segment kept.  A log that begins there holds all that
   the base image may lack, and perhaps some that it has. */
int vr_log_first_segment (struct vr_log *log, struct vr_mark *ret);

/* Reference to the segment that holds lsn if it is in memory, else NULL. */
struct vr_segbuf *vr_log_get_segment (struct vr_log *log, uint64_t lsn);
void vr_log_put_segment (struct vr_log *log, struct vr_segbuf *s);

/* A batch for the wire: whole records at lsn, at most VR_SHIP_MAX bytes, in
 * one segment, with the segment's header when it starts one.  A seal is
 * included only when it is durable here, and always with its padding.  size
 * 0: nothing to ship now.  The segment is referenced for the reader of data,
 * who puts it back (vr_log_put_segment) when the bytes were sent. */
struct vr_ship_batch {
  uint64_t lsn;
  const uint8_t *data;
  uint64_t size;
  uint64_t sealed_epoch; /* last seal in it, 0 if none */
  struct vr_segbuf *segment;
};

/* Where a shipper is.  Start with the mark to begin at, the rest 0. */
struct vr_ship_cursor {
  struct vr_mark at;
  struct vr_segbuf *segment; /* private */
  bool from_file;
};

int vr_log_ship_batch (struct vr_log *log, struct vr_ship_cursor *cursor,
                       struct vr_ship_batch *ret);
void vr_log_ship_cursor_end (struct vr_log *log,
                             struct vr_ship_cursor *cursor);

/* ---- Apply's side (image.c) --------------------------------------------- */

/* The commit point that the superblock durably records: what is to be applied.
 * If it is not beyond this LSN, and could be, it is brought up to date first.
 * Were the image ahead of it, damage to the log above it, which recovery takes
 * for a torn tail, would leave an image of no epoch. */
int vr_log_recorded_commit (struct vr_log *log, uint64_t beyond,
                            uint64_t *ret_lsn);

/* The base image holds everything before *mark, not yet durably. */
void vr_log_set_applied (struct vr_log *log, const struct vr_mark *mark,
                         uint64_t epoch);

/* The base image was synced when applied was at *mark: record that durably
   and free the slots before it. */
int vr_log_recycle (struct vr_log *log, const struct vr_mark *mark,
                    uint64_t epoch);

#endif /* VR_LOG_H */
