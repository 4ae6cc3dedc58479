/* SPDX-License-Identifier: BSD-3-Clause */
/* What the files of the log share; see log.h for what the log is.
 *
 *   log.c          state, segments in memory, append
 *   log_sync.c     write out, sync, commit, recycle
 *   log_open.c     create, recover
 *   log_read.c     walk, scan, read, ship
 */
#ifndef VR_LOG_INTERNAL_H
#define VR_LOG_INTERNAL_H

#include <pthread.h>

#include "log.h"

#define VR_LOG_SPARES 4

struct vr_log {
  struct vr_io *io;
  struct vr_file *file;
  char *path;
  bool read_only;
  uint64_t segment_size;
  uint64_t segment_count;

  /* Everything below is guarded by mutex, except that the holder of
     writer_busy alone moves written and durable. */
  pthread_mutex_t mutex;
  pthread_cond_t changed; /* published, synced, freed, failed */
  int failed;

  /* Append. */
  struct vr_epoch *epoch; /* NULL: not a primary */
  uint64_t open_epoch;    /* of the last record; later ones are not older */
  uint64_t sealed_epoch;
  uint64_t sealed_lsn;
  uint64_t epoch_bytes; /* payload since the last seal */
  uint64_t head;
  uint64_t head_chain;
  bool force_new_segment;
  struct vr_segbuf *tip; /* the segment head is in; NULL at a boundary */
  struct vr_reservation *first_inflight, *last_inflight;

  /* Sync. */
  bool writer_busy; /* somebody writes out or syncs */
  uint64_t sync_wanted;
  uint64_t written;
  uint64_t durable;

  /* Superblock as it would be written now.  version counts changes. */
  struct vr_super super;
  uint64_t super_version;
  uint64_t super_synced;
  uint64_t super_wanted; /* somebody waits for this version */
  uint64_t super_written_ns;
  uint64_t recorded; /* the durable superblock's committed_lsn */

  /* Seals behind the commit point, oldest first. */
  struct vr_seal *seals;
  size_t seal_count, seal_allocated;

  /* Apply. */
  struct vr_mark applied;
  uint64_t applied_epoch;
  struct vr_mark tail;
  uint64_t freed; /* counts recycles, for vr_log_wait_space */

  /* Segments in memory. */
  unsigned cache_slots;
  struct vr_segbuf **cache; /* [number % cache_slots] */
  struct vr_segbuf *spare[VR_LOG_SPARES]; /* kept for reuse: fresh memory
                                             costs a page fault per page */
  unsigned spares;
};

static inline uint64_t
segment_number (const struct vr_log *log, uint64_t lsn)
{
  return lsn / log->segment_size;
}

static inline uint64_t
segment_start (const struct vr_log *log, uint64_t lsn)
{
  return lsn & ~(log->segment_size - 1);
}

static inline uint64_t
align_down (uint64_t n, uint64_t to)
{
  return n & ~(to - 1);
}

static inline uint64_t
align_up (uint64_t n, uint64_t to)
{
  return (n + to - 1) & ~(to - 1);
}

/* Where segment number n lies in the file. */
static inline uint64_t
slot_offset (const struct vr_log *log, uint64_t n)
{
  return VR_DATA_START + (n % log->segment_count) * log->segment_size;
}

static inline uint64_t
complete_lsn (const struct vr_log *log)
{
  return log->first_inflight ? log->first_inflight->lsn : log->head;
}

/* The log is dead: remember the first error and wake everybody.  Mutex held.
   Returns the error. */
int vr_log_fail_locked (struct vr_log *log, int err);

/* Segments in memory; mutex held. */
struct vr_segbuf *vr_segbuf_new (struct vr_log *log, uint64_t number);
void vr_segbuf_put_locked (struct vr_log *log, struct vr_segbuf *s);
struct vr_segbuf *vr_segbuf_get_locked (struct vr_log *log, uint64_t number);
/* Put s into the cache.  -EINPROGRESS if the one it replaces is not yet
   written out. */
int vr_segbuf_cache_locked (struct vr_log *log, struct vr_segbuf *s);

/* Append a pad record up to the next sync boundary, if head is not at one.
   Mutex held. */
void vr_log_pad_locked (struct vr_log *log);

/* Remember a seal that is in the log.  Mutex held.  -ENOMEM. */
int vr_log_push_seal_locked (struct vr_log *log, const struct vr_seal *s);

/* Wait until the changes of the superblock up to version are durable. */
int vr_log_sync_super (struct vr_log *log, uint64_t version);

/* ---- Walking (log_read.c) ----------------------------------------------- */

struct vr_walk {
  struct vr_log *log;
  struct vr_mark at;     /* the next record's place */
  struct vr_segbuf *seg; /* the segment of the last record; referenced */
  bool from_file;        /* it was read back, so payloads are checked */
  const char *problem;   /* why the walk ended here */
};

/* The next record at w->at, which moves behind it.  1: *r and *payload are
 * set, valid until the next step; 0: no valid record (w->problem); else a
 * negative errno of reading.  limit: nothing at or behind it is looked at.
 * Crosses into the next segment when it links to this place. */
int vr_walk_step (struct vr_walk *w, uint64_t limit,
                  const struct vr_record **r, const uint8_t **payload);
void vr_walk_end (struct vr_walk *w);

/* Read segment number n from the file into a new buffer; 0 and *ret with one
   reference, or negative errno. */
int vr_segbuf_load (struct vr_log *log, uint64_t number,
                    struct vr_segbuf **ret);

#endif /* VR_LOG_INTERNAL_H */
